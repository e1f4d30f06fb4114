"""Ed25519 keys (RFC 8032) as people handle them: a short text, and a file of three lines.

Subclasses say whose key it is by a prefix and a file header, so that none is taken for another.
The private key file has mode 0600::

    nearfar-identity 1
    seed 5f3c… (64 hexadecimal digits, the seed of RFC 8032)
    pin nf1:… (the public key; a check on the seed)
"""

from __future__ import annotations

import abc
import base64
import binascii
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from nearfar.errors import ConfigError, SecurityError

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64

_CHECKSUM_BYTES = 4
_FILE_LIMIT_BYTES = 4096

_Public = TypeVar("_Public", bound="PublicKeyText")
_Private = TypeVar("_Private", bound="PrivateKeyFile")


def _checksum(raw: bytes) -> bytes:
    return hashlib.sha256(raw).digest()[:_CHECKSUM_BYTES]


def encode_text(prefix: str, raw: bytes) -> str:
    """Prefix, then base32 of the bytes and their checksum."""
    text = base64.b32encode(raw + _checksum(raw)).decode("ascii").rstrip("=").lower()
    return prefix + text


@dataclass(frozen=True, slots=True)
class PublicKeyText:
    """A public key as people copy it: a prefix and 58 characters of base32.

    Attributes:
        public_key: Raw Ed25519 public key, 32 bytes.
    """

    PREFIX: ClassVar[str]
    #: What messages call it: the subject of a sentence, the noun, the setting, and how to get it.
    SUBJECT: ClassVar[str]
    NOUN: ClassVar[str]
    FIELD: ClassVar[str]
    COPY_AGAIN: ClassVar[str]

    public_key: bytes

    def __post_init__(self) -> None:
        if len(self.public_key) != PUBLIC_KEY_BYTES:
            raise ConfigError(
                f"An Ed25519 public key is {PUBLIC_KEY_BYTES} bytes long, "
                f"not {len(self.public_key)}",
                field=self.FIELD,
            )

    @classmethod
    def parse(cls: type[_Public], text: str) -> _Public:
        """Read the text; white space around it and upper case do not matter.

        Raises:
            ConfigError: Prefix, length, alphabet or checksum is wrong; says which.
        """
        return cls(cls._decode(text.strip().lower(), cls.PREFIX, PUBLIC_KEY_BYTES))

    @classmethod
    def _decode(cls, compact: str, prefix: str, size_bytes: int) -> bytes:
        """The bytes behind a text, which must be `size_bytes`."""
        if not compact.startswith(prefix):
            raise cls._malformed(f"it does not start with {prefix}")
        body = compact[len(prefix) :]
        characters = -(-(size_bytes + _CHECKSUM_BYTES) * 8 // 5)
        if len(body) != characters:
            raise cls._malformed(
                f"it has {len(body)} characters after {prefix} instead of {characters}"
            )
        try:
            decoded = base64.b32decode(body.upper() + "=" * (-len(body) % 8))
        except (binascii.Error, ValueError) as exc:
            raise cls._malformed("it holds characters other than a-z and 2-7") from exc
        raw, checksum = decoded[:size_bytes], decoded[size_bytes:]
        # Comparing the text as well refuses a second spelling of the same key in the spare bits.
        if checksum != _checksum(raw) or encode_text(prefix, raw) != compact:
            raise cls._malformed("its checksum does not match, so a character is mistyped")
        return raw

    @classmethod
    def _malformed(cls, reason: str) -> ConfigError:
        return ConfigError(
            f"{cls.SUBJECT} is not {cls.NOUN}: {reason}", field=cls.FIELD, fix=cls.COPY_AGAIN
        )

    def __str__(self) -> str:
        return encode_text(self.PREFIX, self.public_key)

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether the private half of this key signed the message."""
        try:
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True


class PrivateKeyFile(abc.ABC):
    """The private half, and the file it lives in.

    Args:
        seed: 32 random bytes (RFC 8032 private key).
    """

    __slots__ = ("_key", "_seed")

    HEADER: ClassVar[str]
    #: Name of the public key's line.
    LINE: ClassVar[str]
    NOUN: ClassVar[str]
    FIELD: ClassVar[str]
    HOW_TO_MAKE: ClassVar[str]
    POINT_TO: ClassVar[str]
    AFTER_LOSS: ClassVar[str]
    BEFORE_REPLACING: ClassVar[str]

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self._key = Ed25519PrivateKey.from_private_bytes(seed)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._public_text()})"

    @abc.abstractmethod
    def _public_text(self) -> str:
        """The public key as its file names it."""

    def _public_bytes(self) -> bytes:
        return self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls: type[_Private]) -> _Private:
        """A fresh key from the operating system's random source."""
        return cls(os.urandom(32))

    @classmethod
    def load(cls: type[_Private], path: Path | str) -> _Private:
        """Read a key file.

        Raises:
            ConfigError: The file is missing, unreadable or another kind of file.
            SecurityError: Other users can read it, or its two keys do not belong together.
        """
        path = Path(path)
        noun = cls.NOUN.capitalize()
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                data = file.read(_FILE_LIMIT_BYTES + 1)
        except (OSError, ValueError) as exc:  # ValueError: a NUL character in the path
            raise ConfigError(
                f"{noun} file {path} cannot be read: {getattr(exc, 'strerror', None) or exc}",
                field=cls.FIELD,
                fix=cls.HOW_TO_MAKE,
            ) from exc
        if mode & 0o077:
            raise SecurityError(
                f"{noun} file {path} is open to other users (mode {mode:04o})",
                fix=f"Run `chmod 600 {path}`; if others may have read it, make a new {cls.NOUN}",
            )
        key, public_text = cls._parse(data, path)
        if key._public_text() != public_text:
            raise SecurityError(
                f"{noun} file {path} is damaged: its seed belongs to {key._public_text()}, "
                f"but it names {public_text}",
                fix=cls.AFTER_LOSS,
            )
        return key

    @classmethod
    def _parse(cls: type[_Private], data: bytes, path: Path) -> tuple[_Private, str]:
        try:
            header, seed_line, public_line = data.decode("ascii").splitlines()
            seed_name, seed_hex = seed_line.split(" ")
            public_name, public_text = public_line.split(" ")
            seed = bytes.fromhex(seed_hex)
            if (header, seed_name, public_name, len(seed)) != (cls.HEADER, "seed", cls.LINE, 32):
                raise ValueError
        except ValueError as exc:
            # The cause may quote the seed, so only its type goes on.
            raise ConfigError(
                f"{path} is not a nearfar {cls.NOUN} file of version 1 ({type(exc).__name__})",
                field=cls.FIELD,
                fix=cls.POINT_TO,
            ) from None
        return cls._of(seed, public_text), public_text

    @classmethod
    def _of(cls: type[_Private], seed: bytes, public_text: str) -> _Private:
        """The key of a file."""
        return cls(seed)

    def save(self, path: Path | str) -> None:
        """Write a new file, mode 0600; never replaces one.

        Raises:
            ConfigError: The file exists already, or cannot be written.
        """
        path = Path(path)
        noun = self.NOUN.capitalize()
        text = f"{self.HEADER}\nseed {self._seed.hex()}\n{self.LINE} {self._public_text()}\n"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError as exc:
            raise ConfigError(
                f"{noun} file {path} exists already", field=self.FIELD, fix=self.BEFORE_REPLACING
            ) from exc
        except OSError as exc:
            raise ConfigError(
                f"{noun} file {path} cannot be written: {exc.strerror}", field=self.FIELD
            ) from exc

    def sign(self, message: bytes) -> bytes:
        """Ed25519 signature; callers put a purpose in front of what they sign."""
        return self._key.sign(message)
