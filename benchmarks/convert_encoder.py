"""all-MiniLM-L6-v2 in 8 bits: plain dynamic quantization, and the recipe that nearfar brings."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.convert_process import Conversion, cached_steps, changed_files, convert
from benchmarks.harness import Bar, Direction, Figure, Run, interleave, per_round
from benchmarks.subjects import Begin, Part
from converters import texts
from converters.steps.onnx_session import open_session
from nearfar.bundle import Bundle
from nearfar.bundle.manifest import TextPreprocessing
from nearfar.processing.text import TextEncoder

RECIPE = "minilm-int8"
PASSAGES = 1024
MIN_RECALL, MAX_SIZE = 0.97, 0.30

_PLAIN = """
[settings.int8]
method = "dynamic"
per_channel = false
max_kept = 0
"""


def measure_encoder(source: Path, work: Path, rounds: int, run: Run, begin: Begin) -> Part:
    """Convert plainly, plainly with the gate, by the recipe, again, and with one changed setting.

    Args:
        source: Folder of the model.
        work: Where the bundles go.
        rounds: Of the comparison of speed.
        run: Draws the order of the sides.
        begin: Shows progress.
    """
    step = begin("sentence encoder: conversions", 5)
    plainly, strictly, changed = (work / f"{name}.toml" for name in ("plain", "gate", "changed"))
    plainly.write_text(_recipe(_PLAIN))
    strictly.write_text(_recipe(f"{_PLAIN}\n[settings.gates]\nmax_quality_drop = 0.03\n"))
    changed.write_text(_recipe('[settings.int8]\nmethod = "weights"\nblock_size = 64\n'))
    cache = ("--cache", str(work / "cache"))

    def made(name: str, recipe: str | Path, *options: str) -> Conversion:
        conversion = convert(source, work / name, "--recipe", str(recipe), "--no-measure", *options)
        step()
        return conversion

    plain = made("plain-8", plainly, *cache).bundle
    gated = made("gated", strictly, *cache).bundle
    first = made("best", RECIPE, "--no-cache")
    best = first.bundle
    again = made("again", RECIPE, *cache).bundle
    before = cached_steps(work / "cache")
    made("changed", changed, *cache)
    redone = {name for name, _ in cached_steps(work / "cache") - before}
    needless = redone & {"export-encoder", "optimise-encoder", "source-vectors"}
    bars = [
        _bar("MiniLM: plain dynamic INT8 gets through a gate of 3 %", float(_has_int8(gated)), 0),
        _bar(f"MiniLM, {RECIPE}: recall@10", _figure(best, "recall_at_10"), MIN_RECALL, least=True),
        _bar(f"MiniLM, {RECIPE}: size ÷ FP32", _size(best) / _size(best, "fp32"), MAX_SIZE),
        _bar(
            f"MiniLM, {RECIPE}: files that a second run made differently",
            float(changed_files(best, again)), 0,
        ),
        _bar("MiniLM: steps redone though no setting of theirs changed", float(len(needless)), 0),
    ]  # fmt: skip
    figures = [
        _one(
            "MiniLM: peak memory of a conversion ÷ size of FP32",
            first.peak_bytes / _size(best, "fp32"),
        ),
        Figure.of_rounds("MiniLM: time of a conversion", "s", [first.seconds]),
        _one("MiniLM, plain dynamic: recall@10", _figure(plain, "recall_at_10")),
        _one("MiniLM, plain dynamic: mean cosine", _figure(plain, "cosine_mean")),
        _one("MiniLM, plain dynamic: size ÷ FP32", _size(plain) / _size(plain, "fp32")),
        _one(f"MiniLM, {RECIPE}: recall@10, FP32 documents", _figure(best, "recall_at_10_mixed")),
        _one(f"MiniLM, {RECIPE}: mean cosine", _figure(best, "cosine_mean")),
        *_speed(plain, best, rounds, run, begin),
    ]
    return Part(tuple(bars), tuple(figures))


def _recipe(text: str) -> str:
    """A recipe for this model with some settings."""
    return f"""format = 1

[source]
kind = "huggingface"

[bundle]
name = "minilm"

[convert]
variants = ["fp32", "int8"]

[settings]
passages = {PASSAGES}
{text}"""


def _has_int8(bundle: Bundle) -> bool:
    return bundle.manifest.variant("int8") is not None


def _figure(bundle: Bundle, metric: str) -> float:
    variant = bundle.manifest.variant("int8")
    figures = variant.quality if variant is not None else ()
    return next((f.value for f in figures if f.metric == metric), float("nan"))


def _size(bundle: Bundle, variant_id: str = "int8") -> int:
    return bundle.variant(variant_id).size_bytes


def _speed(plain: Bundle, best: Bundle, rounds: int, run: Run, begin: Begin) -> list[Figure]:
    """Texts in a second, one at a time, against FP32."""
    spec = best.manifest.preprocessing
    assert isinstance(spec, TextPreprocessing)
    encode = TextEncoder(best.shared_file(spec.tokenizer), spec)
    feeds = [encode([text]) for text in texts.passages(32)]
    files = {
        "fp32": best.variant_entry(best.variant("fp32")),
        "plain dynamic": plain.variant_entry(plain.variant("int8")),
        RECIPE: best.variant_entry(best.variant("int8")),
    }

    def side(path: Path) -> Callable[[], float]:
        session = open_session(path)
        wanted = {argument.name for argument in session.get_inputs()}
        rows = [{name: row[name] for name in row if name in wanted} for row in feeds]

        def timed() -> float:
            started_s = time.perf_counter()
            for row in rows:
                session.run(None, row)
            return (time.perf_counter() - started_s) / len(rows)

        timed()
        return timed

    samples = interleave(
        {name: side(path) for name, path in files.items()},
        rounds=rounds,
        random=run.random,
        on_round=begin("sentence encoder: speed", rounds),
    )
    return [
        Figure.of_rounds(
            f"MiniLM, {name}: texts/s ÷ FP32", "",
            per_round(lambda full, small: full / small, samples["fp32"], samples[name]),
        )
        for name in ("plain dynamic", RECIPE)
    ]  # fmt: skip


def _bar(name: str, value: float, limit: float, *, least: bool = False) -> Bar:
    direction: Direction = "at_least" if least else "at_most"
    return Bar(name=name, value=value, limit=limit, direction=direction, unit="")


def _one(name: str, value: float) -> Figure:
    return Figure.of_rounds(name, "", [value])
