"""Hedged calls: the client, a scripted device and a scripted cloud; and a frozen real cloud."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest

from nearfar.errors import DeadlineExceeded, EngineError
from nearfar.wire import messages as wire
from sdk import AsyncClient, Client, CloudConfig, Config
from sdk.config import RoutingConfig
from sdk.quickstart.cloud_process import CloudProcess
from sdk.routing import BreakerState
from sdk.routing.hedging import HedgePlan, plan
from tests.support import tiny
from tests.support.scripted_cloud import TENSOR, answer_infer
from tests.support.scripted_edge import ScriptedEdge, put_into
from tests.support.two_routes import POLICY, X, hang, learn


def test_a_silent_cloud_is_outrun_by_the_device_and_told_to_stop(both, cloud):
    learn(both)
    cloud.behaviour = hang
    both.device.pause_s = 0.2  # the cloud has certainly heard of it by then
    result = both.infer("tensor", X, mode="prefer_cloud", deadline_ms=20_000)
    assert result.timings.total_ms < 10_000
    assert result.route.name == "edge"
    assert result.route.before == ()
    # Late, or so late already that it counts as stalled: that hangs on how fast this machine is.
    assert "the edge was started as well: the cloud" in result.route.hedge
    assert "the edge answered first" in result.route.hedge
    assert result.variant == TENSOR.variants[0].id
    assert result.bytes_sent > 0  # what the cloud was sent has left the device
    assert result.decision.route == "cloud"
    assert plan(result.decision) is not None
    cloud.wait_for(wire.Cancel)


def test_without_a_deadline_a_silent_cloud_is_outrun_too(both, cloud):
    learn(both)
    cloud.behaviour = hang
    assert both.infer("tensor", X, mode="prefer_cloud").route.name == "edge"


def test_a_cloud_that_is_merely_late_may_still_win_and_the_device_is_stopped(both, cloud):
    learn(both)
    before = len(both.device.calls)

    def late(session, message, tensors):
        while len(both.device.calls) == before:
            yield 0.002
        yield from answer_infer(session, message, tensors)

    both.device.pause_s = 20.0
    cloud.behaviour = late
    started_s = time.monotonic()
    result = both.infer("tensor", X, mode="prefer_cloud", deadline_ms=60_000)
    assert time.monotonic() - started_s < 10.0
    assert result.route.name == "cloud"
    assert "the cloud answered first" in result.route.hedge
    assert both.device.cancelled == 1
    assert np.array_equal(result.outputs["y"], X["x"])


def test_a_device_that_is_late_is_outrun_by_the_cloud_and_stopped(both, cloud, monkeypatch):
    learn(both)
    planned = HedgePlan(first="edge", other="cloud", after_ms=30.0, why="a test says so")
    monkeypatch.setattr("sdk.core.plan", lambda decision: planned)
    both.device.pause_s = 20.0
    started_s = time.monotonic()
    result = both.infer("tensor", X, mode="prefer_edge", deadline_ms=60_000)
    assert time.monotonic() - started_s < 10.0
    assert result.route.name == "cloud"
    assert "a test says so" in result.route.hedge
    assert both.device.cancelled == 1
    assert result.bytes_sent >= X["x"].nbytes


@pytest.mark.parametrize("mode", ["prefer_edge", "prefer_cloud"])
def test_a_hedge_that_would_come_too_early_is_asked_about_again(both, cloud, monkeypatch, mode):
    learn(both)
    first, other = ("edge", "cloud") if mode == "prefer_edge" else ("cloud", "edge")
    planned = HedgePlan(first=first, other=other, after_ms=20.0, why="a test says so")
    monkeypatch.setattr("sdk.core.plan", lambda decision: planned)
    monkeypatch.setattr("sdk.racing.stalls_after_ms", lambda expected: 60_000.0)
    asked: list[float] = []

    def start(hedging, planned, began, again):
        asked.append(planned.after_ms)
        if len(asked) < 3:
            return msgspec.structs.replace(planned, after_ms=planned.after_ms + 20.0)
        return "now it is worth it"

    monkeypatch.setattr("sdk.routing.hedging.Hedging.start", start)
    if first == "cloud":
        cloud.behaviour = hang
    else:
        both.device.pause_s = 20.0
    result = both.infer("tensor", X, mode=mode, deadline_ms=60_000)
    assert result.route.name == other
    assert asked == [20.0, 40.0, 60.0]
    assert "now it is worth it" in result.route.hedge


def test_a_device_that_answers_before_the_moment_is_left_alone(both, cloud, monkeypatch):
    learn(both)
    before = len(cloud.saw(wire.Infer))
    planned = HedgePlan(first="edge", other="cloud", after_ms=2000.0, why="a test says so")
    monkeypatch.setattr("sdk.core.plan", lambda decision: planned)
    result = both.infer("tensor", X, mode="prefer_edge")
    assert (result.route.name, result.route.hedge) == ("edge", "")
    assert len(cloud.saw(wire.Infer)) == before


def test_a_hedge_that_fails_leaves_the_first_route_at_work(both, cloud):
    learn(both)
    before = len(both.device.calls)

    def late(session, message, tensors):
        while len(both.device.calls) == before:
            yield 0.002
        yield 0.05
        yield from answer_infer(session, message, tensors)

    both.device.fail_with = EngineError("it broke")
    cloud.behaviour = late
    result = both.infer("tensor", X, mode="prefer_cloud", deadline_ms=20_000)
    assert result.route.name == "cloud"


def test_when_both_fail_the_error_of_the_first_is_told(both, cloud):
    learn(both)
    cloud.behaviour = hang
    both.device.fail_with = EngineError("it broke")
    with pytest.raises(DeadlineExceeded):
        both.infer("tensor", X, mode="prefer_cloud", deadline_ms=700)


def test_personal_data_is_never_sent_by_a_hedge(both, cloud, monkeypatch):
    learn(both)
    before = len(cloud.saw(wire.Infer))
    planned = HedgePlan(first="edge", other="cloud", after_ms=1.0, why="a mistake")
    monkeypatch.setattr("sdk.core.plan", lambda decision: planned)
    both.device.pause_s = 0.2
    # The decision itself has no other route, so nothing is asked; and if it were, policy says no.
    result = both.infer("tensor", X, sensitivity="personal", deadline_ms=5000)
    assert (result.route.name, result.route.hedge) == ("edge", "")
    request = both._infer_request("tensor", X, {"sensitivity": "personal"})
    decision = both._core.decide(request)
    assert both._core.hedging.start(planned, decision, decision) is None
    assert len(cloud.saw(wire.Infer)) == before


def test_a_budget_of_nothing_never_starts_two(cloud, tmp_path):
    (tmp_path / "store").mkdir()
    config = Config(routing=RoutingConfig(hedge_budget=0.0))
    with Client(
        config, cloud=cloud.config(), models=tmp_path / "store", policy=POLICY,
        sensitivity="public",
    ) as client:  # fmt: skip
        put_into(client, ScriptedEdge((TENSOR,)))
        learn(client)
        cloud.behaviour = hang
        result = client.infer("tensor", X, mode="prefer_cloud", deadline_ms=20_000)
        assert client._core.hedging.started == 0
        assert result.route.hedge == ""
        assert result.route.path == "cloud → edge"  # it stalled, and was given up first
        cloud.wait_for(wire.Cancel)


def test_a_stalled_cloud_opens_the_breaker_and_the_device_is_asked(cloud, tmp_path):
    (tmp_path / "store").mkdir()
    config = Config(routing=RoutingConfig(hedge_budget=0.0))
    with Client(
        config, cloud=cloud.config(), models=tmp_path / "store", policy=POLICY,
        sensitivity="public",
    ) as client:  # fmt: skip
        put_into(client, ScriptedEdge((TENSOR,)))
        learn(client)
        cloud.behaviour = hang
        with ThreadPoolExecutor(2) as pool:
            waiting = [
                pool.submit(client.infer, "tensor", X, mode="prefer_cloud", deadline_ms=2500)
                for _ in range(2)
            ]
            ends_s = time.monotonic() + 2.0
            stalled = client._known.endpoints[0].breaker_of("tensor")
            while stalled.state(time.monotonic()) is BreakerState.CLOSED:
                assert time.monotonic() < ends_s, "the stall was not noticed"
                time.sleep(0.005)
            result = client.infer("tensor", X, mode="prefer_cloud", deadline_ms=2500)
            assert result.route.name == "edge"
            assert "cannot be reached" in result.reason
            for future in waiting:  # not for speed, so no budget of hedges stands in the way
                assert future.result().route.name == "edge"
                assert future.result().route.path == "cloud → edge"


def test_an_answer_without_outputs_is_no_success(both, cloud):
    def empty(session, message, tensors):
        yield 0
        session.send(
            wire.Result(
                stream=message.stream, tensors=(), variant="fp32",
                execution_provider="CPUExecutionProvider", queue_ms=0.0, compute_ms=0.0,
            ),
            (),
        )  # fmt: skip

    cloud.behaviour = empty
    result = both.infer("tensor", X, mode="prefer_cloud")
    assert result.route.path == "cloud → edge"
    with pytest.raises(EngineError, match="empty answer"):
        both.infer("tensor", X, mode="cloud_only")


def test_the_async_client_hedges_alike(cloud, tmp_path):
    async def run() -> None:
        (tmp_path / "store").mkdir()
        async with AsyncClient(
            cloud=cloud.config(), models=tmp_path / "store", policy=POLICY, sensitivity="public"
        ) as client:
            device = put_into(client, ScriptedEdge((TENSOR,)))
            for _ in range(12):
                await client.infer("tensor", X, mode="cloud_only")
                await client.infer("tensor", X, mode="edge_only")
            cloud.behaviour = hang
            silent = await client.infer("tensor", X, mode="prefer_cloud", deadline_ms=5000)
            assert silent.route.name == "edge"
            assert "the edge answered first" in silent.route.hedge
            for _ in range(30):
                client._core.hedging.request()  # earns the next one
            before = len(device.calls)

            def late(session, message, tensors):
                while len(device.calls) == before:
                    yield 0.002
                yield from answer_infer(session, message, tensors)

            cloud.behaviour = late
            device.pause_s = 20.0
            answered = await client.infer("tensor", X, mode="prefer_cloud", deadline_ms=60_000)
            assert answered.route.name == "cloud"
            device.pause_s = 0.0

    asyncio.run(run())


# -- real processes --------------------------------------------------------------------------------


@pytest.fixture
def frozen_world(tmp_path):
    pytest.importorskip("onnxruntime")
    store = tmp_path / "models"
    tiny.write_tiny_tensor_bundle(store / "tiny", task="tensor")
    cloud = CloudProcess(state=tmp_path / "cloud", models=store, log=tmp_path / "cloud.log")
    cloud.provision()
    cloud.start()
    config = CloudConfig(
        url=cloud.url, identity=cloud.pin, ca_file=tmp_path / "cloud" / "ca.pem",
        credentials=f"file:{tmp_path / 'cloud' / 'client-key.txt'}",
    )  # fmt: skip
    with Client(cloud=config, models=store, policy=POLICY, sensitivity="public") as client:
        yield client, cloud
    cloud.kill()


def test_a_frozen_cloud_is_outrun_noticed_and_left_alone(frozen_world):
    client, cloud = frozen_world
    feeds = {"x": np.ones((2, 4), np.float32)}
    for _ in range(12):
        assert client.infer("tiny", feeds, mode="cloud_only").route.name == "cloud"
        client.infer("tiny", feeds, mode="edge_only")
    cloud.freeze()
    frozen_s = time.monotonic()
    result = client.infer("tiny", feeds, mode="prefer_cloud", deadline_ms=20_000)
    assert result.route.name == "edge"
    assert "the edge answered first" in result.route.hedge
    assert time.monotonic() - frozen_s < 5.0
    breaker = client._known.breaker
    while breaker.state(time.monotonic()) is BreakerState.CLOSED:
        assert time.monotonic() - frozen_s < 10.0, "nobody noticed"
        time.sleep(0.01)
    after = client.infer("tiny", feeds, mode="prefer_cloud", deadline_ms=20_000)
    assert after.route.name == "edge"
    assert "cannot be reached" in after.reason
