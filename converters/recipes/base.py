"""What all recipes are given, and what they share."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from converters.cache import StepCache, digest_of_arrays, digest_of_path
from converters.libraries import tool_versions
from converters.options import ConversionOptions
from converters.reporting import Reporter
from converters.settings import Settings
from converters.sources.base import Source
from converters.steps.gate import refusal
from converters.steps.measure import measure
from nearfar.bundle.manifest import (
    EngineName,
    LatencyFigure,
    Lineage,
    Placement,
    QualityFigure,
    Requirements,
    Variant,
)
from nearfar.bundle.writer import BundleWriter
from nearfar.errors import ConversionError
from nearfar.units import format_ms

#: Best quality first.
_QUALITY_ORDER = ("fp32", "trt-fp32", "fp16", "trt-fp16", "int8", "trt-int8", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """Where and how a bundle is being made.

    Attributes:
        writer: The bundle; a variant's files go into the folder with its id.
        work: Folder for intermediate files.
        options: What the person chose.
        reporter: Where progress goes.
        cache: Results of earlier steps.
        kept: Nodes that a search left in full precision; filled while the bundle is made.
        kept_tensorrt: The same in ``trt-int8``.
        axes_tensorrt: Sizes that TensorRT engines will cover, by axis; filled likewise.
        refused: Why variants were left out, in words; filled likewise.
    """

    writer: BundleWriter
    work: Path
    options: ConversionOptions
    reporter: Reporter
    cache: StepCache
    kept: list[str] = field(default_factory=list)
    kept_tensorrt: list[str] = field(default_factory=list)
    axes_tensorrt: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    @property
    def settings(self) -> Settings:
        """The numbers to go by."""
        return self.options.settings

    @property
    def settings_found(self) -> Settings:
        """The numbers with what was found on the way, so that a recipe repeats it."""
        int8 = msgspec.structs.replace(self.settings.int8, keep=tuple(self.kept))
        tensorrt = msgspec.structs.replace(
            self.settings.tensorrt,
            keep=tuple(self.kept_tensorrt) or self.settings.tensorrt.keep,
            axes=self.axes_tensorrt or self.settings.tensorrt.axes,
        )
        return msgspec.structs.replace(self.settings, int8=int8, tensorrt=tensorrt)

    def variant_ids(self, default: Sequence[str], possible: Sequence[str]) -> tuple[str, ...]:
        """Wished variants, best quality first.

        Raises:
            ConversionError: One is not possible for this kind of model.
        """
        return self.choose(self.options, default, possible)

    @staticmethod
    def choose(
        options: ConversionOptions, default: Sequence[str], possible: Sequence[str]
    ) -> tuple[str, ...]:
        """As `variant_ids`, before there is a workshop."""
        wished = options.variants or tuple(default)
        for variant_id in wished:
            if variant_id not in possible:
                raise ConversionError(
                    f"Variant {variant_id!r} cannot be made of this model",
                    fix=f"Possible are: {', '.join(possible)}",
                )
        return tuple(sorted(set(wished), key=_QUALITY_ORDER.index))

    @staticmethod
    def variant_ids_in_order(ids: Sequence[str]) -> tuple[str, ...]:
        """Ids, best quality first."""
        return tuple(sorted(ids, key=_QUALITY_ORDER.index))

    def lineage(self, source: Source, *tools: str) -> Lineage:
        """Where the bundle comes from."""
        return Lineage(
            source=source.label, source_sha256=source.sha256(), tools=tool_versions(*tools)
        )

    def variants(
        self,
        ids: Sequence[str],
        *,
        engine: EngineName,
        entries: Mapping[str, str],
        quality: Mapping[str, tuple[QualityFigure, ...]],
        latency: Mapping[str, tuple[LatencyFigure, int]],
    ) -> tuple[Variant, ...]:
        """Manifest entries for variants in the order of `ids`, best quality first.

        The smallest is meant for the edge first, the best for the cloud first.
        """
        found = []
        for rank, variant_id in enumerate(ids):
            is_best = rank == 0 and len(ids) > 1
            placement: tuple[Placement, ...] = ("cloud", "edge") if is_best else ("edge", "cloud")
            measured = latency.get(variant_id)
            found.append(
                Variant(
                    id=variant_id,
                    engine=engine,
                    precision=variant_id,
                    entry=entries[variant_id],
                    files=(),
                    placement=placement,
                    quality_rank=rank,
                    requirements=Requirements(memory_bytes=measured[1] if measured else 0),
                    quality=quality[variant_id],
                    latency=(measured[0],) if measured else (),
                )
            )
        return tuple(found)

    def accept(
        self,
        variant_id: str,
        figures: Sequence[QualityFigure],
        *,
        reference_perplexity: float | None = None,
    ) -> bool:
        """Whether a compressed variant stays in the bundle; says why when it does not.

        Its files are removed then. See `Gates.max_quality_drop`.

        Raises:
            ConversionError: No other variant was asked for.
        """
        problem = refusal(
            variant_id,
            figures,
            self.settings.gates.max_quality_drop,
            reference_perplexity=reference_perplexity,
        )
        if problem is None:
            return True
        self.refuse(variant_id, problem)
        return False

    def refuse(self, variant_id: str, problem: str) -> None:
        """Leave a variant out of the bundle, and say why."""
        self.reporter.say(f"! {problem}")
        shutil.rmtree(self.writer.folder / variant_id, ignore_errors=True)
        self.refused.append(problem)

    def check_any(self, ids: Sequence[str]) -> None:
        """Refuse to make a bundle without variants.

        Raises:
            ConversionError: All were refused.
        """
        if not ids:
            raise ConversionError(
                "No variant is good enough: " + "; ".join(self.refused),
                fix="Add the full precision with --variants, or allow a greater --max-quality-drop",
            )

    def measure(
        self, variant_id: str, engine: EngineName, entry: str, **inputs: object
    ) -> tuple[LatencyFigure, int]:
        """Measure a variant, with a line of progress; see `converters.steps.measure.measure`.

        The same files on the same machine were measured before: their figures are taken.
        """
        from nearfar.engines.devices import probe

        with self.reporter.step(f"measure {variant_id}") as step:
            path = self.writer.folder.joinpath(*entry.split("/"))
            feeds = inputs.get("feeds")
            parts = {
                "engine": engine,
                "files": digest_of_path(path),
                "machine": probe().machine,
                "feeds": digest_of_arrays([feeds]) if isinstance(feeds, dict) else "",
                "prompt_tokens": inputs.get("prompt_tokens", []),
                "input_tokens": inputs.get("input_tokens"),
            }
            figure, memory_bytes = self.cache.value(
                "measure",
                parts,
                tuple[LatencyFigure, int],
                lambda: measure(engine, path, **inputs),  # type: ignore[arg-type]
                tools=("onnxruntime", "onnxruntime-genai"),
            )
            per_token = figure.ms_per_token
            step.note(
                f"p50 {format_ms(figure.p50_ms)}"
                + (f", {1000 / per_token:.1f} tokens/s" if per_token else "")
            )
        return figure, memory_bytes


def summary(figures: Sequence[QualityFigure]) -> str:
    """Figures for a line of progress."""
    return ", ".join(f"{figure.metric} {figure.value:.4g}" for figure in figures)
