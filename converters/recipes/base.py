"""What all recipes are given, and what they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import to_builtins

from converters.cache import StepCache, digest_of_arrays, digest_of_path
from converters.libraries import tool_versions
from converters.options import ConversionOptions
from converters.reporting import Reporter
from converters.settings import Settings
from converters.sources.base import Source
from converters.steps.measure import measure
from converters.steps.quantize import quantize_int8
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
_QUALITY_ORDER = ("fp32", "fp16", "int8", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """Where and how a bundle is being made.

    Attributes:
        writer: The bundle; a variant's files go into the folder with its id.
        work: Folder for intermediate files.
        options: What the person chose.
        reporter: Where progress goes.
        cache: Results of earlier steps.
    """

    writer: BundleWriter
    work: Path
    options: ConversionOptions
    reporter: Reporter
    cache: StepCache

    @property
    def settings(self) -> Settings:
        """The numbers to go by."""
        return self.options.settings

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

    def quantize_int8(self, source: Path, target: Path) -> None:
        """Quantize, with a line of progress; see `converters.steps.quantize`.

        Raises:
            ConversionError: The model cannot be quantized.
        """
        with self.reporter.step("quantize to INT8"):
            self.cache.output(
                "quantize-int8",
                {"source": digest_of_path(source), "settings": to_builtins(self.settings.int8)},
                target,
                lambda path: quantize_int8(source, path, self.work, self.settings.int8),
                tools=("onnx", "onnxruntime"),
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
