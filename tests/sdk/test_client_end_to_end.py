"""Client, edge runtime, engines and a cloud process of its own, on tiny real bundles."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from nearfar.bundle.keys import SigningKey
from nearfar.bundle.sealing import sign_bundle
from nearfar.errors import (
    CloudUnavailable,
    InvalidInput,
    ModelNotFound,
    PolicyDenied,
    SecurityError,
)
from sdk import Client, CloudConfig, doctor
from sdk.quickstart.cloud_process import CloudProcess
from tests.support import tiny

pytest.importorskip("onnxruntime")

POLICY = """
version = 1
[[rule]]
id = "open"
when = { sensitivity = "public" }
effect = "cloud_ok"
[[rule]]
id = "padded"
when = { sensitivity = "internal" }
effect = "cloud_ok"
require = { padding = "balanced" }
[[rule]]
id = "here"
when = { sensitivity = "personal" }
effect = "edge_only"
"""
X = {"x": np.array([[1.0, 2.0, 3.0, 4.0], [-1.0, 0.0, 1.0, 0.5]], np.float32)}
BINARY = bytes(range(128, 256)) * 8192  # 1 MiB


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store, a policy, a configuration and a running cloud that serves the same store."""
    root = tmp_path_factory.mktemp("world")
    store = root / "models"
    tiny.write_tiny_tensor_bundle(store / "tiny", task="tensor")
    tiny.write_tiny_classifier_bundle(store / "tiny-classifier")
    tiny.write_tiny_stream_bundle(store / "ear")
    (root / "policy.toml").write_text(POLICY)
    cloud = CloudProcess(state=root / "cloud", models=store, log=root / "cloud.log")
    cloud.provision()
    cloud.start()
    (root / "nearfar.toml").write_text(
        f"""
[models]
store = "models"

[cloud.main]
url = "{cloud.url}"
identity = "{cloud.pin}"
credentials = "file:cloud/client-key.txt"
ca_file = "cloud/ca.pem"

[policy]
file = "policy.toml"
default_sensitivity = "public"
"""
    )
    yield root, cloud
    cloud.stop()


@pytest.fixture
def config(world) -> Path:
    return world[0] / "nearfar.toml"


@pytest.fixture
def client(config):
    with Client.from_config(config) as opened:
        yield opened


def expected(weights: np.ndarray) -> np.ndarray:
    scores = np.exp(X["x"] @ weights)
    return scores / scores.sum(axis=1, keepdims=True)


def test_each_route_answers_with_its_own_variant(client):
    here = client.infer("tiny", X, mode="edge_only")
    there = client.infer("tiny", X, mode="cloud_only")
    assert (here.variant, there.variant) == ("int8", "fp32")
    np.testing.assert_allclose(there.outputs["y"], expected(tiny.TENSOR_WEIGHTS), rtol=1e-4)
    np.testing.assert_allclose(here.outputs["y"], expected(tiny.TENSOR_WEIGHTS), atol=0.05)
    assert here.execution_provider == there.execution_provider == "CPUExecutionProvider"
    assert here.bytes_sent == 0 < there.bytes_sent


def test_a_signal_is_heard_alike_on_both_routes_and_across_them(client, config):
    signal = np.sin(np.arange(40)).astype(np.float32)
    here = client.stream_audio("ear", sample_rate_hz=8, mode="edge_only").feed(signal)
    # A client that has no models here asks the cloud what the model is like.
    with Client.from_config(config, edge=False) as far:
        there = far.stream_audio("ear", sample_rate_hz=8).feed(signal)
    np.testing.assert_allclose([a.score for a in here], [a.score for a in there], rtol=1e-6)
    assert {a.route.name for a in here} == {"edge"}
    assert {a.route.name for a in there} == {"cloud"}
    stream = client.stream_audio("ear", sample_rate_hz=8, mode="edge_only")
    answers = stream.feed(signal[:20])
    stream._options["mode"] = "cloud_only"  # as when the device is lost in the middle
    answers += stream.feed(signal[20:])
    np.testing.assert_allclose([a.score for a in answers], [a.score for a in here], rtol=1e-6)
    assert [a.route.name for a in answers] == ["edge"] * 5 + ["cloud"] * 5


@pytest.mark.parametrize("mode", ["edge_only", "cloud_only"])
def test_files_are_classified_alike_on_both_routes(client, mode, tmp_path):
    (tmp_path / "file").write_bytes(BINARY)
    result = client.classify("tiny-classifier", tmp_path / "file", top_k=2, mode=mode)
    assert result.label == "binary"
    assert [label for label, _ in result.top] == ["binary", "text"]
    assert client.classify("tiny-classifier", b"hello", mode=mode).label == "text"


def test_of_a_large_file_only_what_the_model_sees_leaves(client):
    result = client.classify("tiny-classifier", BINARY, mode="cloud_only")
    assert result.label == "binary"
    assert result.bytes_sent < 1024


def test_policy_keeps_personal_data_here(client):
    result = client.infer("tiny", X, sensitivity="personal", mode="prefer_cloud")
    assert result.route.name == "edge"
    with pytest.raises(PolicyDenied):
        client.infer("tiny", X, sensitivity="personal", mode="cloud_only")
    with pytest.raises(PolicyDenied):
        client.infer("tiny", X, sensitivity="secret")


@pytest.mark.parametrize("shaping", ["off", "balanced", "strict"])
def test_what_must_be_padded_goes_only_where_it_is(world, shaping):
    root = world[0]
    text = (root / "nearfar.toml").read_text()
    path = root / f"{shaping}.toml"
    path.write_text(text.replace("[cloud.main]", f'[cloud.main]\nshaping = "{shaping}"'))
    with Client.from_config(path) as client:
        if shaping == "off":
            here = client.infer("tiny", X, sensitivity="internal", mode="prefer_cloud")
            assert here.route.name == "edge"
            assert here.bytes_sent == 0
            with pytest.raises(PolicyDenied, match='set its shaping = "balanced"') as caught:
                client.infer("tiny", X, sensitivity="internal", mode="cloud_only")
            assert caught.value.rule == "padded"
            return
        there = client.infer("tiny", X, sensitivity="internal", mode="cloud_only")
        assert there.bytes_sent > 0
        plan = client.explain("tiny", feeds=X, sensitivity="internal")
        assert plan.verdict.require.padding == "balanced"


@pytest.mark.parametrize(
    ("feeds", "field"),
    [
        ({"x": X["x"].astype(np.float64)}, "x"),
        ({"x": X["x"][:, :3]}, "x"),
        ({"X": X["x"]}, "x"),
        ({**X, "extra": X["x"]}, "extra"),
    ],
)
def test_wrong_tensors_are_refused(client, feeds, field):
    with pytest.raises(InvalidInput) as caught:
        client.infer("tiny", feeds)
    assert caught.value.field == field


def test_an_unknown_model_lists_the_known_ones(client):
    with pytest.raises(ModelNotFound, match="tiny-classifier"):
        client.infer("tinny", X)


def test_the_cloud_alone_serves_a_device_without_models(world):
    root, cloud = world
    far = CloudConfig(
        url=cloud.url,
        identity=cloud.pin,
        credentials=f"file:{root / 'cloud' / 'client-key.txt'}",
        ca_file=root / "cloud" / "ca.pem",
    )
    with Client(cloud=far, policy=root / "policy.toml", sensitivity="public") as client:
        assert client.infer("tiny", X).route.name == "cloud"
        with pytest.raises(InvalidInput, match="float64"):
            client.infer("tiny", {"x": X["x"].astype(np.float64)})


def test_the_device_alone_needs_no_policy_and_no_cloud(world):
    with Client(models=world[0] / "models") as client:
        result = client.infer("tiny", X)
        assert result.route.name == "edge"
        assert client._loop is None


def test_threads_share_one_client(client):
    results: list[str] = []

    def ask(mode: str) -> None:
        for _ in range(5):
            results.append(client.infer("tiny", X, mode=mode).route.name)

    threads = [threading.Thread(target=ask, args=(m,)) for m in ("edge_only", "cloud_only") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(results) == ["cloud"] * 15 + ["edge"] * 15


def test_doctor_finds_everything_in_order(config):
    findings = list(doctor.examine(config))
    assert not [f for f in findings if f.status == "fail"]
    assert any(f.subject == "cloud" and "tiny" in f.detail for f in findings)
    assert any(f.subject == "model" and "int8" in f.detail for f in findings)
    assert any(f.subject == "model" and "; unsigned" in f.detail for f in findings)


def test_with_trusted_keys_only_signed_models_run_on_the_device(tmp_path):
    key = SigningKey.generate()
    tiny.write_tiny_tensor_bundle(tmp_path / "models" / "signed", "signed", task="tensor")
    tiny.write_tiny_tensor_bundle(tmp_path / "models" / "free", "free", task="tensor")
    sign_bundle(tmp_path / "models" / "signed", key)
    (tmp_path / "release.pub").write_bytes(key.public.pem())
    file = tmp_path / "nearfar.toml"
    file.write_text('[models]\nstore = "models"\ntrusted_keys = ["release.pub"]\n')
    with Client.from_config(file) as client:
        assert client.infer("signed", X).route.name == "edge"
        with pytest.raises(SecurityError, match="is not signed"):
            client.infer("free", X)
    models = [f.detail for f in doctor.examine(file) if f.subject == "model"]
    assert len(models) == 1
    assert f"signed by the trusted key {key.public.id[:16]}" in models[0]


def _ask_until_back(client: Client) -> str:
    """Route of the first answer; until the breaker's pause is over, asking fails at once."""
    give_up_s = time.monotonic() + 20.0
    while True:
        try:
            return client.infer("tiny", X, mode="cloud_only").route.name
        except CloudUnavailable:
            assert time.monotonic() < give_up_s, "the breaker never let the cloud be tried again"
            time.sleep(0.05)


def test_a_killed_cloud_is_replaced_by_the_device_and_used_again_when_it_is_back(world, client):
    _, cloud = world
    client.infer("tiny", X, mode="cloud_only")
    cloud.kill()
    try:
        result = client.infer("tiny", X, mode="prefer_cloud")
        assert result.route.name == "edge"
    finally:
        cloud.start()
    assert _ask_until_back(client) == "cloud"
