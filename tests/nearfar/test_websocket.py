"""The direct websocket reads and writes what the library would, however the bytes are cut."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol, Side, State

from nearfar.websocket import DirectConnection

LIMIT = 200_000


class FakeTransport(asyncio.Transport):
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
    """A listener that writes down what it is told."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.events: list[str] = []
        self.batches = 0

    def message_received(self, data: bytes | bytearray) -> None:
        self.messages.append(bytes(data))

    def text_received(self) -> None:
        self.events.append("text")

    def message_began(self) -> None:
        self.events.append("began")

    def message_ended(self) -> None:
        self.events.append("ended")

    def batch_ended(self) -> None:
        self.batches += 1

    def writing_paused(self) -> None:
        self.events.append("paused")

    def writing_resumed(self) -> None:
        self.events.append("resumed")

    def connection_ended(self, problem: Any) -> None:
        self.events.append("closed")


def connected(side: Side, body: Callable[[DirectConnection, FakeTransport, Heard], None]) -> None:
    """Run a body with one open end."""

    async def run() -> None:
        end = DirectConnection(Protocol(side, state=State.OPEN, max_size=LIMIT), ping_interval=None)
        transport, heard = FakeTransport(), Heard()
        end.connection_made(transport)
        body(end, transport, heard)

    asyncio.run(run())


def other(side: Side) -> Protocol:
    peer = Side.CLIENT if side is Side.SERVER else Side.SERVER
    return Protocol(peer, state=State.OPEN, max_size=LIMIT)


def said(protocol: Protocol) -> bytes:
    return b"".join(protocol.data_to_send())


BINARY = st.one_of(
    st.binary(max_size=300),
    st.sampled_from([0, 125, 126, 127, 65535, 65536, 70_000, 190_000, 199_000]).map(
        lambda n: b"n" * n
    ),
)
#: What a peer may send: a message, one in fragments with a ping between them, or a ping.
SENT = st.one_of(
    st.tuples(st.just("whole"), BINARY),
    st.tuples(st.just("fragments"), st.lists(st.binary(max_size=40), min_size=2, max_size=4)),
    st.tuples(st.just("ping"), st.binary(max_size=8)),
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(SENT, max_size=6),
    st.lists(st.integers(1, 70_000), max_size=6),
    st.integers(0, 40),
    st.sampled_from([Side.SERVER, Side.CLIENT]),
    st.booleans(),
)
def test_messages_come_as_sent_however_the_bytes_are_cut(
    sent: list[tuple[str, Any]], cuts: list[int], early_bytes: int, side: Side, is_lent: bool
) -> None:
    peer, expected = other(side), []
    for kind, content in sent:
        if kind == "whole":
            peer.send_binary(content)
            expected.append(content)
        elif kind == "ping":
            peer.send_ping(content)
        else:
            peer.send_binary(content[0], fin=False)
            for part in content[1:-1]:
                peer.send_continuation(part, fin=False)
                peer.send_ping(b"between")
            peer.send_continuation(content[-1], fin=True)
            expected.append(b"".join(content))
    stream = said(peer)

    def body(end: DirectConnection, transport: FakeTransport, heard: Heard) -> None:
        end.data_received(stream[:early_bytes])  # before anybody listens
        end.listen(heard)
        position = early_bytes
        for cut in (*cuts, len(stream)):
            if position < len(stream):
                data: Any = stream[position : position + cut]
                if is_lent:  # as from TLS: valid until the call returns
                    data = memoryview(bytearray(data))
                end.data_received(data)
                if is_lent:
                    data[:] = bytes([0xAA]) * len(data)
                position += cut
        assert heard.messages == expected
        pongs = said_by(transport, other(side))
        assert all(frame.opcode is Opcode.PONG for frame in pongs)
        pings = sum(kind == "ping" for kind, _ in sent)
        pings += sum(max(0, len(content) - 2) for kind, content in sent if kind == "fragments")
        assert len(pongs) == pings

    connected(side, body)


def said_by(transport: FakeTransport, reader: Protocol) -> list[Frame]:
    """The frames that were written, as the library at the other end reads them."""
    if transport.written:
        reader.receive_data(bytes(transport.written))
    return [event for event in reader.events_received() if isinstance(event, Frame)]


@settings(deadline=None, max_examples=60)
@given(st.lists(BINARY, min_size=1, max_size=5), st.sampled_from([Side.SERVER, Side.CLIENT]))
def test_the_library_reads_what_was_written(records: list[bytes], side: Side) -> None:
    def body(end: DirectConnection, transport: FakeTransport, heard: Heard) -> None:
        end.listen(heard)
        for record in records:
            end.put(record)
        end.push()
        frames = said_by(transport, other(side))
        assert [bytes(frame.data) for frame in frames] == records
        assert {(frame.opcode, frame.fin) for frame in frames} == {(Opcode.BINARY, True)}

    connected(side, body)


@pytest.mark.parametrize(
    ("side", "stream", "code"),
    [
        (Side.SERVER, b"\x82\x20" + bytes(60), 1002),  # not masked
        (Side.CLIENT, b"\x82\xa0" + bytes(60), 1002),  # masked
        (Side.CLIENT, b"\xc2\x20" + bytes(60), 1002),  # a reserved bit
        (Side.CLIENT, b"\x83\x20" + bytes(60), 1002),  # an opcode that is none
        (Side.CLIENT, b"\x80\x20" + bytes(60), 1002),  # the end of nothing
        (Side.CLIENT, b"\x82\x7f" + (LIMIT + 1).to_bytes(8, "big") + bytes(60), 1009),
    ],
)
def test_what_is_wrong_is_refused_by_the_library(side: Side, stream: bytes, code: int) -> None:
    def body(end: DirectConnection, transport: FakeTransport, heard: Heard) -> None:
        end.listen(heard)
        end.data_received(stream)
        assert heard.messages == []
        assert not end.is_open
        assert not end.is_writable
        (frame,) = said_by(transport, other(side))
        assert frame.opcode is Opcode.CLOSE
        assert int.from_bytes(frame.data[:2], "big") == code

    connected(side, body)


def test_a_whole_message_inside_a_fragmented_one_is_refused() -> None:
    peer = other(Side.CLIENT)
    peer.send_binary(b"begin", fin=False)
    stream = said(peer)
    intruder = other(Side.CLIENT)
    intruder.send_binary(b"x" * 40)

    def body(end: DirectConnection, transport: FakeTransport, heard: Heard) -> None:
        end.listen(heard)
        end.data_received(stream)
        end.data_received(said(intruder))
        assert heard.messages == []
        assert not end.is_open

    connected(Side.CLIENT, body)


def test_text_is_told_at_its_first_fragment() -> None:
    peer = other(Side.CLIENT)
    peer.send_text(b"hello", fin=False)

    def body(end: DirectConnection, transport: FakeTransport, heard: Heard) -> None:
        end.listen(heard)
        end.data_received(said(peer))
        assert heard.events == ["text"]

    connected(Side.CLIENT, body)


def test_a_whole_message_inside_a_fragmented_text_is_refused() -> None:
    peer = other(Side.CLIENT)
    peer.send_text(b"hello", fin=False)
    text = said(peer)
    intruder = other(Side.CLIENT)
    intruder.send_binary(b"x" * 40)

    def body(end: DirectConnection, transport: FakeTransport, heard: Heard) -> None:
        end.listen(heard)
        # The first piece is the library's; from the next one on frames are read directly.
        end.data_received(text)
        end.data_received(said(intruder))
        assert heard.messages == []
        assert not end.is_open

    connected(Side.CLIENT, body)


def test_after_a_fragmented_text_whole_messages_are_taken_again() -> None:
    peer = other(Side.CLIENT)
    peer.send_text(b"hel", fin=False)
    peer.send_continuation(b"lo", fin=True)
    text = said(peer)
    peer.send_binary(b"x" * 40)

    def body(end: DirectConnection, transport: FakeTransport, heard: Heard) -> None:
        end.listen(heard)
        end.data_received(text)
        end.data_received(said(peer))
        assert heard.messages == [b"x" * 40]
        assert end.is_open

    connected(Side.CLIENT, body)


def test_a_peer_that_does_not_read_is_told_and_the_end_as_well() -> None:
    def body(end: DirectConnection, transport: FakeTransport, heard: Heard) -> None:
        end.listen(heard)
        end.pause_writing()
        assert not end.is_writable
        end.resume_writing()
        assert end.is_writable
        end.connection_lost(None)
        assert heard.events == ["paused", "resumed", "closed"]

    connected(Side.SERVER, body)
