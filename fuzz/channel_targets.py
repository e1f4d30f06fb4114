"""Targets between the socket and the messages: websocket frames, pieces of messages, the queue.

Each holds the code under test against something simpler: the library's own reader of frames, and
the list of what was sent.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from unittest import mock

from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol, Side, State

from nearfar.secure import outbox as queue
from nearfar.secure.frames import MAX_UNFINISHED, MAX_WHOLE_BYTES, Assembler, Pieces
from nearfar.secure.shaping import BUCKET_BYTES, LEVELS, padded_bytes
from nearfar.websocket import DirectConnection

#: Longer websocket messages are refused; small, so that a fuzzer finds what happens at the limit.
MAX_WEBSOCKET_BYTES = 4096
MAX_MESSAGE_BYTES = 1 << 20
#: Of a message in pieces: longer is only slower.
MAX_PIECES_BYTES = 2048

# Websocket frames


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        pass


class Heard:
    """A listener that keeps what it is told; what a session would see, in order."""

    def __init__(self) -> None:
        self.events: list[bytes | str] = []
        self.ended = 0

    def message_received(self, data: bytes | bytearray) -> None:
        self.events.append(bytes(data))

    def text_received(self) -> None:
        self.events.append("text")

    def message_began(self) -> None:
        self.events.append("began")

    def message_ended(self) -> None:
        self.events.append("ended")

    def batch_ended(self) -> None: ...

    def writing_paused(self) -> None: ...

    def writing_resumed(self) -> None: ...

    def connection_ended(self, problem: object) -> None:
        self.ended += 1


class _Library:
    """The same bytes through the library alone, its frames joined in the plainest way."""

    def __init__(self, side: Side) -> None:
        self.protocol = Protocol(side, state=State.OPEN, max_size=MAX_WEBSOCKET_BYTES)
        self.events: list[bytes | str] = []
        self.written = bytearray()
        self._parts: list[bytes] | None = None

    def feed(self, data: bytes) -> None:
        self.protocol.receive_data(data)
        for event in self.protocol.events_received():
            assert isinstance(event, Frame)
            self._take(event)
        self.written += b"".join(self.protocol.data_to_send())

    def _take(self, frame: Frame) -> None:
        data = bytes(frame.data)
        if frame.opcode is Opcode.TEXT:
            self.events.append("text")
        elif frame.opcode is Opcode.BINARY and frame.fin:
            self.events.append(data)
        elif frame.opcode is Opcode.BINARY:
            self._parts = [data]
            self.events.append("began")
        elif frame.opcode is Opcode.CONT and self._parts is not None:
            self._parts.append(data)
            if frame.fin:
                self.events += ["ended", b"".join(self._parts)]
                self._parts = None


#: A ping: only after a first frame does the direct way begin.
_FIRST = {Side.CLIENT: b"\x89\x00", Side.SERVER: b"\x89\x80" + bytes(4)}


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def websocket(data: bytes) -> None:
    """What a socket gives: the same messages, refusals and answers as from the library alone.

    The first byte chooses the end (odd: the client's), the second is how many bytes come before
    anybody listens, the third the length of the cuts after that, 0 for none.
    """
    if len(data) >= 3:
        # What is longer than that is left to the library, whose limit is the same here.
        with mock.patch("nearfar.websocket._MAX_LENGTH", MAX_WEBSOCKET_BYTES):
            _loop().run_until_complete(_receive(*data[:3], data[3:]))


async def _receive(end_byte: int, early_bytes: int, cut_bytes: int, stream: bytes) -> None:
    side = Side.CLIENT if end_byte & 1 else Side.SERVER
    library = _Library(side)
    protocol = Protocol(side, state=State.OPEN, max_size=MAX_WEBSOCKET_BYTES)
    end, transport, heard = DirectConnection(protocol, ping_interval=None), Transport(), Heard()
    end.connection_made(transport)
    parts = list(_cuts(stream[early_bytes:], cut_bytes or MAX_WEBSOCKET_BYTES * 16))
    before = (_FIRST[side], stream[:early_bytes])
    for part in before:
        end.data_received(part)
        library.feed(part)
    end.listen(heard)
    for part in parts:
        lent = bytearray(part)
        end.data_received(memoryview(lent))
        lent[:] = b"\xff" * len(lent)  # as with TLS's, which is used again
        library.feed(part)
    # A whole message of which the end is missing lies in another place; nothing else may differ.
    assert heard.events == library.events
    assert protocol.state is library.protocol.state
    assert protocol.close_rcvd == library.protocol.close_rcvd
    assert protocol.close_sent == library.protocol.close_sent
    if side is Side.SERVER:  # a client's masks are drawn by chance
        assert transport.written == library.written
    assert len(transport.written) == len(library.written)
    assert end._begun is None or len(end._begun) <= MAX_WEBSOCKET_BYTES + 14
    end.connection_lost(None)
    assert heard.ended == 1
    await asyncio.sleep(0)  # what the library calls soon must not pile up


def _cuts(data: bytes, size_bytes: int) -> Iterator[bytes]:
    for start in range(0, len(data), size_bytes):
        yield data[start : start + size_bytes]


# Pieces


def pieces_of_messages(data: bytes) -> None:
    """Long messages cut up and put together, up to four at once, in any order of turns.

    The first byte is the length of records (8 bytes each, 32 more), the second whether they are
    padded; then for each message its length in two bytes; after a zero length, whose turn it is.
    """
    if len(data) < 2:
        return
    record_bytes = 32 + 8 * data[0]
    sizes: list[int] = []
    position = 2
    while position + 2 <= len(data) and len(sizes) < MAX_UNFINISHED:
        size = int.from_bytes(data[position : position + 2], "little") % MAX_PIECES_BYTES
        position += 2
        if size == 0:
            break
        sizes.append(size)
    sources = [bytearray(index.to_bytes(1, "big") * size) for index, size in enumerate(sizes)]
    open_ones = {
        index: Pieces(
            (memoryview(source)[: len(source) // 3], memoryview(source)[len(source) // 3 :]),
            len(source), stream=index + 1, number=index, record_bytes=record_bytes,
            pad=padded_bytes if data[1] & 1 else None,
        )
        for index, source in enumerate(sources)
    }  # fmt: skip
    expected = {index: one.left_bytes for index, one in open_ones.items()}
    taken = dict.fromkeys(open_ones, 0)
    whole: dict[int, bytes] = {}
    assembler = Assembler()
    turns = iter(data[position:])
    while open_ones:
        turn = next(turns, 0)
        index = sorted(open_ones)[turn % len(open_ones)]
        one = open_ones[index]
        if turn & 0x80 and sources[index]:
            one.own()  # from here on the app may do with its array what it likes
            _overwrite(sources[index])
        plaintext = one.take()
        assert len(plaintext) <= record_bytes
        taken[index] += len(plaintext)
        for arrived in assembler.feed(plaintext, max_message_bytes=MAX_MESSAGE_BYTES):
            assert arrived.announced_stream == index + 1
            if arrived.message is not None:
                assert index not in whole
                whole[index] = bytes(arrived.message)
        assert assembler.unfinished <= MAX_UNFINISHED
        if not one.count:
            assert one.left_bytes == 0
            del open_ones[index]
    assert taken == expected
    assert assembler.unfinished == 0
    assert whole == {index: bytes([index]) * size for index, size in enumerate(sizes)}


def _overwrite(source: bytearray) -> None:
    source[:] = b"\xff" * len(source)


# The queue

#: `balanced`: of the records with tokens; all others are multiples of 128 bytes.
_GRAIN_BYTES = 32
#: Of messages; those beyond 64 KiB leave in pieces, in `strict` those beyond 4 KiB.
_SIZES = (
    4, 60, 500, 4087, 4088, 4089, 5000, MAX_WHOLE_BYTES, MAX_WHOLE_BYTES + 1, 150_000, 400_000
)  # fmt: skip


def outbox(data: bytes) -> None:
    """Messages into the queue while time goes on: each comes out once, in the order of its stream.

    The first byte chooses the shaping; then steps of two bytes. Bit 0 of the first: put one in (its
    stream in bits 1 and 2, whether it is a token in bit 3, whether it ends the stream's answer in
    bit 4, its size in the second byte); otherwise time goes on by so many times 10 ms, and as many
    records as the upper bits say are taken.
    """
    if not data:
        return
    shaping = LEVELS[data[0] % len(LEVELS)]
    box = queue.Outbox(shaping)
    box.max_unfinished_bytes = MAX_MESSAGE_BYTES
    assembler = Assembler()
    sent: dict[int, list[int]] = {}
    came: dict[int, list[int]] = {}
    streams = [0, 1, 2, 3]  # one that has ended is replaced by a new one
    now_s, number = 0.0, 0

    def take(now_s: float | None, *, is_busy: bool) -> bool:
        plaintext = box.next(now_s, is_busy=is_busy)
        if plaintext is None:
            return False
        assert shaping != "strict" or len(plaintext) == queue.STRICT_RECORD_BYTES
        assert shaping != "balanced" or len(plaintext) >= BUCKET_BYTES
        assert shaping != "balanced" or len(plaintext) % _GRAIN_BYTES == 0
        for arrived in assembler.feed(bytes(plaintext), max_message_bytes=MAX_MESSAGE_BYTES):
            if arrived.message is not None:
                which = int.from_bytes(arrived.message[2:4], "big")
                came.setdefault(arrived.message[0], []).append(which)
        return True

    steps = data[1:201]
    for at in range(0, len(steps) - 1, 2):
        what, how = steps[at], steps[at + 1]
        if not what & 1:
            now_s += how / 100.0
            for _ in range(what >> 4):
                take(now_s, is_busy=True)
            continue
        stream = streams[what >> 1 & 3]
        size_bytes = _SIZES[how % len(_SIZES)]
        traits = queue.Traits()
        if stream:  # 0 is the connection's; it has no answers
            traits = queue.Traits(is_paced=bool(what & 8), ends=bool(what & 16))
        if traits.ends:
            streams[what >> 1 & 3] = max(streams) + 1
        message = bytes([stream]) + number.to_bytes(3, "big") + bytes(size_bytes - 4)
        box.put((message,), size_bytes, stream, traits)
        sent.setdefault(stream, []).append(number)
        number += 1
    while take(None, is_busy=False):
        pass
    came.setdefault(0, []).sort()  # these may overtake each other
    assert came == {0: [], **sent}
