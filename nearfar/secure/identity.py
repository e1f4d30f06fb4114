"""The server's long-term Ed25519 identity, the pin by which clients know it, and its rotation.

Formats: docs/reference/secure-channel.md, "Identity and pin" and "Rotation of the identity".
"""

from __future__ import annotations

from dataclasses import dataclass

from nearfar.errors import ConfigError, SecurityError
from nearfar.secure.ed25519 import (
    PUBLIC_KEY_BYTES,
    SIGNATURE_BYTES,
    PrivateKeyFile,
    PublicKeyText,
)

__all__ = ["PUBLIC_KEY_BYTES", "SIGNATURE_BYTES", "Pin", "RotationStatement", "ServerIdentity"]

#: How long clients go on trusting the old identity after a rotation, unless told otherwise.
DEFAULT_OVERLAP_S = 30 * 24 * 3600
#: Shorter leaves no time to hand a statement out.
MIN_OVERLAP_S = 24 * 3600
MAX_OVERLAP_S = 366 * 24 * 3600

_ROTATION_HEADER = "nearfar-rotation 1"
_ROTATION_PURPOSE = b"nearfar/1 identity rotation\x00"


class Pin(PublicKeyText):
    """A server's public key as people copy it: ``nf1:`` and 58 characters of base32."""

    __slots__ = ()

    PREFIX = "nf1:"
    SUBJECT = "The server identity"
    NOUN = "a pin"
    FIELD = "identity"
    COPY_AGAIN = "Copy the pin again from the server: `nearfar cloud identity show`"


class ServerIdentity(PrivateKeyFile):
    """The private half; kept by the server only."""

    __slots__ = ("pin",)

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

    def __init__(self, seed: bytes) -> None:
        super().__init__(seed)
        self.pin = Pin(self._public_bytes())

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
            statement.old_signature != statement.new_signature
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
            old.public_key,
            new.public_key,
            issued_s.to_bytes(8, "big"),
            until_s.to_bytes(8, "big"),
        )
    )
