"""Mixed precision by sensitivity: keep the few nodes whose rounding harms the output most.

Every candidate is rounded alone and the damage to the model's outputs is measured; the worst are
then kept in full precision, as few as the quality gate needs. It is the scheme of "Mixed-Precision
Post Training Quantization" tools (for example Qualcomm AIMET's), with the node as the unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from converters.steps.onnx_session import open_session, run
from nearfar.errors import ConversionError

Feeds = Mapping[str, np.ndarray]

#: Inputs that damage is measured on. A ranking needs fewer than a verdict.
RANKING_FEEDS = 16


class NodeQuantizer(Protocol):
    """Makes compressed versions of one model, each with other nodes left in full precision."""

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of the nodes that are compressed and have weights worth it."""

    def write(self, target: Path, keep: Sequence[str] = ()) -> None:
        """Write a version; `keep` names the nodes to leave as they are."""


class Damage(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the error of one node does.

    Attributes:
        node: Its name.
        error: Mean over the outputs of the squared error, as a share of the squared output.
        operator: Its type. This and the rest are known of variants that were compared layer by
            layer (`converters.steps.layer_errors`).
        own_error: Relative error of its output when it is given exact inputs.
        input_error: The greatest relative error of what it is given as the variant runs.
        output_error: Relative error of its output then.
    """

    node: str
    error: float
    operator: str = ""
    own_error: float | None = None
    input_error: float | None = None
    output_error: float | None = None


class Choice(msgspec.Struct, frozen=True):
    """What is kept in full precision.

    Attributes:
        keep: Names of the nodes, the most sensitive first.
        drop: The share of quality that is lost with it, on the inputs it was chosen on.
        holds: Whether that is within the limit.
    """

    keep: tuple[str, ...]
    drop: float
    holds: bool


def rank(
    quantizer: NodeQuantizer,
    reference: Path,
    feeds: Sequence[Feeds],
    work: Path,
    *,
    on_node: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Damage, ...]:
    """Measure every candidate alone.

    Args:
        quantizer: Makes the versions.
        reference: FP32 model.
        feeds: Inputs of one call each; the first `RANKING_FEEDS` are used.
        work: Folder for the versions.
        on_node: Told how many nodes are done, of how many.

    Returns:
        The candidates, most harmful first; equal ones in the order of the graph.

    Raises:
        ConversionError: The reference does not run.
    """
    feeds = feeds[:RANKING_FEEDS]
    session = open_session(reference)
    truth = [run(session, feed, name="reference") for feed in feeds]
    del session
    names = quantizer.candidates
    found = []
    path = work / "one-node.onnx"
    for position, name in enumerate(names):
        try:
            quantizer.write(path, keep=[other for other in names if other != name])
            error = _error(path, feeds, truth)
        except ConversionError:
            # Alone it cannot be rounded, or rounding it breaks the model: nothing is worse.
            error = float("inf") if path.exists() else 0.0
        path.unlink(missing_ok=True)
        # JSON has no infinity, and these figures are cached.
        found.append(Damage(name, min(error, 1e30)))
        on_node(position + 1, len(names))
    return tuple(sorted(found, key=lambda one: -one.error))


def choose(
    ranked: Sequence[Damage],
    judge: Callable[[Sequence[str]], float],
    *,
    limit: float,
    max_kept: int,
) -> Choice:
    """Find how few of the most harmful nodes must be kept.

    More kept nodes are taken to lose less, so that halving finds the least number in a few trials.

    Args:
        ranked: From `rank`.
        judge: Makes the version that keeps these nodes; returns how much quality it loses.
        limit: How much it may lose.
        max_kept: How many may be kept.
    """
    names = [one.node for one in ranked if one.error > 0][:max_kept]
    drops: dict[int, float] = {}

    def drop(count: int) -> float:
        if count not in drops:
            drops[count] = judge(names[:count])
        return drops[count]

    if drop(0) <= limit:
        return Choice((), drop(0), True)
    if not names or drop(len(names)) > limit:
        best = min(drops, key=lambda count: (drops[count], count))
        return Choice(tuple(names[:best]), drops[best], False)
    fails, holds = 0, len(names)
    while holds - fails > 1:
        middle = (fails + holds) // 2
        if drop(middle) <= limit:
            holds = middle
        else:
            fails = middle
    return Choice(tuple(names[:holds]), drops[holds], True)


def _error(path: Path, feeds: Sequence[Feeds], truth: Sequence[Mapping[str, np.ndarray]]) -> float:
    session = open_session(path)
    errors = []
    for feed, expected in zip(feeds, truth):  # noqa: B905
        outputs = run(session, feed, name="one rounded node")
        for name, array in expected.items():
            if array.dtype.kind != "f" or not array.size:
                continue
            wide = array.astype(np.float64)
            difference = outputs[name].astype(np.float64) - wide
            scale = float(np.square(wide).sum())
            errors.append(float(np.square(difference).sum()) / (scale or 1.0))
    return float(np.mean(errors)) if errors else 0.0
