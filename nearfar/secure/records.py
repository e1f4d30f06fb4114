"""The record layer: each websocket message after the handshake is one sealed record.

Layout and rekeying: docs/reference/secure-channel.md, "Records".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Union

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from nearfar.errors import SecurityError
from nearfar.secure.keys import SUITE_XWING_AES256GCM, SUITE_XWING_CHACHA20POLY1305

Buffer = Union[bytes, bytearray, memoryview]

#: The one type of record; its plaintext is frames (`nearfar.secure.frames`).
TYPE_MESSAGE = 16

#: Both have 32-byte keys, 12-byte nonces and 16-byte tags.
_AEADS: dict[int, type[AESGCM] | type[ChaCha20Poly1305]] = {
    SUITE_XWING_AES256GCM: AESGCM,
    SUITE_XWING_CHACHA20POLY1305: ChaCha20Poly1305,
}

_HEADER = struct.Struct(">BIQ")  # type, epoch, sequence
_NONCE_BYTES = 12
_TAG_BYTES = 16
#: What a record is longer than its plaintext.
OVERHEAD_BYTES = _HEADER.size + _TAG_BYTES

_LAST_EPOCH = 2**32 - 1
#: For shorter records one copy more costs less than the objects that would save it.
_SHORT_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class RekeyLimits:
    """How much one key protects. Both ends use the same.

    The defaults stay far inside what AES-GCM allows (RFC 8446, section 5.5: 2^24.5 records of
    2^14 bytes): 2^26 blocks give a birthday bound of about 2^-77 per epoch.

    Attributes:
        records: Records per epoch.
        size_bytes: Plaintext per epoch; a single longer record has an epoch of its own.
        age_s: Seconds from the first record of an epoch after which its sender begins the next.
            Only the sender's duty: clocks of two machines cannot be compared.
    """

    records: int = 2**20
    size_bytes: int = 2**30
    age_s: float = 600.0


DEFAULT_REKEY_LIMITS = RekeyLimits()


class _Epoch:
    """Key and IV of one epoch, and how much they have protected.

    Attributes:
        aead: The cipher with its key.
        iv: XORed with the sequence number it gives a record's nonce.
        records: Records so far.
        size_bytes: Their plaintext.
    """

    __slots__ = ("_secret", "_suite", "aead", "iv", "number", "records", "size_bytes")

    def __init__(self, secret: bytes, number: int, suite: int) -> None:
        self.number = number
        self._secret = secret
        self._suite = suite
        self.aead = _AEADS[suite](_expand(secret, b"key", 32))
        self.iv = int.from_bytes(_expand(secret, b"iv", 12), "big")
        self.records = 0
        self.size_bytes = 0

    def has_room(self, size_bytes: int, limits: RekeyLimits) -> bool:
        """For one more record; also where it alone is longer than the limit."""
        return self.records == 0 or (
            self.records < limits.records and self.size_bytes + size_bytes <= limits.size_bytes
        )

    def next(self) -> _Epoch:
        if self.number == _LAST_EPOCH:
            raise channel_failed()
        return _Epoch(_expand(self._secret, b"rekey", 32), self.number + 1, self._suite)


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
        suite: Cipher suite of the handshake.
        limits: When to rekey.
    """

    def __init__(
        self,
        traffic_secret: bytes,
        *,
        suite: int = SUITE_XWING_AES256GCM,
        limits: RekeyLimits = DEFAULT_REKEY_LIMITS,
    ) -> None:
        self._epoch = _Epoch(traffic_secret, 0, suite)
        self._epoch_began_s: float | None = None
        self._sequence = 0
        self._limits = limits

    def seal(
        self,
        record_type: int,
        plaintext: Buffer,
        *,
        now_s: float | None = None,
        room: memoryview | None = None,
    ) -> Buffer:
        """One record, ready to send; records must be sent in the order they were sealed.

        Args:
            record_type: First byte of the record, in the clear.
            plaintext: Any size; it is copied only by the cipher.
            now_s: Any clock that does not jump, always the same; without it age is not looked at.
            room: Where a long record that fits is sealed: what is returned is then its beginning.
        """
        size_bytes = len(plaintext)
        epoch = self._epoch
        began_s = self._epoch_began_s
        has_aged = (
            now_s is not None and began_s is not None and now_s - began_s >= self._limits.age_s
        )
        if has_aged or not epoch.has_room(size_bytes, self._limits):
            epoch = self._epoch = epoch.next()
            began_s = None
        if began_s is None:
            self._epoch_began_s = now_s
        sequence = self._sequence
        header = _HEADER.pack(record_type, epoch.number, sequence)
        nonce = (epoch.iv ^ sequence).to_bytes(_NONCE_BYTES, "big")
        record: Buffer
        if size_bytes <= _SHORT_BYTES:
            record = header + epoch.aead.encrypt(nonce, plaintext, header)
        else:
            record_bytes = size_bytes + OVERHEAD_BYTES
            if room is not None and record_bytes <= len(room):
                record = room[:record_bytes]
            else:
                # numpy's memory is not cleared first, as that of a bytearray is
                record = np.empty(record_bytes, np.uint8).data
            record[: _HEADER.size] = header
            epoch.aead.encrypt_into(nonce, plaintext, header, record[_HEADER.size :])
        epoch.records += 1
        epoch.size_bytes += size_bytes
        self._sequence = sequence + 1
        return record


class RecordOpener:
    """One direction's receiving end; after the first failure it opens nothing more.

    Args:
        traffic_secret: 32 bytes from the handshake.
        suite: Cipher suite of the handshake.
        limits: How much the sender may put into one epoch.
    """

    def __init__(
        self,
        traffic_secret: bytes,
        *,
        suite: int = SUITE_XWING_AES256GCM,
        limits: RekeyLimits = DEFAULT_REKEY_LIMITS,
    ) -> None:
        self._epoch: _Epoch | None = _Epoch(traffic_secret, 0, suite)
        self._sequence = 0
        self._limits = limits

    def open(
        self, record: Buffer, *, into: memoryview | None = None
    ) -> tuple[int, bytes | memoryview]:
        """Type and plaintext of the next record.

        Args:
            record: All of it.
            into: Where the plaintext shall lie, just as long; when the record is refused, anything
                may lie there. `None` makes a new one.

        Raises:
            SecurityError: Anything is wrong with it: always the same error.
        """
        epoch, self._epoch = self._epoch, None  # put back only on success
        size_bytes = len(record) - OVERHEAD_BYTES
        if epoch is None or size_bytes < 0:
            raise channel_failed()
        header = bytes(record[: _HEADER.size])
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
            nonce = (epoch.iv ^ sequence).to_bytes(_NONCE_BYTES, "big")
            sealed = memoryview(record)[_HEADER.size :]
            plaintext: bytes | memoryview
            if into is None:
                plaintext = epoch.aead.decrypt(nonce, sealed, header)
            else:
                epoch.aead.decrypt_into(nonce, sealed, header, into)
                plaintext = into
        except InvalidTag:
            raise channel_failed() from None
        epoch.records += 1
        epoch.size_bytes += size_bytes
        self._epoch = epoch
        self._sequence = sequence + 1
        return record_type, plaintext
