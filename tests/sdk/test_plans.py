from __future__ import annotations

import math
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from nearfar.errors import EngineError, InvalidInput
from sdk import Client, plans
from sdk.policy import parse_policy
from sdk.routing import replay
from tests.support.tiny import write_tiny_classifier_bundle, write_tiny_tensor_bundle

STAYS = parse_policy(
    'version = 1\nclasses = ["public"]\n[[rule]]\nid = "stay"\nwhen = {}\neffect = "edge_only"\n'
)
MAY_LEAVE = parse_policy(
    'version = 1\nclasses = ["public"]\n[[rule]]\nid = "go"\nwhen = {}\neffect = "cloud_ok"\n'
)
FEEDS = {"x": np.arange(4, dtype=np.float32).reshape(1, 4)}


class Counter:
    """Counts how requests of a client were answered."""

    def __init__(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        self.planned = self.decided = 0
        run = client._core.run

        def counted(planned):
            def call(*arguments):
                done = planned(*arguments)
                self.planned += done is not None
                return done

            return call

        def counted_run(request):
            self.decided += 1
            return run(request)

        for name in ("infer", "follow"):
            monkeypatch.setattr(client._plans, name, counted(getattr(client._plans, name)))
        monkeypatch.setattr(client._core, "run", counted_run)


@pytest.fixture
def client(tmp_path):
    write_tiny_tensor_bundle(tmp_path / "tiny")
    write_tiny_classifier_bundle(tmp_path / "tiny-classifier")
    with Client(models=tmp_path, policy=STAYS) as made:
        for _ in range(2):  # the first loads, and so says nothing about later calls
            made.infer("tiny", FEEDS)
            made.classify("tiny-classifier", b"hello")
        yield made


@pytest.fixture
def counter(client, monkeypatch):
    monkeypatch.setattr(plans, "_LIFETIME_S", 3600.0)  # however busy the machine is
    client.infer("tiny", FEEDS, purpose="new")
    client._plans.clear()
    client.infer("tiny", FEEDS)
    client.classify("tiny-classifier", b"hello")
    return Counter(client, monkeypatch)


def test_a_plan_gives_what_deciding_gives(client, counter):
    planned = client.infer("tiny", FEEDS)
    client._plans.clear()
    decided = client.infer("tiny", FEEDS)
    assert (counter.planned, counter.decided) == (1, 1)
    assert planned.outputs.keys() == decided.outputs.keys()
    for name, array in planned.outputs.items():
        np.testing.assert_array_equal(array, decided.outputs[name])
    for field in ("route", "usage", "variant", "execution_provider", "bytes_sent", "reason"):
        assert getattr(planned, field) == getattr(decided, field)
    assert planned.decision.inputs.size == decided.decision.inputs.size
    assert planned.decision.verdict == decided.decision.verdict
    assert 0 < planned.timings.compute_ms < planned.timings.total_ms


def test_the_record_of_a_planned_request_has_its_own_size_and_replays(client, counter):
    longer = b"hello, a longer one"
    planned = client.classify("tiny-classifier", longer, top_k=2)
    client._plans.clear()
    decided = client.classify("tiny-classifier", longer, top_k=2)
    assert (counter.planned, counter.decided) == (1, 1)
    assert planned.top == decided.top
    assert planned.decision.inputs.size == decided.decision.inputs.size
    assert replay(planned.decision.encode()) == planned.decision


@pytest.mark.parametrize(
    "options", [{"purpose": "x"}, {"tenant": "x"}, {"mode": "edge_only"}, {"objective": "quality"}]
)
def test_a_request_that_policy_or_router_may_see_differently_is_decided(client, counter, options):
    client.infer("tiny", FEEDS, **options)
    assert (counter.planned, counter.decided) == (0, 1)


def test_a_request_with_a_deadline_is_decided_and_makes_no_plan(client, counter):
    client._plans.clear()
    for _ in range(2):
        client.infer("tiny", FEEDS, deadline_ms=60_000)
    assert (counter.planned, counter.decided) == (0, 2)
    client.infer("tiny", FEEDS)
    client.infer("tiny", FEEDS, deadline_ms=60_000)
    assert (counter.planned, counter.decided) == (0, 4)
    for _ in range(2):
        client.infer("tiny", FEEDS, deadline_ms=math.inf)
    assert counter.planned == 1


def test_no_plan_is_followed_while_the_slot_is_taken(client, counter):
    gate = client._edge.runtime._hosted["tiny", None].gate
    with gate.acquire():
        assert gate.try_acquire() is None
        assert client._plans.infer("tiny", FEEDS, {}) is None
    assert client._plans.infer("tiny", FEEDS, {}) is not None


def test_a_plan_expires(client, counter, monkeypatch):
    now_s = plans.monotonic()
    monkeypatch.setattr(plans, "monotonic", lambda: now_s)
    monkeypatch.setattr(plans, "_LIFETIME_S", 1.0)
    client._plans.clear()
    client.infer("tiny", FEEDS)
    now_s += 0.99
    client.infer("tiny", FEEDS)
    assert (counter.planned, counter.decided) == (1, 1)
    now_s += 0.02
    client.infer("tiny", FEEDS)
    assert (counter.planned, counter.decided) == (1, 2)


def test_answers_by_plan_are_learned_from_now_and_then(client, counter, monkeypatch):
    learned = []
    now_s = plans.monotonic()
    monkeypatch.setattr(
        client._known.predictor, "observe", lambda *seen, **more: learned.append(seen)
    )
    monkeypatch.setattr(plans, "monotonic", lambda: now_s)
    for _ in range(50):
        now_s += 0.01
        client.infer("tiny", FEEDS)
    assert counter.planned == 50
    assert 4 <= len(learned) <= 6


def test_a_closed_client_has_no_plans(client, counter):
    client.close()
    with pytest.raises(InvalidInput, match="closed"):
        client.infer("tiny", FEEDS)
    assert counter.planned == 0


def test_a_closed_runtime_follows_no_plan(client, counter):
    client._edge.runtime.close()
    assert client._plans.infer("tiny", FEEDS, {}) is None


@pytest.mark.parametrize(
    "feeds",
    [
        {"x": FEEDS["x"].astype(np.int32)},
        {"x": FEEDS["x"].reshape(4, 1)},
        {"x": FEEDS["x"][0]},
        {"y": FEEDS["x"]},
        {"x": FEEDS["x"], "y": FEEDS["x"]},
        {"x": FEEDS["x"].tolist()},
        {"x": None},
        {},
        [FEEDS["x"]],
        None,
    ],
    ids=["dtype", "shape", "rank", "name", "many", "list", "none", "empty", "no dict", "nothing"],
)
def test_what_does_not_fit_is_refused_in_the_same_words(client, counter, feeds):
    with pytest.raises(InvalidInput) as planned:
        client.infer("tiny", feeds)
    client._plans.clear()
    with pytest.raises(InvalidInput) as decided:
        client.infer("tiny", feeds)
    assert str(planned.value) == str(decided.value)
    assert planned.value.field == decided.value.field
    assert counter.planned == 0


def test_no_plan_is_kept_where_policy_and_a_link_leave_the_choice_open(
    client, tmp_path, monkeypatch
):
    with Client(models=tmp_path, policy=MAY_LEAVE) as open_client:
        for _ in range(2):
            open_client.infer("tiny", FEEDS)
        assert open_client._plans.infer("tiny", FEEDS, {}) is not None  # nowhere else to go
        kept = []
        monkeypatch.setattr(open_client._plans, "keep", lambda *seen: kept.append(seen))
        open_client._plans.clear()
        open_client.infer("tiny", FEEDS)
        monkeypatch.undo()
        (done, _), *_ = kept
        replace, inputs = msgspec.structs.replace, done.decision.inputs
        for obstacle in ("", "unreachable", "no_model"):
            open_client._plans.clear()
            cloud = replace(inputs.cloud, obstacle=obstacle)
            decision = replace(done.decision, inputs=replace(inputs, cloud=cloud))
            open_client._plans.keep(replace(done, decision=decision), {})
            assert open_client._plans.infer("tiny", FEEDS, {}) is None
        open_client._plans.keep(done, {})
        assert open_client._plans.infer("tiny", FEEDS, {}) is not None


def test_a_plan_does_not_outlive_a_change_of_the_clouds_region(client, counter, monkeypatch):
    link = SimpleNamespace(state=SimpleNamespace(region="elsewhere"))
    monkeypatch.setattr(client._known, "link", link)
    request = client._classify_request("tiny-classifier", b"hello", 1, {})
    assert client._plans.infer("tiny", FEEDS, {}) is None
    assert client._plans.follow(request) is None
    link.state.region = None
    assert client._plans.infer("tiny", FEEDS, {}) is not None
    assert client._plans.follow(request) is not None


def test_plans_are_few(client, counter, monkeypatch):
    monkeypatch.setattr(plans, "_MAX_PLANS", 3)
    for number in range(20):
        client.infer("tiny", FEEDS, tenant=str(number))
        client.classify("tiny-classifier", b"hello", tenant=str(number))
    assert 1 <= len(client._plans._of_tensors["tiny"]) <= plans._MAX_SHAPES
    assert 1 <= len(client._plans._of_items) <= 3


def test_several_shapes_have_plans_side_by_side(client, counter):
    batches = [{"x": np.zeros((rows, 4), np.float32)} for rows in (1, 2, 3)]
    for _ in range(3):
        for feeds in batches:
            client.infer("tiny", feeds)
    counted = counter.planned, counter.decided
    for feeds in batches:
        assert client.infer("tiny", feeds).usage.items == len(feeds["x"])
    assert (counter.planned - counted[0], counter.decided - counted[1]) == (3, 0)


def test_a_failing_engine_is_not_asked_twice(client, counter, monkeypatch):
    engine, calls = client._edge.runtime._hosted["tiny", None].loaded.engine, []

    def fail(feeds, cancel=None):
        calls.append(feeds)
        raise EngineError("out of memory")

    monkeypatch.setattr(engine, "infer", fail)
    with pytest.raises(EngineError, match="out of memory"):
        client.infer("tiny", FEEDS)
    assert len(calls) == 1
