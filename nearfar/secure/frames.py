"""Frames: how messages, and pieces of long ones, lie in the plaintext of records.

Layout: docs/reference/secure-channel.md, "Frames".
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, Union

import numpy as np

from nearfar.errors import RemoteProtocolError
from nearfar.secure.pace import MAX_BATCH_BYTES
from nearfar.secure.records import OVERHEAD_BYTES, TYPE_MESSAGE, Buffer, RecordOpener
from nearfar.secure.shaping import padded_bytes

#: A longer message travels in pieces, so that others can overtake it.
MAX_WHOLE_BYTES = 64 * 1024
#: Plaintext of a record that carries a piece; none has more. A picture of 224 × 224 in bytes goes
#: into one: each further record of a message walks through more code than caches hold.
PIECE_RECORD_BYTES = 160 * 1024
#: Messages of which pieces are missing, at once.
MAX_UNFINISHED = 4

_HEADER = struct.Struct(">II")  # kind << 24 | number of the message, length
_ANNOUNCEMENT = struct.Struct(">II")  # stream, length of the whole message
#: Multiples of 8, so that tensors stay aligned where they lie.
HEADER_BYTES = _HEADER.size
FIRST_PIECE_BYTES = HEADER_BYTES + _ANNOUNCEMENT.size

_MESSAGE, _FIRST_PIECE, _PIECE = 1, 2, 3
_WHOLE, _FIRST, _NEXT = _MESSAGE << 24, _FIRST_PIECE << 24, _PIECE << 24
_NUMBERS = 1 << 24


def max_record_bytes(max_message_bytes: int) -> int:
    """The longest record that may come while messages may have that length.

    Longer ones are in pieces, so it is small; short limits must not refuse what shaping adds.
    """
    if max_message_bytes > MAX_WHOLE_BYTES:
        return PIECE_RECORD_BYTES + OVERHEAD_BYTES
    longest_bytes = max(padded_bytes(HEADER_BYTES + max_message_bytes), MAX_BATCH_BYTES)
    return longest_bytes + OVERHEAD_BYTES


def frame(parts: Sequence[Buffer], size_bytes: int, plaintext_bytes: int = 0) -> bytes:
    """A record's plaintext with one whole message.

    Args:
        parts: The message, in order.
        size_bytes: Their length together.
        plaintext_bytes: Padded with zeros to that, if it is longer.
    """
    header = _HEADER.pack(_WHOLE, size_bytes)
    missing_bytes = plaintext_bytes - HEADER_BYTES - size_bytes
    if missing_bytes > 0:
        return b"".join((header, *parts, bytes(missing_bytes)))
    return b"".join((header, *parts))


def only_piece(
    parts: Sequence[Buffer], size_bytes: int, stream: int, number: int, plaintext_bytes: int
) -> bytes:
    """A record's plaintext with a first piece that is the whole message.

    Args:
        parts: The message, in order.
        size_bytes: Their length together, not 0.
        stream: Stream it belongs to.
        number: As of `Pieces`.
        plaintext_bytes: As of `frame`.
    """
    length = _ANNOUNCEMENT.size + size_bytes
    header = _HEADER.pack(_FIRST | number % _NUMBERS, length)
    announcement = _ANNOUNCEMENT.pack(stream, size_bytes)
    missing_bytes = plaintext_bytes - HEADER_BYTES - length
    if missing_bytes > 0:
        return b"".join((header, announcement, *parts, bytes(missing_bytes)))
    return b"".join((header, announcement, *parts))


class Pieces:
    """The plaintexts of the records that carry one long message, made as they are needed.

    Args:
        parts: The message, in order; must not change until `own` was called or all were taken.
        size_bytes: Their length together, not 0.
        stream: Stream it belongs to.
        number: Told apart by it from other unfinished messages of this direction.
        record_bytes: Length of all plaintexts but the last.
        pad: Total length of all plaintexts to their padded total; the rest is zeros.

    Attributes:
        count: How many are left.
        left_bytes: Their length together.
    """

    __slots__ = (
        "_number",
        "_opening",
        "_record_bytes",
        "_sources",
        "_to_come",
        "count",
        "left_bytes",
    )

    def __init__(
        self,
        parts: Sequence[Buffer],
        size_bytes: int,
        *,
        stream: int,
        number: int,
        record_bytes: int,
        pad: Callable[[int], int] | None = None,
    ) -> None:
        opening = _ANNOUNCEMENT.pack(stream, size_bytes)
        to_come = len(opening) + size_bytes
        frames = -(-to_come // (record_bytes - HEADER_BYTES))
        used_bytes = to_come + frames * HEADER_BYTES
        self.left_bytes = used_bytes if pad is None else pad(used_bytes)
        self.count = -(-self.left_bytes // record_bytes)
        self._record_bytes = record_bytes
        self._number = number % _NUMBERS
        self._opening = opening  # empty once it is gone
        self._to_come = to_come
        self._sources = [memoryview(part).cast("B") for part in parts]

    def take(self) -> bytes:
        """The next plaintext."""
        left_bytes, to_come = self.left_bytes, self._to_come
        plaintext_bytes = self._record_bytes
        if plaintext_bytes > left_bytes:
            plaintext_bytes = left_bytes
        self.left_bytes = left_bytes - plaintext_bytes
        self.count -= 1
        room = plaintext_bytes - HEADER_BYTES
        zeros = room - to_come
        if zeros > 0:
            room = to_come
        if room <= 0:
            return bytes(plaintext_bytes)
        self._to_come = to_come - room
        if self._opening:
            taken: list[Buffer] = [_HEADER.pack(_FIRST | self._number, room), self._opening]
            room -= len(self._opening)
            self._opening = b""
        else:
            taken = [_HEADER.pack(_NEXT | self._number, room)]
        sources = self._sources
        while room:
            source = sources[0]
            size_bytes = len(source)
            if size_bytes > room:
                taken.append(source[:room])
                sources[0] = source[room:]
                break
            taken.append(source)
            room -= size_bytes
            del sources[0]
        if zeros > 0:
            taken.append(bytes(zeros))
        return b"".join(taken)

    def own(self) -> None:
        """Copy what is left of the message: from now on its arrays may change."""
        if self._sources:
            self._sources = [memoryview(b"".join(self._sources))]


class Arrived(NamedTuple):
    """What a record brought.

    Attributes:
        message: A whole message; `None` when only its beginning came.
        size_bytes: What it took on the wire; of a record with several messages, its part.
        announced_stream: Stream that the first piece named; `None` for a message that came whole.
    """

    message: memoryview | None
    size_bytes: int
    announced_stream: int | None = None


#: Type of a record; its plaintext, if that does not lie where it belongs; else what it brought.
Opened = tuple[int, Union[bytes, memoryview], Union[Sequence[Arrived], None]]


class _Unfinished:
    """One message of which pieces are missing."""

    __slots__ = ("area", "filled_bytes", "size_bytes", "stream")

    def __init__(self, total_bytes: int, stream: int) -> None:
        # malloc: memory that the peer announces but never fills is not touched
        self.area = np.empty(total_bytes, np.uint8).data
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
    def oldest(self) -> tuple[int, int] | None:
        """Number and announced length of the one that began first; `None` without any."""
        for number, one in self._unfinished.items():
            return number, len(one.area)
        return None

    @property
    def held_bytes(self) -> int:
        """Announced length of those messages together."""
        return sum(len(one.area) for one in self._unfinished.values())

    def open_piece(self, opener: RecordOpener, record: Buffer) -> Opened | None:
        """Open a record where its plaintext belongs, if it seems to be the next piece.

        A guess: that it carries the next piece of the one unfinished message, and nothing else.
        What its frame's header covers of the message is put back, also when the guess was wrong.

        Args:
            opener: Opens it.
            record: As it came.

        Returns:
            `None` when there is no such place, and the record is still closed.

        Raises:
            SecurityError: As `RecordOpener.open`.
        """
        unfinished = self._unfinished
        if len(unfinished) != 1:
            return None
        ((number, one),) = unfinished.items()
        area, filled_bytes = one.area, one.filled_bytes
        record_bytes = len(record)
        start = filled_bytes - HEADER_BYTES
        end = start + record_bytes - OVERHEAD_BYTES
        if start < 0 or end <= filled_bytes or end > len(area):
            return None
        covered = area[start:filled_bytes].tobytes()
        record_type, plaintext = opener.open(record, into=area[start:end])
        word, length = _HEADER.unpack_from(plaintext)
        if word != _NEXT | number or length != end - filled_bytes or record_type != TYPE_MESSAGE:
            moved = bytes(plaintext)
            area[start:filled_bytes] = covered
            return record_type, moved, None
        area[start:filled_bytes] = covered
        one.filled_bytes = end
        one.size_bytes += record_bytes
        return record_type, b"", self._finish(number, one) if end == len(area) else ()

    def feed(self, plaintext: bytes | memoryview, *, max_message_bytes: int) -> list[Arrived]:
        """Take the plaintext of one record.

        Args:
            plaintext: The messages found are views of it.
            max_message_bytes: Longest message allowed now; checked before memory is spent.

        Raises:
            RemoteProtocolError: The layout is wrong, or it is too much.
        """
        record_bytes = len(plaintext) + OVERHEAD_BYTES
        if not isinstance(plaintext, bytes):
            plaintext = bytes(plaintext)
        view = memoryview(plaintext)
        total, position = len(view), 0
        if total > HEADER_BYTES:  # nearly always: one frame, and perhaps padding
            word, length = _HEADER.unpack_from(view)
            end = HEADER_BYTES + length
            if end == total or (end < total and plaintext.count(0, end) == total - end):
                body = view[HEADER_BYTES:end]
                if word == _WHOLE and length <= max_message_bytes:
                    return [Arrived(body, record_bytes)]
                if word >> 24 == _FIRST_PIECE and length <= max_message_bytes:
                    return [self._begin(word - _FIRST, body, record_bytes, max_message_bytes)]
        arrived: list[Arrived] = []
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
                    arrived.append(self._begin(number, body, record_bytes, max_message_bytes))
                else:
                    arrived += self._add(number, body, record_bytes)
            else:
                raise _bad(f"a frame has kind {kind}")
        # count() is C: a padded record may have tens of kilobytes of zeros
        if plaintext.count(0, position) != total - position:
            raise _bad("padding is not zero")
        if len(arrived) == 1 and arrived[0].announced_stream is None:
            return [Arrived(arrived[0].message, record_bytes)]
        return arrived

    def _begin(
        self, number: int, body: memoryview, record_bytes: int, max_message_bytes: int
    ) -> Arrived:
        if len(body) < _ANNOUNCEMENT.size:
            raise _bad("a first piece is cut")
        stream, total_bytes = _ANNOUNCEMENT.unpack_from(body)
        if total_bytes > max_message_bytes:
            raise _too_long(total_bytes, max_message_bytes)
        unfinished = self._unfinished
        if number in unfinished:
            raise _bad("a message begins twice")
        if unfinished and (
            len(unfinished) >= MAX_UNFINISHED or self.held_bytes + total_bytes > max_message_bytes
        ):
            raise _bad("too many messages are unfinished")
        data = body[_ANNOUNCEMENT.size :]
        if not data or len(data) > total_bytes:
            raise _bad("a piece is empty or too long")
        if len(data) == total_bytes:
            return Arrived(data, record_bytes, stream)
        one = unfinished[number] = _Unfinished(total_bytes, stream)
        self._put(one, data, record_bytes)
        return Arrived(None, 0, stream)

    def _add(self, number: int, data: memoryview, record_bytes: int) -> Sequence[Arrived]:
        one = self._unfinished.get(number)
        if one is None:
            raise _bad("a piece has no beginning")
        if not data or one.filled_bytes + len(data) > len(one.area):
            raise _bad("a piece is empty or too long")
        self._put(one, data, record_bytes)
        return self._finish(number, one) if one.filled_bytes == len(one.area) else ()

    def _put(self, one: _Unfinished, data: memoryview, record_bytes: int) -> None:
        end = one.filled_bytes + len(data)
        one.area[one.filled_bytes : end] = data
        one.filled_bytes = end
        one.size_bytes += record_bytes

    def _finish(self, number: int, one: _Unfinished) -> tuple[Arrived]:
        del self._unfinished[number]
        return (Arrived(one.area.toreadonly(), one.size_bytes, one.stream),)


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
