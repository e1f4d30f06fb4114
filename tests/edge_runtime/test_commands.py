"""`nearfar edge` from the shell's side."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")

from edge_runtime.commands import app
from nearfar.bundle.keys import SigningKey
from nearfar.bundle.sealing import sign_bundle
from nearfar.cli import run
from nearfar.engines import devices
from tests.support.tiny import write_tiny_classifier_bundle, write_tiny_tensor_bundle


@pytest.fixture
def store(tmp_path):
    write_tiny_tensor_bundle(tmp_path / "models" / "tiny", task="tensor")
    write_tiny_classifier_bundle(tmp_path / "models" / "bytes", name="bytes")
    return tmp_path / "models"


@pytest.fixture
def edge(store, capsys, monkeypatch):
    """Run a command; gives status, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        status = run(app, [*map(str, arguments), "--models", str(store)], program="nearfar edge")
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def test_list_shows_the_variant_that_runs_here(edge):
    status, out, _ = edge("list")
    assert status == 0
    assert any(line.split()[:4] == ["tiny", "1.0.0", "tensor", "int8"] for line in out.splitlines())


def test_check_describes_the_device_and_every_variant(edge):
    status, out, _ = edge("check")
    assert status == 0
    assert "CPUExecutionProvider" in out
    assert out.count("it is the one that runs") == 2


def test_check_fails_and_says_why_where_a_model_cannot_run(edge, monkeypatch):
    bare = devices.Device(
        machine="bare", execution_providers=(), physical_cores=1, memory_bytes=1 << 30,
        has_genai=False,
    )  # fmt: skip
    monkeypatch.setattr(devices, "probe", lambda: bare)
    status, out, _ = edge("check")
    assert status == 1
    assert "no: onnxruntime is not installed" in out


def test_run_classifies_files(edge, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("plain words " * 20)
    status, out, err = edge("run", "bytes", file)
    assert status == 0
    assert out.startswith(f"{file}: text 0.")
    assert "fp32 on CPUExecutionProvider" in err


def test_run_takes_and_writes_tensors(edge, tmp_path):
    np.savez(tmp_path / "in.npz", x=np.ones((2, 4), np.float32))
    status, out, _ = edge("run", "tiny", tmp_path / "in.npz", "-o", tmp_path / "out.npz")
    assert status == 0
    assert "y float32 [2, 3]" in out
    assert np.load(tmp_path / "out.npz")["y"].shape == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["run", "nope", "x"], 1, "no model 'nope'"),
        (["run", "bytes", "/does/not/exist"], 2, "cannot be read"),
        (["run", "tiny", "/does/not/exist.npz"], 2, "not one .npz file"),
        (["run", "tiny", "a.npz", "b.npz"], 2, "not one .npz file"),
    ],
)
def test_mistakes_are_named_on_standard_error(edge, arguments, status, said):
    found, out, err = edge(*arguments)
    assert (found, out) == (status, "")
    assert said in err


def test_an_output_that_cannot_be_written_is_named(edge, tmp_path):
    np.savez(tmp_path / "in.npz", x=np.ones((1, 4), np.float32))
    status, _, err = edge("run", "tiny", tmp_path / "in.npz", "-o", tmp_path / "no" / "out.npz")
    assert status == 2
    assert "cannot be written" in err


def test_an_empty_store_is_named(tmp_path, capsys):
    assert run(app, ["list", "--models", str(tmp_path)], program="nearfar edge") == 1
    assert "no model in" in capsys.readouterr().err


def test_the_package_runs_as_a_module(store):
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime", "list", "--models", str(store)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "tiny" in done.stdout


def test_with_a_trusted_key_only_signed_models_are_seen_and_run(edge, store):
    key = SigningKey.generate()
    status, _, err = edge("list", "--trusted-key", key.public)
    assert status == 1
    assert "that a trusted key signed" in err
    sign_bundle(store / "bytes", key)
    status, out, _ = edge("list", "--trusted-key", key.public)
    assert status == 0
    assert "bytes" in out
    assert "tiny" not in out
    status, _, err = edge("run", "tiny", "x.npz", "--trusted-key", key.public)
    assert status == 1
    assert "is not signed" in err
