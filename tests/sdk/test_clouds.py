"""Several clouds: which one is asked, and what happens when one of them is no more."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.errors import CloudUnavailable, ConfigError, EngineError, InvalidInput, SecurityError
from nearfar.wire import messages as wire
from sdk import AsyncClient, Client, CloudConfig, Config, parse_policy
from sdk.cloud.endpoints import Endpoint, choose
from sdk.cloud.link import LinkState
from sdk.config import RoutingConfig
from sdk.quickstart.cloud_process import CloudProcess
from sdk.records.entries import Decided
from sdk.records.ring import RingReader
from sdk.routing import BreakerState, Predictor, replay
from sdk.routing.objectives import Price
from tests.support import tiny
from tests.support.scripted_cloud import (
    STORY,
    TENSOR,
    Abort,
    ScriptedCloud,
    answer_infer,
    obliging,
    tell,
)
from tests.support.scripted_edge import ScriptedEdge, put_into

POLICY = parse_policy(
    """
version = 1
[[rule]]
id = "open"
when = { sensitivity = "public" }
effect = "cloud_ok"
[[rule]]
id = "union"
when = { sensitivity = "internal" }
effect = "cloud_ok"
require = { region = ["eu"] }
"""
)
X = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}


@pytest.fixture
def clouds(tmp_path):
    """Two clouds with identities, keys and regions of their own."""
    with (
        ScriptedCloud(tmp_path / "eu", region="eu") as eu,
        ScriptedCloud(tmp_path / "us", region="us") as us,
    ):
        yield SimpleNamespace(
            eu=eu,
            us=us,
            configs=(eu.config(name="eu"), us.config(name="us", region="us")),
            of={"eu": eu, "us": us},
        )


@pytest.fixture
def far(clouds):
    """A client without a device; both clouds are connected."""
    with Client(cloud=clouds.configs, policy=POLICY, sensitivity="public") as client:
        client.models(refresh=True)
        yield client


@pytest.fixture
def both(clouds, tmp_path):
    """A client with a device as well."""
    (tmp_path / "store").mkdir()
    with Client(
        cloud=clouds.configs, models=tmp_path / "store", policy=POLICY, sensitivity="public"
    ) as client:
        client.device = put_into(client, ScriptedEdge((TENSOR, STORY)))
        client.models(refresh=True)
        yield client


def fail_with(error_code: str):
    def behaviour(session, message, tensors):
        yield 0
        session.send(wire.Error(stream=message.stream, code=error_code, problem="not today"))

    return behaviour


def abort(session, message, tensors):
    yield 0
    raise Abort


def go_away(session, message, tensors):
    yield 0
    session.send(wire.GoAway(last_stream=message.stream, reason="restart"))
    yield from answer_infer(session, message, tensors)


# -- real sockets ---------------------------------------------------------------------------------


def test_both_clouds_are_used_each_with_its_own_key_and_pin(far, clouds):
    used = Counter(far.infer("tensor", X).route.endpoint for _ in range(40))
    assert set(used) == {"eu", "us"}
    assert len(clouds.eu.saw(wire.Infer)) == used["eu"]
    assert len(clouds.us.saw(wire.Infer)) == used["us"]
    assert clouds.eu.identity.pin != clouds.us.identity.pin
    assert clouds.eu.connections == clouds.us.connections == 1


def test_result_and_record_name_the_cloud(clouds, tmp_path):
    config = Config(routing=RoutingConfig(record=tmp_path / "ring", state=tmp_path / "state.json"))
    with Client(config, cloud=clouds.configs, policy=POLICY, sensitivity="public") as client:
        result = client.infer("tensor", X)
        stream = client.generate("story", "Once", max_new_tokens=3)
        assert stream.text() == "w0 w1 w2 "
    assert result.route.endpoint == result.decision.inputs.endpoint in ("eu", "us")
    assert replay(result.decision.encode()) == result.decision
    names = [
        entry.decision.inputs.endpoint
        for entry in RingReader(tmp_path / "ring").entries()
        if isinstance(entry, Decided)
    ]
    assert names == [result.route.endpoint, stream.route.endpoint]
    # What requests took is kept for each cloud by itself.
    for name in ("state.json", "state.json.eu", "state.json.us"):
        assert (tmp_path / name).exists()


def test_the_slow_cloud_gets_less(far, clouds):
    def slow(session, message, tensors):
        yield 0.06
        yield from answer_infer(session, message, tensors)

    clouds.us.behaviour = slow
    used = Counter(far.infer("tensor", X).route.endpoint for _ in range(30))
    assert used["eu"] > 2 * used["us"]


def test_a_cloud_that_would_be_late_is_not_drawn(far, clouds):
    def slow(session, message, tensors):
        yield 1.8
        yield from answer_infer(session, message, tensors)

    clouds.us.behaviour = slow
    for _ in range(40):
        # The balancer forgets, or it would not ask there often enough for a prediction.
        far._known.endpoint("us")._loads.clear()
        if len(clouds.us.saw(wire.Infer)) < 4:
            far.infer("tensor", X)
    far._known.endpoint("us")._loads.clear()
    asked = len(clouds.us.saw(wire.Infer))
    assert asked == 4
    for _ in range(10):
        assert far.infer("tensor", X, deadline_ms=1500).route.endpoint == "eu"
    assert len(clouds.us.saw(wire.Infer)) == asked


@pytest.mark.parametrize("behaviour", [abort, fail_with("overloaded")])
def test_when_one_cloud_fails_the_other_answers(far, clouds, behaviour):
    clouds.us.behaviour = behaviour
    for _ in range(12):
        result = far.infer("tensor", X, deadline_ms=5000)
        assert result.route.endpoint == "eu"
        assert result.route.before in ((), ("cloud",))
    assert len(clouds.us.saw(wire.Infer)) >= 1
    assert far._core.retries.granted == len(clouds.us.saw(wire.Infer))


def test_a_cloud_that_goes_away_is_left_while_it_does(far, clouds):
    """After its goodbye new requests go to the other one, and no failure is counted for them."""
    clouds.us.behaviour = go_away
    for _ in range(40):
        if not clouds.us.saw(wire.Infer):
            far.infer("tensor", X)
    assert clouds.us.saw(wire.Infer)
    asked = len(clouds.us.saw(wire.Infer))
    for _ in range(10):
        assert far.infer("tensor", X).route.endpoint == "eu"
    assert len(clouds.us.saw(wire.Infer)) == asked


def test_a_model_that_fails_on_one_cloud_is_left_there_and_others_are_not(far, clouds):
    def sick(session, message, tensors):
        if isinstance(message, wire.Infer):
            yield from fail_with("engine")(session, message, tensors)
        else:
            yield from obliging(session, message, tensors)

    clouds.us.behaviour = sick
    us = far._known.endpoint("us")
    ends_s = time.monotonic() + 10
    while us.breaker_of("tensor").state(time.monotonic()) is BreakerState.CLOSED:
        assert time.monotonic() < ends_s
        assert far.infer("tensor", X).route.endpoint == "eu"
    assert us.breaker.state(time.monotonic()) is BreakerState.CLOSED
    assert us.can_try("story", time.monotonic())
    told = {far.generate("story", "Once", max_new_tokens=1) for _ in range(12)}
    assert {stream.route.endpoint for stream in told if stream.text()} == {"eu", "us"}


def test_a_refusal_that_would_be_the_same_elsewhere_is_not_retried(far, clouds):
    clouds.eu.behaviour = clouds.us.behaviour = fail_with("invalid_input")
    with pytest.raises(InvalidInput):
        far.infer("tensor", X)
    assert len(clouds.eu.saw(wire.Infer)) + len(clouds.us.saw(wire.Infer)) == 1


def test_policy_is_asked_about_each_cloud_and_never_gives_way(far, clouds):
    """`internal` data may go to the EU only, however that cloud fares."""
    for _ in range(8):
        assert far.infer("tensor", X, sensitivity="internal").route.endpoint == "eu"
    stream = far.generate("story", "Once", sensitivity="internal", max_new_tokens=2)
    assert stream.text() == "w0 w1 "
    clouds.eu.behaviour = abort
    for _ in range(4):
        with pytest.raises(CloudUnavailable):
            far.infer("tensor", X, sensitivity="internal", deadline_ms=2000)
    assert clouds.us.saw(wire.Infer) == clouds.us.saw(wire.Generate) == []
    # The same client, data that may go anywhere: the other cloud is there.
    assert far.infer("tensor", X).route.endpoint == "us"


def test_an_answer_that_broke_off_goes_on_on_the_other_cloud(far, clouds):
    def behaviour(session, message, tensors):
        if message.prompt.answer_so_far:
            yield from tell(session, message, message.options.max_new_tokens, first=2)
        else:
            yield from tell(session, message, 9, cut_after=2)

    clouds.eu.behaviour = clouds.us.behaviour = behaviour
    stream = far.generate("story", "Once", max_new_tokens=6)
    chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == "w0 w1 w2 w3 w4 w5 "
    assert [chunk.index for chunk in chunks] == list(range(6))
    assert [chunk.handover for chunk in chunks] == [False, False, True, False, False, False]
    assert stream.route.path == "cloud → cloud"
    (first,) = [name for name in ("eu", "us") if name != stream.route.endpoint]
    assert len(clouds.of[first].saw(wire.Generate)) == 1
    assert len(clouds.of[stream.route.endpoint].saw(wire.Generate)) == 1


def test_a_cloud_that_breaks_its_answers_is_left(far, clouds):
    """It takes each request, and fails before the first token; both ends of the budget hold."""

    def broken(session, message, tensors):
        yield from fail_with("engine")(session, message, tensors)

    clouds.us.behaviour = broken
    for _ in range(40):
        stream = far.generate("story", "Once", max_new_tokens=2)
        assert stream.text() == "w0 w1 "
        assert stream.route.endpoint == "eu"
    assert len(clouds.us.saw(wire.Generate)) < 10
    assert far._known.endpoint("us").breaker.state(time.monotonic()) is BreakerState.CLOSED


def test_without_a_cloud_left_the_device_goes_on(both, clouds):
    clouds.eu.behaviour = clouds.us.behaviour = abort
    result = both.infer("tensor", X, mode="prefer_cloud", deadline_ms=10_000)
    assert result.route.path == "cloud → cloud → edge"
    assert result.route.endpoint == ""


def test_with_the_budget_spent_the_device_goes_on_at_once(both, clouds):
    clouds.eu.behaviour = clouds.us.behaviour = abort
    while both._core.retries.withdraw(time.monotonic()):
        pass
    result = both.infer("tensor", X, mode="prefer_cloud", deadline_ms=10_000)
    assert result.route.path == "cloud → edge"


def test_a_wrong_identity_closes_that_cloud_only(clouds):
    pin = clouds.eu.config().identity
    configs = (clouds.configs[0], clouds.us.config(name="us", identity=pin))
    with Client(cloud=configs, policy=POLICY, sensitivity="public") as client:
        for _ in range(6):
            assert client.infer("tensor", X).route.endpoint == "eu"
    assert clouds.us.saw(wire.Infer) == clouds.us.saw(wire.Auth) == []
    with (
        Client(cloud=configs[1:], policy=POLICY, sensitivity="public") as client,
        pytest.raises(SecurityError),
    ):
        client.infer("tensor", X)


def test_a_cloud_that_is_away_at_first_is_used_when_it_is_there(clouds, tmp_path):
    gone = ScriptedCloud(tmp_path / "late", region="eu")
    with gone:
        config = gone.config(name="late")
    with Client(cloud=(config, clouds.configs[1]), policy=POLICY, sensitivity="public") as client:
        assert client.infer("tensor", X).route.endpoint == "us"
        late = ScriptedCloud(tmp_path / "late", region="eu")
        late.port = gone.port
        with late:
            ends_s = time.monotonic() + 15
            while client.infer("tensor", X).route.endpoint != "late":
                assert time.monotonic() < ends_s, "it was never tried again"
                time.sleep(0.02)


def test_the_cheaper_cloud_is_asked_when_cost_counts(clouds):
    dear, cheap = (
        clouds.eu.config(name="eu", price=Price(cost_per_request=2.0)),
        clouds.us.config(name="us", region="us", price=Price(cost_per_request=1.0)),
    )
    with Client(cloud=(dear, cheap), policy=POLICY, sensitivity="public") as client:
        client.models(refresh=True)
        for _ in range(12):
            assert client.infer("tensor", X, objective="cost").route.endpoint == "us"
        assert client.explain("tensor", feeds=X, objective="cost").inputs.cloud.cost == 1.0
        clouds.us.behaviour = abort
        assert client.infer("tensor", X, objective="cost").route.endpoint == "eu"
        with pytest.raises(InvalidInput, match="energy"):
            client.infer("tensor", X, objective="energy")


def test_the_device_is_free_and_the_cloud_is_not(clouds, tmp_path):
    (tmp_path / "store").mkdir()
    config = clouds.eu.config(price=Price(cost_per_request=0.01))
    with Client(
        cloud=config, models=tmp_path / "store", policy=POLICY, sensitivity="public"
    ) as client:
        put_into(client, ScriptedEdge((TENSOR,)))
        for _ in range(4):
            client.infer("tensor", X, mode="cloud_only")
            client.infer("tensor", X, mode="edge_only")
        made = client.explain("tensor", feeds=X, objective="cost")
        assert made.reason == "edge: it costs less (0 instead of 0.01)"
        assert client.explain("tensor", feeds=X).inputs.cloud.cost is None


def test_two_clouds_of_one_name_are_refused(clouds):
    with pytest.raises(ConfigError, match="same name"):
        Client(cloud=(clouds.eu.config(), clouds.us.config()), policy=POLICY)


def test_an_app_on_asyncio_has_several_clouds_too(clouds):
    async def run() -> None:
        async with AsyncClient(cloud=clouds.configs, policy=POLICY, sensitivity="public") as client:
            await client.warm_up("tensor")
            results = await asyncio.gather(*(client.infer("tensor", X) for _ in range(24)))
            assert {result.route.endpoint for result in results} == {"eu", "us"}
            clouds.eu.behaviour = abort
            results = await asyncio.gather(*(client.infer("tensor", X) for _ in range(8)))
            assert {result.route.endpoint for result in results} == {"us"}
            stream = await client.generate("story", "Once", max_new_tokens=2)
            assert await stream.text() == "w0 w1 "
            assert stream.route.endpoint == "us"

    asyncio.run(run())


def test_one_of_two_real_clouds_is_killed(tmp_path):
    """Two cloud processes with a real model; a request in flight survives the death of either."""
    pytest.importorskip("onnxruntime")
    store = tmp_path / "models"
    tiny.write_tiny_tensor_bundle(store / "tiny", task="tensor")
    feeds = {"x": np.ones((2, 4), np.float32)}
    running = []
    for name in ("a", "b"):
        cloud = CloudProcess(state=tmp_path / name, models=store, log=tmp_path / f"{name}.log")
        cloud.provision()
        cloud.start()
        running.append(cloud)
    configs = [
        CloudConfig(
            name=name,
            url=cloud.url,
            identity=cloud.pin,
            credentials=f"file:{tmp_path / name / 'client-key.txt'}",
            ca_file=tmp_path / name / "ca.pem",
        )
        for name, cloud in zip("ab", running, strict=True)
    ]
    try:
        with Client(cloud=configs, policy=POLICY, sensitivity="public") as client:
            client.warm_up("tiny")
            first = [client.infer("tiny", feeds) for _ in range(20)]
            assert {result.route.endpoint for result in first} == {"a", "b"}
            running[0].kill()
            after = [client.infer("tiny", feeds, deadline_ms=10_000) for _ in range(20)]
            assert {result.route.endpoint for result in after} == {"b"}
            assert client._core.retries.granted <= 2
            for result in after:
                np.testing.assert_array_equal(result.outputs["y"], first[0].outputs["y"])
    finally:
        for cloud in running:
            cloud.stop()


# -- sans-IO --------------------------------------------------------------------------------------


def endpoint(name: str, *, is_connected: bool = True, is_leaving: bool = False) -> Endpoint:
    link = SimpleNamespace(
        config=SimpleNamespace(name=name, region=None),
        state=LinkState(is_connected=is_connected),
        in_flight=0,
        is_leaving=is_leaving,
    )
    return Endpoint(link, Predictor())


SITUATIONS = st.lists(
    st.fixed_dictionaries(
        {
            "allowed": st.booleans(),
            "serves": st.sampled_from([True, False, None]),
            "is_connected": st.booleans(),
            "is_leaving": st.booleans(),
            "failed": st.booleans(),
            "is_open": st.booleans(),
        }
    ),
    min_size=1,
    max_size=6,
)


@given(SITUATIONS, st.integers(0, 2**32))
def test_policy_first_then_whoever_can_answer(situations, seed):
    now_s = 10.0
    facts = {str(n): one for n, one in enumerate(situations)}
    endpoints = []
    for name, one in facts.items():
        made = endpoint(name, is_connected=one["is_connected"], is_leaving=one["is_leaving"])
        if one["is_open"]:
            made.breaker.trip(now_s)
        endpoints.append(made)
    chosen = choose(
        endpoints,
        model="m",
        allows=lambda made: facts[made.name]["allowed"],
        serves=lambda made: facts[made.name]["serves"],
        left=[name for name, one in facts.items() if one["failed"]],
        now_s=now_s,
        rng=random.Random(seed),
    )
    picked = facts[chosen.name]
    if any(one["allowed"] for one in situations):
        assert picked["allowed"]

    def is_ready(one: dict) -> bool:
        return bool(
            one["allowed"] and one["serves"] and one["is_connected"]
            and not (one["is_leaving"] or one["failed"] or one["is_open"])
        )  # fmt: skip

    if any(is_ready(one) for one in situations):
        assert is_ready(picked)
    usable = [one for one in situations if one["allowed"] and one["serves"] is not False]
    if any(not one["failed"] and not one["is_open"] for one in usable):
        assert not picked["failed"]
        assert not picked["is_open"]
    if usable:
        assert picked["serves"] is not False


def test_breakers_are_for_the_endpoint_and_for_each_model():
    made = endpoint("a")
    for _ in range(2):
        made.failed("sick", EngineError, 0.0)
    assert not made.can_try("sick", 0.0)
    assert made.can_try("well", 0.0)
    assert "failed 2 times" in made.describe("sick", 0.0)
    assert made.health("sick", 0.0) == (BreakerState.OPEN, 2)
    made.answered("sick", 5.0)
    assert made.can_try("sick", 5.0)
    for _ in range(2):
        made.failed("well", CloudUnavailable, 6.0)
    assert not made.can_try("well", 6.0)
    assert not made.can_try("never asked", 6.0)
    made.reached(None, 7.0)
    assert made.can_try("never asked", 7.0)
    made.reached(SecurityError("not who it should be"), 8.0)
    assert not made.can_try("well", 8.0)


def test_a_long_list_of_failing_names_is_not_kept():
    made = endpoint("a")
    for number in range(1000):
        made.silent(f"m{number}", 0.0)
    assert len(made._breakers) <= 256
