"""The server's long-term Ed25519 identity, the pin by which clients know it, and its rotation.

Formats: docs/reference/secure-channel.md, "Identity and pin" and "Rotation of the identity".
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from nearfar.errors import ConfigError, SecurityError
from nearfar.secure.ed25519 import (
    PUBLIC_KEY_BYTES,
    SIGNATURE_BYTES,
    PrivateKeyFile,
    PublicKeyText,
    encode_text,
)
from nearfar.secure.encoding import sized

__all__ = [
    "COSIGNED_SIGNATURE_BYTES",
    "PUBLIC_KEY_BYTES",
    "SIGNATURE_BYTES",
    "Pin",
    "RotationStatement",
    "ServerIdentity",
    "cosigning_key",
]

#: FIPS 204, table 2.
_MLDSA_KEY_BYTES = 1952
_MLDSA_SIGNATURE_BYTES = 3309
#: Ed25519 signature, ML-DSA-65 public key, ML-DSA-65 signature.
COSIGNED_SIGNATURE_BYTES = SIGNATURE_BYTES + _MLDSA_KEY_BYTES + _MLDSA_SIGNATURE_BYTES

_HASH_BYTES = 32
_COSIGNER_INFO = b"nearfar/1 co-signing key"

#: How long clients go on trusting the old identity after a rotation, unless told otherwise.
DEFAULT_OVERLAP_S = 30 * 24 * 3600
#: Shorter leaves no time to hand a statement out.
MIN_OVERLAP_S = 24 * 3600
MAX_OVERLAP_S = 366 * 24 * 3600

_ROTATION_HEADER = "nearfar-rotation 1"
_ROTATION_PURPOSE = b"nearfar/1 identity rotation\x00"


@dataclass(frozen=True, slots=True)
class Pin(PublicKeyText):
    """A server's public key as people copy it: ``nf1:`` and 58 characters of base32.

    An identity that co-signs with ML-DSA-65 has ``nf2:`` and 109 characters.

    Attributes:
        cosigner_hash: SHA-256 of the ML-DSA-65 public key that must have signed, too; empty when
            Ed25519 is enough.
    """

    PREFIX = "nf1:"
    COSIGNED_PREFIX = "nf2:"
    PREFIXES = (PREFIX, COSIGNED_PREFIX)
    SUBJECT = "The server identity"
    NOUN = "a pin"
    FIELD = "identity"
    COPY_AGAIN = "Copy the pin again from the server: `nearfar cloud identity show`"

    cosigner_hash: bytes = b""

    # `super()` does not work in a dataclass with slots, which is made anew from this one.
    def __post_init__(self) -> None:
        PublicKeyText.__post_init__(self)
        if len(self.cosigner_hash) not in (0, _HASH_BYTES):
            raise ConfigError(
                f"The hash of a co-signing key is {_HASH_BYTES} bytes long, "
                f"not {len(self.cosigner_hash)}",
                field="identity",
            )

    @classmethod
    def parse(cls, text: str) -> Pin:
        compact = text.strip().lower()
        if compact.startswith(cls.COSIGNED_PREFIX):
            raw = cls._decode(compact, cls.COSIGNED_PREFIX, PUBLIC_KEY_BYTES + _HASH_BYTES)
            return cls(raw[:PUBLIC_KEY_BYTES], raw[PUBLIC_KEY_BYTES:])
        return cls(cls._decode(compact, cls.PREFIX, PUBLIC_KEY_BYTES))

    def __str__(self) -> str:
        return encode_text(self.COSIGNED_PREFIX if self.cosigner_hash else self.PREFIX, self.raw)

    @property
    def raw(self) -> bytes:
        """What the text encodes: 32 bytes, or 64 with a co-signer."""
        return self.public_key + self.cosigner_hash

    def accepts(self, presented: Pin) -> bool:
        """Whether a server that presents itself so is the pinned one, if its signatures hold."""
        return self.public_key == presented.public_key and self.cosigner_hash in (
            b"",
            presented.cosigner_hash,
        )

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether this identity signed the message; a co-signature that is not pinned is ignored.

        Raises:
            SecurityError: The installed ``cryptography`` has no ML-DSA, and the pin demands it.
        """
        if len(signature) not in (SIGNATURE_BYTES, COSIGNED_SIGNATURE_BYTES):
            return False
        if not PublicKeyText.verifies(self, signature[:SIGNATURE_BYTES], message):
            return False
        if not self.cosigner_hash:
            return True
        key_bytes = cosigning_key(signature)
        if hashlib.sha256(key_bytes).digest() != self.cosigner_hash:
            return False
        try:
            key = _mldsa().MLDSA65PublicKey.from_public_bytes(key_bytes)
            key.verify(signature[SIGNATURE_BYTES + _MLDSA_KEY_BYTES :], message)
        except UnsupportedAlgorithm as exc:
            raise _no_mldsa() from exc
        except (InvalidSignature, ValueError):
            return False
        return True


def cosigning_key(signature: bytes) -> bytes:
    """The ML-DSA-65 public key inside an identity's signature; empty when it is not co-signed."""
    return signature[SIGNATURE_BYTES : SIGNATURE_BYTES + _MLDSA_KEY_BYTES]


def _mldsa() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import mldsa
    except ImportError as exc:
        raise _no_mldsa() from exc
    return mldsa


def _no_mldsa() -> SecurityError:
    return SecurityError(
        "The installed cryptography package has no ML-DSA-65, which this identity demands",
        fix="Update it: pip install -U cryptography",
    )


class ServerIdentity(PrivateKeyFile):
    """The private half; kept by the server only.

    Args:
        seed: 32 random bytes (RFC 8032 private key).
        cosigns: Whether to sign with ML-DSA-65 as well. Its key comes from the same seed, by HKDF:
            who breaks Ed25519 learns the key that the seed was hashed to, and not the seed.

    Raises:
        SecurityError: The installed ``cryptography`` has no ML-DSA.
    """

    __slots__ = ("_cosigner", "pin")

    HEADER = "nearfar-identity 1"
    LINE = "pin"
    NOUN = "identity"
    FIELD = "identity"
    HOW_TO_MAKE = "Make one with `nearfar cloud init` or `nearfar cloud identity new`"
    POINT_TO = "Point to the identity.key that `nearfar cloud init` wrote"
    AFTER_LOSS = "Restore it from a backup, or make a new identity and send clients its pin"
    BEFORE_REPLACING = "Move it away first; clients that pinned it stop trusting this server"

    #: What clients pin.
    pin: Pin

    def __init__(self, seed: bytes, *, cosigns: bool = False) -> None:
        super().__init__(seed)
        self._cosigner: Any = None
        if not cosigns:
            self.pin = Pin(self._public_bytes())
            return
        derived = HKDF(hashes.SHA256(), 32, None, _COSIGNER_INFO).derive(seed)
        try:
            self._cosigner = _mldsa().MLDSA65PrivateKey.from_seed_bytes(derived)
        except UnsupportedAlgorithm as exc:
            raise _no_mldsa() from exc
        key_hash = hashlib.sha256(self._cosigner.public_key().public_bytes_raw()).digest()
        self.pin = Pin(self._public_bytes(), key_hash)

    @classmethod
    def generate(cls, *, cosigns: bool = False) -> ServerIdentity:
        return cls(os.urandom(32), cosigns=cosigns)

    @classmethod
    def _of(cls, seed: bytes, public_text: str) -> ServerIdentity:
        return cls(seed, cosigns=public_text.startswith(Pin.COSIGNED_PREFIX))

    def sign(self, message: bytes) -> bytes:
        """Signature of 64 bytes, or of 5325 when this identity co-signs.

        Callers put a purpose in front of what they sign.
        """
        signature = super().sign(message)
        if self._cosigner is None:
            return signature
        key: bytes = self._cosigner.public_key().public_bytes_raw()
        return signature + key + bytes(self._cosigner.sign(message))

    def _public_text(self) -> str:
        return str(self.pin)


@dataclass(frozen=True, slots=True, kw_only=True)
class RotationStatement:
    """An identity's word that another one follows it, with which clients move their trust.

    Both identities sign: the old one hands over, the new one shows that it exists.

    Attributes:
        old: The identity that clients trust until now.
        new: The one that follows.
        issued_s: Unix time of the statement.
        until_s: Unix time from which `old` is no longer to be trusted.
        old_signature: By `old`.
        new_signature: By `new`.
    """

    old: Pin
    new: Pin
    issued_s: int
    until_s: int
    old_signature: bytes
    new_signature: bytes

    @classmethod
    def issue(
        cls,
        old: ServerIdentity,
        new: ServerIdentity,
        *,
        now_s: float,
        overlap_s: int = DEFAULT_OVERLAP_S,
    ) -> RotationStatement:
        """State that `new` follows `old`.

        Raises:
            ConfigError: The overlap is out of range.
        """
        if not MIN_OVERLAP_S <= overlap_s <= MAX_OVERLAP_S:
            raise ConfigError(
                f"An overlap of {overlap_s} s is out of range",
                field="overlap",
                fix=f"Choose 1 to {MAX_OVERLAP_S // 86400} days",
            )
        issued_s = int(now_s)
        signed = _rotation_bytes(old.pin, new.pin, issued_s, issued_s + overlap_s)
        return cls(
            old=old.pin,
            new=new.pin,
            issued_s=issued_s,
            until_s=issued_s + overlap_s,
            old_signature=old.sign(signed),
            new_signature=new.sign(signed),
        )

    def text(self) -> str:
        """The statement as a file."""
        return (
            f"{_ROTATION_HEADER}\nold {self.old}\nnew {self.new}\n"
            f"issued {self.issued_s}\nuntil {self.until_s}\n"
            f"old-signature {self.old_signature.hex()}\nnew-signature {self.new_signature.hex()}\n"
        )

    @classmethod
    def parse(cls, text: str) -> RotationStatement:
        """Read a statement and check both signatures.

        Raises:
            ConfigError: The text is not a rotation statement.
            SecurityError: A signature does not hold, or the overlap is out of range.
        """
        names = ("old", "new", "issued", "until", "old-signature", "new-signature")
        try:
            header, *lines = text.splitlines()
            pairs = [line.split(" ") for line in lines]
            if header != _ROTATION_HEADER or tuple(name for name, _ in pairs) != names:
                raise ValueError
            old, new, issued, until, old_signature, new_signature = (value for _, value in pairs)
            if not all(part.isascii() and part.isdigit() for part in (issued, until)):
                raise ValueError
            statement = cls(
                old=Pin.parse(old),
                new=Pin.parse(new),
                issued_s=int(issued),
                until_s=int(until),
                old_signature=bytes.fromhex(old_signature),
                new_signature=bytes.fromhex(new_signature),
            )
        except (ValueError, ConfigError) as exc:
            raise ConfigError(
                f"This is not a nearfar rotation statement of version 1 ({type(exc).__name__})",
                field="statement",
                fix="Give the rotation.txt that `nearfar cloud identity rotate` wrote",
            ) from None
        overlap_s = statement.until_s - statement.issued_s
        if not MIN_OVERLAP_S <= overlap_s <= MAX_OVERLAP_S or statement.issued_s >= 2**40:
            raise SecurityError(
                f"The rotation statement keeps the old identity for {overlap_s} s",
                fix=f"Ask the operator for one of 1 to {MAX_OVERLAP_S // 86400} days",
            )
        signed = _rotation_bytes(
            statement.old, statement.new, statement.issued_s, statement.until_s
        )
        if not (
            statement.old != statement.new
            and statement.old.verifies(statement.old_signature, signed)
            and statement.new.verifies(statement.new_signature, signed)
        ):
            raise SecurityError(
                "The rotation statement is not signed by both identities that it names",
                fix="Get it again from the operator; something altered it on the way",
            )
        return statement


def _rotation_bytes(old: Pin, new: Pin, issued_s: int, until_s: int) -> bytes:
    return b"".join(
        (
            _ROTATION_PURPOSE,
            sized(old.raw),
            sized(new.raw),
            issued_s.to_bytes(8, "big"),
            until_s.to_bytes(8, "big"),
        )
    )
