"""Client: routes, policy, repair, deadlines, threads; scripted models, everything else is real."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import sdk
from nearfar.errors import (
    BundleError,
    Cancelled,
    CloudUnavailable,
    ConfigError,
    DeadlineExceeded,
    EngineError,
    InvalidInput,
    ModelNotFound,
    Overloaded,
    PolicyDenied,
    SecurityError,
    StreamInterrupted,
)
from nearfar.secure.identity import ServerIdentity
from nearfar.wire import messages as wire
from sdk import Client, parse_policy
from tests.support.scripted_cloud import EMBEDDING, STORY, TENSOR, ScriptedCloud, manifest, tell
from tests.support.scripted_edge import ScriptedEdge, put_into
from tests.support.two_routes import X, hang

POLICY = parse_policy(
    """
version = 1
classes = ["public", "internal", "personal", "secret"]
[[rule]]
id = "open"
when = { sensitivity = "public" }
effect = "cloud_ok"
[[rule]]
id = "clinic-2"
when = { sensitivity = "personal" }
effect = "edge_only"
[[rule]]
id = "eu-only"
when = { sensitivity = "internal", region = "eu" }
effect = "cloud_ok"
"""
)

EDGE_MODELS = (TENSOR, STORY, manifest("local", "tensor", inputs=TENSOR.inputs))


@pytest.fixture
def far(cloud):
    """A client with a cloud and nothing local."""
    with Client(cloud=cloud.config(), policy=POLICY, sensitivity="public") as client:
        yield client


@pytest.fixture
def both(cloud, tmp_path):
    """A client with a device and a cloud; `client.device` scripts the device."""
    (tmp_path / "store").mkdir()
    with Client(
        cloud=cloud.config(), models=tmp_path / "store", policy=POLICY, sensitivity="public"
    ) as client:
        client.device = put_into(client, ScriptedEdge(EDGE_MODELS))
        yield client


# -- routes ------------------------------------------------------------------------------------


def test_the_device_answers_when_the_mode_says_so(both, cloud):
    result = both.infer("tensor", X, mode="edge_only")
    assert result.route.name == "edge"
    assert result.bytes_sent == 0
    assert np.array_equal(result.outputs["y"], X["x"])
    assert cloud.connections == 0


def test_the_cloud_answers_when_the_mode_says_so_and_the_bytes_are_counted(both, cloud):
    result = both.infer("tensor", X, mode="cloud_only")
    assert result.route.name == "cloud"
    assert result.bytes_sent >= X["x"].nbytes
    assert result.timings.total_ms > 0
    assert result.usage.items == 2
    assert result.variant == "fp32"


def test_personal_data_stays_on_the_device_and_the_route_names_the_rule(both, cloud):
    result = both.infer("tensor", X, sensitivity="personal", mode="prefer_cloud")
    assert str(result.route).startswith('edge · "')
    assert "clinic-2" in result.reason
    assert cloud.connections == 0


def test_a_class_without_a_rule_is_denied_and_nothing_leaves(both, cloud):
    with pytest.raises(PolicyDenied):
        both.infer("tensor", X, sensitivity="secret")
    assert cloud.connections == 0
    assert both.device.calls == []


def test_data_without_a_label_counts_as_the_strictest_class(cloud):
    with Client(cloud=cloud.config(), policy=POLICY) as client, pytest.raises(PolicyDenied):
        client.infer("tensor", X)
    assert cloud.connections == 0


def test_without_a_policy_the_cloud_is_never_used(cloud):
    with Client(cloud=cloud.config()) as client, pytest.raises((PolicyDenied, ConfigError)):
        client.infer("tensor", X, sensitivity="public", mode="cloud_only")
    assert cloud.connections == 0


def test_a_rule_about_a_region_holds_only_where_cloud_and_configuration_agree(tmp_path):
    with ScriptedCloud(tmp_path / "s", region="us") as cloud:
        config = cloud.config(region="eu")
        with (
            Client(cloud=config, policy=POLICY, sensitivity="internal") as client,
            pytest.raises((PolicyDenied, ConfigError)),
        ):
            client.infer("tensor", X)
        assert cloud.saw(wire.Infer) == []


def test_a_busy_device_gives_way_when_the_deadline_is_tight(both):
    both.infer("tensor", X, mode="edge_only")
    both.infer("tensor", X, mode="cloud_only")
    both.device.wait_s = 5.0
    result = both.infer("tensor", X, deadline_ms=1000)
    assert result.route.name == "cloud"


def test_explain_decides_and_nothing_runs_or_leaves(both, cloud):
    decision = both.explain("tensor", feeds=X)
    assert decision.route in ("edge", "cloud")
    assert {c.route for c in decision.candidates} == {"edge", "cloud"}
    assert sdk.replay(decision.encode()).route == decision.route
    assert len(decision.encode()) <= 1024
    assert cloud.connections == 0
    assert both.device.calls == []


def test_explain_says_why_there_is_no_route(both):
    decision = both.explain("story", prompt="x", sensitivity="secret")
    assert decision.route is None
    with pytest.raises(PolicyDenied):
        decision.raise_if_denied()


def test_models_tells_what_is_where(both):
    here = {m.name: m for m in both.models()}
    assert here["local"].edge_variant == "fp32"
    assert "embedder" not in here
    everywhere = {m.name: m for m in both.models(refresh=True)}
    assert everywhere["embedder"].edge_variant is None
    assert everywhere["embedder"].cloud_variant == "fp32"
    assert everywhere["tensor"].edge_variant == everywhere["tensor"].cloud_variant == "fp32"


def test_warm_up_connects_and_sends_nothing_of_the_app(both, cloud):
    both.warm_up("tensor")
    assert {type(m) for m in cloud.seen} <= {wire.Auth, wire.ListModels, wire.Ping}
    assert both.explain("tensor", feeds=X).inputs.cloud.obstacle == ""
    with pytest.raises(ModelNotFound, match="nowhere"):
        both.warm_up("nowhere")


# -- wrong input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("feeds", "field", "word"),
    [
        ({"x": np.zeros((2, 4))}, "x", "float32"),
        ({"x": np.zeros((2, 5), np.float32)}, "x", "[2, 5]"),
        ({"x": np.zeros(4, np.float32)}, "x", "[4]"),
        ({"z": np.zeros((2, 4), np.float32)}, "x", "missing"),
        ({**X, "z": X["x"]}, "z", "no input"),
        ({"x": [[1.0, 2.0, 3.0, 4.0]]}, "x", "list"),
        ([1, 2], "feeds", "list"),
    ],
)
def test_a_wrong_tensor_is_refused_before_anything_leaves(far, cloud, feeds, field, word):
    far.models(refresh=True)
    with pytest.raises(InvalidInput) as caught:
        far.infer("tensor", feeds)
    assert caught.value.field == field
    assert word in str(caught.value)
    assert cloud.saw(wire.Infer) == []


@pytest.mark.parametrize(
    ("ask", "word"),
    [
        (lambda c: c.generate("tensor", "x"), "tensor model"),
        (lambda c: c.embed("story", ["x"]), "text-generation"),
        (lambda c: c.classify("embedder", b"x"), "embedding"),
        (lambda c: c.infer("story", {}), "chat()"),
        (lambda c: c.embed("embedder", "x"), "single string"),
        (lambda c: c.embed("embedder", []), "empty"),
        (lambda c: c.embed("embedder", [1]), "int"),
        (lambda c: c.embed("embedder", ["x", "\ud800"]), "surrogates"),
        (lambda c: c.generate("story", "once \ud800"), "surrogates"),
        (lambda c: c.chat("story", [{"role": "user", "content": "\udfff"}]), "surrogates"),
        (lambda c: c.generate("story", "x", stop="\ud800"), "surrogates"),
        (lambda c: c.explain("tensor", feeds={"x": X}, max_new_tokens=4), "max_new_tokens"),
        (lambda c: c.explain("tensor", upload_bytes=400, top_p=0.5), "top_p"),
        (lambda c: c.generate("story", ""), "empty"),
        (lambda c: c.chat("story", []), "empty"),
        (lambda c: c.chat("story", "hello"), "string"),
        (lambda c: c.chat("story", [{"role": "robot", "content": "x"}]), "robot"),
        (lambda c: c.chat("story", [{"role": "user"}]), "lacks"),
        (lambda c: c.chat("story", [{"role": "assistant", "content": "x"}]), "last message"),
        (lambda c: c.generate("story", "x", max_new_tokens=0), "max_new_tokens"),
        (lambda c: c.generate("story", "x", max_new_tokens=512), "512"),
        (lambda c: c.generate("story", "x", temperature=-1), "temperature"),
        (lambda c: c.generate("story", "x", top_p=0), "top_p"),
        (lambda c: c.generate("story", "x", stop=[""]), "stop"),
        (lambda c: c.infer("tensor", X, mode="fastest"), "fastest"),
        (lambda c: c.infer("tensor", X, objective="cost"), "cost"),
        (lambda c: c.infer("tensor", X, priority=10), "priority"),
        (lambda c: c.infer("tensor", X, deadline_ms=-1), "deadline_ms"),
        (lambda c: c.infer("tensor", X, deadline_ms=math.nan), "deadline_ms"),
        (lambda c: c.infer("tensor", X, sensitivity="publik"), "publik"),
        (lambda c: c.classify("tensor", b"x", top_k=0), "top_k"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_leaves(far, cloud, ask, word):
    with pytest.raises(InvalidInput, match=r".") as caught:
        ask(far)
    assert word in str(caught.value)
    assert cloud.saw(wire.Infer) == []
    assert cloud.saw(wire.Generate) == []


def test_an_unknown_model_is_answered_with_those_that_exist(both):
    with pytest.raises(ModelNotFound) as caught:
        both.infer("tensr", X)
    assert "local" in str(caught.value)
    assert "embedder" in str(caught.value)


def test_a_missing_store_is_named(tmp_path):
    with pytest.raises(BundleError, match="nowhere"):
        Client(models=tmp_path / "nowhere")


def test_a_client_with_neither_models_nor_cloud_is_refused():
    with pytest.raises(ConfigError):
        Client()


def test_malformed_configuration_names_file_and_fix(tmp_path):
    path = tmp_path / "nearfar.toml"
    path.write_text("[cloud.main\nurl = 1\n")
    with pytest.raises(ConfigError, match=r"nearfar\.toml"):
        Client.from_config(path)


# -- repair ------------------------------------------------------------------------------------


def test_an_unreachable_cloud_is_noticed_quickly_and_the_device_answers(both, cloud, tmp_path):
    gone = cloud.config(url="wss://localhost:1/v1/nearfar")
    with Client(
        cloud=gone, models=tmp_path / "store", policy=POLICY, sensitivity="public"
    ) as client:
        put_into(client, ScriptedEdge(EDGE_MODELS))
        started = time.monotonic()
        result = client.infer("tensor", X, mode="prefer_cloud")
        assert result.route.name == "edge"
        assert time.monotonic() - started < 5.0


def test_an_unreachable_cloud_without_a_device_is_an_unavailable_cloud(cloud):
    gone = cloud.config(url="wss://localhost:1/v1/nearfar")
    with Client(cloud=gone, policy=POLICY, sensitivity="public") as client:
        started = time.monotonic()
        with pytest.raises(CloudUnavailable, match="localhost:1"):
            client.infer("tensor", X)
        assert time.monotonic() - started < 5.0


def test_a_wrong_pin_is_never_worked_around(both, cloud, tmp_path):
    wrong = cloud.config(identity=str(ServerIdentity.generate().pin))
    with Client(
        cloud=wrong, models=tmp_path / "store", policy=POLICY, sensitivity="public"
    ) as client:
        device = put_into(client, ScriptedEdge(EDGE_MODELS))
        with pytest.raises(SecurityError):
            client.infer("tensor", X, mode="prefer_cloud")
        assert device.calls == []
        # What needs no cloud is not disturbed by it.
        assert client.infer("tensor", X, sensitivity="personal").route.name == "edge"


def test_a_cloud_that_dies_with_the_request_is_repaired_on_the_device(both, cloud):
    both.warm_up("tensor")
    cloud.behaviour = hang
    killer = threading.Thread(target=lambda: (cloud.wait_for(wire.Infer), cloud.cut_all()))
    killer.start()
    result = both.infer("tensor", X, mode="prefer_cloud")
    killer.join()
    assert result.route.name == "edge"
    assert result.route.before == ("cloud",)
    assert result.route.path == "cloud → edge"
    assert result.bytes_sent > 0  # the attempt counts


def test_a_device_that_fails_is_repaired_on_the_cloud(both):
    both.device.fail_with = EngineError("The engine broke")
    result = both.infer("tensor", X, mode="prefer_edge")
    assert result.route.path == "edge → cloud"


def test_repair_does_not_widen_what_policy_allows(both, cloud):
    both.device.fail_with = EngineError("The engine broke")
    with pytest.raises(EngineError):
        both.infer("tensor", X, sensitivity="personal")
    assert cloud.connections == 0


def test_a_full_cloud_is_repaired_on_the_device(both, cloud):
    def full(session, message, tensors):
        session.send(wire.Error(stream=message.stream, code="overloaded", problem="Full"))
        yield 0

    cloud.behaviour = full
    assert both.infer("tensor", X, mode="prefer_cloud").route.path == "cloud → edge"
    with pytest.raises(Overloaded, match="Full"):
        both.infer("tensor", X, mode="cloud_only")


def test_a_connection_that_died_while_idle_is_replaced_unnoticed(far, cloud):
    far.infer("tensor", X)
    cloud.cut_all()
    assert far.infer("tensor", X).route.name == "cloud"
    assert cloud.connections == 2


# -- streams -----------------------------------------------------------------------------------


def test_a_stream_gives_chunks_and_then_its_facts(far, cloud):
    with far.generate("story", "Once", max_new_tokens=150) as stream:
        chunks = list(stream)
    assert [c.index for c in chunks] == list(range(150))
    assert stream.text() == "".join(c.text for c in chunks)
    assert stream.finish_reason == "length"
    assert stream.usage.completion_tokens == 150
    assert stream.route.name == "cloud"
    assert stream.timings.ttft_ms <= stream.timings.total_ms
    assert stream.bytes_sent > 0
    assert stream.variant == "fp32"
    assert not any(c.handover for c in chunks)


def test_a_stream_on_the_device_sends_nothing(both, cloud):
    stream = both.chat(
        "story", [{"role": "user", "content": "hi"}], max_new_tokens=5, sensitivity="personal"
    )
    assert stream.text() == "e0 e1 e2 e3 e4 "
    assert stream.bytes_sent == 0
    assert cloud.connections == 0


def test_an_answer_cut_on_the_cloud_goes_on_where_it_stopped_on_the_device(both, cloud):
    cloud.behaviour = lambda s, m, t: tell(s, m, 20, cut_after=6)
    stream = both.generate("story", "Once", max_new_tokens=20, mode="prefer_cloud")
    chunks = list(stream)
    assert [c.route for c in chunks] == ["cloud"] * 6 + ["edge"] * 14
    assert [c.handover for c in chunks].index(True) == 6
    assert sum(c.handover for c in chunks) == 1
    assert [c.index for c in chunks] == list(range(20))
    assert stream.route.path == "cloud → edge"
    assert stream.finish_reason == "length"
    assert stream.usage.completion_tokens == 20
    _, _, prompt, options = both.device.calls[-1]
    assert prompt.answer_so_far == "w0 w1 w2 w3 w4 w5 "
    assert options.max_new_tokens == 14


def test_an_answer_cut_on_the_device_goes_on_on_the_cloud(both, cloud):
    both.device.fail_with = EngineError("The engine broke")
    both.device.cut_after = 3
    stream = both.generate("story", "Once", max_new_tokens=10, mode="prefer_edge")
    assert stream.text() == "e0 e1 e2 " + "".join(f"w{i} " for i in range(7))
    assert stream.route.path == "edge → cloud"
    sent = cloud.saw(wire.Generate)[0]
    assert sent.prompt.answer_so_far == "e0 e1 e2 "
    assert sent.options.max_new_tokens == 7


def test_an_answer_that_policy_keeps_here_is_interrupted_and_never_silently_cut(both, cloud):
    both.device.fail_with = EngineError("The engine broke")
    both.device.cut_after = 3
    stream = both.generate("story", "Once", max_new_tokens=10, sensitivity="personal")
    with pytest.raises(StreamInterrupted) as caught:
        stream.text()
    assert caught.value.received_tokens == 3
    assert stream.partial_text == "e0 e1 e2 "
    assert stream.finish_reason is None
    assert cloud.connections == 0
    with pytest.raises(StreamInterrupted):
        stream.text()


def test_an_answer_cut_without_another_route_is_interrupted(far, cloud):
    cloud.behaviour = lambda s, m, t: tell(s, m, 20, cut_after=4)
    stream = far.generate("story", "Once", max_new_tokens=20)
    with pytest.raises(StreamInterrupted):
        stream.text()
    assert stream.finish_reason is None


def test_an_answer_whose_every_token_came_is_complete_without_its_fin(far, cloud):
    cloud.behaviour = lambda s, m, t: tell(s, m, 20, cut_after=20)
    stream = far.generate("story", "Once", max_new_tokens=20)
    assert len(list(stream)) == 20
    assert stream.finish_reason == "length"


def test_a_deadline_leaves_what_came_and_says_so(far, cloud):
    far.warm_up("story")
    cloud.behaviour = lambda s, m, t: tell(s, m, 100, pause_s=0.05)
    started = time.monotonic()
    stream = far.generate("story", "Once", max_new_tokens=100, deadline_ms=400)
    chunks = list(stream)
    assert time.monotonic() - started < 4.0
    assert 0 < len(chunks) < 100
    assert stream.finish_reason == "deadline"
    cloud.wait_for(wire.Cancel)


def test_a_deadline_before_the_first_token_is_exceeded(far, cloud):
    far.warm_up("story")
    cloud.behaviour = hang
    stream = far.generate("story", "Once", deadline_ms=200)
    with pytest.raises(DeadlineExceeded) as caught:
        stream.text()
    assert caught.value.tried == ("cloud",)


def test_a_deadline_holds_on_the_device_too(both):
    both.device.pause_s = 0.05
    stream = both.generate("story", "Once", max_new_tokens=100, mode="edge_only", deadline_ms=300)
    assert 0 < len(list(stream)) < 100
    assert stream.finish_reason == "deadline"
    with pytest.raises(DeadlineExceeded) as caught:
        both.infer("tensor", X, mode="edge_only", deadline_ms=10)
    assert caught.value.tried == ("edge",)


def test_closing_a_stream_tells_the_cloud_to_stop(far, cloud):
    cloud.behaviour = lambda s, m, t: tell(s, m, 400, pause_s=0.01)
    stream = far.generate("story", "Once", max_new_tokens=400)
    next(stream)
    stream.close()
    cloud.wait_for(wire.Cancel)
    assert stream.finish_reason == "cancelled"
    assert list(stream) == []


def test_an_abandoned_stream_is_cancelled_as_well(far, cloud):
    cloud.behaviour = lambda s, m, t: tell(s, m, 400, pause_s=0.01)
    stream = far.generate("story", "Once", max_new_tokens=400)
    next(stream)
    del stream
    cloud.wait_for(wire.Cancel)


def test_an_interrupted_wait_cancels_the_request(far, cloud, monkeypatch):
    """Ctrl-C while the cloud works: the wait ends, and the cloud is told."""
    import concurrent.futures

    far.warm_up("tensor")
    cloud.behaviour = hang
    wait = concurrent.futures.Future.result

    def interrupted(self, timeout=None):
        cloud.wait_for(wire.Infer)
        raise KeyboardInterrupt

    monkeypatch.setattr(concurrent.futures.Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        far.infer("tensor", X)
    monkeypatch.setattr(concurrent.futures.Future, "result", wait)
    cloud.wait_for(wire.Cancel)


# -- embeddings --------------------------------------------------------------------------------


def embedder(*variants: str, mixed: bool = False):
    return manifest(
        "embedder",
        "embedding",
        variants=variants,
        preprocessing=EMBEDDING.preprocessing,
        embedding_output="vectors",
        mixed_routes=mixed,
    )


@pytest.fixture
def vectors(cloud, tmp_path):
    def make(mixed: bool) -> Client:
        cloud.models = (embedder("fp32", mixed=mixed),)
        (tmp_path / "store").mkdir(exist_ok=True)
        client = Client(
            cloud=cloud.config(), models=tmp_path / "store", policy=POLICY, sensitivity="public"
        )
        put_into(client, ScriptedEdge((embedder("int8", mixed=mixed),)))
        return client

    return make


def test_vectors_of_two_variants_are_not_mixed(vectors, cloud):
    with vectors(mixed=False) as client:
        first = client.embed("embedder", ["a"], mode="cloud_only")
        assert first.variant == "fp32"
        assert client.embed("embedder", ["a", "b"]).route.name == "cloud"
        assert cloud.saw(wire.Infer)[-1].variant == "fp32"
        with pytest.raises(InvalidInput, match="fp32"):
            client.embed("embedder", ["a"], sensitivity="personal")


def test_a_bundle_that_says_so_lets_its_variants_be_mixed(vectors):
    with vectors(mixed=True) as client:
        assert client.embed("embedder", ["a"], mode="cloud_only").variant == "fp32"
        result = client.embed("embedder", ["a", "b"], sensitivity="personal")
        assert result.variant == "int8"
        assert result.vectors.shape == (2, 3)
        assert result.vectors.dtype == np.float32


# -- threads and the end -----------------------------------------------------------------------


def test_one_client_serves_many_threads(far, cloud):
    def ask(number: int) -> float:
        x = np.full((1, 4), number, np.float32)
        return float(far.infer("tensor", {"x": x}).outputs["y"][0, 0])

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(60))) == [float(n) for n in range(60)]
    assert cloud.connections == 1


def test_closing_leaves_no_thread_behind(cloud):
    before = set(threading.enumerate())
    client = Client(cloud=cloud.config(), policy=POLICY, sensitivity="public")
    client.infer("tensor", X)
    assert set(threading.enumerate()) > before
    client.close()
    client.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(InvalidInput, match="closed"):
        client.infer("tensor", X)


def test_closing_ends_a_request_that_another_thread_waits_for(cloud):
    cloud.behaviour = hang
    client = Client(cloud=cloud.config(), policy=POLICY, sensitivity="public")
    failed = []

    def ask() -> None:
        try:
            client.infer("tensor", X)
        except Cancelled as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    cloud.wait_for(wire.Infer)
    client.close()
    thread.join(5)
    assert not thread.is_alive()
    assert len(failed) == 1


def test_closing_twice_or_unused_is_fine(cloud):
    client = Client(cloud=cloud.config())
    client.close()
    client.close()


def test_a_cloud_that_has_become_slow_is_learned_from_and_left_for_the_device(both, cloud):
    # Several, so that one call which the machine disturbed does not make the device look slow.
    for mode in ("edge_only", "cloud_only") * 8:
        both.infer("tensor", X, mode=mode)
    cloud.behaviour = hang
    for _ in range(12):
        with pytest.raises(DeadlineExceeded):
            both.infer("tensor", X, mode="cloud_only", deadline_ms=150)
    result = both.infer("tensor", X, mode="prefer_cloud", deadline_ms=150)
    assert result.route.name == "edge"
