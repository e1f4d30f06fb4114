"""The record layer: each websocket message after the handshake is one sealed record.

Layout and rekeying: docs/reference/secure-channel.md, "Records".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from nearfar.errors import SecurityError

#: Record that carries one message of the wire protocol.
TYPE_MESSAGE = 16

_HEADER = struct.Struct(">BIQ")  # type, epoch, sequence
_TAG_BYTES = 16
#: What a record is longer than its plaintext.
OVERHEAD_BYTES = _HEADER.size + _TAG_BYTES

_LAST_EPOCH = 2**32 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RekeyLimits:
    """How much one key protects. Both ends use the same.

    The defaults stay far inside what AES-GCM allows (RFC 8446, section 5.5: 2^24.5 records of
    2^14 bytes): 2^26 blocks give a birthday bound of about 2^-77 per epoch.

    Attributes:
        records: Records per epoch.
        size_bytes: Plaintext per epoch; a single longer record has an epoch of its own.
    """

    records: int = 2**20
    size_bytes: int = 2**30


DEFAULT_REKEY_LIMITS = RekeyLimits()


class _Epoch:
    """Key and IV of one epoch, and how much they have protected."""

    __slots__ = ("_aead", "_iv", "_records", "_secret", "_size_bytes", "number")

    def __init__(self, secret: bytes, number: int) -> None:
        self.number = number
        self._secret = secret
        self._aead = AESGCM(_expand(secret, b"key", 32))
        self._iv = int.from_bytes(_expand(secret, b"iv", 12), "big")
        self._records = 0
        self._size_bytes = 0

    def has_room(self, size_bytes: int, limits: RekeyLimits) -> bool:
        return self._records == 0 or (
            self._records < limits.records and self._size_bytes + size_bytes <= limits.size_bytes
        )

    def count(self, size_bytes: int) -> None:
        self._records += 1
        self._size_bytes += size_bytes

    def next(self) -> _Epoch:
        if self.number == _LAST_EPOCH:
            raise channel_failed()
        return _Epoch(_expand(self._secret, b"rekey", 32), self.number + 1)

    def _nonce(self, sequence: int) -> bytes:
        return (self._iv ^ sequence).to_bytes(12, "big")

    def seal(self, sequence: int, plaintext: bytes | bytearray, header: bytes) -> bytes:
        return self._aead.encrypt(self._nonce(sequence), plaintext, header)

    def open(self, sequence: int, sealed: memoryview, header: bytes) -> bytes:
        return self._aead.decrypt(self._nonce(sequence), sealed, header)


def _expand(secret: bytes, label: bytes, size_bytes: int) -> bytes:
    return HKDFExpand(hashes.SHA256(), size_bytes, b"nearfar/1 " + label).derive(secret)


def channel_failed() -> SecurityError:
    """The one error for every failure of the record layer, so that none tells an attacker more."""
    return SecurityError(
        "The secure channel failed and was closed",
        fix="Reconnect; if it fails again, something between client and server alters the traffic",
    )


class RecordSealer:
    """One direction's sending end.

    Args:
        traffic_secret: 32 bytes from the handshake.
        limits: When to rekey.
    """

    def __init__(
        self, traffic_secret: bytes, *, limits: RekeyLimits = DEFAULT_REKEY_LIMITS
    ) -> None:
        self._epoch = _Epoch(traffic_secret, 0)
        self._sequence = 0
        self._limits = limits

    def seal(self, record_type: int, plaintext: bytes | bytearray) -> bytes:
        """One record, ready to send; records must be sent in the order they were sealed."""
        if not self._epoch.has_room(len(plaintext), self._limits):
            self._epoch = self._epoch.next()
        header = _HEADER.pack(record_type, self._epoch.number, self._sequence)
        sealed = self._epoch.seal(self._sequence, plaintext, header)
        self._epoch.count(len(plaintext))
        self._sequence += 1
        return header + sealed


class RecordOpener:
    """One direction's receiving end; after the first failure it opens nothing more.

    Args:
        traffic_secret: 32 bytes from the handshake.
        limits: How much the sender may put into one epoch.
    """

    def __init__(
        self, traffic_secret: bytes, *, limits: RekeyLimits = DEFAULT_REKEY_LIMITS
    ) -> None:
        self._epoch: _Epoch | None = _Epoch(traffic_secret, 0)
        self._sequence = 0
        self._limits = limits

    def open(self, record: bytes) -> tuple[int, bytes]:
        """Type and plaintext of the next record.

        Raises:
            SecurityError: Anything is wrong with it: always the same error.
        """
        epoch, self._epoch = self._epoch, None  # put back only on success
        size_bytes = len(record) - OVERHEAD_BYTES
        if epoch is None or size_bytes < 0:
            raise channel_failed()
        header = record[: _HEADER.size]
        record_type, number, sequence = _HEADER.unpack(header)
        # The sender decides when to rekey; it may be early, never late.
        if number == epoch.number + 1:
            epoch = epoch.next()
        if (
            number != epoch.number
            or sequence != self._sequence
            or not epoch.has_room(size_bytes, self._limits)
        ):
            raise channel_failed()
        try:
            plaintext = epoch.open(sequence, memoryview(record)[_HEADER.size :], header)
        except InvalidTag:
            raise channel_failed() from None
        epoch.count(size_bytes)
        self._epoch = epoch
        self._sequence += 1
        return record_type, plaintext
