"""Whether a compressed variant is good enough: one number for every task, held against a limit."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from converters.settings import Gates
from nearfar.bundle.manifest import LatencyFigure, QualityFigure
from nearfar.units import format_bytes, format_ms

#: Figures measured on the graph as the model states it, where ONNX Runtime would fuse it here.
UNFUSED = "_unfused"

#: From this share of quality on it is told which layers a variant loses it in.
NOTICEABLE = 0.01

#: The figure that speaks for a task, and what a lossless variant has.
_SHARES = ("recall_at_10", "top1_agreement", "labels_agreement")


#: As much more is lost by a CPU's kernels than by the graph as it is written when they saturate:
#: rounding differs by far less. (A CNN fell from 0.995 to 0.114.)
_SATURATES_ABOVE, _SATURATES_TIMES = 0.01, 1.5


class Refusal(msgspec.Struct, frozen=True):
    """Why a variant may not go into the bundle.

    Attributes:
        reason: What is wrong, with the figure and the limit.
        hint: What to try instead; may be empty.
    """

    reason: str
    hint: str

    def blaming(self, damage: str, mending: str) -> Refusal:
        """The same with the layers that are to blame.

        Args:
            damage: Which they are, in words.
            mending: What to do about it, to follow "Try"; may be empty.
        """
        hints = [hint for hint in (mending, self.hint) if hint]
        return Refusal(f"{self.reason}; {damage}", "; or ".join(hints))

    def __str__(self) -> str:
        said = f"{self.reason}. It is left out"
        return f"{said}. Try {self.hint}" if self.hint else said


def quality_drop(
    figures: Sequence[QualityFigure], *, reference_perplexity: float | None = None, suffix: str = ""
) -> tuple[str, float] | None:
    """How much worse than its reference a variant is.

    Args:
        figures: Of the variant.
        reference_perplexity: Of the reference, for language models.
        suffix: `UNFUSED` judges the model, "" the variant as it runs on this machine.

    Returns:
        (what was looked at, share that was lost), or `None` where nothing fitting was measured.
    """
    values = {figure.metric: figure.value for figure in figures}
    perplexity = values.get("perplexity")
    if perplexity is not None and reference_perplexity:
        return "perplexity", perplexity / reference_perplexity - 1.0
    for metric in _SHARES:
        if metric + suffix in values:
            return metric, 1.0 - values[metric + suffix]
    if "relative_error" + suffix in values:
        return "relative_error", values["relative_error" + suffix]
    return None


def refusal(
    variant_id: str,
    figures: Sequence[QualityFigure],
    limit: float | None,
    *,
    reference_perplexity: float | None = None,
) -> Refusal | None:
    """Why a variant loses too much quality for the bundle; `None` when it does not."""
    if limit is None:
        return None
    here = quality_drop(figures, reference_perplexity=reference_perplexity)
    model = quality_drop(figures, suffix=UNFUSED)
    if here is None or here[1] <= limit:
        return None
    metric, drop = here
    if model is not None and model[1] <= limit:
        return Refusal(
            f"{variant_id} loses {drop:.1%} ({metric}) as it runs on this CPU, and {model[1]:.1%} "
            "on the graph as it is written: the CPU's 8-bit kernels saturate",
            "--int8 weights here, or convert on the machine that shall run it",
        )
    return Refusal(
        f"{variant_id} loses {drop:.1%} ({metric}), the limit is {limit:.1%}",
        "another method (--int8 weights|static, or --auto), smaller blocks (int8.block_size), or "
        "let more nodes stay in full precision (int8.max_kept)",
    )


def size_refusal(variant_id: str, size_bytes: int, gates: Gates, full_bytes: int) -> Refusal | None:
    """Why a variant is too large for the bundle; `None` when it is not.

    Args:
        variant_id: Its id, for the text.
        size_bytes: Of its files.
        gates: The limits.
        full_bytes: Size of the model's weights in 32 bits; 0 when that is not known.
    """
    limit = gates.size_limit_bytes(full_bytes)
    if limit is None or size_bytes <= limit:
        return None
    share = f" ({size_bytes / full_bytes:.2f}x of its size in 32 bits)" if full_bytes else ""
    return Refusal(
        f"{variant_id} has {format_bytes(size_bytes)}{share}, the limit is {format_bytes(limit)}",
        "fewer bits (--variants int8 or int4), larger blocks (int8.block_size = 128), fewer nodes "
        "in full precision (int8.max_kept), a smaller model, or a greater --max-size",
    )


def latency_refusal(variant_id: str, latency: LatencyFigure, gates: Gates) -> Refusal | None:
    """Why a variant is too slow for the bundle; `None` when it is not."""
    limit = gates.max_latency_ms
    if limit is None or latency.p50_ms <= limit:
        return None
    what = " to the first token" if latency.ms_per_token is not None else ""
    return Refusal(
        f"{variant_id} takes {format_ms(latency.p50_ms)}{what} (p50, {latency.machine}), the limit "
        f"is {format_ms(limit)}",
        "--auto, which times every method; --int8 static or dynamic, whose activations have 8 bits "
        "too; a smaller model; or measure on the machine that shall run it",
    )


def saturates(figures: Sequence[QualityFigure]) -> bool:
    """Whether this CPU's 8-bit kernels lose what the graph as it is written does not.

    `False` where only one of the two was measured.
    """
    here, model = quality_drop(figures), quality_drop(figures, suffix=UNFUSED)
    if here is None or model is None:
        return False
    return here[1] > max(model[1] + _SATURATES_ABOVE, model[1] * _SATURATES_TIMES)
