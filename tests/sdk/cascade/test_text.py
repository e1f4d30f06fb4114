"""Answers in text through the cascade: scripted models, everything else is real."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from nearfar.errors import (
    AgreementNotMet,
    CalibrationError,
    EngineError,
    InvalidInput,
)
from nearfar.generation import GenerationOptions
from nearfar.wire import messages as wire
from sdk import AsyncClient, Client, parse_policy
from sdk.cascade import calibration as calibrations
from sdk.cascade.calibration import Calibration, digest_of, load, save
from sdk.cascade.measure import Data, Settings, calibrate
from sdk.cascade.scores import TEXT_SCORES, AnswerScores, same_text
from sdk.cascade.settings import CascadeConfig, ModelCascade
from sdk.config import Config
from tests.support.scripted_cloud import Abort, ScriptedCloud, manifest
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
NEAR, FAR = (
    manifest("story", "text-generation", variants=(name,), context_length_tokens=512)
    for name in ("int4", "fp32")
)
TOKENS = 4
ASKED = {"min_agreement": 0.98, "max_new_tokens": TOKENS}
EDGE_TEXT, CLOUD_TEXT = "e0 e1 e2 e3 ", "w0 w1 w2 w3 "


def calibrated(folder, **changes):
    """A calibration that at 0.98 keeps answers whose least margin is above about 1."""
    margins = np.random.default_rng(0).uniform(0.0, 4.0, 2000)
    fields = {
        "model": "story",
        "task": "text-generation",
        "edge": digest_of(NEAR, "int4"),
        "cloud": digest_of(FAR, "fp32"),
        "samples": len(margins),
        "scores": calibrations.make({"least_margin": margins}, margins > 1.0),
        "generation": GenerationOptions(max_new_tokens=TOKENS),
        **changes,
    }
    save(Calibration(**fields), folder / "story.json")


@pytest.fixture
def cloud(tmp_path):
    with ScriptedCloud(tmp_path / "state", models=(FAR,)) as server:
        yield server


@pytest.fixture
def make(tmp_path, cloud):
    """Makes clients with a device, a cloud and a calibration; no audits unless asked for."""
    (tmp_path / "store").mkdir()
    folder = tmp_path / "calibrations"
    calibrated(folder)
    made = []

    def client(kind=Client, *, audit=0.0, models=None, margins=(), **arguments):
        config = Config(
            cascade=CascadeConfig(calibrations=folder, audit=audit, models=models or {})
        )
        one = kind(
            config,
            cloud=cloud.config(),
            models=tmp_path / "store",
            policy=POLICY,
            sensitivity="public",
            **arguments,
        )
        one.device = put_into(one, ScriptedEdge([NEAR]))
        one.device.margins = margins
        one.folder = folder
        made.append(one)
        return one

    yield client
    for one in made:
        if isinstance(one, Client):
            one.close()


def cut(session, message, tensors):
    raise Abort
    yield


def both(make, **arguments):
    """What came of one answer, from the blocking and from the async client."""
    options = {**ASKED, **arguments.pop("options", {})}
    with make(**arguments) as client:
        stream = client.generate("story", "once", **options)
        text = stream.text()

    async def ask():
        async with make(AsyncClient, **arguments) as one:
            answer = await one.generate("story", "once", **options)
            return await answer.text(), answer

    other_text, other = asyncio.run(ask())
    assert other_text == text
    assert other.agreement.outcome == stream.agreement.outcome
    assert other.route.path == stream.route.path
    return text, stream


# -- what happens to an answer -------------------------------------------------------------------


def test_a_sure_answer_stays_on_the_device_and_nothing_is_sent(make, cloud):
    text, stream = both(make)
    assert text == stream.partial_text == EDGE_TEXT
    assert stream.route.path == "edge"
    assert stream.agreement.outcome == "kept"
    assert stream.agreement.confidence == pytest.approx(10.0)
    assert "holds an agreement of 0.98" in stream.reason
    assert stream.bytes_sent == 0
    assert stream.finish_reason == "length"
    assert stream.usage.completion_tokens == TOKENS
    assert cloud.saw(wire.Generate) == []


def test_an_unsure_answer_is_the_clouds_and_nothing_of_the_devices_is_shown(make, cloud):
    text, stream = both(make, margins=(9.0, 0.1))
    assert text == CLOUD_TEXT
    assert stream.route.path == "edge → cloud"
    assert stream.agreement.outcome == "escalated"
    assert stream.agreement.confidence == pytest.approx(0.1)
    assert "least_margin" in stream.reason
    assert stream.bytes_sent > 0
    assert {type(m) for m in cloud.saw(wire.Generate)} == {wire.Generate}


def test_the_device_stops_at_the_first_token_that_is_not_sure(make):
    with make(margins=(9.0, 0.1)) as client:
        stream = client.generate("story", "once", **ASKED)
        assert next(stream).route == "cloud"
        assert stream._cascade.scores.tokens == 2
        assert stream._cascade.near.finish_reason == "cancelled"


def test_pieces_come_one_by_one_also_from_the_cloud(make):
    with make(margins=(0.1,)) as client:
        chunks = list(client.generate("story", "once", **ASKED))
        assert [chunk.route for chunk in chunks] == ["cloud"] * TOKENS
        assert [chunk.index for chunk in chunks] == list(range(TOKENS))


def test_an_unsure_answer_without_a_cloud_is_marked(make, cloud):
    cloud.behaviour = cut
    text, stream = both(make, margins=(0.1,))
    assert text == EDGE_TEXT
    assert stream.agreement.outcome == "unmet"
    assert "agreement not guaranteed" in stream.reason
    text, stream = both(make, margins=(0.1,), options={"mode": "edge_only"})
    assert (text, stream.agreement.outcome) == (EDGE_TEXT, "unmet")
    assert "edge_only" in stream.reason


def test_policy_is_asked_before_an_unsure_answer_goes_to_the_cloud(make, cloud):
    text, stream = both(make, margins=(0.1,), options={"sensitivity": "personal"})
    assert (text, stream.agreement.outcome) == (EDGE_TEXT, "unmet")
    assert cloud.saw(wire.Generate) == []


def test_an_app_may_rather_have_no_answer(make, cloud):
    cloud.behaviour = cut
    with make(margins=(0.1,)) as client:
        stream = client.generate("story", "once", require_agreement=True, **ASKED)
        with pytest.raises(AgreementNotMet, match="least_margin"):
            stream.text()
        assert stream.partial_text == ""


def test_a_device_that_breaks_off_gives_the_clouds_answer_alone(make):
    with make() as client:
        client.device.fail_with, client.device.cut_after = EngineError("broken"), 2
        stream = client.generate("story", "once", **ASKED)
        assert stream.text() == CLOUD_TEXT
        assert stream.agreement.outcome == "escalated"


def test_what_goes_to_the_cloud_at_once_agrees(make):
    text, stream = both(make, options={"mode": "cloud_only"})
    assert (text, stream.agreement.outcome) == (CLOUD_TEXT, "cloud")


def test_a_closed_stream_ends_and_asks_nobody(make, cloud):
    with make(margins=(0.1,)) as client:
        stream = client.generate("story", "once", **ASKED)
        stream.close()
        assert list(stream) == []
        assert cloud.saw(wire.Generate) == []


# -- the audit -------------------------------------------------------------------------------------


def test_picked_answers_are_compared_and_counted(make):
    with make(audit=1.0) as client:
        stream = client.generate("story", "once", **ASKED)
        assert stream.text() == CLOUD_TEXT
        assert stream.agreement.outcome == "audited"
        for _ in range(9):
            client.generate("story", "once", **ASKED).text()
    state = load(client.folder / "story.json").audits["0.98"]
    assert (state.audited, state.differed) == (10, 10.0)


def test_an_audit_without_a_cloud_leaves_the_answer_on_the_device(make, cloud):
    cloud.behaviour = cut
    text, stream = both(make, audit=1.0)
    assert (text, stream.agreement.outcome) == (EDGE_TEXT, "kept")


# -- what is refused -------------------------------------------------------------------------------


def test_drawn_tokens_agree_with_nothing(make):
    with make() as client, pytest.raises(InvalidInput, match="drawn") as caught:
        client.generate("story", "once", temperature=0.7, **ASKED)
    assert caught.value.field == "temperature"


def test_a_calibration_is_for_answers_of_one_length(make):
    with make() as client, pytest.raises(CalibrationError, match="max_new_tokens = 4"):
        client.generate("story", "once", min_agreement=0.98, max_new_tokens=5)


def test_a_configured_agreement_can_be_turned_off_for_a_call(make):
    with make(models={"story": ModelCascade(min_agreement=0.98, audit=0.0)}) as client:
        stream = client.generate("story", "once", max_new_tokens=TOKENS)
        assert stream.text() == EDGE_TEXT
        assert stream.agreement.outcome == "kept"
        plain = client.generate("story", "once", min_agreement=0, mode="edge_only")
        assert plain.agreement is None


def test_a_calibration_whose_scores_are_another_tasks_is_refused(tmp_path):
    calibrated(tmp_path)
    path = tmp_path / "story.json"
    path.write_text(path.read_text().replace("least_margin", "entropy"))
    with pytest.raises(CalibrationError, match="scores do not fit"):
        load(path)


# -- calibrating -----------------------------------------------------------------------------------


def test_calibrating_compares_texts_and_records_what_the_answers_were(make):
    with make() as client:
        settings = Settings(max_new_tokens=TOKENS, is_chat=False)
        found = calibrate(client, "story", Data(items=["one", "two", "three"]), settings)
    assert found.task == "text-generation"
    assert found.samples == 3
    assert set(found.scores) == set(TEXT_SCORES)
    assert all(len(sample.disagreements) == 3 for sample in found.scores.values())
    assert found.generation == GenerationOptions(max_new_tokens=TOKENS)
    assert found.threshold(0.98).keeps_nothing


def test_calibrating_text_with_tensors_is_refused(make):
    with make() as client, pytest.raises(InvalidInput, match="texts"):
        calibrate(client, "story", Data(feeds={"x": np.zeros((2, 3), np.float32)}))


# -- scores ----------------------------------------------------------------------------------------


def test_scores_are_those_of_the_softmax():
    scores = AnswerScores()
    logits = np.log(np.array([0.7, 0.2, 0.1], np.float32))
    scores(logits, 0)
    scores(logits + 3.0, 1)  # a constant changes nothing
    assert scores.value("answer_probability") == pytest.approx(math.log(0.7 * 0.2), rel=1e-5)
    assert scores.value("least_probability") == pytest.approx(math.log(0.2), rel=1e-5)
    assert scores.value("least_margin") == pytest.approx(math.log(0.2 / 0.7), rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_never_sure(bad):
    scores = AnswerScores()
    scores(np.array([bad, 0.0], np.float32), 0)
    assert all(scores.value(name) == -math.inf for name in TEXT_SCORES)


def test_no_token_is_not_sure():
    assert all(AnswerScores().value(name) == -math.inf for name in TEXT_SCORES)


def test_white_space_is_no_difference():
    assert same_text(" a  b\n", "a b")
    assert not same_text("a b", "ab")
