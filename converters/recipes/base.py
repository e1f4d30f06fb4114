"""What all recipes are given, and what they share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from converters.cache import StepCache, digest_of_arrays, digest_of_path
from converters.libraries import tool_versions
from converters.options import ConversionOptions
from converters.report.evidence import Evidence, LayerErrors, Tried
from converters.report.words import damage_of, mending_of, method_of
from converters.reporting import Reporter
from converters.settings import Settings
from converters.sources.base import Source
from converters.steps.gate import (
    NOTICEABLE,
    UNFUSED,
    Refusal,
    latency_refusal,
    quality_drop,
    refusal,
    saturates,
    size_refusal,
)
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
_QUALITY_ORDER = (
    "fp32", "onnx-fp32", "trt-fp32", "fp16", "onnx-fp16", "trt-fp16", "bf16", "trt-bf16",
    "pruned", "slim", "int8", "onnx-int8", "trt-int8", "int4", "onnx-int4",
)  # fmt: skip

_SLICE_LESS = (
    "fewer layers to drop (slim.drop_layers), a greater slim.keep_mlp, longer training "
    "(slim.recovery_steps), texts like those that it will see (--train), or more bits"
)


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
        kept_int4: The same in ``int4`` of models that are no language models.
        kept_tensorrt: The same in ``trt-int8``.
        axes_tensorrt: Sizes that TensorRT engines will cover, by axis; filled likewise.
        refused: Why variants were left out, in words; filled likewise.
        resolved: What a setting stood for that left a choice, by its name; filled likewise.
        evidence: What the report shows beside the manifest; filled likewise.
    """

    writer: BundleWriter
    work: Path
    options: ConversionOptions
    reporter: Reporter
    cache: StepCache
    kept: list[str] = field(default_factory=list)
    kept_int4: list[str] = field(default_factory=list)
    kept_tensorrt: list[str] = field(default_factory=list)
    axes_tensorrt: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    resolved: dict[str, str] = field(default_factory=dict)
    evidence: Evidence = field(default_factory=Evidence)

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
        stated = self.settings.int4
        int4 = msgspec.structs.replace(
            stated,
            keep=tuple(self.kept_int4) or stated.keep,
            algorithm=self.resolved.get("int4.algorithm", stated.algorithm),
        )
        return msgspec.structs.replace(self.settings, int8=int8, int4=int4, tensorrt=tensorrt)

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
        engine: EngineName | Mapping[str, EngineName],
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
                    engine=engine if isinstance(engine, str) else engine[variant_id],
                    precision=variant_id.removeprefix("onnx-"),
                    entry=entries[variant_id],
                    files=(),
                    placement=placement,
                    quality_rank=rank,
                    requirements=Requirements(memory_bytes=measured[1] if measured else 0),
                    quality=tuple(self._renamed(figure) for figure in quality[variant_id]),
                    latency=(measured[0],) if measured else (),
                    saturation=self._saturation(variant_id, quality[variant_id]),
                )
            )
        return tuple(found)

    def _renamed(self, figure: QualityFigure) -> QualityFigure:
        """A reference that a gate held back is named as what it is."""
        if figure.reference not in {one.id for one in self.evidence.tried}:
            return figure
        return msgspec.structs.replace(figure, reference=f"{figure.reference}, not in the bundle")

    def _saturation(self, variant_id: str, figures: Sequence[QualityFigure]) -> dict[str, bool]:
        """See `Variant.saturation`."""
        from nearfar.engines.devices import cpu_kind, probe

        if variant_id != "int8" or self.settings.int8.method == "weights":
            return {}
        found = saturates(figures)
        if found:
            self.reporter.say(
                f"! {variant_id} saturates in the 8-bit kernels of this CPU: it is in the bundle "
                "for other machines, and is never chosen on this one. --int8 weights does not"
            )
        return {cpu_kind(probe()): found}

    def accept(
        self,
        variant_id: str,
        figures: Sequence[QualityFigure],
        *,
        reference_perplexity: float | None = None,
        blame: Callable[[], LayerErrors | None] | None = None,
    ) -> bool:
        """Whether a compressed variant stays in the bundle; says why when it does not.

        Its files are removed then. See `Gates.max_quality_drop`.

        Args:
            variant_id: Its id.
            figures: Of its quality.
            reference_perplexity: Of the reference, for language models.
            blame: Finds the layers that err; it is asked where the graph as it is written loses a
                noticeable share, or too much.

        Raises:
            ConversionError: No other variant was asked for.
        """
        if reference_perplexity is not None:
            self.evidence.perplexity = reference_perplexity
        problem = refusal(
            variant_id,
            figures,
            self.settings.gates.max_quality_drop,
            reference_perplexity=reference_perplexity,
        )
        drop = quality_drop(figures, suffix=UNFUSED) or quality_drop(
            figures, reference_perplexity=reference_perplexity
        )
        limit = self.settings.gates.max_quality_drop
        least = NOTICEABLE if limit is None else min(limit, NOTICEABLE)
        found = blame() if blame is not None and drop is not None and drop[1] > least else None
        if problem is None:
            return True
        if self.settings.slim.is_wished:
            # What slicing lost, no other way of rounding brings back.
            problem = Refusal(problem.reason, _SLICE_LESS)
        if found is not None:
            # Of language models no node can be kept.
            is_text = reference_perplexity is not None
            mending = mending_of(found, variant_id, self._kept_in(variant_id))
            problem = problem.blaming(damage_of(found), "" if is_text else mending)
        self._leave_out(variant_id, problem, figures)
        return False

    def _kept_in(self, variant_id: str) -> Sequence[str]:
        if variant_id == "int4":
            return self.kept_int4
        return self.kept_tensorrt if variant_id.startswith("trt-") else self.kept

    def accept_slim(
        self,
        ids: Sequence[str],
        figures: Sequence[QualityFigure],
        *,
        reference_perplexity: float | None = None,
    ) -> tuple[str, ...]:
        """Which variants stay, by what the sliced model loses in full precision.

        Where it loses too much by itself, nothing that is made of it can be good enough.
        """
        if self.accept("slim", figures, reference_perplexity=reference_perplexity):
            return tuple(ids)
        for variant_id in ids:
            if variant_id not in ("fp32", "slim"):
                self.refuse(variant_id, f"{variant_id} would be made of slim, which loses too much")
        return tuple(variant_id for variant_id in ids if variant_id == "fp32")

    def refuse(self, variant_id: str, reason: str) -> None:
        """Leave a variant out of the bundle, and say why."""
        self._leave_out(variant_id, Refusal(reason, ""), ())

    def measured(
        self,
        ids: Sequence[str],
        engine: EngineName | Mapping[str, EngineName],
        entries: Mapping[str, str],
        quality: Mapping[str, tuple[QualityFigure, ...]],
        **inputs: object,
    ) -> tuple[tuple[str, ...], dict[str, tuple[LatencyFigure, int]]]:
        """Measure all variants, and leave out those that are too large or too slow.

        Args:
            ids: Of the variants that are made.
            engine: What runs them, or each of them.
            entries: Id to what the engine opens.
            quality: Id to figures, for the report.
            inputs: See `measure`.

        Returns:
            Ids of the variants that stay, and what was measured of them.

        Raises:
            ConversionError: None stays, or the limit is a share of a size that is not known.
        """
        gates, full_bytes = self.settings.gates, self.evidence.full_bytes
        if gates.max_size_share is not None and not full_bytes:
            raise ConversionError(
                "How large the model is in 32 bits is not known, so a share of it is no limit",
                fix="State the limit in MiB, such as --max-size 20MiB",
            )
        latency: dict[str, tuple[LatencyFigure, int]] = {}
        kept = []
        for variant_id in ids:
            problem = size_refusal(variant_id, self._size(variant_id), gates, full_bytes)
            if problem is None and self.options.measure:
                latency[variant_id] = self.measure(
                    variant_id,
                    engine if isinstance(engine, str) else engine[variant_id],
                    entries[variant_id],
                    **inputs,
                )
                problem = latency_refusal(variant_id, latency[variant_id][0], gates)
            if problem is None:
                kept.append(variant_id)
            else:
                self._leave_out(
                    variant_id, problem, quality[variant_id], latency.pop(variant_id, None)
                )
        self.check_any(kept)
        return tuple(kept), latency

    def _leave_out(
        self,
        variant_id: str,
        problem: Refusal,
        figures: Sequence[QualityFigure],
        latency: tuple[LatencyFigure, int] | None = None,
    ) -> None:
        """Remove a variant's files, and remember why it is not in the bundle."""
        self.reporter.say(f"! {problem}")
        drop = quality_drop(figures, reference_perplexity=self.evidence.perplexity)
        size_bytes, full_bytes = self._size(variant_id), self.evidence.full_bytes
        self.evidence.tried.append(
            Tried(
                id=variant_id,
                method=method_of(variant_id, self.settings_found),
                outcome="refused",
                reason=problem.reason,
                hint=problem.hint,
                size_bytes=size_bytes,
                share=size_bytes / full_bytes if full_bytes else 0.0,
                metric=drop[0] if drop else "",
                lost=max(0.0, drop[1]) if drop else None,
                quality=tuple(figures),
                latency=latency[0] if latency else None,
                memory_bytes=latency[1] if latency else 0,
            )
        )
        shutil.rmtree(self.writer.folder / variant_id, ignore_errors=True)
        self.refused.append(problem.reason)

    def _size(self, variant_id: str) -> int:
        folder = self.writer.folder / variant_id
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    def check_any(self, ids: Sequence[str]) -> None:
        """Refuse to make a bundle without variants.

        Raises:
            ConversionError: All were refused.
        """
        if not ids:
            raise ConversionError(
                "No variant is good enough: " + "; ".join(self.refused),
                fix="Add the full precision with --variants, or allow more with "
                "--max-quality-drop, --max-size or --max-latency",
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
                "figures": "latency, memory, throughput",
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
