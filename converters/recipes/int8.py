"""The INT8 variant of an ONNX graph, with as many nodes kept as the quality gate needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from msgspec import to_builtins

from converters.cache import digest_of_arrays, digest_of_path
from converters.recipes.base import Workshop
from converters.report.evidence import ActivationHistogram, LayerErrors
from converters.report.words import method_of
from converters.steps.activations import histograms
from converters.steps.quantize import Int8Quantizer, quantize_int8
from converters.steps.sensitivity import Choice, Damage, choose, rank
from nearfar.errors import ConversionError

_TOOLS = ("onnx", "onnxruntime", "numpy")
#: What is chosen is judged on other inputs afterwards, where it may do a little worse.
_MARGIN = 0.8


def make_int8(
    shop: Workshop,
    source: Path,
    target: Path,
    *,
    calibration: Sequence[Mapping[str, np.ndarray]],
    judge: Callable[[Path], float],
    variant_id: str = "int8",
) -> None:
    """Quantize, with lines of progress.

    Args:
        shop: Where and how.
        source: FP32 model.
        target: Where the variant shall be.
        calibration: Inputs of one call each, for ranges and for the search; not those that the
            variant is verified on.
        judge: Share of quality that a file loses on the calibration inputs.
        variant_id: Of which variant the report shall say what is found.

    Raises:
        ConversionError: The model cannot be quantized.
    """
    settings = shop.settings.int8
    quantizer = Int8Quantizer(source, shop.work, settings, calibration)
    parts: dict[str, object] = {
        "source": digest_of_path(source),
        "settings": {key: value for key, value in to_builtins(settings).items()
                     if key not in ("max_kept", "keep")},
        "calibration": digest_of_arrays(calibration) if settings.method == "static" else "",
    }  # fmt: skip
    keep: tuple[str, ...] = settings.keep
    if shop.settings.gates.max_quality_drop is not None:
        choice = _search(shop, quantizer, source, calibration, judge, parts, variant_id)
        keep += tuple(name for name in choice.keep if name not in keep)
    with shop.reporter.step("quantize to INT8") as step:
        shop.cache.output(
            "quantize-int8",
            {**parts, "keep": keep},
            target,
            lambda path: quantize_int8(quantizer, path, keep),
            tools=_TOOLS,
        )
        if keep:
            step.note(f"{len(keep)} nodes stay in full precision: {', '.join(keep)}")
    shop.kept.extend(keep)
    if settings.method == "static":
        with shop.reporter.step("look at the ranges of the activations"):
            shop.evidence.histograms[variant_id] = shop.cache.value(
                "activation-histograms", parts, tuple[ActivationHistogram, ...],
                lambda: histograms(source, quantizer.ranges(), calibration, shop.work),
                tools=_TOOLS,
            )  # fmt: skip


def _search(
    shop: Workshop,
    quantizer: Int8Quantizer,
    source: Path,
    calibration: Sequence[Mapping[str, np.ndarray]],
    judge: Callable[[Path], float],
    parts: Mapping[str, object],
    variant_id: str,
) -> Choice:
    """Which nodes to keep, from the cache where it was found before."""
    limit = shop.settings.gates.max_quality_drop
    assert limit is not None
    max_kept = shop.settings.int8.max_kept
    stated = shop.settings.int8.keep
    parts = {**parts, "calibration": digest_of_arrays(calibration), "keep": stated}
    trial = shop.work / "trial-int8.onnx"
    measured: list[tuple[Damage, ...]] = []

    def tried(keep: Sequence[str]) -> float:
        quantizer.write(trial, keep)
        try:
            return judge(trial)
        except ConversionError:
            return 1.0  # so far off that the comparison refused it
        finally:
            trial.unlink(missing_ok=True)

    def ranking() -> tuple[Damage, ...]:
        return shop.cache.value(
            "rank-int8", parts, tuple[Damage, ...],
            lambda: rank(quantizer, source, calibration, shop.work), tools=_TOOLS,
        )  # fmt: skip

    def search() -> Choice:
        plain = tried(())
        if plain <= limit * _MARGIN or not max_kept or len(quantizer.candidates) < 2:
            return Choice((), plain, plain <= limit)
        with shop.reporter.step("rank nodes by the damage of rounding them") as step:
            ranked = ranking()
            measured.append(ranked)
            step.note(", ".join(f"{one.node} {one.error:.2g}" for one in ranked[:3]))
        # With every node kept there would be nothing left to round.
        most = min(max_kept, len(quantizer.candidates) - 1)
        return choose(ranked, tried, limit=limit * _MARGIN, max_kept=most)

    with shop.reporter.step("find what must stay in full precision") as step:
        choice = shop.cache.value(
            "choose-int8", {**parts, "limit": limit, "max_kept": max_kept}, Choice, search,
            tools=_TOOLS,
        )  # fmt: skip
        step.note(
            f"{len(choice.keep)} nodes; loses {choice.drop:.2%} of quality, {limit:.2%} are allowed"
        )
    # The choice may come from the cache, and then so does what it was made by.
    if not measured and shop.cache.has("rank-int8", parts, tools=_TOOLS):
        measured.append(ranking())
    for ranked in measured:
        shop.evidence.layers.append(
            LayerErrors(
                variant_id=variant_id,
                method=method_of("int8", shop.settings),
                errors=ranked,
                kept=(*stated, *(name for name in choice.keep if name not in stated)),
            )
        )
    return choice
