"""`nearfar convert` at the terminal."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from converters.commands import convert
from nearfar.bundle import open_bundle
from nearfar.bundle.keys import SigningKey, trusted
from nearfar.cli import run
from tests.support.tiny import tensor_model


def nearfar_convert(*arguments: str) -> int:
    return run(convert, arguments, program="nearfar convert")


def test_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]):
    assert nearfar_convert("--help") == 0
    text = capsys.readouterr().out
    assert len(re.findall(r"nearfar convert \S+\.(?:gguf|onnx)", text)) >= 2
    assert "--variants" in text


def test_each_step_is_told_with_its_time(tmp_path: Path, capsys):
    onnx.save(tensor_model(), tmp_path / "m.onnx")
    status = nearfar_convert(str(tmp_path / "m.onnx"), "-o", str(tmp_path / "b"), "--no-measure")
    assert status == 0
    text = capsys.readouterr().out
    for step in ("check m.onnx", "optimise the graph", "verify on", "write the bundle"):
        assert re.search(rf"✓ .*{step}.*\(\d+\.\d s\)", text), step
    open_bundle(tmp_path / "b").verify()


def test_an_error_is_two_lines_and_exit_status_1(tmp_path: Path, capsys):
    assert nearfar_convert(str(tmp_path / "nowhere"), "-o", str(tmp_path / "b")) == 1
    captured = capsys.readouterr()
    assert "error:" in captured.err
    assert "fix:" in captured.err
    assert "Traceback" not in captured.err + captured.out


def test_the_module_can_be_run_and_loads_no_framework_for_help():
    code = (
        "import runpy, sys; sys.argv = ['converters', '--help']\n"
        "try: runpy.run_module('converters', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_conversion_can_end_signed(tmp_path: Path, capsys):
    onnx.save(tensor_model(), tmp_path / "m.onnx")
    arguments = (str(tmp_path / "m.onnx"), "-o", str(tmp_path / "b"), "--no-measure", "--sign")
    assert nearfar_convert(*arguments, str(tmp_path / "key")) == 2
    assert "bundle keygen" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    SigningKey.generate().save(tmp_path / "key")
    assert nearfar_convert(*arguments, str(tmp_path / "key")) == 0
    open_bundle(tmp_path / "b", trusted_keys=trusted([tmp_path / "key.pub"])).verify()
