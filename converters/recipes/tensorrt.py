"""Variants for TensorRT: typed ONNX that devices build engines of, and the gate without a GPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from converters.cache import digest_of_path
from converters.recipes.base import Workshop
from converters.recipes.int8 import make_int8
from converters.recipes.layers import Blame, blame_layers, explained
from converters.settings import TensorrtSettings
from converters.steps.bfloat16 import to_bfloat16
from converters.steps.half_precision import to_half
from converters.steps.rounding_twin import write_twin
from converters.tensorrt.ranges import ANY_SIZE, Bounds, load_model, profile_of, stated_axes
from nearfar.bundle.manifest import (
    QualityFigure,
    Requirements,
    ShapeRange,
    TensorrtPlan,
    Variant,
)
from nearfar.errors import ConversionError

IDS = ("trt-fp32", "trt-fp16", "trt-bf16", "trt-int8")
_HALF_SCALES_OPSET = 19
_TOOLS = ("onnx", "onnxruntime", "onnxslim", "numpy")

Feeds = Mapping[str, np.ndarray]


class TensorrtVariants:
    """Makes the wished ``trt-…`` variants of one FP32 graph.

    Args:
        shop: Where and how.
        full: The FP32 graph.
        wished: Ids of all variants of the bundle; others are passed over.
        sample: One real input: the usual sizes.
        bounds: Sizes of axes other than the first.
    """

    def __init__(
        self,
        shop: Workshop,
        full: Path,
        wished: Sequence[str],
        *,
        sample: Feeds,
        bounds: Bounds = ANY_SIZE,
    ) -> None:
        self.ids = tuple(one for one in IDS if one in wished)
        self._shop = shop
        self._settings: TensorrtSettings = shop.settings.tensorrt
        self._full = full
        self._sample = {name: array.shape for name, array in sample.items()}
        self._bounds = bounds
        self._base = shop.work / "tensorrt.onnx"
        self._calibration: list[dict[str, np.ndarray]] = []
        self._profile: tuple[ShapeRange, ...] = ()

    def paths(self) -> dict[str, Path]:
        """Where each variant's graph lies in the bundle that is being made."""
        return {one: self._shop.writer.file(self._entry(one)) for one in self.ids}

    def make(self, calibration: Sequence[Feeds], judge: Callable[[Path], float]) -> dict[str, Path]:
        """Write them.

        Args:
            calibration: Inputs that ranges of ``trt-int8`` are found on.
            judge: Share of quality that a file loses on these.

        Returns:
            Id to graph.

        Raises:
            ConfigError: A stated axis does not exist.
            ConversionError: A graph cannot be made.
        """
        if not self.ids:
            return {}
        paths = self.paths()
        self._calibration = self.meant(calibration)
        base = self._base
        with self._shop.reporter.step("prepare the graph for TensorRT") as step:
            step.note(self._prepare(base))
        for one, path in paths.items():
            if one == "trt-fp32":
                shutil.copyfile(base, path)
                continue
            if one == "trt-bf16":
                self._written(one, base, path, to_bfloat16)
                continue
            precise = base
            if one == "trt-int8":
                precise = self._quantized(base, calibration, judge)
            if one == "trt-int8" and (self._settings.rest == "fp32" or not _takes_half(precise)):
                shutil.copyfile(precise, path)
                continue
            self._written(one, precise, path, to_half)
        return paths

    def judged(
        self,
        paths: Mapping[str, Path],
        judge: Callable[[str, Path], tuple[QualityFigure, ...]],
    ) -> dict[str, tuple[QualityFigure, ...]]:
        """Figures of each; one that is not the same model any more is left out, and said to be.

        Args:
            paths: Id to graph.
            judge: Makes the figures of one.
        """
        found = {}
        for one in paths:
            try:
                with explained(one, self._blame(one)):
                    found[one] = judge(one, self._judged(one))
            except ConversionError as exc:
                self._shop.refuse(one, f"{one}: {exc.problem}")
        return found

    def _blame(self, variant_id: str) -> Blame:
        path = self._judged(variant_id)
        return partial(
            blame_layers, self._shop, variant_id, self._base, path, lambda: self._calibration
        )

    def _written(
        self, variant_id: str, source: Path, target: Path, write: Callable[[Path, Path], None]
    ) -> None:
        """Write a variant in 16 bits, and the twin that it is judged by."""
        words = "BF16" if variant_id == "trt-bf16" else "FP16"
        with self._shop.reporter.step(f"write {variant_id} with {words}"):
            self._shop.cache.output(
                words.lower(),
                {"source": digest_of_path(source)},
                target,
                lambda path: write(source, path),
                tools=_TOOLS,
            )
            twin = self._twin(variant_id)
            twin.parent.mkdir(exist_ok=True)
            write_twin(target, twin)

    def _judged(self, variant_id: str) -> Path:
        """What is run here for a variant: itself, or its twin where it has one."""
        twin = self._twin(variant_id)
        return twin if twin.is_file() else self._shop.writer.file(self._entry(variant_id))

    def _twin(self, variant_id: str) -> Path:
        return self._shop.work / f"{variant_id}-twin" / "model.onnx"

    def meant(self, samples: Sequence[Feeds]) -> list[dict[str, np.ndarray]]:
        """Samples with the fixed inputs at their value."""
        fixed = self._settings.fixed
        return [
            {
                name: np.full_like(array, fixed[name]) if name in fixed else array
                for name, array in feeds.items()
            }
            for feeds in samples
        ]

    def finish(self, quality: Mapping[str, tuple[QualityFigure, ...]]) -> tuple[Variant, ...]:
        """Manifest entries of those that are good enough and, where asked, taken by TensorRT."""
        found = []
        for one in self.ids:
            if one not in quality:
                continue
            if not self._shop.accept(one, quality[one], blame=self._blame(one)):
                continue
            variant = Variant(
                id=one,
                engine="tensorrt",
                precision=one.removeprefix("trt-"),
                entry=self._entry(one),
                files=(),
                requirements=Requirements(execution_provider="TensorrtExecutionProvider"),
                quality=quality[one],
                tensorrt=TensorrtPlan(
                    profile=self._profile,
                    fixed=self._settings.fixed,
                    workspace_bytes=self._settings.workspace_bytes,
                    optimization_level=self._settings.optimization_level,
                ),
            )
            checked = self._checked(variant)
            if checked is not None:
                found.append(checked)
        return tuple(found)

    def _checked(self, variant: Variant) -> Variant | None:
        """With what the gate says, or `None` when TensorRT refuses it."""
        if not self._settings.check:
            return variant
        checked = with_check(self._shop, variant, profile=self._profile)
        facts = checked.tensorrt_check
        if facts is not None and not facts.accepted:
            why = "; ".join(facts.findings) or "it does not say why"
            self._shop.refuse(variant.id, f"TensorRT refuses {variant.id}: {why}")
            return None
        return checked

    def _prepare(self, target: Path) -> str:
        """The graph with its fixed inputs gone; says what was done."""
        from converters.libraries import load
        from converters.tensorrt.repair import repair
        from converters.tensorrt.scan import scan

        model = load_model(self._full)
        self._profile = profile_of(
            model, self._settings.axes, sample=self._sample, bounds=self._bounds
        )
        self._shop.axes_tensorrt.update(stated_axes(model, self._profile))
        findings = repair(model, scan(model), fixed=self._settings.fixed, ranges=self._profile)
        load("onnx").save(model, str(target))
        return "; ".join(str(finding) for finding in findings)

    def _quantized(
        self, base: Path, calibration: Sequence[Feeds], judge: Callable[[Path], float]
    ) -> Path:
        """Symmetric S8 QDQ with biases in float; other settings are those of ``int8``."""
        shop, int8 = self._shop, self._shop.settings.int8
        settings = msgspec.structs.replace(
            int8,
            method="static",
            keep=self._settings.keep,
            calibration=msgspec.structs.replace(int8.calibration, target="tensorrt"),
        )
        options = replace(
            shop.options, settings=msgspec.structs.replace(shop.settings, int8=settings)
        )
        own = replace(shop, options=options, kept=shop.kept_tensorrt)
        target = shop.work / "tensorrt-int8.onnx"
        make_int8(
            own, base, target, calibration=self.meant(calibration), judge=judge,
            variant_id="trt-int8",
        )  # fmt: skip
        return target

    @staticmethod
    def _entry(variant_id: str) -> str:
        return f"{variant_id}/model.onnx"


def _takes_half(path: Path) -> bool:
    """Whether `QuantizeLinear` may have FP16 scales in this graph: since opset 19."""
    from converters.tensorrt.graph import Graph

    return Graph(load_model(path, with_data=False)).opset >= _HALF_SCALES_OPSET


def with_check(
    shop: Workshop,
    variant: Variant,
    *,
    profile: Sequence[ShapeRange] | None = None,
    sample: Feeds | None = None,
    bounds: Bounds = ANY_SIZE,
) -> Variant:
    """The variant with what TensorRT says about its graph, with a line of progress."""
    from converters.tensorrt.check import check_graph

    path = shop.writer.folder.joinpath(*variant.entry.split("/"))
    settings = shop.settings.tensorrt
    with shop.reporter.step(f"ask TensorRT about {variant.id}") as step:
        verdict = check_graph(
            path,
            profile=profile,
            axes=settings.axes,
            sample={name: array.shape for name, array in (sample or {}).items()},
            bounds=bounds,
            try_repair=False,
        )
        step.note("takes it" if verdict.accepted else "refuses it")
    for finding in verdict.findings:
        shop.reporter.say(f"! {variant.id}: {finding}. {finding.fix}.")
    return msgspec.structs.replace(variant, tensorrt_check=verdict.facts())


def joined(
    shop: Workshop,
    variants: Sequence[Variant],
    made: TensorrtVariants,
    quality: Mapping[str, tuple[QualityFigure, ...]],
    *,
    sample: Feeds,
    bounds: Bounds = ANY_SIZE,
) -> tuple[Variant, ...]:
    """All variants of a bundle, best quality first; with the gate's word where it was asked."""
    others = tuple(variants)
    if shop.settings.tensorrt.check:
        others = tuple(with_check(shop, one, sample=sample, bounds=bounds) for one in others)
    own = made.finish(quality)
    ids = shop.variant_ids_in_order([one.id for one in (*others, *own)])
    by_id = {one.id: one for one in (*others, *own)}
    return tuple(
        msgspec.structs.replace(by_id[one], quality_rank=rank) for rank, one in enumerate(ids)
    )
