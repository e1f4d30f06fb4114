"""Keys that sign bundles: Ed25519 (RFC 8032), in the PEM files that other tools read too.

The private key is PKCS #8 (RFC 5958), the public one SubjectPublicKeyInfo (RFC 5280), both with the
algorithm of RFC 8410: ``openssl genpkey -algorithm ed25519`` makes the same files.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from nearfar.errors import ConfigError, SecurityError

#: Holds the passphrase of private keys; a command line would show it to other users.
PASSPHRASE_VARIABLE = "NEARFAR_SIGNING_PASSPHRASE"  # noqa: S105 (the name, not the passphrase)

_PREFIX = "ed25519:"
_PUBLIC_KEY_BYTES = 32
_FILE_LIMIT_BYTES = 16 * 1024
_PUBLIC_FIX = "Give the .pub file that `nearfar bundle keygen` wrote, or the text it printed"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key whose signatures are trusted, where it is given as one.

    Attributes:
        raw: The Ed25519 public key, 32 bytes.
    """

    raw: bytes

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Read ``ed25519:`` and the Base64 of the key, as `str` gives it.

        Raises:
            ConfigError: It is not of that form.
        """
        try:
            raw = base64.b64decode(text.strip().removeprefix(_PREFIX), validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if not text.strip().startswith(_PREFIX) or len(raw) != _PUBLIC_KEY_BYTES:
            raise ConfigError(
                f"{text[:60]!r} is not a public key of the form {_PREFIX} and 44 characters",
                field="trusted_keys",
                fix=_PUBLIC_FIX,
            )
        return cls(raw)

    @classmethod
    def load(cls, path: Path | str) -> PublicKey:
        """Read a PEM file.

        Raises:
            ConfigError: Missing, unreadable, or not an Ed25519 public key.
        """
        path = Path(path).expanduser()
        data = _read(path, "Public key", "trusted_keys", _PUBLIC_FIX)
        if b"PRIVATE KEY" in data:
            raise ConfigError(
                f"{path} is a private key, which belongs to who signs only",
                field="trusted_keys",
                fix=_PUBLIC_FIX,
            )
        try:
            key = load_pem_public_key(data)
        except (ValueError, UnsupportedAlgorithm) as exc:
            raise ConfigError(
                f"{path} is not a public key in PEM form", field="trusted_keys", fix=_PUBLIC_FIX
            ) from exc
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigError(
                f"{path} is a key of another kind than Ed25519",
                field="trusted_keys",
                fix=_PUBLIC_FIX,
            )
        return cls(key.public_bytes_raw())

    @property
    def id(self) -> str:
        """Lower-case hexadecimal SHA-256 of the DER SubjectPublicKeyInfo."""
        der = self._key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha256(der).hexdigest()

    def pem(self) -> bytes:
        """The contents of a ``.pub`` file."""
        return self._key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether this key signed the message."""
        try:
            self._key().verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True

    def _key(self) -> Ed25519PublicKey:
        return Ed25519PublicKey.from_public_bytes(self.raw)

    def __str__(self) -> str:
        return _PREFIX + base64.b64encode(self.raw).decode("ascii")


#: A key, its text (``ed25519:…``), or the path of its PEM file.
KeyReference = Union[PublicKey, str, Path]


class SigningKey:
    """The private half. Its text never shows the key."""

    __slots__ = ("_key", "public")

    #: What readers trust.
    public: PublicKey

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key().public_bytes_raw())

    def __repr__(self) -> str:
        return f"SigningKey({self.public})"

    @classmethod
    def generate(cls) -> SigningKey:
        """A fresh key from the operating system's random source."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path | str) -> SigningKey:
        """Read a PEM file, decrypted with `PASSPHRASE_VARIABLE` where it is encrypted.

        Raises:
            ConfigError: Missing, unreadable, not an Ed25519 private key, or passphrase missing.
            SecurityError: Other users can read the file.
        """
        path = Path(path).expanduser()
        fix = "Make a key with `nearfar bundle keygen`"
        data = _read(path, "Signing key", "key", fix)
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise SecurityError(
                f"Signing key {path} is open to other users (mode {mode:04o})",
                fix=f"Run `chmod 600 {path}`; if others may have read it, make a new key",
            )
        try:
            key = load_pem_private_key(data, _passphrase() if b"ENCRYPTED" in data else None)
        except (TypeError, ValueError, UnsupportedAlgorithm) as exc:
            raise ConfigError(
                f"{path} cannot be read as a private key in PEM form ({type(exc).__name__})",
                field="key",
                fix=f"{fix}; if it has a passphrase, set {PASSPHRASE_VARIABLE}",
            ) from None  # the cause may speak of what is in the file
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"{path} is not an Ed25519 key", field="key", fix=fix)
        return cls(key)

    def save(self, path: Path | str) -> Path:
        """Write the private key (mode 0600) and, beside it, ``PATH.pub``; replaces neither.

        The private key is encrypted when `PASSPHRASE_VARIABLE` is set.

        Returns:
            Path of the public key.

        Raises:
            ConfigError: One of the files exists already, or cannot be written.
        """
        path = Path(path).expanduser()
        public = path.with_name(path.name + ".pub")
        passphrase = _passphrase()
        encryption: KeySerializationEncryption = NoEncryption()
        if passphrase is not None:
            encryption = BestAvailableEncryption(passphrase)
        pem = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        if public.exists():
            raise ConfigError(f"{public} exists already", field="key", fix="Choose another name")
        _write_new(path, pem, 0o600)
        _write_new(public, self.public.pem(), 0o644)
        return public

    def sign(self, message: bytes) -> bytes:
        """Ed25519 signature, 64 bytes; the same message always has the same."""
        return self._key.sign(message)


def trusted(keys: Iterable[KeyReference]) -> tuple[PublicKey, ...]:
    """Keys from what people write into settings.

    Raises:
        ConfigError: There is none, or one cannot be read. *An empty list would be read by one as
            "trust nobody" and by another as "do not check".*
    """
    found = []
    for key in keys:
        if isinstance(key, str) and key.startswith(_PREFIX):
            key = PublicKey.parse(key)
        found.append(key if isinstance(key, PublicKey) else PublicKey.load(key))
    if not found:
        raise ConfigError(
            "The list of trusted keys is empty",
            field="trusted_keys",
            fix="Name a key, or leave the setting out to load unsigned bundles too",
        )
    return tuple(found)


def _passphrase() -> bytes | None:
    return os.environ.get(PASSPHRASE_VARIABLE, "").encode() or None


def _read(path: Path, what: str, field: str, fix: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_FILE_LIMIT_BYTES)
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise ConfigError(f"{what} {path} cannot be read ({reason})", field=field, fix=fix) from exc


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as exc:
        raise ConfigError(
            f"{path} exists already", field="key", fix="Choose another name; keys are not replaced"
        ) from exc
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written ({exc.strerror})", field="key") from exc
