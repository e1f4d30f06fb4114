"""A real server on loopback: cancellation, deadlines, load, repeated requests."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from cloud_runtime.settings import ServerSettings
from nearfar.errors import Cancelled, DeadlineExceeded, Overloaded
from nearfar.wire.retention import RetentionLimits
from tests.cloud_runtime.asking import X, chat
from tests.cloud_runtime.support import ScriptedModel, WireClient, run, running, served, until


def test_cancelling_a_running_answer_frees_its_slot(state):
    async def main() -> None:
        model = chat(token_s=0.002)
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            stream = await client.start_generate("chat", tokens=100_000)
            await client.next(stream)
            await client.cancel(stream)
            with pytest.raises(Cancelled):
                await client.collect(stream)
            short = await client.collect(await client.start_generate("chat", tokens=3))
            assert short.fin.count == 4
        assert model.tokens < 1000

    run(main())


def test_a_cancel_right_behind_its_request_is_not_lost(state):
    async def main() -> None:
        model = chat(token_s=0.002)
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            for _ in range(5):
                stream = await client.start_generate("chat", tokens=100_000)
                await client.cancel(stream)
                with pytest.raises(Cancelled):
                    await client.collect(stream)
            await until(lambda: not model.running)

    run(main())


def test_a_cancelled_waiting_request_never_runs(state):
    async def main() -> None:
        model = ScriptedModel()
        model.hold.set()
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            first = await client.start_infer("scripted", {"x": X})
            await until(lambda: model.running)
            second = await client.start_infer("scripted", {"x": X})
            await client.cancel(second)
            with pytest.raises(Cancelled):
                await client.next(second)
            model.hold.clear()
            await client.next(first)
            await client.infer("scripted", {"x": X})
        assert model.runs == 2

    run(main())


@pytest.mark.parametrize("keep_s", [0.0, 0.2])
def test_a_client_that_vanishes_frees_its_slot_when_retention_ends(state, keep_s):
    settings = ServerSettings(retention=RetentionLimits(keep_s=keep_s))

    async def main() -> None:
        model = chat(token_s=0.002)
        async with running(served(model), state, settings) as server:
            async with WireClient.connect(server) as client:
                await client.next(await client.start_generate("chat", tokens=100_000))
                client.websocket.transport.abort()
            await until(lambda: not model.running)
            async with WireClient.connect(server) as client:
                await client.collect(await client.start_generate("chat", tokens=2))

    run(main())


def test_a_deadline_that_passes_in_the_queue_is_reported_in_time(state):
    async def main() -> None:
        model = ScriptedModel()
        model.hold.set()
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            first = await client.start_infer("scripted", {"x": X})
            await until(lambda: model.running)
            started_s = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await client.infer("scripted", {"x": X}, deadline_ms=80.0)
            assert 0.06 < time.monotonic() - started_s < 2.0
            model.hold.clear()
            await client.next(first)
        assert model.runs == 1

    run(main())


def test_a_deadline_that_passes_in_the_engine_is_reported_in_time(state):
    async def main() -> None:
        model = ScriptedModel()
        model.hold.set()
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            with pytest.raises(DeadlineExceeded):
                await client.infer("scripted", {"x": X}, deadline_ms=50.0)
            assert model.running
            model.hold.clear()

    run(main())


def test_a_deadline_that_passes_mid_answer_ends_it_and_frees_the_slot(state):
    async def main() -> None:
        model = chat(token_s=0.005)
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            stream = await client.start_generate("chat", tokens=100_000, deadline_ms=100.0)
            message, _ = await client.next(stream)
            assert message.text == "t0 "
            with pytest.raises(DeadlineExceeded):
                await client.collect(stream)
            await until(lambda: not model.running)

    run(main())


def test_a_deadline_already_passed_runs_nothing(state):
    async def main() -> None:
        model = ScriptedModel()
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            with pytest.raises(DeadlineExceeded):
                await client.infer("scripted", {"x": X}, deadline_ms=0.0)
        assert model.runs == 0

    run(main())


def test_more_requests_than_may_wait_are_told_to_come_back(state):
    async def main() -> None:
        model = ScriptedModel()
        model.hold.set()
        models = served(model, max_waiting=2)
        async with running(models, state) as server, WireClient.connect(server) as client:
            streams = [await client.start_infer("scripted", {"x": X}) for _ in range(3)]
            with pytest.raises(Overloaded, match="run or wait already"):
                await client.infer("scripted", {"x": X})
            model.hold.clear()
            for stream in streams:
                await client.next(stream)
            await client.infer("scripted", {"x": X})

    run(main())


def test_urgent_requests_go_before_those_that_can_wait(state):
    async def main() -> None:
        model, told = chat(), []
        model.hold.set()
        async with running(served(model), state) as server, WireClient.connect(server) as client:

            async def ask(priority: int) -> None:
                stream = await client.start_generate("chat", tokens=1, priority=priority)
                await client.collect(stream)
                told.append(priority)

            first = asyncio.create_task(ask(5))
            await until(lambda: model.running)
            executor = server.server._services.models.get("chat").executor
            others = []
            for waiting, priority in enumerate((0, 5, 9), 1):
                others.append(asyncio.create_task(ask(priority)))
                await until(lambda waiting=waiting: executor._gate.state().waiting == waiting)
            model.hold.clear()
            await asyncio.gather(first, *others)
        assert told == [5, 9, 5, 0]

    run(main())


def test_a_repeated_request_is_computed_once(state):
    async def main() -> None:
        model = ScriptedModel(delay_s=0.05)
        async with running(served(model), state) as server:
            request_id = b"i" * 16
            async with WireClient.connect(server) as client:
                await client.start_infer("scripted", {"x": X}, request_id=request_id)
                await until(lambda: model.running)
                client.websocket.transport.abort()
            async with WireClient.connect(server) as client:
                _, outputs = await client.infer("scripted", {"x": X}, request_id=request_id)
                np.testing.assert_array_equal(outputs["y"], X)
                await client.infer("scripted", {"x": X}, request_id=request_id)
        assert model.runs == 1

    run(main())
