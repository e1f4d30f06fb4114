"""`nearfar bench tensorrt`: what counts as taken, and that a missing library is told first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import tensorrt
from benchmarks.tensorrt import Answer, Settings, measure
from benchmarks.tensorrt_table import show
from converters.tensorrt.check import Verdict
from converters.tensorrt.findings import Finding
from nearfar.errors import ConversionError, EngineError, InvalidInput
from tests.support.tensorrt_path import use_stand_in
from tests.support.tiny import write_tiny_tensor_bundle


def begin(title: str, steps: int) -> Callable[[], None]:
    return lambda: None


@pytest.fixture(autouse=True)
def no_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "_subjects", lambda settings: iter(()))


def test_a_store_is_asked_about_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    use_stand_in(monkeypatch)
    bundle = write_tiny_tensor_bundle(tmp_path / "models" / "tiny")
    found = measure(Settings(models=tmp_path / "models", sources=None), begin)
    name = bundle.manifest.name
    graphs = [answer.graph for answer in found.answers]
    assert graphs == [f"{name}/{variant.id}" for variant in bundle.manifest.variants]
    assert all(answer.is_taken for answer in found.answers)
    assert all(bar.is_met for bar in found.report.bars)
    assert found.report.settings[graphs[0]] == "taken"
    show(found)
    assert "taken" in capsys.readouterr().out


def test_a_refusal_of_what_was_made_for_tensorrt_falls_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    use_stand_in(monkeypatch)
    refused = Verdict(findings=(Finding(kind="refused", problem="no", is_refusal=True),))
    monkeypatch.setattr(tensorrt, "_subjects", lambda settings: iter([("net", tmp_path, None)]))
    monkeypatch.setattr(
        tensorrt,
        "_converted",
        lambda *args: [
            Answer(graph="net/trt-fp16", is_for_tensorrt=True, verdict=refused),
            Answer(graph="net/trt-int8", is_for_tensorrt=True, why="it cannot be made"),
            Answer(graph="net/int8", is_for_tensorrt=False, verdict=Verdict(fixed_accepted=True)),
        ],
    )
    found = measure(Settings(models=None, sources=None), begin)
    assert [bar.value for bar in found.report.bars] == [2.0, 2.0]
    assert [answer.summary for answer in found.answers] == [
        "refused: refused: no", "refused: it cannot be made", "refused, taken when repaired: ",
    ]  # fmt: skip


def test_a_missing_library_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NEARFAR_TENSORRT_PYTHON", "/nowhere/python")
    with pytest.raises((EngineError, ConversionError)):
        measure(Settings(models=None, sources=None), begin)


def test_nothing_to_ask_about_is_told(monkeypatch: pytest.MonkeyPatch):
    use_stand_in(monkeypatch)
    with pytest.raises(InvalidInput, match="nothing to ask"):
        measure(Settings(models=None, sources=None), begin)
