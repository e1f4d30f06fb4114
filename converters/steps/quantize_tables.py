"""Lookup tables in 8 bits with a scale for each row.

ONNX Runtime's quantizers give a table one scale (dynamic, QDQ) or support 4 bits only
(`GatherBlockQuantized`). Rows of an embedding differ in size, so one scale wastes bits on most.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from converters.libraries import load


def quantize_tables(model: Any, keep: Collection[str], *, least_weights: int) -> int:
    """Round tables that are looked up by row, in place.

    ``Gather(table, ids)`` becomes ``Mul(Cast(Gather(table_int8, ids)), Gather(scales, ids))``;
    scales are FP32 of shape (rows, 1), so that 8 bits and a share of 32 are kept for each number.

    Args:
        model: An `onnx.ModelProto`.
        keep: Names of nodes to leave as they are.
        least_weights: Smaller tables stay.

    Returns:
        How many tables were rounded.
    """
    onnx = load("onnx")
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {output.name for output in graph.output}
    rounded = 0
    for name, tensor in stored.items():
        nodes = readers.get(name, [])
        if (
            tensor.data_type != onnx.TensorProto.FLOAT
            or len(tensor.dims) != 2
            or tensor.dims[0] * tensor.dims[1] < least_weights
            or name in outputs
            or not nodes
            or not all(_is_row_lookup(node, name) and node.name not in keep for node in nodes)
        ):
            continue
        table = onnx.numpy_helper.to_array(tensor)
        scales = np.abs(table).max(axis=1, keepdims=True) / np.float32(127)
        scales = np.where(scales == 0, np.float32(1), scales).astype(np.float32)
        codes = np.clip(np.rint(table / scales), -127, 127).astype(np.int8)
        graph.initializer.remove(tensor)
        graph.initializer.extend(
            [
                onnx.numpy_helper.from_array(codes, f"{name}_int8"),
                onnx.numpy_helper.from_array(scales, f"{name}_scales"),
            ]
        )
        for node in nodes:
            _replace(onnx, graph, node, name)
        rounded += 1
    return rounded


def _is_row_lookup(node: Any, table: str) -> bool:
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    return node.op_type == "Gather" and node.input[0] == table and axis == 0


def _replace(onnx: Any, graph: Any, node: Any, table: str) -> None:
    make = onnx.helper.make_node
    output, ids = node.output[0], node.input[1]
    new = [
        make("Gather", [f"{table}_int8", ids], [f"{output}_int8"], name=f"{node.name}_int8"),
        make("Cast", [f"{output}_int8"], [f"{output}_codes"], name=f"{node.name}_cast",
             to=onnx.TensorProto.FLOAT),
        make("Gather", [f"{table}_scales", ids], [f"{output}_scales"], name=f"{node.name}_scales"),
        make("Mul", [f"{output}_codes", f"{output}_scales"], [output], name=f"{node.name}_scale"),
    ]  # fmt: skip
    position = next(i for i, other in enumerate(graph.node) if other is node or other == node)
    graph.node.remove(node)
    for offset, replacement in enumerate(new):
        graph.node.insert(position + offset, replacement)
