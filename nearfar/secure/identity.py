"""The server's long-term Ed25519 identity, and the pin by which clients know it.

The private key file is text, three lines, mode 0600::

    nearfar-identity 1
    seed 5f3c… (64 hexadecimal digits, the Ed25519 seed of RFC 8032)
    pin nf1:… (what clients pin; a check on the seed)
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from nearfar.errors import ConfigError, SecurityError

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64

_PREFIX = "nf1:"
_CHECKSUM_BYTES = 4
_BASE32_CHARACTERS = 58  # ceil((32 + 4) bytes * 8 / 5)
_FILE_HEADER = "nearfar-identity 1"
_FILE_LIMIT_BYTES = 4096
_COPY_THE_PIN = "Copy the pin again from the server: `nearfar cloud identity show`"


def _checksum(public_key: bytes) -> bytes:
    return hashlib.sha256(public_key).digest()[:_CHECKSUM_BYTES]


@dataclass(frozen=True, slots=True)
class Pin:
    """A server's public key as people copy it: ``nf1:`` and 58 characters of base32.

    Attributes:
        public_key: Raw Ed25519 public key, 32 bytes.
    """

    public_key: bytes

    def __post_init__(self) -> None:
        if len(self.public_key) != PUBLIC_KEY_BYTES:
            raise ConfigError(
                f"An identity is {PUBLIC_KEY_BYTES} bytes long, not {len(self.public_key)}",
                field="identity",
            )

    @classmethod
    def parse(cls, text: str) -> Pin:
        """Read a pin; white space around it and upper case do not matter.

        Raises:
            ConfigError: Prefix, length, alphabet or checksum is wrong; says which.
        """
        compact = text.strip().lower()
        if not compact.startswith(_PREFIX):
            raise _not_a_pin(f"it does not start with {_PREFIX}")
        body = compact[len(_PREFIX) :]
        if len(body) != _BASE32_CHARACTERS:
            raise _not_a_pin(
                f"it has {len(body)} characters after {_PREFIX} instead of {_BASE32_CHARACTERS}"
            )
        try:
            raw = base64.b32decode(body.upper() + "=" * (-len(body) % 8))
        except (binascii.Error, ValueError) as exc:
            raise _not_a_pin("it holds characters other than a-z and 2-7") from exc
        public_key, checksum = raw[:PUBLIC_KEY_BYTES], raw[PUBLIC_KEY_BYTES:]
        # Comparing the text as well refuses a second spelling of the same key in the spare bits.
        if checksum != _checksum(public_key) or str(cls(public_key)) != compact:
            raise _not_a_pin("its checksum does not match, so a character is mistyped")
        return cls(public_key)

    def __str__(self) -> str:
        raw = self.public_key + _checksum(self.public_key)
        return _PREFIX + base64.b32encode(raw).decode("ascii").rstrip("=").lower()

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether this identity signed the message (Ed25519, RFC 8032)."""
        try:
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True


def _not_a_pin(reason: str) -> ConfigError:
    return ConfigError(
        f"The server identity is not a pin: {reason}", field="identity", fix=_COPY_THE_PIN
    )


class ServerIdentity:
    """The private half; kept by the server only.

    Args:
        seed: 32 random bytes (RFC 8032 private key).
    """

    __slots__ = ("_key", "_seed", "pin")

    #: What clients pin.
    pin: Pin

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.pin = Pin(self._key.public_key().public_bytes_raw())

    def __repr__(self) -> str:
        return f"ServerIdentity({self.pin})"

    @classmethod
    def generate(cls) -> ServerIdentity:
        """A fresh identity from the operating system's random source."""
        return cls(os.urandom(32))

    @classmethod
    def load(cls, path: Path | str) -> ServerIdentity:
        """Read an identity file.

        Raises:
            ConfigError: The file is missing, unreadable or not an identity file.
            SecurityError: Other users can read it, or seed and pin do not belong together.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                data = file.read(_FILE_LIMIT_BYTES + 1)
        except OSError as exc:
            raise ConfigError(
                f"Identity file {path} cannot be read: {exc.strerror}",
                field="identity",
                fix="Make one with `nearfar cloud init` or `nearfar cloud identity new`",
            ) from exc
        if mode & 0o077:
            raise SecurityError(
                f"Identity file {path} is open to other users (mode {mode:04o})",
                fix=f"Run `chmod 600 {path}`; if others may have read it, make a new identity",
            )
        identity, pin_text = cls._parse(data, path)
        if str(identity.pin) != pin_text:
            raise SecurityError(
                f"Identity file {path} is damaged: its seed belongs to {identity.pin}, "
                f"but it names {pin_text}",
                fix="Restore it from a backup, or make a new identity and send clients its pin",
            )
        return identity

    @classmethod
    def _parse(cls, data: bytes, path: Path) -> tuple[ServerIdentity, str]:
        try:
            header, seed_line, pin_line = data.decode("ascii").splitlines()
            seed_name, seed_hex = seed_line.split(" ")
            pin_name, pin_text = pin_line.split(" ")
            seed = bytes.fromhex(seed_hex)
            if (header, seed_name, pin_name, len(seed)) != (_FILE_HEADER, "seed", "pin", 32):
                raise ValueError
        except ValueError as exc:
            # The cause may quote the seed, so only its type goes on.
            raise ConfigError(
                f"{path} is not a nearfar identity file of version 1 ({type(exc).__name__})",
                field="identity",
                fix="Point to the identity.key that `nearfar cloud init` wrote",
            ) from None
        return cls(seed), pin_text

    def save(self, path: Path | str) -> None:
        """Write a new identity file, mode 0600; never replaces one.

        Raises:
            ConfigError: The file exists already, or cannot be written.
        """
        path = Path(path)
        text = f"{_FILE_HEADER}\nseed {self._seed.hex()}\npin {self.pin}\n"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError as exc:
            raise ConfigError(
                f"Identity file {path} exists already",
                field="identity",
                fix="Move it away first; clients that pinned it stop trusting this server",
            ) from exc
        except OSError as exc:
            raise ConfigError(
                f"Identity file {path} cannot be written: {exc.strerror}", field="identity"
            ) from exc

    def sign(self, message: bytes) -> bytes:
        """Ed25519 signature; callers put a purpose in front of what they sign."""
        return self._key.sign(message)
