"""Established TLS without asyncio's layer: the same bytes, and the same ends of a connection."""

from __future__ import annotations

import asyncio
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK

from benchmarks import wire_ends, wire_server
from cloud_runtime.connection import ServerWebsocket
from cloud_runtime.provision import url_of
from cloud_runtime.server import tls_context
from nearfar import tls as module
from nearfar.secure.identity import ServerIdentity
from nearfar.secure.keys import KeyRing
from nearfar.session import Limits
from nearfar.tls import DirectTls
from sdk.cloud.connection import tls_context as client_tls
from sdk.cloud.websocket import ClientWebsocket
from sdk.config import CloudConfig
from tests.cloud_runtime.support import make_state, run

takes_over = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="asyncio's layer is another one before Python 3.11"
)


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.events: list[str] = []
        self.ended: asyncio.Future[ConnectionClosed] = asyncio.get_running_loop().create_future()

    def message_received(self, data: Any) -> None:
        self.messages.append(bytes(data))

    def text_received(self) -> None: ...
    def message_began(self) -> None: ...
    def message_ended(self) -> None: ...
    def batch_ended(self) -> None: ...

    def writing_paused(self) -> None:
        self.events.append("paused")

    def writing_resumed(self) -> None:
        self.events.append("resumed")

    def connection_ended(self, problem: ConnectionClosed) -> None:
        self.ended.set_result(problem)


class End:
    """One end: its websocket, and what it heard."""

    def __init__(self, websocket: Any) -> None:
        self.websocket = websocket
        self.heard = Heard()
        websocket.listen(self.heard)

    @property
    def socket(self) -> Any:
        """The transport below TLS."""
        return self.websocket.transport._ssl_protocol._transport

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return make_state(tmp_path_factory.mktemp("state"))


def config_of(state: Any, port: int) -> CloudConfig:
    return CloudConfig(
        url=url_of("127.0.0.1", port),
        identity=state.pin.read_text(encoding="ascii").strip(),
        credentials=f"file:{state.client_key}",
        ca_file=state.ca_certificate,
    )


def port_of(server: Any) -> int:
    port: int = next(iter(server.sockets)).getsockname()[1]
    return port


@asynccontextmanager
async def ends(state: Any) -> AsyncIterator[tuple[End, End]]:
    """(client, server) of one connection over loopback."""
    accepted: asyncio.Future[End] = asyncio.get_running_loop().create_future()

    async def handle(websocket: ServerConnection) -> None:
        accepted.set_result(End(websocket))
        await websocket.wait_closed()

    context = tls_context(state.server_chain, state.server_key)
    options: dict[str, Any] = {"compression": None, "max_size": 8 << 20, "close_timeout": 2}
    async with serve(
        handle, "127.0.0.1", 0, ssl=context, create_connection=ServerWebsocket, **options
    ) as server:
        config = config_of(state, port_of(server))
        client = End(
            await connect(
                config.url, ssl=client_tls(config), create_connection=ClientWebsocket, proxy=None,
                **options,
            )
        )  # fmt: skip
        try:
            yield client, await accepted
        finally:
            client.websocket.transport.abort()


def messages(seed: int) -> list[bytes]:
    """Around the sizes of TLS records, reads and the longest frame that is taken whole."""
    sizes = [0, 1, 125, 126, 16_383, 16_384, 16_385, 65_535, 65_536, 196_608, 300_000, 1 << 20]
    return [np.random.default_rng(seed + size).bytes(size) for size in sizes]


def send(end: End, data: bytes) -> None:
    end.websocket.put(data)
    end.websocket.push()


@pytest.mark.parametrize("is_known", [pytest.param(True, marks=takes_over), False])
def test_messages_arrive_as_they_were_sent(state, monkeypatch, is_known):
    if not is_known:
        monkeypatch.setattr(module, "_USED", ("no_such_attribute",))

    async def scenario() -> None:
        async with ends(state) as (client, server):
            for end in (client, server):
                assert isinstance(end.websocket._direct, DirectTls) is is_known
            there, back = messages(1), messages(2)
            for one, other in zip(there, back):  # noqa: B905 (same length)
                for end, data in ((client, one), (server, other)):
                    await end.until(lambda end=end: end.websocket.is_writable)
                    send(end, data)
            await server.until(lambda: len(server.heard.messages) == len(there))
            await client.until(lambda: len(client.heard.messages) == len(back))
            assert server.heard.messages == there
            assert client.heard.messages == back

    run(scenario())


@takes_over
@pytest.mark.parametrize("is_aside", [False, True])
def test_what_lies_in_the_room_leaves_in_its_turn(state, is_aside):
    long = [np.random.default_rng(seed).bytes(150_000 + seed) for seed in range(3)]
    expected = [b"first", long[0], long[1], b"between", b"short", long[2]]

    def lay(end: End, data: bytes) -> None:
        record = end.websocket.room[: len(data)]
        record[:] = data
        end.websocket.put(record)
        end.websocket.room[: len(data)] = bytes(len(data))

    async def scenario() -> None:
        async with ends(state) as (client, server):
            for end, other in ((client, server), (server, client)):
                if is_aside:  # asyncio's layer goes on where this one stands
                    end.websocket._direct._step_aside()
                for data in expected:
                    if len(data) > 4096:
                        lay(end, data)
                    else:
                        end.websocket.put(data)
                end.websocket.push()
                await other.until(lambda other=other: len(other.heard.messages) == len(expected))
                assert other.heard.messages == expected

    run(scenario())


@takes_over
def test_sessions_keep_nothing_that_lies_in_the_shared_buffer(state, monkeypatch):
    genuine = DirectTls.buffer_updated

    def poisoned(self: DirectTls, nbytes: int) -> None:
        genuine(self, nbytes)
        self._plain[:] = bytes([0xAA]) * len(self._plain)
        self.room[:] = bytes([0x55]) * len(self.room)

    monkeypatch.setattr(DirectTls, "buffer_updated", poisoned)

    async def scenario() -> None:
        keys = KeyRing(ServerIdentity.load(state.identity), now_s=time.time())
        echo = wire_server.SessionEcho(keys, Limits())
        context = tls_context(state.server_chain, state.server_key)
        async with serve(
            echo.serve, "127.0.0.1", 0, ssl=context, compression=None, max_size=8 << 20,
            create_connection=ServerWebsocket,
        ) as server:  # fmt: skip
            config = config_of(state, port_of(server))
            session = await wire_ends.Session.open(config, client_tls(config))
            for size_bytes in (8, 1024, 70_000, 150_000, 1 << 20):
                payload = np.frombuffer(np.random.default_rng(size_bytes).bytes(size_bytes), "u1")
                session._send(payload)
                received = await session._next()
                await asyncio.sleep(0)  # what was read together has been handed over
                assert np.array_equal(received.tensors[0], payload)
            await session.close()

    run(scenario())


def test_a_websocket_that_closes_ends_both(state):
    async def scenario() -> None:
        async with ends(state) as (client, server):
            send(server, b"last words")
            await client.until(lambda: client.heard.messages == [b"last words"])
            await client.websocket.close()
            for end in (client, server):
                assert isinstance(await end.heard.ended, ConnectionClosedOK)

    run(scenario())


def leave_tls(end: End) -> None:
    end.websocket.transport.close()


def leave_tcp(end: End) -> None:
    end.socket.get_extra_info("socket").shutdown(socket.SHUT_WR)


def vanish(end: End) -> None:
    end.websocket.transport.abort()


@takes_over
@pytest.mark.parametrize("leave", [leave_tls, leave_tcp, vanish])
def test_an_end_that_leaves_without_a_word_ends_the_other(state, leave):
    async def scenario() -> None:
        async with ends(state) as (client, server):
            send(server, b"before")
            await client.until(lambda: bool(client.heard.messages))
            leave(server)
            problem = await client.heard.ended
            assert problem.rcvd is None  # no close frame came
            assert not client.websocket.is_writable

    run(scenario())


@takes_over
def test_a_record_that_is_damaged_ends_the_connection(state):
    async def scenario() -> None:
        async with ends(state) as (client, server):
            send(server, b"good")
            await client.until(lambda: bool(client.heard.messages))
            server.socket.write(bytes.fromhex("1703030020") + bytes(32))
            problem = await client.heard.ended
            assert isinstance(problem.__cause__, ssl.SSLError)
            assert client.heard.messages == [b"good"]
            await server.heard.ended

    run(scenario())


@takes_over
@pytest.mark.parametrize("then_closes", [False, True])
def test_an_end_that_does_not_read_stops_the_other(state, then_closes):
    data = np.random.default_rng(3).bytes(100_000)

    async def scenario() -> None:
        async with ends(state) as (client, server):
            client.socket.pause_reading()
            sent = 0
            while server.websocket.is_writable:
                send(server, data)
                sent += 1
                await asyncio.sleep(0)
            assert server.heard.events == ["paused"]
            closing = None
            if then_closes:
                closing = asyncio.ensure_future(server.websocket.close())
                await asyncio.sleep(0)
            client.socket.resume_reading()
            await client.until(lambda: len(client.heard.messages) == sent)
            assert set(client.heard.messages) == {data}
            if closing is not None:
                await closing
                assert isinstance(await client.heard.ended, ConnectionClosedOK)
            else:
                await server.until(lambda: server.heard.events == ["paused", "resumed"])
                send(client, b"and back")
                await server.until(lambda: server.heard.messages == [b"and back"])

    run(scenario())


def test_writing_after_the_end_does_nothing(state):
    async def scenario() -> None:
        async with ends(state) as (client, server):
            client.websocket.transport.abort()
            send(client, b"too late")
            await server.heard.ended
            send(client, b"later still")
            assert server.heard.messages == []

    run(scenario())


def test_a_connection_without_tls_stays_as_it_is(tmp_path: Path):
    async def scenario() -> None:
        async def handle(websocket: ServerConnection) -> None:
            await websocket.send(b"plain")
            await websocket.wait_closed()

        async with serve(handle, "127.0.0.1", 0) as server:
            url = f"ws://127.0.0.1:{port_of(server)}"
            end = End(await connect(url, create_connection=ClientWebsocket, proxy=None))
            await end.until(lambda: end.heard.messages == [b"plain"])
            assert end.websocket._direct is None
            await end.websocket.close()

    run(scenario())
