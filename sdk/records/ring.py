"""A file of the last few thousand records: fixed size, written in place, readable at any time.

    "nfring1\\0" ‖ slot_bytes u32 ‖ slots u32 ‖ next u64 ‖ 0 …                    64 bytes
    slots × ( number u64 ‖ length u16 ‖ crc32 u32 ‖ entry ‖ … )                  little-endian

Entry `n` lies in slot ``n mod slots``. Several processes may write at once, one after the other by
`flock`. A writer that dies leaves at worst one slot whose checksum does not hold, and readers skip
it. Nothing is flushed to the disk: losing the last records with the power is no loss to an app, and
waiting for the disk with every decision would be.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from nearfar.errors import InvalidInput, NearfarError
from sdk.records.entries import (
    Decided,
    Entry,
    Finished,
    Moment,
    Stalled,
    decode_entry,
    encode_entry,
)
from sdk.routing.breaker import BreakerState

if TYPE_CHECKING:
    from edge_runtime import Stall
    from sdk.knowledge import Knowledge
    from sdk.routing import Observation, RouteDecision
    from sdk.routing.types import Route

logger = logging.getLogger(__name__)

MAGIC = b"nfring1\0"
HEADER_BYTES = 64
#: A decision of 1,024 bytes, time and moment (at most 64), the slot's own 14, and room.
SLOT_BYTES = 1152
#: 4.5 MiB; at ten decisions a second, the last seven minutes.
SLOTS = 4096
_HEAD = struct.Struct("<8sIIQ")
_NEXT = struct.Struct("<Q")
_NEXT_AT = 16
_SLOT = struct.Struct("<QHI")


class Recorder:
    """Writes down what a client decides and how long it took. Thread-safe; never raises.

    A ring that cannot be written is reported once, in the log, and then left alone: an app must not
    fail for its records.

    Args:
        path: The ring; made at the first record, for the owner only.
        known: Of the client, for the state of the link.
    """

    def __init__(self, path: Path, known: Knowledge, *, slots: int = SLOTS) -> None:
        self._path = path
        self._known = known
        self._new_slots = slots
        self._slots = 0
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._is_broken = False

    def decided(self, decision: RouteDecision) -> None:
        """Note a decision."""
        endpoint = self._known.endpoint(decision.inputs.endpoint)
        if endpoint is None:
            link, state, failures = self._known.predictor.link, BreakerState.CLOSED, 0
        else:
            link = endpoint.predictor.link
            state, failures = endpoint.health(decision.inputs.model, time.monotonic())
        moment = Moment(
            delay_ms=link.delay_ms,
            ms_per_byte=link.ms_per_byte,
            breaker=state.value,
            failures=failures,
        )
        self.write(Decided(at_s=time.time(), decision=decision, moment=moment))

    def finished(self, route: Route, model: str, observation: Observation) -> None:
        """Note an attempt that answered."""
        self.write(
            Finished(
                at_s=time.time(),
                route=route,
                model=model[:64],
                total_ms=observation.total_ms,
                queue_ms=observation.queue_ms,
                tokens=observation.completion_tokens,
            )
        )

    def stalled(self, stall: Stall) -> None:
        """Note an engine of the device that stalled."""
        self.write(
            Stalled(
                at_s=time.time(),
                model=stall.model[:64],
                phase=stall.phase,
                silent_ms=stall.silent_ms,
                limit_ms=stall.limit_ms,
            )
        )

    def write(self, entry: Entry) -> None:
        """Write one entry over the oldest."""
        if self._is_broken:
            return
        data = encode_entry(entry)
        if len(data) > SLOT_BYTES - _SLOT.size:
            return  # no such entry is made; half of one would be worse than none
        try:
            with self._lock:
                descriptor = self._descriptor
                if descriptor is None:
                    descriptor = self._descriptor = self._open()
                self._put(descriptor, data)
        except (OSError, NearfarError) as exc:
            self._is_broken = True
            logger.warning("decisions are not recorded: %s: %s", self._path, exc)

    def close(self) -> None:
        """Close the file; idempotent."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, None
            self._is_broken = True
            if descriptor is not None:
                os.close(descriptor)

    def _put(self, descriptor: int, data: bytes) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            number = _NEXT.unpack(os.pread(descriptor, 8, _NEXT_AT))[0]
            head = _SLOT.pack(number, len(data), _checksum(number, data))
            os.pwrite(descriptor, head + data, HEADER_BYTES + number % self._slots * SLOT_BYTES)
            os.pwrite(descriptor, _NEXT.pack(number + 1), _NEXT_AT)
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        descriptor = os.open(self._path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_size == 0:
                header = _HEAD.pack(MAGIC, SLOT_BYTES, self._new_slots, 0)
                os.pwrite(descriptor, header.ljust(HEADER_BYTES, b"\0"), 0)
            self._slots = _slots_of(os.pread(descriptor, HEADER_BYTES, 0), self._path)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


class RingReader:
    """Reads a ring, also while it is written.

    Args:
        path: The ring.

    Attributes:
        damaged: Slots that could not be read, so far.

    Raises:
        InvalidInput: It is no ring, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.damaged = 0
        self._seen = -1
        with self._opened() as file:
            self._slots = _slots_of(file.read(HEADER_BYTES), path)

    def entries(self) -> Iterator[Entry]:
        """Entries that were not given out before, the oldest first."""
        found: list[tuple[int, bytes]] = []
        with self._opened() as file:
            descriptor = file.fileno()
            end = self._next(descriptor)
            for number in range(max(0, end - self._slots, self._seen + 1), end):
                where = HEADER_BYTES + number % self._slots * SLOT_BYTES
                data = os.pread(descriptor, SLOT_BYTES, where)
                if len(data) < _SLOT.size:
                    continue  # the file was cut
                held, length, checksum = _SLOT.unpack_from(data)
                entry = data[_SLOT.size : _SLOT.size + length]
                if _checksum(held, entry) != checksum:
                    self.damaged += 1
                elif held == number:  # otherwise a newer one is there by now
                    found.append((number, entry))
        for number, entry in found:
            self._seen = max(self._seen, number)
            try:
                yield decode_entry(entry)
            except InvalidInput:
                self.damaged += 1

    def _next(self, descriptor: int) -> int:
        data = os.pread(descriptor, 8, _NEXT_AT)
        return int(_NEXT.unpack(data)[0]) if len(data) == 8 else 0

    def _opened(self) -> BinaryIO:
        try:
            return self._path.open("rb")
        except OSError as exc:
            raise InvalidInput(
                f"The records {self._path} cannot be read ({exc.strerror})",
                field="file",
                fix='They are written by a client with [routing] record = "FILE"',
            ) from exc


def _checksum(number: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(_NEXT.pack(number)))


def _slots_of(header: bytes, path: Path) -> int:
    """Number of slots, from the header."""
    if len(header) == HEADER_BYTES:
        magic, slot_bytes, slots, _ = _HEAD.unpack_from(header)
        if magic == MAGIC and slot_bytes == SLOT_BYTES and 0 < slots <= 1 << 20:
            return int(slots)
    raise InvalidInput(
        f"{path} does not hold records of decisions",
        field="file",
        fix='Name the file of [routing] record = "FILE"; remove it if an older version wrote it',
    )
