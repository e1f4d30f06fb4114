"""The cascade through the whole client: scripted models, everything else is real."""

from __future__ import annotations

import asyncio
import time

import msgspec
import numpy as np
import pytest

from nearfar.bundle.manifest import TensorSpec
from nearfar.errors import (
    AgreementNotMet,
    CalibrationError,
    CloudUnavailable,
    InvalidInput,
    PolicyDenied,
    SecurityError,
)
from nearfar.wire import messages as wire
from nearfar.wire.codec import describe
from sdk import AsyncClient, Client, parse_policy
from sdk.cascade import calibration as calibrations
from sdk.cascade.calibration import Calibration, digest_of, load, save
from sdk.cascade.run import Cascades
from sdk.cascade.scores import confidence
from sdk.cascade.settings import CascadeConfig, ModelCascade
from sdk.config import Config
from tests.support.scripted_cloud import STORY, Abort, ScriptedCloud, manifest
from tests.support.scripted_edge import ScriptedEdge, put_into

POLICY = parse_policy(
    """
version = 1
classes = ["public", "personal"]
[[rule]]
id = "open"
when = { sensitivity = "public" }
effect = "cloud_ok"
[[rule]]
id = "home"
when = { sensitivity = "personal" }
effect = "edge_only"
"""
)
FIELDS = {
    "inputs": (TensorSpec(name="x", datatype="FP32", shape=(-1, 3)),),
    "outputs": (TensorSpec(name="y", datatype="FP32", shape=(-1, 3)),),
    "labels": ("a", "b", "c"),
    "label_output": "y",
}
NEAR = manifest("shapes", "classification", variants=("int8",), **FIELDS)
FAR = manifest("shapes", "classification", variants=("fp32",), **FIELDS)
#: The device gives its input back as class scores.
SURE = {"x": np.array([[0.9, 0.05, 0.05]], np.float32)}
UNSURE = {"x": np.array([[0.4, 0.35, 0.25]], np.float32)}


def calibrated(folder, *, near=NEAR, far=FAR, **changes):
    """A calibration that at 0.98 keeps what is surer than two to one."""
    rng = np.random.default_rng(0)
    rows = rng.dirichlet([0.4, 0.4, 0.4], 1500)
    margins = confidence("margin", rows)
    fields = {
        "model": "shapes",
        "task": "classification",
        "edge": digest_of(near, near.variants[0].id),
        "cloud": digest_of(far, far.variants[0].id),
        "samples": len(rows),
        "scores": calibrations.make({"margin": margins}, margins > np.log(2)),
        **changes,
    }
    save(Calibration(**fields), folder / "shapes.json")


@pytest.fixture
def cloud(tmp_path):
    with ScriptedCloud(tmp_path / "state", models=(FAR, STORY)) as server:
        server.behaviour = opposite
        yield server


@pytest.fixture
def make(tmp_path, cloud):
    """Makes clients with a device, a cloud and a calibration; no audits unless asked for."""
    (tmp_path / "store").mkdir()
    folder = tmp_path / "calibrations"
    calibrated(folder)
    made = []

    def client(kind=Client, *, audit=0.0, cloud_config=None, models=None, **arguments):
        config = Config(
            cascade=CascadeConfig(calibrations=folder, audit=audit, models=models or {})
        )
        one = kind(
            config,
            cloud=cloud_config or cloud.config(),
            models=tmp_path / "store",
            policy=POLICY,
            sensitivity="public",
            **arguments,
        )
        one.device = put_into(one, ScriptedEdge([NEAR, STORY]))
        made.append(one)
        return one

    yield client
    for one in made:
        if isinstance(one, Client):
            one.close()


def opposite(session, message, tensors):
    """A cloud that never agrees: class scores in reverse order."""
    yield 0
    outputs = {"y": np.ascontiguousarray(tensors[0][:, ::-1])}
    session.send(
        wire.Result(
            stream=message.stream,
            tensors=describe(outputs),
            variant="fp32",
            execution_provider="CPUExecutionProvider",
            queue_ms=0.0,
            compute_ms=0.1,
        ),
        tuple(outputs.values()),
    )


def hang(session, message, tensors):
    yield 30


def cut(session, message, tensors):
    raise Abort
    yield


# -- what happens to an answer -------------------------------------------------------------------


def test_a_sure_answer_stays_on_the_device_and_nothing_is_sent(make, cloud):
    result = make().infer("shapes", SURE, min_agreement=0.98)
    assert result.route.name == "edge"
    assert result.agreement.outcome == "kept"
    assert result.agreement.is_met
    assert result.agreement.confidence > result.agreement.threshold
    assert "holds an agreement of 0.98" in result.reason
    assert result.bytes_sent == 0
    assert cloud.saw(wire.Infer) == []


def test_an_unsure_answer_is_the_clouds(make, cloud):
    result = make().infer("shapes", UNSURE, min_agreement=0.98)
    assert result.route.path == "edge → cloud"
    assert result.agreement.outcome == "escalated"
    assert result.agreement.confidence < result.agreement.threshold
    assert "margin" in result.reason
    assert result.outputs["y"].argmax() == 2  # the cloud's, not the device's
    assert result.variant == "fp32"
    assert result.bytes_sent >= UNSURE["x"].nbytes
    assert len(cloud.saw(wire.Infer)) == 1


def test_a_batch_goes_as_its_least_sure_row_does(make):
    mixed = {"x": np.concatenate([SURE["x"], UNSURE["x"]])}
    client = make()
    assert client.infer("shapes", mixed, min_agreement=0.98).agreement.outcome == "escalated"
    twice = {"x": np.concatenate([SURE["x"], SURE["x"]])}
    assert client.infer("shapes", twice, min_agreement=0.98).agreement.outcome == "kept"


def test_outputs_that_are_no_numbers_escalate(make):
    broken = {"x": np.array([[np.nan, 0.1, 0.2]], np.float32)}
    assert make().infer("shapes", broken, min_agreement=0.98).agreement.outcome == "escalated"


def test_what_policy_keeps_at_home_is_answered_there_and_marked(make, cloud):
    result = make().infer("shapes", UNSURE, min_agreement=0.98, sensitivity="personal")
    assert result.route.name == "edge"
    assert result.agreement.outcome == "unmet"
    assert not result.agreement.is_met
    assert "not guaranteed" in result.reason
    assert "home" in result.reason
    assert cloud.connections == 0


def test_an_app_may_demand_the_agreement(make, cloud):
    client = make()
    with pytest.raises(AgreementNotMet, match="margin") as caught:
        client.infer(
            "shapes", UNSURE, min_agreement=0.98, sensitivity="personal", require_agreement=True
        )
    assert caught.value.target == 0.98
    assert isinstance(caught.value.__cause__, PolicyDenied)
    assert cloud.connections == 0
    sure = client.infer(
        "shapes", SURE, min_agreement=0.98, sensitivity="personal", require_agreement=True
    )
    assert sure.agreement.outcome == "kept"


def test_edge_only_means_edge_only(make, cloud):
    result = make().infer("shapes", UNSURE, min_agreement=0.98, mode="edge_only")
    assert result.agreement.outcome == "unmet"
    assert "edge_only" in result.reason
    assert cloud.connections == 0


def test_the_cloud_alone_agrees_with_itself(make):
    result = make().infer("shapes", SURE, min_agreement=0.98, mode="cloud_only")
    assert result.route.name == "cloud"
    assert result.agreement.outcome == "cloud"
    assert result.agreement.is_met


def test_without_a_link_the_device_answers_and_says_so(make, cloud):
    client = make(cloud_config=cloud.config(url="wss://localhost:1/v1/nearfar"))
    result = client.infer("shapes", UNSURE, min_agreement=0.98)
    assert result.agreement.outcome == "unmet"
    with pytest.raises(AgreementNotMet) as caught:
        client.infer("shapes", UNSURE, min_agreement=0.98, require_agreement=True)
    assert isinstance(caught.value.__cause__, CloudUnavailable)


def test_a_cloud_that_is_cut_off_leaves_the_devices_answer_and_its_bytes_count(make, cloud):
    cloud.behaviour = cut
    result = make().infer("shapes", UNSURE, min_agreement=0.98)
    assert result.agreement.outcome == "unmet"
    assert result.route.path == "cloud → edge"
    assert result.outputs["y"].argmax() == 0
    assert result.bytes_sent >= UNSURE["x"].nbytes


def test_a_cloud_that_hangs_costs_no_more_than_the_deadline(make, cloud):
    client = make()
    client.warm_up("shapes")
    cloud.behaviour = hang
    started_s = time.monotonic()
    result = client.infer("shapes", UNSURE, min_agreement=0.98, deadline_ms=300)
    assert time.monotonic() - started_s < 5  # not a measurement: a hang would be 30
    assert result.agreement.outcome == "unmet"
    assert result.route.name == "edge"


def test_a_wrong_identity_is_never_worked_around(make, cloud, tmp_path):
    from nearfar.secure.identity import ServerIdentity

    other = ServerIdentity.generate().pin
    client = make(cloud_config=cloud.config(identity=str(other)))
    with pytest.raises(SecurityError):
        client.infer("shapes", UNSURE, min_agreement=0.98)


def test_a_model_that_only_the_cloud_has_needs_no_calibration(make, tmp_path):
    client = make()
    client.device._models.clear()
    client._edge._found.clear()
    (tmp_path / "calibrations" / "shapes.json").unlink()
    assert client.infer("shapes", SURE, min_agreement=0.98).agreement.outcome == "cloud"


# -- settings ------------------------------------------------------------------------------------


def test_calls_that_state_nothing_are_as_before(make):
    result = make().infer("shapes", UNSURE, mode="prefer_edge")
    assert result.agreement is None
    assert result.route.name == "edge"


def test_the_configuration_states_it_for_a_model_and_a_call_can_turn_it_off(make):
    client = make(models={"shapes": ModelCascade(min_agreement=0.98, audit=0.0, require=True)})
    assert client.infer("shapes", UNSURE).agreement.outcome == "escalated"
    assert client.infer("shapes", UNSURE, min_agreement=0, mode="edge_only").agreement is None
    with pytest.raises(AgreementNotMet):
        client.infer("shapes", UNSURE, mode="edge_only")
    marked = client.infer("shapes", UNSURE, mode="edge_only", require_agreement=False)
    assert marked.agreement.outcome == "unmet"


def test_a_stricter_agreement_escalates_more(make):
    client = make()
    between = {"x": np.array([[0.62, 0.3, 0.08]], np.float32)}
    assert client.infer("shapes", between, min_agreement=0.9).agreement.outcome == "kept"
    strict = client.infer("shapes", between, min_agreement=0.999).agreement
    assert strict.outcome == "escalated"
    assert strict.threshold > client.infer("shapes", between, min_agreement=0.9).agreement.threshold


@pytest.mark.parametrize("wrong", [1.0, 1.5, -0.1, float("nan")])
def test_an_agreement_must_be_a_part(make, wrong):
    with pytest.raises(InvalidInput, match="min_agreement"):
        make().infer("shapes", SURE, min_agreement=wrong)


def test_explaining_shows_the_first_step(make, cloud):
    client = make()
    assert client.explain("shapes", feeds=SURE, min_agreement=0.98).inputs.mode == "prefer_edge"
    assert client.explain("shapes", feeds=SURE).inputs.mode == "auto"
    assert cloud.connections == 0


def test_an_async_client_cascades_too(make):
    async def ask():
        async with make(AsyncClient) as client:
            sure = await client.infer("shapes", SURE, min_agreement=0.98)
            unsure = await client.infer("shapes", UNSURE, min_agreement=0.98)
            return sure.agreement.outcome, unsure.agreement.outcome

    assert asyncio.run(ask()) == ("kept", "escalated")


# -- calibrations that do not fit ----------------------------------------------------------------


def test_without_a_calibration_nothing_runs(make, cloud, tmp_path):
    (tmp_path / "calibrations" / "shapes.json").unlink()
    client = make()
    with pytest.raises(CalibrationError, match="nearfar calibrate"):
        client.infer("shapes", SURE, min_agreement=0.98)
    assert client.device.calls == []
    assert cloud.connections == 0


def test_a_calibration_for_another_edge_model_is_refused_before_anything_runs(make, tmp_path):
    other = msgspec.structs.replace(NEAR, labels=("c", "b", "a"))
    calibrated(tmp_path / "calibrations", near=other)
    client = make()
    with pytest.raises(CalibrationError, match="another edge model"):
        client.infer("shapes", SURE, min_agreement=0.98)
    assert client.device.calls == []


def test_a_calibration_for_another_cloud_model_is_refused_as_soon_as_it_is_known(make, tmp_path):
    other = msgspec.structs.replace(FAR, labels=("c", "b", "a"))
    calibrated(tmp_path / "calibrations", far=other)
    client = make()
    with pytest.raises(CalibrationError, match="another cloud model"):
        client.infer("shapes", UNSURE, min_agreement=0.98)
    with pytest.raises(CalibrationError, match="another cloud model"):
        client.infer("shapes", SURE, min_agreement=0.98)  # its offers are known now


def test_a_calibration_of_another_model_is_refused(make, tmp_path):
    calibrated(tmp_path / "calibrations", model="colours")
    with pytest.raises(CalibrationError, match="of 'colours'"):
        make().infer("shapes", SURE, min_agreement=0.98)


def test_names_cannot_lead_out_of_the_folder(tmp_path):
    with pytest.raises(CalibrationError):
        Cascades(tmp_path / "inner").of("../shapes")


def test_a_client_that_was_told_of_no_folder_says_so(tmp_path):
    with pytest.raises(CalibrationError, match="knows no calibrations"):
        Cascades(None).of("shapes")


# -- the audit -----------------------------------------------------------------------------------


def test_an_audited_answer_is_the_clouds_and_is_compared(make, cloud, tmp_path):
    client = make(audit=1.0)
    result = client.infer("shapes", SURE, min_agreement=0.98)
    assert result.agreement.outcome == "audited"
    assert "watch" in result.reason
    assert result.outputs["y"].argmax() == 2
    state = client._core.cascades.of("shapes").audit(0.98)
    assert (state.audited, state.differed) == (1, 1.0)
    client.infer("shapes", UNSURE, min_agreement=0.98)
    state = client._core.cascades.of("shapes").audit(0.98)
    assert (state.audited, state.differed) == (2, 1.0)  # what escalates never differs


def test_the_audit_never_sends_what_policy_keeps(make, cloud):
    client = make(audit=1.0)
    for _ in range(3):
        result = client.infer("shapes", SURE, min_agreement=0.98, sensitivity="personal")
        assert result.agreement.outcome == "kept"
    assert cloud.connections == 0


def test_drift_narrows_what_the_device_keeps_also_after_a_restart(make, cloud, tmp_path, caplog):
    client = make(audit=1.0)
    before = client.infer("shapes", SURE, min_agreement=0.98).agreement.threshold
    for _ in range(40):  # this cloud always differs
        last = client.infer("shapes", SURE, min_agreement=0.98).agreement
    assert last.threshold > before
    assert "agree with the cloud less often" in caplog.text
    level = client._core.cascades.of("shapes").audit(0.98).level
    assert level > 0
    assert load(tmp_path / "calibrations" / "shapes.json").audits["0.98"].level == level
    again = make().infer("shapes", SURE, min_agreement=0.98).agreement
    assert again.threshold > before


def test_an_audit_does_not_write_over_a_new_calibration(make, tmp_path):
    client = make(audit=1.0)
    client.infer("shapes", SURE, min_agreement=0.98)
    calibrated(tmp_path / "calibrations", created="later")
    for _ in range(20):
        client.infer("shapes", SURE, min_agreement=0.98)
    now = load(tmp_path / "calibrations" / "shapes.json")
    assert now.created == "later"
    assert now.audits == {}


def test_a_coin_picks_about_the_stated_part(make, cloud):
    client = make(audit=0.25)
    client.infer("shapes", SURE, min_agreement=0.98)
    tosses = iter([0.1, 0.24, 0.26, 0.9])
    client._core.cascades.coin = lambda: next(tosses)
    outcomes = [client.infer("shapes", SURE, min_agreement=0.98).agreement.outcome for _ in "1234"]
    assert outcomes == ["audited", "audited", "kept", "kept"]


def test_sure_answers_are_kept_when_the_audit_cannot_ask(make, cloud):
    cloud.behaviour = cut
    result = make(audit=1.0).infer("shapes", SURE, min_agreement=0.98)
    assert result.agreement.outcome == "kept"
    assert result.route.name == "edge"
