"""Operators of transformers as ONNX Runtime's own: `Attention`, `SkipLayerNormalization`, …"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from converters.libraries import load, quiet
from converters.sources.onnx_file import io_specs
from converters.steps.onnx_session import open_session, run
from nearfar.errors import ConversionError


def fuse(source: Path, target: Path, model_type: str) -> dict[str, int]:
    """Write a graph with the operators of `com.microsoft` in place of those they stand for.

    The fusions are those of `onnxruntime.transformers.optimizer`; nothing but ONNX Runtime runs the
    result.

    Args:
        source: FP32 model.
        target: The file; not written where nothing fits.
        model_type: Whose graph it is like, as the optimizer names them.

    Returns:
        Operator to how many there are; nothing where none fits, or the optimizer fails.
    """
    onnx = load("onnx")
    optimizer = load("onnxruntime.transformers.optimizer")
    try:
        with quiet():
            model = optimizer.optimize_model(str(source), model_type=model_type, opt_level=0)
            counts = {
                name: int(count)
                for name, count in model.get_fused_operator_statistics().items()
                if count
            }
            before = {node.op_type for node in onnx.load(str(source)).graph.node}
            counts = {name: count for name, count in counts.items() if name not in before}
            if counts:
                model.save_model_to_file(str(target))
    except Exception as exc:  # an optimiser's failure is no reason to fail: the model is fine
        if isinstance(exc, (ConversionError, MemoryError)):
            raise
        target.unlink(missing_ok=True)
        return {}
    return counts


def is_same(
    source: Path, target: Path, feeds: Sequence[Mapping[str, np.ndarray]], max_error: float
) -> bool:
    """Whether a rewritten graph loads, and has the same inputs, outputs and numbers.

    Args:
        source: What it was made of.
        target: The graph.
        feeds: Inputs of one call each.
        max_error: How much outputs may differ, as a share of the largest.
    """
    try:
        ends = [
            [[(one.name, one.datatype) for one in specs] for specs in io_specs(path)]
            for path in (source, target)
        ]
        if ends[0] != ends[1]:
            return False
        one, other = open_session(source), open_session(target)
        for feed in feeds:
            expected = run(one, feed, name=source.name)
            outputs = run(other, feed, name=target.name)
            for name, array in expected.items():
                scale = float(np.abs(array).max()) if array.dtype.kind == "f" and array.size else 0
                if array.dtype.kind != "f":
                    if not np.array_equal(array, outputs[name]):
                        return False
                elif array.size and np.abs(outputs[name] - array).max() > max_error * (scale or 1):
                    return False
    except ConversionError:
        return False
    return True
