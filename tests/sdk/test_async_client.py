"""AsyncClient: the same as Client, on the app's event loop."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from nearfar.errors import DeadlineExceeded, EngineError, InvalidInput, PolicyDenied
from nearfar.wire import messages as wire
from sdk import AsyncClient
from tests.support.scripted_cloud import STORY, TENSOR, tell
from tests.support.scripted_edge import ScriptedEdge, put_into
from tests.support.two_routes import POLICY, X


@pytest.fixture
def run(cloud, tmp_path):
    """Runs a coroutine function with a client; nothing may be left behind afterwards."""
    (tmp_path / "store").mkdir()

    def runner(use):
        async def body():
            async with AsyncClient(
                cloud=cloud.config(), models=tmp_path / "store", policy=POLICY, sensitivity="public"
            ) as client:
                client.device = put_into(client, ScriptedEdge((TENSOR, STORY)))
                return await use(client)

        async def limited():
            result = await asyncio.wait_for(body(), 20)
            await asyncio.sleep(0.01)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, left
            assert not [t for t in threading.enumerate() if t.name.startswith("nearfar")]
            return result

        return asyncio.run(limited())

    return runner


def test_both_routes_answer(run):
    async def use(client):
        here = await client.infer("tensor", X, mode="edge_only")
        there = await client.infer("tensor", X, mode="cloud_only")
        return here, there

    here, there = run(use)
    assert (here.route.name, there.route.name) == ("edge", "cloud")
    assert np.array_equal(there.outputs["y"], X["x"])
    assert here.bytes_sent == 0 < there.bytes_sent


def test_many_requests_at_once_on_both_routes(run, cloud):
    async def use(client):
        async def ask(number: int) -> float:
            mode = "cloud_only" if number % 2 else "edge_only"
            x = {"x": np.full((1, 4), number, np.float32)}
            result = await client.infer("tensor", x, mode=mode)
            return float(result.outputs["y"][0, 0])

        return await asyncio.gather(*(ask(n) for n in range(100)))

    assert run(use) == [float(n) for n in range(100)]
    assert cloud.connections == 1


def test_streams_from_both_routes_at_once(run):
    async def use(client):
        async def read(mode):
            stream = await client.generate("story", "Once", max_new_tokens=30, mode=mode)
            texts = [chunk.text async for chunk in stream]
            assert stream.finish_reason == "length"
            return len(texts), stream.route.name

        return await asyncio.gather(read("edge_only"), read("cloud_only"), read("cloud_only"))

    assert run(use) == [(30, "edge"), (30, "cloud"), (30, "cloud")]


def test_a_cut_answer_goes_on_on_the_device(run, cloud):
    cloud.behaviour = lambda s, m, t: tell(s, m, 12, cut_after=5)

    async def use(client):
        stream = await client.generate("story", "Once", max_new_tokens=12, mode="prefer_cloud")
        return [chunk async for chunk in stream], stream.route.path

    chunks, path = run(use)
    assert path == "cloud → edge"
    assert [c.handover for c in chunks].index(True) == 5
    assert len(chunks) == 12


def test_cancelling_a_task_cancels_its_request(run, cloud):
    def hang(session, message, tensors):
        yield 30

    cloud.behaviour = hang

    async def use(client):
        task = asyncio.ensure_future(client.infer("tensor", X, mode="cloud_only"))
        await asyncio.to_thread(cloud.wait_for, wire.Infer)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(cloud.wait_for, wire.Cancel)

    run(use)


def test_cancelling_a_reader_stops_the_device(run):
    async def use(client):
        client.device.pause_s = 0.01

        async def read():
            async for _ in await client.generate(
                "story", "x", max_new_tokens=400, mode="edge_only"
            ):
                started.set()

        started = asyncio.Event()
        task = asyncio.ensure_future(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.close()
        return client.device.cancelled

    assert run(use) <= 1


def test_deadlines_and_policy_hold(run, cloud):
    async def use(client):
        client.device.pause_s = 0.05
        with pytest.raises(DeadlineExceeded):
            await client.infer("tensor", X, mode="edge_only", deadline_ms=10)
        with pytest.raises(PolicyDenied):
            await client.infer("tensor", X, sensitivity="secret")
        client.device.fail_with = EngineError("broken")
        with pytest.raises(EngineError):
            await client.infer("tensor", X, sensitivity="personal")

    run(use)
    assert cloud.saw(wire.Infer) == []


def test_explain_models_and_warm_up(run, cloud):
    async def use(client):
        assert (await client.explain("tensor", feeds=X)).route in ("edge", "cloud")
        assert cloud.connections == 0
        await client.warm_up("tensor")
        names = [info.name for info in await client.models(refresh=True)]
        assert names == ["embedder", "story", "tensor"]

    run(use)


def test_a_client_belongs_to_one_event_loop(cloud):
    client = AsyncClient(cloud=cloud.config(), policy=POLICY, sensitivity="public")

    async def use():
        await client.infer("tensor", X)

    async def use_and_close():
        with pytest.raises(InvalidInput, match="two event loops"):
            await use()

    async def first():
        await use()
        await client._link.close()

    asyncio.run(first())
    asyncio.run(use_and_close())


def test_a_closed_client_says_so(cloud):
    async def body():
        client = AsyncClient(cloud=cloud.config(), policy=POLICY, sensitivity="public")
        await client.close()
        with pytest.raises(InvalidInput, match="closed"):
            await client.infer("tensor", X)

    asyncio.run(body())
