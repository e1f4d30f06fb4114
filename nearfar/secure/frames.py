"""Frames: how messages, and pieces of long ones, lie in the plaintext of records.

Layout: docs/reference/secure-channel.md, "Frames".
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nearfar.errors import RemoteProtocolError
from nearfar.secure.records import OVERHEAD_BYTES, Buffer

#: A longer message travels in pieces, so that others can overtake it.
MAX_WHOLE_BYTES = 64 * 1024
#: Plaintext of a record that carries a piece.
PIECE_RECORD_BYTES = 64 * 1024
#: No record has more plaintext: the longest whole message, its header, and Padmé's padding.
MAX_PLAINTEXT_BYTES = 68 * 1024
#: Messages of which pieces are missing, at once.
MAX_UNFINISHED = 4

_HEADER = struct.Struct(">II")  # kind << 24 | number of the message, length
_ANNOUNCEMENT = struct.Struct(">II")  # stream, length of the whole message
#: A multiple of 8, so that tensors stay aligned where they lie.
HEADER_BYTES = _HEADER.size

_MESSAGE, _FIRST_PIECE, _PIECE = 1, 2, 3
_NUMBERS = 1 << 24


def frame(parts: Sequence[Buffer], size_bytes: int, plaintext_bytes: int = 0) -> bytes:
    """A record's plaintext with one whole message.

    Args:
        parts: The message, in order.
        size_bytes: Their length together.
        plaintext_bytes: Padded with zeros to that, if it is longer.
    """
    zeros = bytes(max(0, plaintext_bytes - HEADER_BYTES - size_bytes))
    return b"".join((_HEADER.pack(_MESSAGE << 24, size_bytes), *parts, zeros))


def cut(
    parts: Sequence[Buffer],
    size_bytes: int,
    *,
    stream: int,
    number: int,
    record_bytes: int,
    pad: Callable[[int], int] | None = None,
) -> deque[memoryview]:
    """The plaintexts of records that carry one message in pieces; the message is copied once.

    Args:
        parts: The message, in order; may change afterwards.
        size_bytes: Their length together, not 0.
        stream: Stream it belongs to.
        number: Told apart by it from other unfinished messages of this direction.
        record_bytes: Length of all plaintexts but the last.
        pad: Total length of all plaintexts to their padded total; the rest is zeros.
    """
    room = record_bytes - HEADER_BYTES
    count = -(-(size_bytes + _ANNOUNCEMENT.size) // room)
    used_bytes = size_bytes + _ANNOUNCEMENT.size + count * HEADER_BYTES
    total_bytes = used_bytes if pad is None else pad(used_bytes)
    buffer = np.empty(total_bytes, np.uint8)  # all of it is written below, once
    area = buffer.data
    number %= _NUMBERS
    left_bytes = size_bytes + _ANNOUNCEMENT.size
    for index in range(count):
        kind = _PIECE if index else _FIRST_PIECE
        length = min(room, left_bytes)
        _HEADER.pack_into(area, index * record_bytes, kind << 24 | number, length)
        left_bytes -= length
    _ANNOUNCEMENT.pack_into(area, HEADER_BYTES, stream, size_bytes)
    position = HEADER_BYTES + _ANNOUNCEMENT.size
    for part in parts:
        source = memoryview(part).cast("B")
        while source:
            taken = min(len(source), record_bytes - position % record_bytes)
            area[position : position + taken] = source[:taken]
            source = source[taken:]
            position += taken
            if position % record_bytes == 0:
                position += HEADER_BYTES
    buffer[used_bytes:] = 0
    return deque(
        area[start : start + record_bytes] for start in range(0, total_bytes, record_bytes)
    )


@dataclass(frozen=True, slots=True)
class Arrived:
    """What a record brought.

    Attributes:
        message: A whole message; `None` when only its beginning came.
        size_bytes: What it took on the wire; of a record with several messages, its part.
        announced_stream: Stream that the first piece named; `None` for a message that came whole.
    """

    message: memoryview | None
    size_bytes: int
    announced_stream: int | None = None


class _Unfinished:
    """One message of which pieces are missing."""

    __slots__ = ("area", "filled_bytes", "size_bytes", "stream")

    def __init__(self, total_bytes: int, stream: int) -> None:
        # malloc: memory that the peer announces but never fills is not touched
        self.area = np.empty(total_bytes, np.uint8)
        self.filled_bytes = 0
        self.size_bytes = 0
        self.stream = stream


class Assembler:
    """One direction's receiving end: plaintexts in, messages out.

    Holds at most `MAX_UNFINISHED` messages, together no longer than one message may be.
    """

    def __init__(self) -> None:
        self._unfinished: dict[int, _Unfinished] = {}

    @property
    def unfinished(self) -> int:
        """Messages of which pieces are missing."""
        return len(self._unfinished)

    @property
    def held_bytes(self) -> int:
        """Announced length of those messages together."""
        return sum(len(one.area) for one in self._unfinished.values())

    def feed(self, plaintext: bytes, *, max_message_bytes: int) -> list[Arrived]:
        """Take the plaintext of one record.

        Args:
            plaintext: The messages found are views of it.
            max_message_bytes: Longest message allowed now; checked before memory is spent.

        Raises:
            RemoteProtocolError: The layout is wrong, or it is too much.
        """
        arrived: list[Arrived] = []
        view = memoryview(plaintext)
        total, position = len(view), 0
        record_bytes = total + OVERHEAD_BYTES
        while position + HEADER_BYTES <= total:
            word, length = _HEADER.unpack_from(view, position)
            kind = word >> 24
            if kind == 0:
                break
            start, position = position, position + HEADER_BYTES + length
            if position > total:
                raise _bad("a frame is longer than its record")
            if length > max_message_bytes + _ANNOUNCEMENT.size:
                raise _too_long(length, max_message_bytes)
            body = view[start + HEADER_BYTES : position]
            if kind == _MESSAGE and not word & (_NUMBERS - 1):
                if length > max_message_bytes:
                    raise _too_long(length, max_message_bytes)
                arrived.append(Arrived(body, HEADER_BYTES + length))
            elif kind in (_FIRST_PIECE, _PIECE):
                number = word & (_NUMBERS - 1)
                if kind == _FIRST_PIECE:
                    body = self._begin(number, body, max_message_bytes)
                    arrived.append(Arrived(None, 0, self._unfinished[number].stream))
                if finished := self._add(number, body, record_bytes):
                    arrived.append(finished)
            else:
                raise _bad(f"a frame has kind {kind}")
        # count() is C: a padded record may have tens of kilobytes of zeros
        if plaintext.count(0, position) != total - position:
            raise _bad("padding is not zero")
        if len(arrived) == 1 and arrived[0].announced_stream is None:
            return [Arrived(arrived[0].message, record_bytes)]
        return arrived

    def _begin(self, number: int, body: memoryview, max_message_bytes: int) -> memoryview:
        if len(body) < _ANNOUNCEMENT.size:
            raise _bad("a first piece is cut")
        stream, total_bytes = _ANNOUNCEMENT.unpack_from(body)
        if total_bytes > max_message_bytes:
            raise _too_long(total_bytes, max_message_bytes)
        if number in self._unfinished:
            raise _bad("a message begins twice")
        if len(self._unfinished) >= MAX_UNFINISHED or (
            self.held_bytes + total_bytes > max_message_bytes
        ):
            raise _bad("too many messages are unfinished")
        self._unfinished[number] = _Unfinished(total_bytes, stream)
        return body[_ANNOUNCEMENT.size :]

    def _add(self, number: int, data: memoryview, record_bytes: int) -> Arrived | None:
        one = self._unfinished.get(number)
        if one is None:
            raise _bad("a piece has no beginning")
        end = one.filled_bytes + len(data)
        if not data or end > len(one.area):
            raise _bad("a piece is empty or too long")
        one.area[one.filled_bytes : end] = np.frombuffer(data, np.uint8)
        one.filled_bytes = end
        one.size_bytes += record_bytes
        if end < len(one.area):
            return None
        del self._unfinished[number]
        return Arrived(one.area.data.toreadonly(), one.size_bytes, one.stream)


def _bad(reason: str) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"A record cannot be read: {reason}",
        fix="Check that both sides run compatible nearfar versions",
    )


def _too_long(size_bytes: int, max_message_bytes: int) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"The peer sent a message of {size_bytes} bytes where {max_message_bytes} are allowed",
        fix="Send smaller messages, or raise max_message_bytes on both sides",
    )
