"""Key configurations: short-lived X-Wing public keys, signed by the server's identity.

Layout: docs/reference/secure-channel.md, "Key configuration".
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from nearfar.errors import ConfigError, SecurityError
from nearfar.secure import attestation, kem
from nearfar.secure.encoding import MalformedError, Reader, list_of, sized
from nearfar.secure.identity import (
    COSIGNED_SIGNATURE_BYTES,
    PUBLIC_KEY_BYTES,
    SIGNATURE_BYTES,
    Pin,
    ServerIdentity,
    cosigning_key,
)

#: First byte of every websocket message.
TYPE_KEY_CONFIGURATION = 1

#: X-Wing, HKDF-SHA256, AES-256-GCM.
SUITE_XWING_AES256GCM = 0x0001
#: X-Wing, HKDF-SHA256, ChaCha20-Poly1305.
SUITE_XWING_CHACHA20POLY1305 = 0x0002
#: What this code speaks, best first.
SUPPORTED_VERSIONS = (1,)
SUPPORTED_SUITES = (SUITE_XWING_AES256GCM, SUITE_XWING_CHACHA20POLY1305)

KEY_ID_BYTES = 8
MAX_LIFETIME_S = 24 * 3600
#: Shorter leaves no room between the clock tolerance and the next rotation.
MIN_LIFETIME_S = 900
#: A fresh configuration is valid from this long ago, for clients whose clocks are late.
CLOCK_TOLERANCE_S = 300

_SIGNATURE_PURPOSE = b"nearfar/1 key configuration signature\x00"
_YEAR_10000_S = 253_402_300_800


@functools.lru_cache(maxsize=1)
def preferred_suites() -> tuple[int, ...]:
    """Cipher suites in the order in which this machine is fast at them.

    Without AES instructions (small Arm boards) ChaCha20 is several times faster, and AES in
    software may leak its key through timing.
    """
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux: machines of today have the instructions
        return SUPPORTED_SUITES
    return suites_for(cpuinfo)


def suites_for(cpuinfo: str) -> tuple[int, ...]:
    """Cipher suites for a machine with this `/proc/cpuinfo`: AES first unless it says no AES.

    x86 calls the line ``flags``, Arm ``Features``; both call the instructions ``aes``.
    """
    for line in cpuinfo.splitlines():
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            has_aes = "aes" in words.split()
            return SUPPORTED_SUITES if has_aes else SUPPORTED_SUITES[::-1]
    return SUPPORTED_SUITES


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyConfiguration:
    """What the server says first.

    Attributes:
        versions: Channel versions the server speaks.
        key_id: Names the key, 8 bytes.
        not_before_s: Unix time from which the key may be used.
        expires_s: Unix time from which it may not.
        suites: Cipher suites the key may be used with.
        public_key: X-Wing public key, 1216 bytes.
        attestation_hash: What the server's evidence will show (`attestation.claims_hash`), or
            `attestation.NO_ATTESTATION`.
        identity: Who signed.
        message: The encoded and signed message, as it was sent.
    """

    versions: tuple[int, ...]
    key_id: bytes
    not_before_s: int
    expires_s: int
    suites: tuple[int, ...]
    public_key: bytes
    attestation_hash: bytes
    identity: Pin
    message: bytes

    @classmethod
    def issue(
        cls,
        identity: ServerIdentity,
        public_key: bytes,
        *,
        not_before_s: int,
        lifetime_s: int,
        attestation_hash: bytes = attestation.NO_ATTESTATION,
    ) -> KeyConfiguration:
        """Sign a configuration for a public key."""
        key_id = hashlib.sha256(public_key).digest()[:KEY_ID_BYTES]
        expires_s = not_before_s + lifetime_s
        body = b"".join(
            (
                bytes([TYPE_KEY_CONFIGURATION]),
                list_of(SUPPORTED_VERSIONS, 1),
                key_id,
                not_before_s.to_bytes(8, "big"),
                expires_s.to_bytes(8, "big"),
                list_of(SUPPORTED_SUITES, 2),
                sized(public_key),
                attestation_hash,
                identity.pin.public_key,
            )
        )
        return cls(
            versions=SUPPORTED_VERSIONS,
            key_id=key_id,
            not_before_s=not_before_s,
            expires_s=expires_s,
            suites=SUPPORTED_SUITES,
            public_key=public_key,
            attestation_hash=attestation_hash,
            identity=identity.pin,
            message=body + identity.sign(_SIGNATURE_PURPOSE + body),
        )

    @classmethod
    @functools.lru_cache(maxsize=16)
    def parse(cls, message: bytes) -> KeyConfiguration:
        """Read the layout; proves nothing yet, see `verify`.

        The last ones are kept, as a client that reconnects is shown the same for hours.

        Raises:
            SecurityError: The bytes are not a key configuration.
        """
        reader = Reader(message)
        try:
            reader.expect(bytes([TYPE_KEY_CONFIGURATION]))
            configuration = cls(
                versions=reader.list_of(1),
                key_id=reader.take(KEY_ID_BYTES),
                not_before_s=reader.unsigned(8),
                expires_s=reader.unsigned(8),
                suites=reader.list_of(2),
                public_key=reader.sized(kem.PUBLIC_KEY_BYTES),
                attestation_hash=reader.take(attestation.HASH_BYTES),
                identity=Pin(reader.take(PUBLIC_KEY_BYTES)),
                message=message,
            )
            signature = reader.rest()
            if len(signature) == COSIGNED_SIGNATURE_BYTES:
                key_hash = hashlib.sha256(cosigning_key(signature)).digest()
                named = Pin(configuration.identity.public_key, key_hash)
                configuration = replace(configuration, identity=named)
            elif len(signature) != SIGNATURE_BYTES:
                raise MalformedError
        except MalformedError:
            raise SecurityError(
                "The server's first message is not a nearfar key configuration",
                fix="Check the URL: it must lead to a nearfar cloud runtime (…/v1/nearfar)",
            ) from None
        return configuration

    def verify(self, pin: Pin, *, now_s: float) -> None:
        """Check, as a client, that the pinned identity signed this and that it is valid now.

        Raises:
            SecurityError: Says which of identity, signature, lifetime or clock is wrong.
        """
        if not pin.accepts(self.identity):
            raise SecurityError(
                f"The server's identity is not the pinned one: expected {pin}, "
                f"but the server presented {self.identity}",
                fix="If the operator confirms over another channel that the identity changed, put "
                "the new pin into `identity` of this cloud, or give `nearfar trust add` the "
                "operator's rotation statement; otherwise someone is in between",
            )
        if not _is_signed(self.message, self.identity, pin):
            raise SecurityError(
                f"The server's key configuration is not signed by the pinned identity {pin}",
                fix="Reconnect from another network; something in between altered it",
            )
        lifetime_s = self.expires_s - self.not_before_s
        if not 0 < lifetime_s <= MAX_LIFETIME_S or self.expires_s >= _YEAR_10000_S:
            raise SecurityError(
                f"The server's key configuration is valid for {lifetime_s} s, which is not "
                f"within {MAX_LIFETIME_S} s",
                fix="Update the server; keys this long-lived are refused",
            )
        if not self.not_before_s <= now_s < self.expires_s:
            late = now_s >= self.expires_s
            raise SecurityError(
                f"The server's key configuration {'has expired' if late else 'is not valid yet'}: "
                f"it holds from {_utc(self.not_before_s)} until {_utc(self.expires_s)}, "
                f"and this machine's clock says {_utc(now_s)}",
                fix="Check the clocks of this machine and of the server (`timedatectl`)",
            )


@functools.lru_cache(maxsize=16)
def _is_signed(message: bytes, identity: Pin, pin: Pin) -> bool:
    """Kept, as `KeyConfiguration.parse` is."""
    signature_bytes = COSIGNED_SIGNATURE_BYTES if identity.cosigner_hash else SIGNATURE_BYTES
    body, signature = message[:-signature_bytes], message[-signature_bytes:]
    return pin.verifies(signature, _SIGNATURE_PURPOSE + body)


def _utc(time_s: float) -> str:
    try:
        return datetime.fromtimestamp(time_s, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return f"{time_s!r} s"


class KeyRing:
    """The server's current key configurations and their private keys, in memory only.

    A new one is issued when half of the newest one's lifetime is over; the older stays usable
    until it expires, and then its private key is dropped. Not thread-safe.

    Args:
        identity: Signs the configurations.
        lifetime_s: 900 to 86400 seconds.
        now_s: Wall clock (`time.time()`).
        attester: Gives evidence about this machine to each client; `None` for a server that
            attests nothing.

    Raises:
        ConfigError: `lifetime_s` is out of range.
    """

    def __init__(
        self,
        identity: ServerIdentity,
        *,
        lifetime_s: int = MAX_LIFETIME_S,
        now_s: float,
        attester: attestation.Attester | None = None,
    ) -> None:
        if not MIN_LIFETIME_S <= lifetime_s <= MAX_LIFETIME_S:
            raise ConfigError(
                f"Key configurations cannot live for {lifetime_s} s",
                field="lifetime_s",
                fix=f"Choose between {MIN_LIFETIME_S} s and {MAX_LIFETIME_S} s",
            )
        self._identity = identity
        self._lifetime_s = int(lifetime_s)
        self.attester = attester
        self._attestation_hash = (
            attestation.NO_ATTESTATION
            if attester is None
            else attestation.claims_hash(attester.claims)
        )
        self._issued: dict[bytes, tuple[KeyConfiguration, kem.KemPrivateKey]] = {}
        self._newest = self._issue(now_s)

    @property
    def pin(self) -> Pin:
        """The identity behind all configurations."""
        return self._identity.pin

    def current(self, now_s: float) -> KeyConfiguration:
        """The configuration for a new connection; issues the next one when it is time."""
        self._drop_expired(now_s)
        newest = self._newest
        rotate_at_s = newest.not_before_s + self._lifetime_s / 2
        # A wall clock that was set back, or ahead and back, leaves a newest one that is not valid
        # yet, or whose private key is gone.
        is_usable = newest.key_id in self._issued and newest.not_before_s <= now_s < rotate_at_s
        if not is_usable:
            self._newest = newest = self._issue(now_s)
        return newest

    def private_key(self, key_id: bytes, now_s: float) -> kem.KemPrivateKey | None:
        """The key of that id, or `None` when it is unknown or has expired."""
        self._drop_expired(now_s)
        entry = self._issued.get(key_id)
        return None if entry is None else entry[1]

    def __len__(self) -> int:
        """Private keys held."""
        return len(self._issued)

    def _issue(self, now_s: float) -> KeyConfiguration:
        key = kem.KemPrivateKey.generate()
        configuration = KeyConfiguration.issue(
            self._identity,
            key.public_bytes,
            not_before_s=int(now_s) - CLOCK_TOLERANCE_S,
            lifetime_s=self._lifetime_s,
            attestation_hash=self._attestation_hash,
        )
        self._issued[configuration.key_id] = (configuration, key)
        return configuration

    def _drop_expired(self, now_s: float) -> None:
        for key_id, (configuration, _) in list(self._issued.items()):
            if configuration.expires_s <= now_s:
                del self._issued[key_id]
