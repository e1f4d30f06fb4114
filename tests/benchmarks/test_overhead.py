from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import overhead
from benchmarks.baselines import Start, TimedAnswer, start_python
from benchmarks.harness import Run
from benchmarks.overhead import Settings, Subject
from nearfar.bundle.manifest import Manifest, Variant
from nearfar.cli import main
from nearfar.errors import EngineError, InvalidInput
from tests.support.tiny import write_tiny_classifier_bundle, write_tiny_tensor_bundle

BARS = (
    "import sdk: time",
    "import sdk: memory above bare Python",
    "assistant: tokens/s of the client ÷ bare loop",
    "file-type: infer, added to the bare call",
    "minilm: infer, added to the bare call",
)


def no_progress(title: str, steps: int):
    return lambda: None


def answer(*, tokens: int = 64, prompt_tokens: int = 9, total_s: float = 2.0) -> TimedAnswer:
    return TimedAnswer(
        text="…", prompt_tokens=prompt_tokens, tokens=tokens, ttft_s=0.5, total_s=total_s
    )


def subject(store: Path) -> Subject:
    bundle = write_tiny_classifier_bundle(store / "tiny-classifier")
    return Subject(bundle, bundle.variant("fp32"))


def test_speed_counts_prefill_and_decode_speed_does_not():
    assert answer().tokens_per_s == 32.0
    assert answer().decode_tokens_per_s == pytest.approx(63 / 1.5)


@pytest.mark.parametrize("ours", [answer(tokens=40), answer(prompt_tokens=30)])
def test_speeds_of_different_work_are_not_compared(tmp_path, ours):
    with pytest.raises(EngineError, match="did not do the same work on 'tiny-classifier'"):
        overhead.same_work(subject(tmp_path), answer(), ours)


def test_speeds_of_the_same_work_are_compared(tmp_path):
    overhead.same_work(subject(tmp_path), answer(total_s=1.0), answer(total_s=3.0))


def test_a_fresh_python_is_measured_with_what_the_statement_costs():
    bare = start_python()
    heavy = start_python("import time; kept = bytearray(b'x') * 50_000_000; time.sleep(0.2)")
    assert 45e6 < heavy.rss_bytes - bare.rss_bytes < 70e6
    assert heavy.wall_s > 0.2
    assert bare.wall_s < heavy.wall_s
    assert bare.cpu_s < heavy.cpu_s


def test_a_statement_that_fails_in_a_fresh_python_is_an_error_with_its_message():
    with pytest.raises(EngineError, match="No module named 'nonesuch'"):
        start_python("import nonesuch")


def test_import_bars_are_medians_above_the_bare_python_of_the_same_round(monkeypatch):
    mebibytes = iter([10, 40, 20, 80, 30, 90])  # bare, sdk for each round: 30, 60, 60 above

    def scripted(statement: str = "pass") -> Start:
        if statement != "pass":
            return Start(wall_s=0.15, cpu_s=0.1, rss_bytes=next(sdk_rss))
        return Start(wall_s=0.0, cpu_s=0.0, rss_bytes=next(bare_rss))

    pairs = [int(x * 1e6) for x in mebibytes]
    bare_rss, sdk_rss = iter(pairs[::2]), iter([0, *pairs[1::2]])  # the first one only warms up
    monkeypatch.setattr(overhead, "start_python", scripted)
    part = overhead.measure_import(Settings(models=Path(), rounds=3), Run("overhead"), no_progress)
    time_bar, memory_bar = part.bars
    assert time_bar.value == pytest.approx(150)
    assert time_bar.is_met
    assert memory_bar.value == pytest.approx(60)
    assert not memory_bar.is_met


def test_the_models_of_the_quickstart_are_taken_where_there_are_several(monkeypatch):
    def manifest(name: str, task: str) -> Manifest:
        variant = Variant(id="a", engine="onnxruntime", precision="fp32", entry="a/x", files=())
        return Manifest(name=name, version="1.0.0", task=task, variants=(variant,))

    everything = [
        manifest("aaa", "text-generation"), manifest("assistant", "text-generation"),
        manifest("bbb", "classification"), manifest("ccc", "embedding"),
        manifest("minilm", "embedding"),
    ]  # fmt: skip
    monkeypatch.setattr(overhead.BundleStore, "models", lambda self: everything)
    names = [found.name for found in overhead.find_models(Path())]
    assert names == ["assistant", "bbb", "minilm"]


def test_a_model_without_preprocessing_is_refused(tmp_path):
    bundle = write_tiny_tensor_bundle(tmp_path / "tiny")
    with pytest.raises(InvalidInput, match="'tiny' says nothing about preprocessing"):
        overhead._input(None, Subject(bundle, bundle.variant("int8")))


def test_a_block_gives_its_median_and_keeps_every_call():
    seen = []
    block = overhead.Blocks(lambda: seen.append(1), calls=10)
    assert block() > 0
    assert block() > 0
    assert len(block.calls_us) == 20
    assert len(seen) > 20  # the first calls of a block are not timed


def test_infer_and_classify_are_compared_with_the_bare_call_on_a_real_bundle(tmp_path):
    from sdk import Client

    chosen = subject(tmp_path)
    with Client(models=tmp_path) as client:
        part = overhead.measure_tensors(
            client, chosen, Settings(models=tmp_path, rounds=2), Run("overhead"), no_progress
        )
    (bar,) = part.bars
    assert bar.name == "tiny-classifier: infer, added to the bare call"
    assert bar.limit == 100.0
    figures = {figure.name: figure.summary for figure in part.figures}
    bare, ours = figures["tiny-classifier: bare call"], figures["tiny-classifier: infer"]
    assert 0 < bare.p50 < ours.p50
    assert bar.value == pytest.approx(ours.p50 - bare.p50, rel=0.5)
    assert bare.count == ours.count == figures["tiny-classifier: classify"].count


def test_different_outputs_are_not_compared(tmp_path):
    from sdk import Client

    chosen = subject(tmp_path)
    feeds = {"bytes": np.zeros((1, 32), np.int32)}
    with Client(models=tmp_path) as client:
        result = client.infer("tiny-classifier", feeds)
    right = list(result.outputs.values())
    overhead.same_outputs(chosen, right, result)
    with pytest.raises(EngineError, match="different outputs 'scores'"):
        overhead.same_outputs(chosen, [1 - array for array in right], result)


@pytest.mark.models
def test_the_command_measures_every_bar_on_the_real_models(bundles_dir, tmp_path):
    path = tmp_path / "overhead.json"
    command = ["bench", "overhead", "--models", str(bundles_dir), "--rounds", "2"]
    assert main([*command, "--tokens", "8", "--json", str(path)]) == 0
    report = json.loads(path.read_text(encoding="utf-8"))
    assert tuple(bar["name"] for bar in report["bars"]) == BARS
    values = {bar["name"]: bar["value"] for bar in report["bars"]}
    # Wide, for a busy machine: this test is about what is measured, not about how fast it is.
    assert 0.2 < values[BARS[2]] < 5
    assert 0 < values[BARS[0]] < 60_000
    assert 5 < values[BARS[1]] < 200
    assert report["settings"]["assistant"].endswith("int4")
