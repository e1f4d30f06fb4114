"""Calibrating: both models run, nothing leaves that policy keeps, the file says what was seen."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from nearfar.bundle.manifest import TensorSpec, TextPreprocessing
from nearfar.cli import run as run_command
from nearfar.errors import CalibrationError, CloudUnavailable, InvalidInput, PolicyDenied
from nearfar.wire import messages as wire
from nearfar.wire.codec import describe
from sdk import Client, client, parse_policy
from sdk.cascade.calibration import load, save
from sdk.cascade.commands import calibrate as command
from sdk.cascade.commands import read_data
from sdk.cascade.measure import Data, Settings, calibrate
from tests.support.scripted_cloud import STORY, Abort, ScriptedCloud, manifest
from tests.support.scripted_edge import ScriptedEdge, put_into

POLICY = """
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
FIELDS = {
    "inputs": (TensorSpec(name="x", datatype="FP32", shape=(-1, 3)),),
    "outputs": (TensorSpec(name="y", datatype="FP32", shape=(-1, 3)),),
    "labels": ("a", "b", "c"),
    "label_output": "y",
}
WORDS = {
    "preprocessing": TextPreprocessing(tokenizer="tokenizer.json", max_length_tokens=16),
    "embedding_output": "vectors",
}


def models(variant):
    return (
        manifest("shapes", "classification", variants=(variant,), **FIELDS),
        manifest("words", "embedding", variants=(variant,), mixed_routes=True, **WORDS),
        manifest("apart", "embedding", variants=(variant,), **WORDS),
        STORY,
    )


class WordsEdge(ScriptedEdge):
    """Embeds a text as its length and how often it holds an a."""

    def infer(self, model, feeds=None, *, items=None, **more):
        done = super().infer(model, feeds, items=items, **more)
        if items is not None:
            done.outputs = {"vectors": embedded(items)}
        return done


def embedded(texts):
    return np.array([[len(t), 1 + t.count("a")] for t in texts], np.float32)


def doubtful(session, message, tensors):
    """Says what the device says, but where the two best are close, the second best; and turns
    the vectors of texts that hold a z."""
    yield 0
    if message.form == "text":
        texts = [bytes(item).decode() for item in tensors[0]]
        vectors = embedded(texts)
        outputs = {"vectors": np.array(
            [v[::-1] if "z" in t else v for t, v in zip(texts, vectors, strict=True)], np.float32
        )}  # fmt: skip
    else:
        rows = tensors[0].copy()
        ordered = np.sort(rows, axis=-1)
        close = ordered[:, -1] < 1.2 * ordered[:, -2]
        rows[close] = rows[close][:, [1, 2, 0]]
        outputs = {"y": rows}
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


@pytest.fixture
def cloud(tmp_path):
    with ScriptedCloud(tmp_path / "state", models=models("fp32")) as server:
        server.behaviour = doubtful
        yield server


@pytest.fixture
def both(cloud, tmp_path):
    (tmp_path / "store").mkdir()
    with Client(
        cloud=cloud.config(), models=tmp_path / "store", policy=parse_policy(POLICY),
        sensitivity="public", calibrations=tmp_path,
    ) as one:  # fmt: skip
        one.device = put_into(one, WordsEdge(models("int8")))
        yield one


@pytest.fixture
def rows():
    return np.random.default_rng(0).dirichlet([0.5, 0.5, 0.5], 600).astype(np.float32)


def test_tensors_are_compared_in_batches_and_the_threshold_separates_the_doubtful(
    both, cloud, rows
):
    seen = []
    found = calibrate(both, "shapes", Data(feeds={"x": rows}), on_input=seen.append)
    assert sum(seen) == found.samples == 600
    assert len(cloud.saw(wire.Infer)) < 30
    assert (found.edge.variant, found.cloud.variant) == ("int8", "fp32")
    threshold = found.threshold(0.98)
    assert 0.5 < threshold.kept_share < 1.0
    ordered = np.sort(rows, axis=-1)
    margins = np.log(ordered[:, -1] / ordered[:, -2])
    assert threshold.score in found.scores
    if threshold.score == "margin":
        assert threshold.bound <= np.log(1.2) + 1e-6
    # And the client uses it.
    save(found, both._core.cascade.calibrations / "shapes.json")
    kept = both.infer("shapes", {"x": rows[[margins.argmax()]]}, min_agreement=0.98)
    assert kept.agreement.outcome in ("kept", "audited")


def test_what_policy_keeps_at_home_never_calibrates(both, cloud, rows):
    with pytest.raises(PolicyDenied):
        calibrate(both, "shapes", Data(feeds={"x": rows}), sensitivity="personal")
    assert cloud.connections == 0
    assert both.device.calls == []


def test_texts_are_compared_by_cosine_and_scored_by_how_usual_they_are(both):
    texts = ["banana" * (1 + i % 5) + ("z" if i % 97 == 0 else "") for i in range(800)]
    found = calibrate(both, "words", Data(items=texts))
    assert found.task == "embedding"
    assert found.samples == 640  # a fifth is for the centre
    assert len(found.scores["typicality"].disagreements) == 7
    assert len(found.centre) == 2
    save(found, both._core.cascade.calibrations / "words.json")
    result = both.embed("words", ["banana"], min_agreement=0.95)
    assert result.agreement.outcome in ("kept", "audited")


def test_vectors_of_different_spaces_may_not_cascade(both):
    with pytest.raises(InvalidInput, match="share one vector space"):
        calibrate(both, "apart", Data(items=["a", "b"]))
    with pytest.raises(InvalidInput, match="share one vector space"):
        both.embed("apart", ["a"], min_agreement=0.9)


def test_a_cloud_that_goes_away_ends_the_calibration(both, cloud, rows):
    def gone(session, message, tensors):
        raise Abort
        yield

    cloud.behaviour = gone
    with pytest.raises(CloudUnavailable):
        calibrate(both, "shapes", Data(feeds={"x": rows}))


def test_no_data_and_odd_settings_are_refused(both):
    with pytest.raises(CalibrationError, match="no data"):
        calibrate(both, "shapes", Data())
    with pytest.raises(InvalidInput, match="confidence"):
        Settings(confidence=1.0)
    with pytest.raises(InvalidInput, match="horizon"):
        Settings(horizon_requests=0)
    with pytest.raises(InvalidInput, match="min_cosine"):
        Settings(min_cosine=2.0)


def test_a_score_must_fit_the_task(both, rows):
    with pytest.raises(InvalidInput, match="no score of a classification"):
        calibrate(both, "shapes", Data(feeds={"x": rows[:40]}), Settings(score="typicality"))
    with pytest.raises(InvalidInput, match="no score of a embedding"):
        calibrate(both, "words", Data(items=["a"] * 10), Settings(score="margin"))


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def told(cloud, tmp_path, monkeypatch):
    """A nearfar.toml for this cloud; clients get the scripted device."""
    (tmp_path / "store").mkdir()
    (tmp_path / "policy.toml").write_text(POLICY)
    config = cloud.config()
    path = tmp_path / "nearfar.toml"
    path.write_text(
        f'[models]\nstore = "store"\n[policy]\nfile = "policy.toml"\n'
        f'[cloud.main]\nurl = "{config.url}"\nidentity = "{config.identity}"\n'
        f'credentials = "{config.credentials}"\nca_file = "{config.ca_file}"\n'
        f'[cascade]\ncalibrations = "calibrations"\n'
    )

    class Scripted(Client):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            put_into(self, WordsEdge(models("int8")))

    monkeypatch.setattr(client, "Client", Scripted)
    return SimpleNamespace(path=path, folder=tmp_path / "calibrations")


def calibrate_by_command(told, *arguments):
    return run_command(command, [*map(str, arguments), "-c", str(told.path)], program="calibrate")


def test_the_command_writes_the_file_and_says_what_it_means(told, rows, tmp_path, capsys):
    np.savez(tmp_path / "rows.npz", x=rows)
    status = calibrate_by_command(
        told, "shapes", "--data", tmp_path / "rows.npz", "--sensitivity", "public"
    )
    assert status == 0
    found = load(told.folder / "shapes.json")
    assert found.samples == 600
    shown = "".join(capsys.readouterr().out.split())
    for words in ("600", "stated agreement", "goes to the cloud", "95% confidence", "shapes.json"):
        assert words.replace(" ", "") in shown


def test_the_command_says_when_the_data_is_too_little(told, rows, tmp_path, capsys):
    np.savez(tmp_path / "rows.npz", x=rows)
    status = calibrate_by_command(
        told, "shapes", "--data", tmp_path / "rows.npz", "--sensitivity", "public",
        "--limit", 50, "-o", tmp_path / "small.json",
    )  # fmt: skip
    assert status == 0
    assert load(tmp_path / "small.json").samples == 50
    assert "every request goes to the cloud" in capsys.readouterr().out


def test_the_command_sends_nothing_that_has_no_label(told, rows, cloud, tmp_path, capsys):
    np.savez(tmp_path / "rows.npz", x=rows)
    assert calibrate_by_command(told, "shapes", "--data", tmp_path / "rows.npz") == 1
    assert cloud.connections == 0
    assert not told.folder.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--score", "luck"), ("--min-agreement", "1"), ("--data", "missing-folder"),
        ("--texts", "missing.txt"), ("--data", "a.npz", "--data", "b.npz"), (),
        ("--data", "a", "--texts", "b"), ("--data", "missing.npz"),
    ],
)  # fmt: skip
def test_wrong_usage_is_said_before_anything_runs(told, arguments, cloud, capsys):
    given = arguments if {"--data", "--texts"} & set(arguments) or not arguments else (
        *arguments, "--data", "x")  # fmt: skip
    if "missing-folder" in given:
        given = (*given, "--sensitivity", "public")
    assert calibrate_by_command(told, "shapes", *given) == 2
    assert cloud.connections == 0
    assert capsys.readouterr().err


def test_data_is_shuffled_and_limited(tmp_path):
    folder = tmp_path / "data"
    (folder / "inner").mkdir(parents=True)
    for index in range(20):
        (folder / "inner" / f"{index:02}").write_text("x")
    names = [path.name for path in read_data([folder], []).items]
    assert sorted(names) == [f"{i:02}" for i in range(20)] != names
    assert len(read_data([folder], [], limit=5)) == 5
    (tmp_path / "lines").write_text("one\n\n two \n")
    assert sorted(read_data([], [tmp_path / "lines"]).items) == ["one", "two"]
    np.savez(tmp_path / "odd.npz", x=np.ones((2, 3)), y=np.ones((3, 3)))
    with pytest.raises(InvalidInput, match="same inputs"):
        read_data([tmp_path / "odd.npz"], [])
