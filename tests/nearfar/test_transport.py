"""Both ends of a connection joined by their transports, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np

from nearfar import transport as module
from nearfar.session import Limits, Received
from nearfar.transport import TextReceived, Transport
from nearfar.wire import messages as wire
from tests.support.wire import Pair, infer, result

LARGE = np.arange(100_000, dtype=np.float64)  # 800 KB: five pieces
SMALL = np.arange(8, dtype=np.float32)


class Wire:
    """Where a websocket stands: keeps records until they are delivered."""

    def __init__(self) -> None:
        self.is_writable = self.is_open = True
        self.room = memoryview(bytearray(1 << 18))
        self.parts: list[bytes] = []
        self.batches: list[list[bytes]] = []
        self.listener: Any = None
        self.transport = self

    def listen(self, listener: Any) -> None:
        self.listener = listener

    def put(self, record: Any) -> None:
        self.parts.append(bytes(record))

    def push(self) -> None:
        if self.parts:
            self.batches.append(self.parts)
            self.parts = []

    async def until_writable(self) -> None:
        await asyncio.sleep(0)


class End:
    """The owner of one transport."""

    def __init__(self, session: Any, **options: Any) -> None:
        self.wire = Wire()
        self.received: list[Received] = []
        self.failures: list[Exception] = []
        self.late: list[str] = []
        self.answers = False
        self.transport = Transport(
            self.wire,
            session,
            self,
            **{"message_timeout_s": 30.0} | options,  # type: ignore[arg-type]
        )
        self.transport.start()

    def on_received(self, received: Received) -> None:
        self.received.append(received)
        if self.answers:
            stream = received.message.stream  # type: ignore[union-attr]
            self.transport.send(result(stream, {"y": SMALL}), [SMALL])

    def on_failed(self, error: Exception) -> None:
        self.failures.append(error)

    def on_late(self, reason: str) -> None:
        self.late.append(reason)

    def on_ended(self, _: Any) -> None:
        self.late.append("ended")

    def take(self, batch: list[bytes]) -> None:
        for record in batch:
            self.wire.listener.message_received(record)
        self.wire.listener.batch_ended()


def ends(**options: Any) -> tuple[End, End, Pair]:
    pair = Pair.connected(Limits())
    return End(pair.client), End(pair.server, **options), pair


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)


def ask(client: End, pair: Pair, array: np.ndarray = SMALL) -> None:
    client.transport.send(infer(pair.client.next_stream, {"x": array}), [array])


def test_a_message_is_written_before_send_returns() -> None:
    async def body() -> None:
        client, server, pair = ends()
        ask(client, pair)
        (batch,) = client.wire.batches
        server.take(batch)
        assert [one.message.stream for one in server.received] == [1]  # type: ignore[union-attr]

    run(body())


def test_many_in_flight_leave_together_and_not_later_than_the_next_turn() -> None:
    async def body() -> None:
        client, server, pair = ends()
        for _ in range(module._CROWD + 3):
            ask(client, pair)
        written = len(client.wire.batches)
        assert written == module._CROWD  # each of the first ones at once
        await asyncio.sleep(0)
        assert len(client.wire.batches) == written + 1
        assert len(client.wire.batches[-1]) == 1  # they share a record
        for batch in client.wire.batches:
            server.take(batch)
        assert len(server.received) == module._CROWD + 3

    run(body())


def test_the_other_end_need_not_wait_for_the_last_of_many() -> None:
    async def body() -> None:
        client, _, pair = ends()
        for _ in range(module._CROWD + module._SHARE):
            ask(client, pair)
        assert len(client.wire.batches) == module._CROWD + 1

    run(body())


def test_answers_to_one_batch_leave_together() -> None:
    async def body() -> None:
        client, server, pair = ends()
        server.answers = True
        for _ in range(3):
            ask(client, pair)
        server.take([record for batch in client.wire.batches for record in batch])
        (batch,) = server.wire.batches
        client.take(batch)
        assert len(client.received) == 3

    run(body())


def test_a_long_answer_does_not_wait_for_its_batch_and_is_not_copied() -> None:
    async def body() -> None:
        client, server, pair = ends()
        copied: list[bool] = []
        send = pair.server.send

        def watch(message: Any, tensors: Any = (), *, borrow: bool = False) -> int:
            copied.append(not borrow)
            return send(message, tensors, borrow=borrow)

        pair.server.send = watch  # type: ignore[method-assign]
        ask(client, pair)
        (batch,) = client.wire.batches
        for record in batch:
            server.wire.listener.message_received(record)
        server.transport.send(result(1, {"y": LARGE}), [LARGE])
        assert copied == [False]
        assert server.wire.batches  # written before the batch has ended
        for written in server.wire.batches:
            client.take(written)
        assert np.array_equal(client.received[0].tensors[0], LARGE)

    run(body())


def test_what_waits_for_a_slow_reader_is_no_longer_the_callers_array() -> None:
    async def body() -> None:
        client, server, pair = ends()
        client.wire.is_writable = False
        array = LARGE.copy()
        ask(client, pair, array)
        array[:] = -1.0
        client.wire.is_writable = True
        client.wire.listener.writing_resumed()
        for batch in client.wire.batches:
            server.take(batch)
        assert np.array_equal(server.received[0].tensors[0], LARGE)

    run(body())


def test_a_reader_that_takes_nothing_is_late() -> None:
    async def body() -> None:
        _, server, _ = ends(write_timeout_s=0.01)
        server.wire.listener.writing_paused()
        await asyncio.sleep(0.05)
        assert server.late == ["the other end reads too slowly"]

    run(body())


def test_pieces_that_stop_coming_are_late(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_SLOWEST_BYTES_PER_S", 1e12)

    async def body() -> None:
        client, server, pair = ends(message_timeout_s=0.3)
        ask(client, pair, LARGE)
        pieces = [record for batch in client.wire.batches for record in batch]
        server.take(pieces[:2])
        await asyncio.sleep(0.05)
        assert server.late == []
        await asyncio.sleep(0.5)
        assert server.late == ["message took too long"]

    run(body())


def test_pieces_that_keep_coming_are_not_late(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_SLOWEST_BYTES_PER_S", LARGE.nbytes / 30.0)

    async def body() -> None:
        client, server, pair = ends(message_timeout_s=0.02)
        ask(client, pair, LARGE)
        pieces = [record for batch in client.wire.batches for record in batch]
        server.take(pieces[:2])
        await asyncio.sleep(0.05)  # longer than the limit: the message is long
        server.take(pieces[2:])
        assert server.late == []
        assert np.array_equal(server.received[0].tensors[0], LARGE)

    run(body())


def test_after_a_failure_nothing_more_is_received() -> None:
    async def body() -> None:
        client, server, pair = ends()
        ask(client, pair)
        ((record,),) = client.wire.batches
        server.take([record[:-1] + b"?", record])
        assert len(server.failures) == 1
        assert server.received == []
        server.wire.listener.text_received()
        assert len(server.failures) == 1

    run(body())


def test_text_is_a_failure() -> None:
    async def body() -> None:
        client, _, _ = ends()
        client.wire.listener.text_received()
        assert isinstance(client.failures[0], TextReceived)

    run(body())


def test_flushing_everything_ends_with_a_connection_that_closes() -> None:
    async def body() -> None:
        client, _, pair = ends()
        client.wire.is_writable = False
        ask(client, pair, LARGE)
        client.wire.is_open = False
        await asyncio.wait_for(client.transport.flush_all(), 5.0)
        assert client.wire.batches == []

    run(body())


def test_a_closed_transport_is_silent() -> None:
    async def body() -> None:
        client, server, pair = ends()
        client.transport.close()
        ask(client, pair)
        assert client.wire.batches == []
        server.transport.send(wire.GoAway(last_stream=0))
        client.take(server.wire.batches[0])
        assert client.received == []

    run(body())
