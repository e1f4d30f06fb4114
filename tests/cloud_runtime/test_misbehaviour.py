"""A real server on loopback: clients that break the rules, stay silent or do not read."""

from __future__ import annotations

import asyncio
import logging
import socket
import time

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from cloud_runtime.settings import ServerSettings
from nearfar.wire.messages import Cancel, ListModels, Result
from tests.cloud_runtime.asking import X, raw_websocket
from tests.cloud_runtime.support import ScriptedModel, WireClient, run, running, served, until


@pytest.mark.parametrize("data", [b"", b"\x00", b"\xff" * 5000, b"\x02" + b"\x00" * 2400])
def test_malformed_frames_close_the_connection_but_not_the_server(state, data):
    async def main() -> None:
        async with running(served(ScriptedModel()), state) as server:
            websocket = await raw_websocket(server)
            await websocket.recv()
            await websocket.send(data)
            with pytest.raises(ConnectionClosed):
                await websocket.recv()
            async with WireClient.connect(server) as client:
                await client.infer("scripted", {"x": X})

    run(main())


def test_a_record_that_was_changed_on_the_way_closes_the_connection(state):
    async def main() -> None:
        async with running(served(ScriptedModel()), state) as server:
            async with WireClient.connect(server) as client:
                client.session.send(ListModels(stream=client.session.next_stream))
                (record,) = client.session.data_to_send()
                await client.websocket.send(record[:-1] + bytes([record[-1] ^ 1]))
                await client.websocket.wait_closed()
            async with WireClient.connect(server) as client:
                await client.infer("scripted", {"x": X})

    run(main())


def test_text_frames_are_refused(state):
    async def main() -> None:
        async with running(served(ScriptedModel()), state) as server:
            websocket = await raw_websocket(server)
            await websocket.recv()
            await websocket.send("hello")
            with pytest.raises(ConnectionClosed) as caught:
                await websocket.recv()
            assert caught.value.rcvd.code == 1003

    run(main())


def test_a_slow_handshake_is_dropped(state):
    settings = ServerSettings(handshake_timeout_s=0.2)

    async def main() -> None:
        async with running(served(ScriptedModel()), state, settings) as server:
            started_s = time.monotonic()
            websocket = await raw_websocket(server)
            await websocket.recv()
            with pytest.raises(ConnectionClosed):
                await websocket.recv()
            assert time.monotonic() - started_s < 5

    run(main())


def test_an_admitted_client_may_stay_silent_longer_than_the_handshake_may_take(state):
    settings = ServerSettings(handshake_timeout_s=0.5)

    async def main() -> None:
        async with (
            running(served(ScriptedModel()), state, settings) as server,
            WireClient.connect(server) as client,
        ):
            await asyncio.sleep(0.8)
            await client.infer("scripted", {"x": X})

    run(main())


def test_a_message_that_trickles_in_is_dropped(state):
    settings = ServerSettings(message_timeout_s=0.2)

    async def fragments():
        while True:
            yield b"\x00"
            await asyncio.sleep(0.02)

    async def main() -> None:
        async with running(served(ScriptedModel()), state, settings) as server:
            websocket = await raw_websocket(server)
            await websocket.recv()
            with pytest.raises(ConnectionClosed):
                await websocket.send(fragments())

    run(main())


def test_an_admitted_client_that_trickles_is_dropped_though_it_answers_pings(state, caplog):
    caplog.set_level(logging.INFO, logger="cloud_runtime.access")
    settings = ServerSettings(message_timeout_s=0.5, ping_interval_s=0.05, ping_timeout_s=0.3)

    async def fragments():
        while True:
            yield b"\x00"
            await asyncio.sleep(0.02)

    async def main() -> None:
        async with running(served(ScriptedModel()), state, settings) as server:
            async with WireClient.connect(server) as client:
                with pytest.raises(ConnectionClosed):
                    await client.websocket.send(fragments())
            await until(lambda: not server.server.connections)
        assert "(message took too long)" in caplog.text

    run(main())


def test_a_stranger_cannot_make_the_server_hold_large_messages(state):
    async def main() -> None:
        async with running(served(ScriptedModel()), state) as server:
            websocket = await raw_websocket(server)
            await websocket.recv()
            with pytest.raises(ConnectionClosed):  # noqa: PT012 (whichever notices first)
                await websocket.send(b"\x00" * (8 << 20))
                await websocket.recv()

    run(main())


def test_a_client_that_never_reads_is_dropped_and_frees_its_slot(state):
    settings = ServerSettings(write_timeout_s=0.3)

    class Large(ScriptedModel):
        def infer(self, feeds):
            self.runs += 1
            return {"y": np.zeros(15 << 20, np.uint8)}

    async def main() -> None:
        model = Large()
        async with running(served(model), state, settings) as server:
            async with WireClient.connect(server) as client:
                client.websocket.transport.pause_reading()
                for _ in range(4):
                    await client.start_infer("scripted", {"x": X})
                await until(lambda: not server.server.connections)
                client.websocket.transport.abort()
            async with WireClient.connect(server) as client:
                await client.infer("scripted", {"x": X})

    run(main())


def test_requests_wait_while_their_client_does_not_read_and_can_be_cancelled(state):
    class Large(ScriptedModel):
        def infer(self, feeds):
            self.runs += 1
            return {"y": np.zeros(15 << 20, np.uint8)}

    async def main() -> None:
        model = Large()
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            # Much less than an answer, whatever this machine's buffers grow to.
            socket_ = client.websocket.transport.get_extra_info("socket")
            socket_.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            client.websocket.transport.pause_reading()
            await client.start_infer("scripted", {"x": X})
            (connection,) = server.server.connections
            await until(lambda: not connection._transport.is_writable)
            streams = [await client.start_infer("scripted", {"x": X}) for _ in range(3)]
            await until(lambda: len(connection._streams) == 3)
            await client.send(Cancel(stream=streams[0]))
            await until(lambda: connection._streams[streams[0]].aborted is not None)
            assert model.runs == 1
            client.websocket.transport.resume_reading()
            for stream in streams[1:]:
                message, _ = await client.next(stream)
                assert isinstance(message, Result)
            assert model.runs == 3

    run(main())
