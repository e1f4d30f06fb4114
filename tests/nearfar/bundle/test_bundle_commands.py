"""`nearfar bundle inspect` and `nearfar bundle verify`."""

from __future__ import annotations

from pathlib import Path

import pytest

from nearfar.bundle.commands import app
from nearfar.bundle.manifest import decode_manifest
from nearfar.cli import run
from tests.support.tiny import write_tiny_tensor_bundle


def nearfar_bundle(*arguments: str) -> int:
    return run(app, arguments, program="nearfar bundle")


def test_inspect_shows_variants_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_tiny_tensor_bundle(tmp_path / "t")
    assert nearfar_bundle("inspect", str(tmp_path / "t")) == 0
    text = capsys.readouterr().out
    for expected in ("tiny 1.0.0", "x FP32[?, 4]", "int8", "fp32", "top1_agreement", "0.05 ms"):
        assert expected in text


def test_inspect_prints_the_manifest_for_programs(tmp_path: Path, capsys):
    bundle = write_tiny_tensor_bundle(tmp_path / "t")
    assert nearfar_bundle("inspect", str(bundle.path), "--json") == 0
    assert decode_manifest(capsys.readouterr().out.encode()) == bundle.manifest


def test_verify_says_that_all_is_good(tmp_path: Path, capsys):
    write_tiny_tensor_bundle(tmp_path / "t")
    assert nearfar_bundle("verify", str(tmp_path / "t")) == 0
    assert "2 files" in capsys.readouterr().out


def test_verify_names_the_damaged_file_and_exits_1(tmp_path: Path, capsys):
    bundle = write_tiny_tensor_bundle(tmp_path / "t")
    file = bundle.path / "fp32" / "model.onnx"
    file.write_bytes(bytes(file.stat().st_size))
    assert nearfar_bundle("verify", str(bundle.path)) == 1
    assert "fp32/model.onnx" in capsys.readouterr().err.replace("\n", "")


def test_a_manifest_cannot_write_on_the_terminal(tmp_path: Path, capsys):
    bundle = write_tiny_tensor_bundle(tmp_path / "t")
    file = bundle.path / "manifest.json"
    file.write_text(
        file.read_text().replace('"description": ""', '"description": "[red]\\u001b[2J"')
    )
    assert nearfar_bundle("inspect", str(bundle.path)) == 0
    text = capsys.readouterr().out
    assert "[red]" in text
    assert "\x1b[2J" not in text
