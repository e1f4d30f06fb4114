"""`nearfar bench convert`: what it needs is asked for first, and bars are what manifests say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.convert import PARTS, Settings, measure
from benchmarks.convert_encoder import _figure, _has_int8
from benchmarks.convert_process import changed_files, convert, tree_bytes
from benchmarks.harness import Bar
from benchmarks.subjects import Part
from nearfar.bundle import open_bundle
from nearfar.errors import ConversionError, InvalidInput
from tests.support.tiny import write_tiny_classifier_bundle, write_tiny_tensor_bundle


def begin(title: str, steps: int):
    raise AssertionError("nothing is measured before all models are found")


@pytest.mark.parametrize("part", [part for part in PARTS if part != "vision"])
def test_a_missing_model_is_asked_for_before_anything_runs(tmp_path: Path, part: str):
    with pytest.raises(InvalidInput, match="There is no") as caught:
        measure(Settings(sources=tmp_path, parts=(part,)), begin)
    assert "quickstart" in (caught.value.fix or "")


def test_files_that_came_out_differently_are_counted(tmp_path: Path):
    one = write_tiny_tensor_bundle(tmp_path / "one")
    other = write_tiny_tensor_bundle(tmp_path / "other")
    assert changed_files(one, one) == changed_files(one, open_bundle(other.path)) == 0
    third = write_tiny_classifier_bundle(tmp_path / "third")
    files = {e.path for b in (one, third) for v in b.manifest.variants for e in v.files}
    assert changed_files(one, third) == len(files)


def test_a_figure_that_is_not_there_is_not_a_number(tmp_path: Path):
    bundle = write_tiny_tensor_bundle(tmp_path / "one")
    assert _has_int8(bundle)
    assert _figure(bundle, "no_such_metric") != _figure(bundle, "no_such_metric")


def test_a_conversion_that_fails_is_quoted(tmp_path: Path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(ConversionError, match=r"broken\.onnx ended with status 1"):
        convert(broken, tmp_path / "bundle", "--no-cache")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc")
def test_memory_of_children_counts():
    before = tree_bytes(os.getpid())
    hold = "import sys; data = b'x' * 60_000_000; print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        held = tree_bytes(os.getpid())
        child.communicate()
    assert held > before + 50_000_000


def test_a_part_that_fails_loses_only_itself(tmp_path: Path, monkeypatch, capsys):
    def fails(*_: object) -> Part:
        raise ConversionError("silero refuses", fix="Mend it")

    kept = Bar(name="files: kept", value=1.0, limit=1.0, direction="at_least", unit="")
    monkeypatch.setattr("benchmarks.convert.measure_audio", fails)
    monkeypatch.setattr("benchmarks.convert.measure_files", lambda *_: Part((kept,), ()))
    for name in ("silero_vad.onnx", "magika/model.onnx"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    report = measure(Settings(sources=tmp_path, parts=("audio", "files")), begin)
    assert [(bar.name, bar.is_met) for bar in report.bars] == [
        ("audio: measured", False),
        ("files: kept", True),
    ]
    assert "silero refuses" in capsys.readouterr().err
