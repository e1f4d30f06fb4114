"""The graph in full precision with ONNX Runtime's own operators, where a recipe wants that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from converters.cache import digest_of_arrays, digest_of_path
from converters.recipes.base import Workshop
from converters.steps.fuse import fuse, is_same

_TOOLS = ("onnx", "onnxruntime", "numpy")
#: Inputs that the graph is compared with its source on.
_CHECKED = 4


def fused(
    shop: Workshop, source: Path, feeds: Sequence[Mapping[str, np.ndarray]], *, name: str = "fused"
) -> Path:
    """The graph that variants in 32 and 16 bits are made of.

    Those in 8 and 4 bits are made of the plain one: quantizers do not know the weights inside
    `Attention`.

    Args:
        shop: Where and how.
        source: FP32 graph.
        feeds: Inputs of one call each.
        name: Of the file in the folder for intermediate files.

    Returns:
        A file in the workshop; `source` where it is not wished, nothing fits, or something else is
        computed, which a line of progress says.
    """
    settings = shop.settings.optimise
    if not settings.fuse:
        return source
    target = shop.work / f"{name}.onnx"
    limit = shop.settings.gates.max_optimise_error
    parts = {
        "source": digest_of_path(source),
        "feeds": digest_of_arrays(feeds[:_CHECKED]),
        "model_type": settings.model_type,
        "limit": limit,
    }

    def make(path: Path) -> bool:
        counts = fuse(source, path, settings.model_type)
        said.extend(f"{count} {operator}" for operator, count in counts.items())
        return bool(counts) and is_same(source, path, feeds[:_CHECKED], limit)

    said: list[str] = []
    with shop.reporter.step("fuse operators for ONNX Runtime") as step:
        if shop.cache.output("fuse", parts, target, make, tools=_TOOLS):
            step.note(", ".join(said))
            return target
        why = "the result is not the same model" if said else "no pattern of it fits"
        step.note(f"left as it is: {why}")
    return source
