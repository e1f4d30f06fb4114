"""Whether a compressed variant is good enough: one number for every task, held against a limit."""

from __future__ import annotations

from collections.abc import Sequence

from nearfar.bundle.manifest import QualityFigure

#: Figures measured on the graph as the model states it, where ONNX Runtime would fuse it here.
UNFUSED = "_unfused"

#: The figure that speaks for a task, and what a lossless variant has.
_SHARES = ("recall_at_10", "top1_agreement")


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
) -> str | None:
    """Why a variant may not go into the bundle, in words; `None` when it may."""
    if limit is None:
        return None
    here = quality_drop(figures, reference_perplexity=reference_perplexity)
    model = quality_drop(figures, suffix=UNFUSED)
    if here is None or here[1] <= limit:
        return None
    metric, drop = here
    if model is not None and model[1] <= limit:
        return (
            f"{variant_id} loses {drop:.1%} ({metric}) as it runs on this CPU, and {model[1]:.1%} "
            "on the graph as it is written: the CPU's 8-bit kernels saturate. It is left out; use "
            "--int8 weights here, or convert on the machine that shall run it"
        )
    return (
        f"{variant_id} loses {drop:.1%} ({metric}), the limit is {limit:.1%}: it is left out. Try "
        "another method (--int8 weights|static), smaller blocks (int8.block_size), or let more "
        "nodes stay in full precision (int8.max_kept)"
    )
