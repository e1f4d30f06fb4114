"""`nearfar convert --auto`: what is tried, what is taken, and why."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from converters.cache import contents
from converters.commands import convert as command
from converters.options import ConversionOptions
from converters.recipe_file import options_of, read_recipe
from converters.report.contents import report_in
from converters.report.evidence import Tried
from converters.reporting import Reporter
from converters.search import search
from converters.search.choice import choose, judged
from converters.search.search import search_model
from converters.settings import Gates, Settings
from nearfar.bundle import Bundle, open_bundle
from nearfar.bundle.manifest import LatencyFigure
from nearfar.cli import run
from nearfar.engines.golden import check_golden
from nearfar.errors import ConversionError

FEW = ("int8-blocks-128", "int8-dynamic")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two layers of 64; large enough for every method."""
    random = np.random.default_rng(1)
    weights = [random.standard_normal((64, 64)).astype(np.float32) / 8 for _ in range(2)]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "a"], ["h"], name="first"),
            helper.make_node("Relu", ["h"], ["r"], name="relu"),
            helper.make_node("MatMul", ["r", "b"], ["y"], name="second"),
        ],
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64])],
        [numpy_helper.from_array(array, name) for array, name in zip(weights, "ab", strict=True)],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    made.ir_version = 9
    (tmp_path / "source").mkdir()
    onnx.save(made, tmp_path / "source" / "layers.onnx")
    return tmp_path / "source" / "layers.onnx"


class Heard(Reporter):
    """Remembers what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def auto(
    model: Path, cache: Path, *, to: str = "bundle", gates: Gates | None = None, **more
) -> Bundle:
    settings = Settings(gates=gates or Gates(max_quality_drop=0.5))
    options = ConversionOptions(
        measure=False, cache=cache, settings=settings, replace=True, name="layers"
    )
    return search_model(model, model.parent.parent / "bundle", options, **more)


def test_the_best_of_all_ways_are_put_into_one_bundle(model: Path, tmp_path: Path):
    heard = Heard()
    bundle = auto(model, tmp_path / "cache", reporter=heard, save_recipe=tmp_path / "r.toml")
    bundle.verify()
    manifest, report = bundle.manifest, report_in(bundle)
    ids = [one.id for one in manifest.variants]
    assert ids[0] == "fp32"
    assert 1 < len(ids) <= 3
    assert [one.quality_rank for one in manifest.variants] == list(range(len(ids)))
    assert manifest.variants[0].placement[0] == "cloud"
    tried = {one.id: one for one in report.variants}
    assert len(tried) >= 7
    assert {key for key, one in tried.items() if one.outcome == "packed"} == set(ids)
    assert all(one.reason for one in tried.values() if one.outcome != "packed")
    # What is taken is worth having, and it is said why.
    assert all(tried[key].is_front for key in ids)
    least = min(one.size_bytes for one in tried.values() if one.size_bytes)
    (line,) = [line for line in heard.lines if "the smallest" in line]
    assert tried[line.split()[1].rstrip(":")].size_bytes <= 1.05 * least
    assert "Pareto" in (bundle.path / "report.html").read_text()
    for key in ids:
        assert check_golden(bundle, key).is_good
    # Again by its recipe: without a search, the same files.
    again = Heard()
    known = read_recipe(tmp_path / "r.toml")
    options = options_of(known, tmp_path / "r.toml")
    search_model(model, tmp_path / "again", options, reporter=again, recipe=known)
    assert "✓ the files are those that the recipe states, by their SHA-256" in again.lines
    assert os.listdir(tmp_path).count("again") == 1


def test_a_search_goes_on_where_it_was_stopped(model: Path, tmp_path: Path, monkeypatch):
    cache = tmp_path / "cache"
    made: list[str] = []
    original = search.Bench.run

    def run_once(self, trial, *, limit):
        if trial.id == "int8-dynamic" and not made:
            made.append(trial.id)
            raise KeyboardInterrupt
        return original(self, trial, limit=limit)

    monkeypatch.setattr(search.Bench, "run", run_once)
    with pytest.raises(KeyboardInterrupt):
        auto(model, cache, ways=FEW)
    assert not (tmp_path / "bundle").exists()
    assert contents(cache)["trial"][0] == 2
    heard = Heard()
    auto(model, cache, ways=FEW, reporter=heard)
    assert any(line.startswith("✓ 2 trials were taken from") for line in heard.lines)
    assert contents(cache)["trial"][0] == 3


def test_gates_hold_for_what_is_taken(model: Path, tmp_path: Path):
    gates = Gates(max_quality_drop=0.5, max_size_share=0.8)
    bundle = auto(model, tmp_path / "cache", gates=gates, ways=FEW)
    assert "fp32" not in [one.id for one in bundle.manifest.variants]
    (full,) = [one for one in report_in(bundle).variants if one.id == "fp32"]
    assert full.outcome == "refused"
    with pytest.raises(ConversionError, match="No variant holds the limits"):
        auto(model, tmp_path / "cache", gates=Gates(max_size_bytes=10), ways=FEW)


def tried(name: str, size: int, lost: float, outcome: str = "packed") -> Tried:
    return Tried(id=name, size_bytes=size, lost=lost, outcome=outcome)


def test_smallest_fastest_and_best_come_first():
    rows = [tried("full", 100, 0.0), tried("a", 40, 0.01), tried("b", 30, 0.02),
            tried("c", 20, 0.03), tried("worse", 45, 0.02), tried("bad", 10, 0.4)]  # fmt: skip
    marked = judged(rows, Gates(max_quality_drop=0.05), 100)
    ids, lines, told = choose(marked, 3)
    assert ids == ("full", "a", "c")
    assert lines[2].startswith("c: the smallest (20 B, loses 3 %")
    outcomes = {one.id: (one.outcome, one.reason) for one in told}
    assert outcomes["bad"][0] == "refused"
    assert "loses 40 % (), the limit is 5 %" in outcomes["bad"][1]
    assert outcomes["worse"][0] == "not taken"
    assert outcomes["worse"][1].startswith("a is at least as small")
    assert choose(marked, 1)[0] == ("c",)


def test_a_hair_smaller_does_not_decide():
    rows = [tried("full", 1000, 0.0), tried("slow", 100, 0.001), tried("good", 102, 0.0005)]
    latency = LatencyFigure(
        machine="m", execution_provider="CPUExecutionProvider", p50_ms=1.0, p99_ms=1.0, calls=9
    )
    timed = [
        msgspec.structs.replace(one, latency=msgspec.structs.replace(latency, p50_ms=p50))
        for one, p50 in zip(rows, (3.0, 9.0, 1.0), strict=True)
    ]
    assert choose(judged(timed, Gates(max_quality_drop=0.05), 1000), 1)[0] == ("good",)


def test_the_command_searches_and_shows_the_plan(model: Path, tmp_path: Path, capsys):
    base = [str(model), "-o", str(tmp_path / "b"), "--auto", "--max-quality-drop", "50%"]
    assert run(command, [*base, "--dry-run"], program="nearfar convert") == 0
    text = capsys.readouterr().out
    assert "try int8-static-entropy" in text
    assert "if it is needed" in text
    assert not (tmp_path / "b").exists()
    few = [*base, "--only", ",".join(FEW)]
    assert run(command, [*few, "--dry-run"], program="nearfar convert") == 0
    assert "entropy" not in capsys.readouterr().out
    assert run(command, [*few, "--no-measure"], program="nearfar convert") == 0
    text = capsys.readouterr().out
    assert "[2/3] int8-blocks-128, about" in text
    assert "report.html" in text
    open_bundle(tmp_path / "b").verify()
    assert run(command, [*base, "--variants", "int8"], program="nearfar convert") == 2
    assert run(command, [*base, "--only", "magic", "--dry-run"], program="nearfar convert") == 2
    assert "Name some of: int8-blocks-128" in " ".join(capsys.readouterr().err.split())
    without = [argument for argument in few if argument != "--auto"]
    assert run(command, without, program="nearfar convert") == 2
