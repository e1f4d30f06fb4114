"""Fewer bits for an ONNX graph: 16 as they are, 8 and 4 with as many nodes kept as the quality gate
needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec import to_builtins

from converters.cache import digest_of_arrays, digest_of_path
from converters.recipes.base import Workshop
from converters.report.evidence import ActivationHistogram, LayerErrors
from converters.report.words import method_of
from converters.steps.activations import histograms
from converters.steps.quantize import Int8Quantizer, store_half
from converters.steps.quantize_int4 import Int4Quantizer
from converters.steps.round_weights import Half
from converters.steps.sensitivity import Choice, Damage, NodeQuantizer, choose, rank
from converters.steps.smooth import smooth
from nearfar.errors import ConversionError

_TOOLS = ("onnx", "onnxruntime", "numpy")
#: Variants whose weights are stored in 16 bits.
HALVES: tuple[Half, ...] = ("fp16", "bf16")
#: What is made of a graph in full precision and runs in ONNX Runtime.
COMPRESSED = (*HALVES, "int8", "int4")
#: What is chosen is judged on other inputs afterwards, where it may do a little worse.
_MARGIN = 0.8


def make_half(shop: Workshop, source: Path, target: Path, kind: Half) -> None:
    """Store weights in 16 bits, with a line of progress.

    Raises:
        ConversionError: The model has none.
    """
    with shop.reporter.step(f"store weights as {kind.upper()}"):
        shop.cache.output(
            f"store-{kind}",
            {"source": digest_of_path(source)},
            target,
            lambda path: store_half(source, path, kind),
            tools=("onnx", "numpy"),
        )


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
    if settings.smooth is not None:
        source = _smoothed(shop, source, calibration, variant_id)
    quantizer = Int8Quantizer(source, shop.work, settings, calibration)
    parts: dict[str, object] = {
        "source": digest_of_path(source),
        "settings": {key: value for key, value in to_builtins(settings).items()
                     if key not in ("max_kept", "keep")},
        "calibration": digest_of_arrays(calibration) if settings.method == "static" else "",
    }  # fmt: skip
    way = _Way("int8", quantizer, parts, settings.keep, settings.max_kept, variant_id)
    shop.kept.extend(_make(shop, way, source, target, calibration, judge))
    if settings.method == "static":
        with shop.reporter.step("look at the ranges of the activations"):
            shop.evidence.histograms[variant_id] = shop.cache.value(
                "activation-histograms", parts, tuple[ActivationHistogram, ...],
                lambda: histograms(source, quantizer.ranges(), calibration, shop.work),
                tools=_TOOLS,
            )  # fmt: skip


def _smoothed(
    shop: Workshop,
    source: Path,
    calibration: Sequence[Mapping[str, np.ndarray]],
    variant_id: str,
) -> Path:
    """The model with what is hard to round moved from its activations into its weights."""
    settings, alpha = shop.settings.int8, shop.settings.int8.smooth
    assert alpha is not None
    if settings.method == "weights":
        raise ConversionError(
            "int8.smooth helps where activations are rounded, and with int8.method = 'weights' "
            "they are not",
            fix="Use --int8 dynamic or --int8 static with it, or leave it out",
        )
    target = shop.work / f"smoothed-{variant_id}.onnx"
    feeds = calibration[: settings.calibration.samples]
    max_error = shop.settings.gates.max_optimise_error
    parts = {
        "source": digest_of_path(source),
        "calibration": digest_of_arrays(feeds),
        "alpha": alpha,
        "keep": settings.keep,
        "max_error": max_error,
    }

    def make(path: Path) -> None:
        done = smooth(
            source, path, feeds=feeds, alpha=alpha, keep=settings.keep, max_error=max_error,
            work=shop.work,
        )  # fmt: skip
        step.note(
            f"{done.products} products; divided in {done.folded} LayerNormalization and "
            f"{done.inserted} Mul"
        )

    with shop.reporter.step(f"move what is hard to round into weights (alpha {alpha:g})") as step:
        shop.cache.output("smooth", parts, target, make, tools=_TOOLS)
    return target


def make_int4(
    shop: Workshop,
    source: Path,
    target: Path,
    *,
    calibration: Sequence[Mapping[str, np.ndarray]],
    judge: Callable[[Path], float],
) -> None:
    """As `make_int8`, of models that are no language models.

    Raises:
        ConversionError: The model cannot be quantized.
    """
    settings = shop.settings.int4
    quantizer = Int4Quantizer(source, shop.work, settings)
    used = (settings.block_size, settings.symmetric, settings.accuracy_level)
    parts: dict[str, object] = {"source": digest_of_path(source), "settings": used}
    shop.resolved["int4.algorithm"] = "rtn"
    way = _Way("int4", quantizer, parts, settings.keep, settings.max_kept, "int4")
    shop.kept_int4.extend(_make(shop, way, source, target, calibration, judge))


@dataclass(frozen=True, slots=True)
class _Way:
    """How one precision is made.

    Attributes:
        precision: Its name.
        quantizer: Makes it.
        parts: What the result depends on, but for the nodes that are kept.
        keep: Nodes that are kept anyway.
        max_kept: How many more may be.
        variant_id: Of which variant the report shall say what is found.
    """

    precision: str
    quantizer: NodeQuantizer
    parts: dict[str, object]
    keep: tuple[str, ...]
    max_kept: int
    variant_id: str


def _make(
    shop: Workshop,
    way: _Way,
    source: Path,
    target: Path,
    calibration: Sequence[Mapping[str, np.ndarray]],
    judge: Callable[[Path], float],
) -> tuple[str, ...]:
    """Write the variant; returns the nodes that are kept."""
    keep = way.keep
    if shop.settings.gates.max_quality_drop is not None:
        choice = _search(shop, way, source, calibration, judge)
        keep += tuple(name for name in choice.keep if name not in keep)
    with shop.reporter.step(f"quantize to {way.precision.upper()}") as step:
        shop.cache.output(
            f"quantize-{way.precision}",
            {**way.parts, "keep": keep},
            target,
            lambda path: way.quantizer.write(path, keep),
            tools=_TOOLS,
        )
        if keep:
            step.note(f"{len(keep)} nodes stay in full precision: {', '.join(keep)}")
    return keep


def _search(
    shop: Workshop,
    way: _Way,
    source: Path,
    calibration: Sequence[Mapping[str, np.ndarray]],
    judge: Callable[[Path], float],
) -> Choice:
    """Which nodes to keep, from the cache where it was found before."""
    limit = shop.settings.gates.max_quality_drop
    assert limit is not None
    quantizer, stated, max_kept = way.quantizer, way.keep, way.max_kept
    parts = {**way.parts, "calibration": digest_of_arrays(calibration), "keep": stated}
    trial = shop.work / f"trial-{way.precision}.onnx"
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
            f"rank-{way.precision}", parts, tuple[Damage, ...],
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
            f"choose-{way.precision}",
            {**parts, "limit": limit, "max_kept": max_kept},
            Choice,
            search,
            tools=_TOOLS,
        )
        step.note(
            f"{len(choice.keep)} nodes; loses {choice.drop:.2%} of quality, {limit:.2%} are allowed"
        )
    # The choice may come from the cache, and then so does what it was made by.
    if not measured and shop.cache.has(f"rank-{way.precision}", parts, tools=_TOOLS):
        measured.append(ranking())
    for ranked in measured:
        shop.evidence.layers.append(
            LayerErrors(
                variant_id=way.variant_id,
                method=method_of(way.precision, shop.settings),
                errors=ranked,
                kept=(*stated, *(name for name in choice.keep if name not in stated)),
            )
        )
    return choice
