"""SmolLM2-135M in 4 and 8 bits: rounded to the nearest, and the ways nearfar has for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.baselines import GenaiLoop
from benchmarks.convert_process import Conversion, convert
from benchmarks.harness import Bar, Direction, Figure, Run, interleave, per_round
from benchmarks.subjects import Begin, Part
from converters import texts
from converters.awq.environment import INTERPRETER_VARIABLE
from nearfar.bundle import Bundle
from nearfar.engines.devices import physical_cores
from nearfar.errors import EngineError

MAX_SIZE, MIN_SPEED = 0.20, 3.0
MAX_LOSS_TO_RTN, MAX_SIZE_TO_RTN = 0.5, 1.15
MAX_MEMORY = 2.5

_RTN = """format = 1

[source]
kind = "gguf"

[bundle]
name = "rounded"

[convert]
variants = ["int4"]

[settings.int4]
algorithm = "rtn"
"""
_GPTQ = _RTN.replace('"rtn"', '"gptq"')
_AWQ = (
    _RTN.replace('"rtn"', '"awq"')
    + """
[settings.int4.awq]
scales = "{}"
"""
)
#: The beginning of a text to go on with: a question would end at once without a chat template.
_PROMPT_CHARACTERS = 300


def measure_llm(
    source: Path,
    work: Path,
    rounds: int,
    tokens: int,
    run: Run,
    begin: Begin,
    *,
    quick: bool,
) -> Part:
    """Convert as `nearfar convert` does, to INT8, and to INT4 by GPTQ and rounded to the nearest.

    Args:
        source: The GGUF file.
        work: Where the bundles go.
        rounds: Of the comparison of speed.
        tokens: Length of each timed answer.
        run: Draws the order of the sides.
        begin: Shows progress.
        quick: Leave INT8 out, and AWQ, which is there where `INTERPRETER_VARIABLE` names modelopt.
    """
    ways = () if quick or not os.environ.get(INTERPRETER_VARIABLE) else ("search", "none")
    step = begin("language model: conversions", 4 - quick + len(ways))

    def made(name: str, *options: str, recipe: str = "") -> Conversion:
        if recipe:
            path = work / f"{name}.toml"
            path.write_text(recipe)
            options = ("--recipe", str(path))
        conversion = convert(source, work / name, "--no-measure", "--no-cache", *options)
        step()
        return conversion

    first = made("best")
    eight = None if quick else made("eight", "--variants", "int8")
    by_rounding = made("rtn", recipe=_RTN)
    by_gptq = made("gptq", recipe=_GPTQ)
    scaled = {
        scales: made(f"awq-{scales}", recipe=_AWQ.format(scales)) for scales in ways
    }  # fmt: skip
    best, rounded, chosen = first.bundle, by_rounding.bundle, by_gptq.bundle
    full = _perplexity(best, "fp32")
    lost_rtn, size_rtn = _perplexity(rounded, "int4") - full, _size(rounded, "int4")
    speed = _speed(best, {"int4 gptq": chosen, "int4 rtn": rounded}, rounds, tokens, run, begin)
    bars = [speed["int4 gptq"].bar(MIN_SPEED, "at_least")]
    for name, bundle in (("INT4", best), ("INT4 GPTQ", chosen)):
        lost, size = _perplexity(bundle, "int4") - full, _size(bundle, "int4")
        bars += [
            _bar(f"SmolLM2 {name}: size ÷ FP32", size / _size(best, "fp32"), MAX_SIZE),
            _bar(f"SmolLM2 {name}: perplexity lost ÷ RTN's", lost / lost_rtn, MAX_LOSS_TO_RTN),
            _bar(f"SmolLM2 {name}: size ÷ RTN", size / size_rtn, MAX_SIZE_TO_RTN),
        ]
    bars += [
        _bar(
            "SmolLM2: peak memory of a conversion ÷ size of FP32",
            first.peak_bytes / _size(best, "fp32"), MAX_MEMORY,
        ),
        _bar(
            "SmolLM2 GPTQ: peak memory of a conversion ÷ size of FP32",
            by_gptq.peak_bytes / _size(best, "fp32"), MAX_MEMORY,
        ),
    ]  # fmt: skip
    figures = [
        _one("SmolLM2 FP32: perplexity", full),
        _one("SmolLM2 INT4: perplexity", _perplexity(best, "int4")),
        _one("SmolLM2 INT4 GPTQ: perplexity", _perplexity(chosen, "int4")),
        _one("SmolLM2 INT4 RTN: perplexity", _perplexity(rounded, "int4")),
        _one("SmolLM2 INT4 RTN: size ÷ FP32", size_rtn / _size(best, "fp32")),
        _one(
            "SmolLM2 RTN: peak memory of a conversion ÷ size of FP32",
            by_rounding.peak_bytes / _size(best, "fp32"),
        ),
        Figure.of_rounds("SmolLM2: time of a conversion", "s", [first.seconds]),
        Figure.of_rounds("SmolLM2 RTN: time of a conversion", "s", [by_rounding.seconds]),
        Figure.of_rounds("SmolLM2 GPTQ: time of a conversion", "s", [by_gptq.seconds]),
        *speed.values(),
    ]
    if eight is not None:
        int8 = eight.bundle
        figures += [
            _one("SmolLM2 INT8: perplexity", _perplexity(int8, "int8")),
            _one("SmolLM2 INT8: size ÷ FP32", _size(int8, "int8") / _size(best, "fp32")),
        ]
    for scales, one in scaled.items():
        name = "SmolLM2 INT4 AWQ" + ("" if scales == "search" else ", no scales")
        figures += [
            _one(f"{name}: perplexity", _perplexity(one.bundle, "int4")),
            _one(f"{name}: size ÷ FP32", _size(one.bundle, "int4") / _size(best, "fp32")),
        ]
        bars.append(
            _bar(
                f"{name}: peak memory of a conversion ÷ size of FP32",
                one.peak_bytes / _size(best, "fp32"), MAX_MEMORY,
            )
        )  # fmt: skip
    return Part(tuple(bars), tuple(figures))


def _speed(
    best: Bundle, others: Mapping[str, Bundle], rounds: int, tokens: int, run: Run, begin: Begin
) -> dict[str, Figure]:
    """Tokens in a second after the first, against FP32 in the same round."""
    prompt = texts.prose()[:_PROMPT_CHARACTERS]
    folders = {
        "fp32": best.variant_entry(best.variant("fp32")),
        "int4": best.variant_entry(best.variant("int4")),
        **{name: one.variant_entry(one.variant("int4")) for name, one in others.items()},
    }

    def side(folder: Path) -> Callable[[], float]:
        loop = GenaiLoop(folder, threads=physical_cores())
        loop.generate(prompt, tokens=8)  # the first answer also allocates

        def timed() -> float:
            answer = loop.generate(prompt, tokens=tokens)
            if answer.tokens < tokens // 2:
                raise EngineError(
                    f"{folder.name} ends its answer after {answer.tokens} tokens: too few to time"
                )
            return answer.decode_tokens_per_s

        return timed

    samples = interleave(
        {name: side(folder) for name, folder in folders.items()},
        rounds=rounds,
        random=run.random,
        on_round=begin("language model: speed", rounds),
    )
    return {
        name: Figure.of_rounds(
            f"SmolLM2 {name.upper()}: decode tokens/s ÷ FP32", "",
            per_round(lambda small, full: small / full, samples[name], samples["fp32"]),
        )
        for name in ("int4", *others)
    } | {
        f"{name} alone": Figure.of_rounds(
            f"SmolLM2 {name.upper()}: decode", "tokens/s", samples[name]
        )
        for name in folders
    }  # fmt: skip


def _perplexity(bundle: Bundle, variant_id: str) -> float:
    figures = bundle.variant(variant_id).quality
    return next(figure.value for figure in figures if figure.metric == "perplexity")


def _size(bundle: Bundle, variant_id: str) -> int:
    return bundle.variant(variant_id).size_bytes


def _bar(name: str, value: float, limit: float) -> Bar:
    direction: Direction = "at_most"
    return Bar(name=name, value=value, limit=limit, direction=direction, unit="")


def _one(name: str, value: float) -> Figure:
    return Figure.of_rounds(name, "", [value])
