"""`nearfar jobs`."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nearfar import cli
from sdk import Client, JobsConfig
from sdk.jobs.commands import app
from tests.support.tiny import write_tiny_classifier_bundle, write_tiny_tensor_bundle

pytest.importorskip("onnxruntime")
FEEDS = {"x": np.arange(4, dtype=np.float32).reshape(1, 4)}


@pytest.fixture
def config(tmp_path):
    write_tiny_tensor_bundle(tmp_path / "models" / "tiny")
    path = tmp_path / "nearfar.toml"
    path.write_text('[models]\nstore = "models"\n[jobs]\nfile = "jobs.db"\nrun = false\n')
    return path


@pytest.fixture
def ids(config):
    with Client.from_config(config) as client:
        return [client.submit("tiny", feeds=FEEDS, deferrable=True).id for _ in range(3)]


def run(capsys, *arguments: object) -> tuple[int, str]:
    status = cli.run(app, [str(a) for a in arguments], program="nearfar jobs")
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_list_shows_each_job_and_no_content(config, ids, capsys):
    status, text = run(capsys, "list", "-c", config, "--json")
    assert status == 0
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["id"] for row in rows] == ids
    assert [rows[0][name] for name in ("method", "model", "sensitivity")] == [
        "infer", "tiny", "secret",
    ]  # fmt: skip
    assert rows[0]["status"] == "waiting"
    status, text = run(capsys, "list", "-c", config)
    assert status == 0
    assert "waiting" in text
    assert ids[0][:12] in text


def test_run_runs_what_can_be_run(config, ids, capsys):
    assert run(capsys, "run", "-c", config) == (0, "3 done, 0 waiting\n")
    assert run(capsys, "run", "-c", config, "--wait") == (0, "0 waiting\n")
    with Client.from_config(config) as client:
        assert client.job(ids[0]).result(0).outputs["y"].shape == (1, 3)


def test_cancel_takes_the_beginning_of_an_id(config, ids, capsys):
    assert run(capsys, "cancel", ids[1][:12], "-c", config) == (0, "1 cancelled\n")
    assert run(capsys, "run", "-c", config) == (0, "2 done, 0 waiting\n")
    assert run(capsys, "cancel", "--all", "--forget", "-c", config) == (
        0,
        "0 cancelled, 3 deleted\n",
    )
    assert run(capsys, "list", "-c", config) == (0, "no jobs\n")


def test_cancel_says_what_is_wrong(config, ids, capsys):
    status, text = run(capsys, "cancel", "zzz", "-c", config)
    assert status == 2
    assert "no job" in text
    assert run(capsys, "cancel", "-c", config)[0] == 2
    assert run(capsys, "cancel", ids[0], "--all", "-c", config)[0] == 2


def test_a_configuration_without_a_queue_is_named(tmp_path, capsys):
    (tmp_path / "nearfar.toml").write_text('[models]\nstore = "models"\n')
    status, text = run(capsys, "list", "-c", tmp_path / "nearfar.toml")
    assert status == 2
    assert "[jobs]" in text


def test_a_queue_that_was_never_used_is_named_and_not_made(config, capsys):
    status, text = run(capsys, "list", "-c", config)
    assert status == 2
    assert "first job" in text
    assert not (config.parent / "jobs.db").exists()


def test_a_classification_keeps_its_number_of_labels(tmp_path):
    write_tiny_classifier_bundle(tmp_path / "models" / "tiny-classifier")
    jobs = JobsConfig(file=tmp_path / "jobs.db")
    with Client(models=tmp_path / "models", jobs=jobs) as client:
        called = client.classify("tiny-classifier", b"hello", top_k=2)
        result = client.submit("tiny-classifier", data=b"hello", top_k=2).result(20)
    assert (result.label, result.score, result.top) == (called.label, called.score, called.top)
    assert len(result.top) == 2
