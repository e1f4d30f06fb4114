from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import overhead, subjects
from benchmarks.baselines import OnnxCall, RunClock, Start, TimedAnswer, start_python
from benchmarks.harness import Run
from benchmarks.overhead_llm import same_work
from benchmarks.overhead_tensors import Blocks, _input, measure_tensors, same_outputs
from benchmarks.subjects import Settings, Subject
from nearfar.bundle.manifest import Manifest, Variant
from nearfar.cli import main
from nearfar.errors import EngineError, InvalidInput
from tests.support.tiny import write_tiny_classifier_bundle, write_tiny_tensor_bundle

BARS = (
    "import sdk: time",
    "import sdk: memory above bare Python",
    "assistant: tokens/s of the client ÷ bare loop",
    "file-type: infer adds (p50)",
    "minilm: infer adds (p50)",
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
        same_work(subject(tmp_path), answer(), ours)


def test_speeds_of_the_same_work_are_compared(tmp_path):
    same_work(subject(tmp_path), answer(total_s=1.0), answer(total_s=3.0))


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
    monkeypatch.setattr(subjects.BundleStore, "models", lambda self: everything)
    names = [found.name for found in subjects.find_models(Path())]
    assert names == ["assistant", "bbb", "minilm"]


def test_a_model_without_preprocessing_is_refused(tmp_path):
    bundle = write_tiny_tensor_bundle(tmp_path / "tiny")
    with pytest.raises(InvalidInput, match="'tiny' says nothing about preprocessing"):
        _input(None, Subject(bundle, bundle.variant("int8")))


class Call:
    """Stands for a call through the client: spends some time itself and some inside the run."""

    def __init__(self, store: Path) -> None:
        chosen = subject(store)
        self.feeds = {"bytes": np.zeros((1, 32), np.int32)}
        self.session = OnnxCall(chosen.entry, execution_provider="CPUExecutionProvider")
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        ends_s = time.perf_counter() + 2e-3
        while time.perf_counter() < ends_s:
            pass
        self.session.run(self.feeds)


def test_a_block_keeps_every_call_and_tells_what_was_spent_outside_the_run(tmp_path):
    call = Call(tmp_path)
    with RunClock() as inside:
        block = Blocks(call, calls=10, inside=inside)
        medians = [block(), block()]
    assert len(block.calls_us) == 20
    assert call.count > 20  # the first calls of a block are not timed
    assert min(medians) > min(block.outside_us) >= 2000
    assert 0 < inside.last_ns / 1e3 < max(block.calls_us) - 2000


def test_onnx_runtime_is_as_before_after_the_clock_was_taken_off():
    import onnxruntime as ort

    before = ort.InferenceSession.run
    with RunClock():
        assert ort.InferenceSession.run is not before
    assert ort.InferenceSession.run is before


def test_infer_and_classify_are_compared_with_the_bare_call_on_a_real_bundle(tmp_path):
    from sdk import Client

    chosen = subject(tmp_path)
    with Client(models=tmp_path) as client:
        part = measure_tensors(
            client, chosen, Settings(models=tmp_path, rounds=2), Run("overhead"), no_progress
        )
    (inside,) = part.bars
    assert inside.name == "tiny-classifier: infer adds (p50)"
    assert inside.limit == 100.0
    figures = {figure.name: figure.summary for figure in part.figures}
    bare, ours = figures["tiny-classifier: bare call"], figures["tiny-classifier: infer"]
    # The quickest of thousands: medians of a busy machine may stand either way round.
    assert 0 < bare.min < ours.min
    around = figures["tiny-classifier: bare call around the model (p50)"]
    assert 0 < around.min < bare.max
    assert inside.value < ours.max
    assert bare.count == ours.count == figures["tiny-classifier: classify"].count


def test_different_outputs_are_not_compared(tmp_path):
    from sdk import Client

    chosen = subject(tmp_path)
    feeds = {"bytes": np.zeros((1, 32), np.int32)}
    with Client(models=tmp_path) as client:
        result = client.infer("tiny-classifier", feeds)
    right = list(result.outputs.values())
    same_outputs(chosen, right, result)
    with pytest.raises(EngineError, match="different outputs 'scores'"):
        same_outputs(chosen, [1 - array for array in right], result)


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
