"""The whole way with real bundles, the real engine and the real cloud runtime: calibrate, ask."""

from __future__ import annotations

import numpy as np
import pytest

from nearfar.errors import CalibrationError
from sdk import Client, CloudConfig, parse_policy
from sdk.cascade.calibration import save
from sdk.cascade.measure import Data, calibrate
from sdk.cascade.settings import CascadeConfig, ModelCascade
from sdk.config import Config
from sdk.quickstart.cloud_process import CloudProcess
from tests.support import tiny

pytest.importorskip("onnxruntime")

OPEN = 'version = 1\nclasses = ["public"]\n[[rule]]\nid = "open"\nwhen = {}\neffect = "cloud_ok"\n'
STAY = OPEN.replace("cloud_ok", "edge_only")
ROWS = np.random.default_rng(0).normal(0, 3, (800, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store, a running cloud that serves it, and a calibration made through both."""
    root = tmp_path_factory.mktemp("world")
    tiny.write_tiny_tensor_bundle(root / "models" / "tiny")
    cloud = CloudProcess(state=root / "cloud", models=root / "models", log=root / "cloud.log")
    cloud.provision()
    cloud.start()
    with client_of(root, cloud) as client:
        save(calibrate(client, "tiny", Data(feeds={"x": ROWS})), root / "calibrations/tiny.json")
    yield root, cloud
    cloud.stop()


def client_of(root, cloud, *, policy=OPEN, models="models", told=None):
    cascade = CascadeConfig(calibrations=root / "calibrations", audit=0.0, models=told or {})
    config = CloudConfig(
        url=cloud.url,
        identity=str(cloud.pin),
        credentials=f"file:{root / 'cloud' / 'client-key.txt'}",
        ca_file=root / "cloud" / "ca.pem",
    )
    return Client(
        Config(cascade=cascade),
        cloud=config,
        models=root / models,
        policy=parse_policy(policy),
        sensitivity="public",
    )


def test_both_variants_are_asked_and_a_sure_answer_stays(world):
    with client_of(*world) as client:
        result = client.infer("tiny", {"x": ROWS[:1] * 9}, min_agreement=0.98)
        assert (result.agreement.outcome, result.variant) == ("kept", "int8")
        strict = client.infer("tiny", {"x": ROWS[:1]}, min_agreement=0.9999)
        assert (strict.agreement.outcome, strict.variant) == ("escalated", "fp32")


def test_plans_never_answer_for_the_cascade(world):
    told = {"tiny": ModelCascade(min_agreement=0.98, audit=0.0)}
    feeds = {"x": ROWS[:1]}
    with client_of(*world, policy=STAY, told=told) as client:
        for _ in range(4):  # edge only by policy, no deadline: what plans are made for
            assert client.infer("tiny", feeds, min_agreement=0).agreement is None
        assert client._plans._of_tensors["tiny"]
        assert client.infer("tiny", feeds).agreement is not None
        assert client.infer("tiny", feeds, min_agreement=0.9).agreement.target == 0.9
        assert client.infer("tiny", feeds, min_agreement=0).agreement is None


def test_another_bundle_of_the_same_name_is_refused(world):
    root, cloud = world
    tiny.write_tiny_classifier_bundle(root / "others" / "tiny", name="tiny")
    with (
        client_of(root, cloud, models="others") as client,
        pytest.raises(CalibrationError, match="another edge model"),
    ):
        client.classify("tiny", b"abc" * 40, min_agreement=0.98)
