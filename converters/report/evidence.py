"""What a conversion finds out on its way that the manifest has no place for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from converters.steps.sensitivity import Damage
from nearfar.bundle.manifest import LatencyFigure, QualityFigure

Outcome = Literal["packed", "refused", "failed", "not taken"]


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """One variant that was made, or was to be made, and what became of it.

    Attributes:
        id: Its id; of variants that are not in the bundle, the id that it would have had.
        method: How it was made, in words.
        outcome: ``packed``: it is in the bundle. ``refused``: a gate held it back. ``failed``: it
            could not be made. ``not taken``: it holds all gates, and others were taken.
        reason: Why, in words.
        hint: What to try instead.
        size_bytes: Of its files; 0 when they were not made.
        share: That, as a share of the model's weights in 32 bits; 0 when that is not known.
        metric: The figure that speaks for its quality.
        lost: Share of quality that is lost by it; `None` when that was not measured.
        quality: All figures.
        latency: Speed on the machine that converted.
        memory_bytes: Resident while loaded; 0 when not measured.
        is_front: Whether no other variant is at least as good in size, speed and quality.
    """

    id: str
    method: str = ""
    outcome: Outcome = "packed"
    reason: str = ""
    hint: str = ""
    size_bytes: int = 0
    share: float = 0.0
    metric: str = ""
    lost: float | None = None
    quality: tuple[QualityFigure, ...] = ()
    latency: LatencyFigure | None = None
    memory_bytes: int = 0
    is_front: bool = False

    @property
    def latency_ms(self) -> float | None:
        """What is compared: time per token of language models, else of a call."""
        if self.latency is None:
            return None
        return self.latency.ms_per_token or self.latency.p50_ms


class LayerErrors(msgspec.Struct, frozen=True, kw_only=True):
    """What the errors of single nodes do to the outputs.

    Attributes:
        variant_id: Of which variant.
        method: How it rounds.
        kind: ``alone``: each node was rounded alone, to see which must stay as they are.
            ``inside``: the variant was compared with its reference layer by layer, to see where
            its error is made.
        errors: All that were tried, most harmful first; of ``inside`` and a model of many layers
            those that lie where most harm is done.
        kept: Those that stay in full precision.
        error: Of ``inside``: the sum over all layers.
    """

    variant_id: str
    method: str
    kind: Literal["alone", "inside"] = "alone"
    errors: tuple[Damage, ...]
    kept: tuple[str, ...] = ()
    error: float = 0.0


class ActivationHistogram(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of one activation on calibration inputs, and the range that 8 bits are given.

    Attributes:
        tensor: Its name in the graph.
        low, high: The range that calibration chose.
        least, most: The edges of the first and the last bin.
        counts: How many numbers each bin has.
        cut: Share of the numbers outside the range.
    """

    tensor: str
    low: float
    high: float
    least: float
    most: float
    counts: tuple[int, ...]
    cut: float


@dataclass(slots=True)
class Evidence:
    """Filled while a bundle is made.

    Attributes:
        full_bytes: Size of the model's weights in 32 bits; 0 when that is not known.
        tried: Variants that are not in the bundle.
        layers: Errors per layer, where they were measured.
        histograms: Variant id to activations, of INT8 with calibrated ranges.
        perplexity: Of the best variant of a language model.
        changed: What was done to the model itself, in words.
    """

    full_bytes: int = 0
    tried: list[Tried] = field(default_factory=list)
    layers: list[LayerErrors] = field(default_factory=list)
    histograms: dict[str, tuple[ActivationHistogram, ...]] = field(default_factory=dict)
    perplexity: float | None = None
    changed: str = ""
