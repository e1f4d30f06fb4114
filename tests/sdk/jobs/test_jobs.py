"""Jobs of a client: they wait, run once, survive, and go nowhere that policy forbids."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from nearfar.errors import (
    Cancelled,
    CloudUnavailable,
    ConfigError,
    DeadlineExceeded,
    EngineError,
    InvalidInput,
    Overloaded,
    PolicyDenied,
)
from nearfar.wire import messages as wire
from sdk import AsyncClient, Client, CloudConfig, JobsConfig, parse_policy
from sdk.jobs import pace
from tests.cloud_runtime.support import ScriptedModel, make_state, running, served
from tests.support.scripted_cloud import STORY, TENSOR, Abort, ScriptedCloud, obliging
from tests.support.scripted_edge import ScriptedEdge, put_into

OPEN = parse_policy(
    'version = 1\n[[rule]]\nid = "open"\nwhen = { sensitivity = "public" }\neffect = "cloud_ok"\n'
    '[[rule]]\nid = "here"\nwhen = { sensitivity = "personal" }\neffect = "edge_only"\n'
)
CLOSED = parse_policy(
    'version = 1\n[[rule]]\nid = "shut"\nwhen = { sensitivity = "public" }\neffect = "deny"\n'
)
X = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
TEXT = [{"role": "user", "content": "Tell me."}]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(pace, "FIRST_PAUSE_S", 0.02)


@pytest.fixture
def jobs(tmp_path):
    return JobsConfig(file=tmp_path / "queue" / "jobs.db")


@pytest.fixture
def cloud(tmp_path):
    with ScriptedCloud(tmp_path / "state") as server:
        yield server


@pytest.fixture
def store(tmp_path):
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


def far(cloud, jobs, **changes):
    return Client(
        **{"cloud": cloud.config(), "policy": OPEN, "sensitivity": "public", "jobs": jobs} | changes
    )


def near(store, jobs, **changes):
    client = Client(
        **{"models": store, "policy": OPEN, "sensitivity": "personal", "jobs": jobs} | changes
    )
    client.device = put_into(client, ScriptedEdge((TENSOR, STORY)))
    return client


def asleep(jobs):
    return JobsConfig(file=jobs.file, run=False)


def until(condition, message):
    ends_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends_s, message
        time.sleep(0.005)


# -- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "model"),
    [
        ({"feeds": X}, "tensor"),
        ({"texts": ["near", "far"]}, "embedder"),
        ({"messages": TEXT, "max_new_tokens": 3}, "story"),
        ({"prompt": "Once", "max_new_tokens": 3}, "story"),
    ],
    ids=["infer", "embed", "chat", "generate"],
)
def test_a_job_gives_what_a_call_gives(cloud, jobs, inputs, model):
    with far(cloud, jobs) as client:
        job = client.submit(model, deferrable=True, **inputs)
        result = job.result(10)
        assert (job.status, job.model) == ("done", model)
    assert result.route.name == "cloud"
    assert result.bytes_sent > 0
    assert result.decision.inputs.model == model
    assert result.timings.total_ms > 0
    if "feeds" in inputs:
        np.testing.assert_array_equal(result.outputs["y"], X["x"])
        assert result.usage.items == 2
    elif "texts" in inputs:
        assert result.vectors.shape == (2, 3)
    else:
        assert (result.text, result.finish_reason) == ("w0 w1 w2 ", "length")
        assert result.usage.completion_tokens == 3


def test_a_job_that_policy_keeps_here_runs_here(store, jobs):
    with near(store, jobs) as client:
        result = client.submit("story", prompt="Once", max_new_tokens=2, deferrable=True).result(10)
        assert result.text == "e0 e1 "
        assert result.route.name == "edge"
        assert client.submit("tensor", feeds=X).result(10).route.name == "edge"


def test_jobs_are_found_again_after_a_restart(cloud, jobs):
    with far(cloud, asleep(jobs)) as client:
        first = client.submit("tensor", feeds=X, deferrable=True)
        assert first.status == "waiting"
    with far(cloud, jobs) as client:
        (job,) = client.jobs()
        assert job.id == first.id
        np.testing.assert_array_equal(job.result(10).outputs["y"], X["x"])
        assert client.job(first.id).result(0).route.name == "cloud"
    assert len(cloud.saw(wire.Infer)) == 1


def test_a_result_can_be_taken_again_until_it_is_forgotten(cloud, jobs):
    with far(cloud, jobs) as client:
        job = client.submit("tensor", feeds=X)
        job.result(10)
        job.result(0)
        assert job.forget()
        with pytest.raises(InvalidInput, match="no job"):
            job.result(0)
        with pytest.raises(InvalidInput, match="no job"):
            client.job(job.id)
        assert client.jobs() == ()
    assert len(cloud.saw(wire.Infer)) == 1


# -- waiting for the link --------------------------------------------------------------------------


def test_a_job_waits_for_the_cloud_and_runs_when_it_is_there(tmp_path, jobs):
    with ScriptedCloud(tmp_path / "state") as cloud:
        port = cloud.port
    with far(cloud, jobs) as client:
        job = client.submit("tensor", feeds=X, deferrable=True)
        other = client.submit("embedder", texts=["a"], deferrable=True)
        with pytest.raises(DeadlineExceeded, match="goes on"):
            job.result(0.3)
        assert {job.status, other.status} <= {"waiting", "running"}  # running: it is tried again
        back = ScriptedCloud(tmp_path / "state")
        back.port = port
        with back:
            np.testing.assert_array_equal(job.result(20).outputs["y"], X["x"])
            other.result(20)
            assert len(back.saw(wire.Infer)) == 2


def test_a_job_that_may_not_wait_fails_with_its_route(tmp_path, jobs):
    with ScriptedCloud(tmp_path / "state") as cloud:
        pass
    with far(cloud, jobs) as client:
        job = client.submit("tensor", feeds=X)
        with pytest.raises(CloudUnavailable):
            job.result(20)
        assert job.status == "failed"


def test_while_the_cloud_is_away_jobs_of_the_device_still_run(tmp_path, store, jobs):
    with ScriptedCloud(tmp_path / "state") as cloud:
        pass
    with near(store, jobs, cloud=cloud.config()) as client:
        waits = client.submit("embedder", texts=["a"], sensitivity="public", deferrable=True)
        runs = client.submit("tensor", feeds=X, sensitivity="personal", deferrable=True)
        assert runs.result(20).route.name == "edge"
        assert waits.status in ("waiting", "running")


def test_a_request_that_is_sent_again_keeps_its_id(cloud, jobs):
    def break_off(session, message, tensors):
        yield 0
        if len(cloud.saw(wire.Infer)) < 4:
            raise Abort
        yield from obliging(session, message, tensors)

    cloud.behaviour = break_off
    with far(cloud, jobs) as client:
        client.submit("tensor", feeds=X, deferrable=True).result(20)
    ids = {message.request_id for message in cloud.saw(wire.Infer)}
    assert len(cloud.saw(wire.Infer)) == 4
    assert len(ids) == 1


def test_a_deadline_bounds_each_attempt_and_not_the_wait(cloud, jobs):
    def slow_at_first(session, message, tensors):
        yield 0.5 if len(cloud.saw(wire.Infer)) == 1 else 0
        yield from obliging(session, message, tensors)

    cloud.behaviour = slow_at_first
    with far(cloud, jobs, deadline_ms=0.001) as client:  # the client's default is not for jobs
        client.submit("tensor", feeds=X, deferrable=True).result(20)
        cloud.seen.clear()
        job = client.submit("tensor", feeds=X, deferrable=True, deadline_ms=250)
        job.result(20)
    assert len(cloud.saw(wire.Infer)) == 2


def test_an_engine_that_keeps_failing_ends_the_job(store, jobs):
    with near(store, jobs) as client:
        client.device.fail_with = EngineError("no memory")
        job = client.submit("tensor", feeds=X, deferrable=True)
        with pytest.raises(EngineError, match="no memory"):
            job.result(20)
        assert len(client.device.calls) == pace.MAX_TRIES
        client.device.fail_with = None
        assert client.submit("tensor", feeds=X).result(10)


def test_a_defect_ends_its_job_and_not_the_queue(store, jobs, caplog):
    with near(store, jobs) as client:
        client.device.fail_with = ZeroDivisionError("4711 in the text")
        job = client.submit("tensor", feeds=X, deferrable=True)
        with pytest.raises(Exception, match="ZeroDivisionError") as caught:
            job.result(10)
        assert "4711" not in str(caught.value)
        assert "4711" not in caplog.text
        client.device.fail_with = None
        assert client.submit("tensor", feeds=X).result(10)


# -- policy ----------------------------------------------------------------------------------------


def test_what_policy_forbids_now_is_not_kept(cloud, jobs):
    with far(cloud, jobs) as client, pytest.raises(PolicyDenied):
        client.submit("tensor", feeds=X, sensitivity="secret", deferrable=True)
    with far(cloud, asleep(jobs)) as client:
        assert client.jobs() == ()
    assert cloud.connections == 0


def test_policy_is_asked_again_when_the_job_runs(cloud, jobs):
    with far(cloud, asleep(jobs)) as client:
        client.submit("tensor", feeds=X, deferrable=True)
    with far(cloud, jobs, policy=CLOSED) as client:
        (job,) = client.jobs()
        with pytest.raises(PolicyDenied) as caught:
            job.result(10)
        assert caught.value.rule == "shut"
        assert job.status == "denied"
    assert cloud.connections == 0


def test_a_default_that_changes_does_not_change_the_class_of_a_job(cloud, store, jobs):
    with near(store, asleep(jobs), cloud=cloud.config()) as client:
        client.submit("tensor", feeds=X, deferrable=True)  # unlabelled, and so personal
    with near(store, jobs, cloud=cloud.config(), sensitivity="public") as client:
        (job,) = client.jobs()
        result = job.result(10)
    assert result.route.name == "edge"
    assert result.decision.inputs.sensitivity == "personal"
    assert cloud.connections == 0


def test_a_wrong_request_is_refused_at_once(store, jobs):
    with near(store, jobs) as client:
        with pytest.raises(InvalidInput, match="dtype"):
            client.submit("tensor", feeds={"x": X["x"].astype(np.float64)}, deferrable=True)
        with pytest.raises(InvalidInput, match="2 inputs"):
            client.submit("tensor", feeds=X, texts=["a"])
        with pytest.raises(InvalidInput, match="surrogates"):
            client.submit("story", prompt="\udc80", deferrable=True)
        assert client.jobs() == ()


def test_without_a_queue_the_error_says_how_to_get_one(cloud):
    with (
        Client(cloud=cloud.config(), policy=OPEN) as client,
        pytest.raises(ConfigError, match="no queue"),
    ):
        client.submit("tensor", feeds=X)


def test_a_full_queue_says_so(cloud, tmp_path):
    with far(cloud, JobsConfig(file=tmp_path / "q", max_jobs=1, run=False)) as client:
        client.submit("tensor", feeds=X, deferrable=True)
        with pytest.raises(Overloaded):
            client.submit("tensor", feeds=X, deferrable=True)


# -- cancelling and closing ------------------------------------------------------------------------


def test_a_waiting_job_can_be_cancelled(cloud, jobs):
    with far(cloud, asleep(jobs)) as client:
        job = client.submit("tensor", feeds=X, deferrable=True)
        assert job.cancel()
        assert job.status == "cancelled"
        with pytest.raises(Cancelled):
            job.result(0)
        assert not job.cancel()
    with far(cloud, jobs) as client:
        assert client.jobs()[0].status == "cancelled"
    assert cloud.connections == 0


def test_cancelling_a_job_that_streams_stops_the_work_behind_it(store, jobs):
    with near(store, jobs) as client:
        client.device.pause_s = 0.05
        job = client.submit("story", prompt="Once", max_new_tokens=500, deferrable=True)
        until(lambda: job.status == "running", "it did not begin")
        assert job.cancel()
        assert client.submit("tensor", feeds=X).result(10)  # all tokens would take 25 s
        assert job.status == "cancelled"


def test_closing_puts_a_job_back_and_the_next_client_ends_it(cloud, jobs):
    cloud.behaviour = lambda *_: iter([30.0])
    with far(cloud, jobs) as client:
        job = client.submit("tensor", feeds=X, deferrable=True)
        cloud.wait_for(wire.Infer)
    cloud.behaviour = obliging
    with far(cloud, jobs) as client:
        client.job(job.id).result(10)
    ids = [message.request_id for message in cloud.saw(wire.Infer)]
    assert len(ids) == 2
    assert len(set(ids)) == 1


def test_a_closed_client_leaves_no_thread_behind(cloud, jobs):
    before = set(threading.enumerate())
    with far(cloud, jobs) as client:
        client.submit("tensor", feeds=X).result(10)
        assert any(thread.name == "nearfar-jobs" for thread in threading.enumerate())
    until(lambda: set(threading.enumerate()) <= before, "threads are left")


def test_two_clients_of_one_queue_run_each_job_once(cloud, jobs):
    with far(cloud, jobs) as first, far(cloud, jobs) as second:
        handles = [
            client.submit("tensor", feeds=X, deferrable=True)
            for client in (first, second)
            for _ in range(4)
        ]
        for handle in handles:
            handle.result(20)
    assert len(cloud.saw(wire.Infer)) == 8


def test_a_client_without_jobs_imports_nothing_of_them(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys, sdk; sdk.Client(models=sys.argv[1]);"
        "print([m for m in sys.modules if m.startswith('sdk.jobs') or m == 'sqlite3'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# -- asyncio -------------------------------------------------------------------------------------


def far_async(cloud, jobs):
    return AsyncClient(cloud=cloud.config(), policy=OPEN, sensitivity="public", jobs=jobs)


def test_async_jobs_give_what_calls_give(cloud, jobs):
    async def scenario():
        async with far_async(cloud, jobs) as client:
            tensor = await client.submit("tensor", feeds=X, deferrable=True)
            story = await client.submit("story", messages=TEXT, max_new_tokens=2)
            np.testing.assert_array_equal((await tensor.result(10)).outputs["y"], X["x"])
            assert (await story.result(10)).text == "w0 w1 "
            assert await tensor.status() == "done"
            assert await tensor.model() == "tensor"
            assert [job.id for job in await client.jobs()] == [tensor.id, story.id]
            assert await story.forget()
            with pytest.raises(InvalidInput):
                await client.job(story.id)

    asyncio.run(scenario())


def test_async_jobs_outlive_their_client(cloud, jobs):
    cloud.behaviour = lambda *_: iter([30.0])

    async def begin():
        async with far_async(cloud, jobs) as client:
            job = await client.submit("tensor", feeds=X, deferrable=True)
            await asyncio.to_thread(cloud.wait_for, wire.Infer)
            with pytest.raises(DeadlineExceeded, match="goes on"):
                await job.result(0.05)
            return job.id

    async def end(job_id):
        async with far_async(cloud, jobs) as client:
            return await (await client.job(job_id)).result(10)

    job_id = asyncio.run(begin())
    cloud.behaviour = obliging
    result = asyncio.run(end(job_id))
    np.testing.assert_array_equal(result.outputs["y"], X["x"])
    assert len({message.request_id for message in cloud.saw(wire.Infer)}) == 1


def test_an_async_client_that_is_never_closed_loses_no_job(cloud, jobs):
    cloud.behaviour = lambda *_: iter([30.0])

    async def abandon():
        client = far_async(cloud, jobs)
        job = await client.submit("tensor", feeds=X, deferrable=True)
        await asyncio.to_thread(cloud.wait_for, wire.Infer)
        client._runner.desk._turn.give_back()  # as the end of the process does
        return job.id

    job_id = asyncio.run(abandon())
    cloud.behaviour = obliging
    cloud.cut_all()
    with far(cloud, jobs) as client:
        assert client.job(job_id).result(10).route.name == "cloud"


def test_an_async_job_can_be_cancelled(cloud, jobs):
    async def scenario():
        async with far_async(cloud, asleep(jobs)) as client:
            job = await client.submit("tensor", feeds=X, deferrable=True)
            assert await job.cancel()
            with pytest.raises(Cancelled):
                await job.result(1)

    asyncio.run(scenario())


# -- with a real server --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "inputs"),
    [("tensor", {"feeds": X}), ("story", {"prompt": "Once", "max_new_tokens": 3})],
    ids=["batch", "text"],
)
def test_what_the_cloud_computes_for_a_client_that_dies_is_not_computed_again(
    tmp_path, jobs, model, inputs
):
    scripted = ScriptedModel(model, task="tensor" if model == "tensor" else "text-generation")
    state = make_state(tmp_path / "cloud")

    async def scenario():
        async with running(served(scripted), state) as server:
            config = CloudConfig(
                url=server.url,
                identity=server.pin,
                credentials=f"file:{state.client_key}",
                ca_file=state.ca_certificate,
            )
            scripted.hold.set()
            first = AsyncClient(cloud=config, policy=OPEN, sensitivity="public", jobs=jobs)
            job = await first.submit(model, deferrable=True, **inputs)
            while not scripted.running:
                await asyncio.sleep(0.005)
            first._runner.desk._turn.give_back()  # as the end of its process does
            async with AsyncClient(
                cloud=config, policy=OPEN, sensitivity="public", jobs=jobs
            ) as second:
                handle = await second.job(job.id)
                await asyncio.sleep(0.1)
                scripted.hold.clear()
                result = await handle.result(20)
            await first.close()
            return result

    result = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert scripted.runs == 1
    assert result.route.name == "cloud"
