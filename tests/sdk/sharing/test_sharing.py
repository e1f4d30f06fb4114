"""Equal requests share one computation, and nobody suffers for another."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from nearfar.errors import (
    CloudUnavailable,
    ConfigError,
    DeadlineExceeded,
    EngineError,
    InvalidInput,
)
from nearfar.wire import messages as wire
from sdk import AsyncClient, CacheConfig, Client, parse_policy
from sdk.config_file import parse_config
from tests.support.scripted_cloud import EMBEDDING, STORY, TENSOR, ScriptedCloud, obliging
from tests.support.scripted_edge import ScriptedEdge, put_into

POLICY = parse_policy(
    'version = 1\n[[rule]]\nid = "open"\nwhen = { sensitivity = ["public", "secret"] }\n'
    'effect = "cloud_ok"\n'
)
X = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
Y = {"x": X["x"] + 1}
CACHE = {"tensor": CacheConfig(), "embedder": CacheConfig()}


@pytest.fixture
def cloud(tmp_path):
    with ScriptedCloud(tmp_path / "state") as server:
        yield server


def far(cloud, cache=CACHE, **changes):
    return Client(
        **{"cloud": cloud.config(), "policy": POLICY, "sensitivity": "public", "cache": cache}
        | changes
    )


def asked(cloud) -> int:
    return len(cloud.saw(wire.Infer))


class Gate:
    """Holds the cloud's answers back until it is opened."""

    def __init__(self, cloud) -> None:
        self.open = threading.Event()
        cloud.behaviour = self._behave

    def _behave(self, session, message, tensors):
        while not self.open.is_set():
            yield 0.005
        yield from obliging(session, message, tensors)


# -- kept answers ----------------------------------------------------------------------------------


def test_an_equal_request_gets_the_kept_answer_marked_as_such(cloud):
    with far(cloud) as client:
        first = client.infer("tensor", X)
        again = client.infer("tensor", X)
        other = client.infer("tensor", Y)
    assert asked(cloud) == 2
    assert first.route.source == other.route.source == "run"
    assert again.route.source == "cache"
    assert "(cached)" in str(again.route)
    np.testing.assert_array_equal(again.outputs["y"], X["x"])
    np.testing.assert_array_equal(other.outputs["y"], Y["x"])
    assert (again.bytes_sent, again.timings.compute_ms, again.timings.network_ms) == (0, 0.0, 0.0)
    assert again.decision == first.decision
    assert again.variant == first.variant


def test_each_caller_owns_his_outputs(cloud):
    with far(cloud) as client:
        for _ in range(3):
            result = client.infer("tensor", X)
            np.testing.assert_array_equal(result.outputs["y"], X["x"])
            result.outputs["y"][:] = -1


def test_embeddings_are_kept_per_text(cloud):
    with far(cloud) as client:
        assert client.embed("embedder", ["a", "b"]).route.source == "run"
        assert client.embed("embedder", ["a", "b"]).route.source == "cache"
        assert client.embed("embedder", ["b", "a"]).route.source == "run"


@pytest.mark.parametrize(
    "options",
    [{"sensitivity": "secret"}, {"tenant": "t"}, {"purpose": "p"}, {"mode": "cloud_only"}],
    ids=str,
)
def test_what_differs_is_not_shared(cloud, options):
    with far(cloud) as client:
        client.infer("tensor", X)
        assert client.infer("tensor", X, **options).route.source == "run"
    assert asked(cloud) == 2


def test_secret_and_unlabelled_data_are_never_kept(cloud):
    with far(cloud, sensitivity=None) as client:
        for _ in range(2):
            assert client.infer("tensor", X).route.source == "run"
            assert client.infer("tensor", X, sensitivity="secret").route.source == "run"
        assert client._sharing.held("tensor") == (0, 0)


def test_models_that_are_not_named_are_not_shared(cloud):
    with far(cloud, cache={"embedder": CacheConfig()}) as client:
        client.infer("tensor", X)
        assert client.infer("tensor", X).route.source == "run"
    with far(cloud, cache=None) as client:
        assert client._sharing is None


def test_texts_are_generated_anew(cloud):
    with far(cloud, cache={"story": CacheConfig()}) as client:
        for _ in range(2):
            assert client.generate("story", "Once", max_new_tokens=2).route.source == "run"


def test_entries_and_bytes_are_bounded_and_the_unused_go_first(cloud):
    with far(cloud, cache={"tensor": CacheConfig(max_entries=2)}) as client:
        feeds = [{"x": X["x"] + n} for n in range(3)]
        client.infer("tensor", feeds[0])
        client.infer("tensor", feeds[1])
        client.infer("tensor", feeds[0])
        client.infer("tensor", feeds[2])
        assert client.infer("tensor", feeds[0]).route.source == "cache"
        assert client.infer("tensor", feeds[1]).route.source == "run"
        assert client._sharing.held("tensor")[0] == 2
    with far(cloud, cache={"tensor": CacheConfig(max_bytes=6000)}) as client:
        for n in range(5):
            client.infer("tensor", {"x": X["x"] + n})
            entries, size_bytes = client._sharing.held("tensor")
            assert entries <= 2
            assert size_bytes <= 6000
        big = {"x": np.zeros((1000, 4), np.float32)}
        client.infer("tensor", big)
        assert client.infer("tensor", big).route.source == "run"


def test_an_answer_counts_for_its_time(cloud):
    now_s = 100.0
    with far(cloud, cache={"tensor": CacheConfig(ttl_s=10)}) as client:
        client._sharing._clock = lambda: now_s
        client.infer("tensor", X)
        now_s = 109.9
        assert client.infer("tensor", X).route.source == "cache"
        now_s = 110.0
        assert client.infer("tensor", X).route.source == "run"


def test_failures_are_not_kept(tmp_path):
    (tmp_path / "store").mkdir()
    with Client(models=tmp_path / "store", sensitivity="public", cache=CACHE) as client:
        device = put_into(client, ScriptedEdge((TENSOR, EMBEDDING, STORY)))
        device.fail_with = EngineError("broke")
        with pytest.raises(EngineError):
            client.infer("tensor", X)
        device.fail_with = None
        assert client.infer("tensor", X).route.source == "run"
        assert client.infer("tensor", X).route.source == "cache"


def test_a_closed_client_gives_nothing_and_keeps_nothing(cloud):
    client = far(cloud)
    client.infer("tensor", X)
    client.close()
    assert client._sharing.held("tensor") == (0, 0)
    with pytest.raises(InvalidInput, match="closed"):
        client.infer("tensor", X)


def test_a_model_on_the_device_is_shared_and_makes_no_plan(tmp_path):
    pytest.importorskip("onnxruntime")
    from tests.support.tiny import write_tiny_tensor_bundle

    write_tiny_tensor_bundle(tmp_path / "tiny")
    feeds = {"x": np.arange(4, dtype=np.float32).reshape(1, 4)}
    with Client(models=tmp_path, sensitivity="public", cache={"tiny": CacheConfig()}) as client:
        first = client.infer("tiny", feeds)
        again = [client.infer("tiny", feeds) for _ in range(3)]
        assert {result.route.source for result in again} == {"cache"}
        np.testing.assert_array_equal(first.outputs["y"], again[0].outputs["y"])
        sources = [client.infer("tiny", feeds, sensitivity="secret").route.source for _ in "abc"]
        assert sources == ["run"] * 3


# -- requests under way ----------------------------------------------------------------------------


def test_requests_under_way_share_one_computation(cloud):
    gate = Gate(cloud)
    with (
        far(cloud, cache={"tensor": CacheConfig(ttl_s=0)}) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        running = [pool.submit(client.infer, "tensor", X) for _ in range(8)]
        cloud.wait_for(wire.Infer)
        time.sleep(0.05)
        gate.open.set()
        results = [future.result(10) for future in running]
        assert asked(cloud) == 1
        sources = sorted(result.route.source for result in results)
        assert sources == ["in_flight"] * 7 + ["run"]
        for result in results:
            np.testing.assert_array_equal(result.outputs["y"], X["x"])
            result.outputs["y"][:] = -1
        client.infer("tensor", X)  # nothing was kept
        assert asked(cloud) == 2


def test_the_deadline_of_the_first_does_not_fail_the_others(cloud):
    gate = Gate(cloud)
    with far(cloud) as client, ThreadPoolExecutor(3) as pool:
        client.warm_up("tensor")
        first = pool.submit(client.infer, "tensor", X, deadline_ms=300)
        cloud.wait_for(wire.Infer)
        others = [pool.submit(client.infer, "tensor", X) for _ in range(2)]
        with pytest.raises(DeadlineExceeded):
            first.result(10)
        cloud.wait_for(wire.Infer, 2)
        gate.open.set()
        sources = sorted(future.result(10).route.source for future in others)
        # On a busy machine the other one may come only when the answer is there.
        assert sources in (["in_flight", "run"], ["cache", "run"])
    assert asked(cloud) == 2


def test_whoever_has_less_time_than_the_first_does_not_wait_for_it(cloud):
    gate = Gate(cloud)
    with far(cloud) as client, ThreadPoolExecutor(1) as pool:
        client.warm_up("tensor")
        first = pool.submit(client.infer, "tensor", X)
        cloud.wait_for(wire.Infer)
        with pytest.raises(DeadlineExceeded):
            client.infer("tensor", X, deadline_ms=100)
        assert asked(cloud) == 2
        gate.open.set()
        assert first.result(10).route.source == "run"


def test_a_deadline_that_passes_while_waiting_is_only_ones_own(cloud):
    gate = Gate(cloud)
    with far(cloud) as client, ThreadPoolExecutor(1) as pool:
        client.warm_up("tensor")
        first = pool.submit(client.infer, "tensor", X, deadline_ms=400)
        cloud.wait_for(wire.Infer)
        began_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.infer("tensor", X, deadline_ms=800)
        assert time.monotonic() - began_s < 5
        with pytest.raises(DeadlineExceeded):
            first.result(10)
        gate.open.set()


def test_an_error_that_all_would_meet_reaches_all(tmp_path):
    (tmp_path / "store").mkdir()
    with Client(models=tmp_path / "store", sensitivity="public", cache=CACHE) as client:
        device = put_into(client, ScriptedEdge((TENSOR,)))
        device.pause_s, device.fail_with = 0.3, CloudUnavailable("gone")
        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(client.infer, "tensor", X) for _ in range(4)]
            errors = [future.exception(10) for future in running]
        assert {str(error) for error in errors} == {"gone."}
        assert len({id(error) for error in errors}) == 4
        assert len(device.calls) < 4


def test_a_cancelled_task_does_not_fail_the_others(cloud):
    gate = Gate(cloud)

    async def scenario():
        async with AsyncClient(
            cloud=cloud.config(), policy=POLICY, sensitivity="public", cache=CACHE
        ) as client:
            first = asyncio.ensure_future(client.infer("tensor", X))
            await asyncio.to_thread(cloud.wait_for, wire.Infer)
            waits = asyncio.ensure_future(client.infer("tensor", X))
            others = [asyncio.ensure_future(client.infer("tensor", X)) for _ in range(3)]
            await asyncio.sleep(0.02)
            waits.cancel()
            await asyncio.sleep(0.02)
            assert not any(other.done() for other in others)
            first.cancel()
            await asyncio.to_thread(cloud.wait_for, wire.Infer, 2)
            gate.open.set()
            results = await asyncio.gather(*others)
            assert sorted(r.route.source for r in results) == ["in_flight", "in_flight", "run"]
            for task in (first, waits):
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert (await client.infer("tensor", X)).route.source == "cache"

    asyncio.run(scenario())
    assert asked(cloud) == 2


def test_async_waiters_have_their_own_deadlines(cloud):
    gate = Gate(cloud)

    async def scenario():
        async with AsyncClient(
            cloud=cloud.config(), policy=POLICY, sensitivity="public", cache=CACHE
        ) as client:
            await client.warm_up("tensor")
            first = asyncio.ensure_future(client.infer("tensor", X, deadline_ms=20_000))
            await asyncio.to_thread(cloud.wait_for, wire.Infer)
            patient = asyncio.ensure_future(client.infer("tensor", X))
            with pytest.raises(DeadlineExceeded):
                await client.infer("tensor", X, deadline_ms=100)
            gate.open.set()
            assert (await first).route.source == "run"
            assert (await patient).route.source == "in_flight"

    asyncio.run(scenario())


def test_a_client_without_a_cache_imports_nothing_of_it(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys, sdk; sdk.Client(models=sys.argv[1]);"
        "print([m for m in sys.modules if m.startswith('sdk.sharing')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# -- configuration -------------------------------------------------------------------------------


def test_the_section_is_read():
    config = parse_config(
        "[cache.minilm]\n[cache.tiny]\nmax_entries = 5\nmax_bytes = 9\nttl_s = 0\n"
    )
    assert config.caches == {
        "minilm": CacheConfig(),
        "tiny": CacheConfig(max_entries=5, max_bytes=9, ttl_s=0),
    }
    assert parse_config("").caches == {}


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("cache = 3", "cache"),
        ("[cache]\nminilm = 3", "cache.minilm"),
        ("[cache.minilm]\nmax_entries = 0", "cache.minilm.max_entries"),
        ("[cache.minilm]\nmax_bytes = 1.5", "cache.minilm.max_bytes"),
        ("[cache.minilm]\nttl_s = -1", "cache.minilm.ttl_s"),
        ("[cache.minilm]\nttl_s = inf", "cache.minilm.ttl_s"),
        ("[cache.minilm]\nttl = 1", "cache.minilm.ttl"),
    ],
)
def test_what_is_wrong_is_named(text, field):
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert caught.value.field == field


def test_a_request_that_states_an_agreement_is_not_shared(cloud):
    with far(cloud) as client:
        plain, stated = (
            client._infer_request("tensor", X, {"min_agreement": agreement})
            for agreement in (None, 0.98)
        )
        assert client._sharing.key(plain) is not None
        assert client._sharing.key(stated) is None
