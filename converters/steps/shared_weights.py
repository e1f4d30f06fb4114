"""Weights that several nodes read, where ONNX Runtime's quantizers take them for one node's own.

Seen in 1.31, with the smallest graphs that show it:

- ``static``: a weight that is read by ``Gemm`` and by ``Gemm`` with ``transB`` (or by ``MatMul``,
  or looked up by ``Gather``) has its scales along one axis only, which is the last reader's. The
  quantizer fails, or writes a graph that does not run; of a square matrix one that is wrong.
- ``dynamic``: ``Gemm`` with ``transB`` becomes ``MatMul`` of a weight that is turned in place,
  whoever else reads it. The graph does not load; of a square matrix it is wrong.
- Both: a node that shall stay in full precision gets the rounded weight of the others.

So readers that need other forms of a weight get a copy of their own before it is rounded. Models
with tied weights become larger by that: a table of words that is the head too is stored twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import Any

from converters.libraries import load
from converters.tensorrt.graph import Graph

#: Along which axis of its weight an operator's outputs lie.
_CHANNELS = {"MatMul": 1, "Conv": 0, "ConvTranspose": 1}
_PRODUCTS = (*_CHANNELS, "Gemm")

#: What form of a weight a node reads at a position; `None` where any will do.
Form = Callable[[Any, int], Hashable | None]


def static_form(keep: Collection[str], *, per_channel: bool) -> Form:
    """For the QDQ quantizer: full precision, a table, or scales along an axis."""

    def form(node: Any, position: int) -> Hashable | None:
        if node.name in keep:
            return "full"
        if node.op_type == "Gather" and position == 0:
            return "table" if per_channel else "rounded"
        if node.op_type in _PRODUCTS and position == 1:
            return _channel_axis(node) if per_channel else "rounded"
        return None

    return form


def dynamic_form(keep: Collection[str]) -> Form:
    """For the dynamic quantizer: full precision, turned (for one node alone), or as it lies."""

    def form(node: Any, position: int) -> Hashable | None:
        if node.op_type == "Gemm" and position == 1 and Graph.attribute(node, "transB", 0):
            return "turned", node.output[0]
        return "full" if node.name in keep else "rounded"

    return form


def part_shared(model: Any, form: Form) -> tuple[str, ...]:
    """Give readers of one weight in several forms a weight each, in place.

    Args:
        model: An `onnx.ModelProto`; weights and nodes at its top level are looked at.
        form: What each reader needs.

    Returns:
        Names of the weights that are stored more than once now.
    """
    onnx = load("onnx")
    graph = model.graph
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    stored = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type in floats and len(tensor.dims) > 1
    }
    readers: dict[str, dict[Hashable, list[tuple[Any, int]]]] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            wanted = form(node, position) if name in stored else None
            if wanted is not None:
                readers.setdefault(name, {}).setdefault(wanted, []).append((node, position))
    parted = {name: list(forms.values()) for name, forms in readers.items() if len(forms) > 1}
    for name, groups in parted.items():
        for number, places in enumerate(groups[1:], 2):
            _copy(graph, stored[name], _free_name(stored, f"{name}_{number}"), places, stored)
    return tuple(parted)


def part_all(model: Any) -> None:
    """Give every node that reads an integer weight one of its own, in place."""
    onnx = load("onnx")
    integers = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    seen: set[str] = set()
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            # A weight's zero point is widened with it.
            if name in stored and stored[name].data_type in integers:
                if name in seen:
                    copy = _free_name(stored, f"{name}_{len(stored)}")
                    _copy(model.graph, stored[name], copy, [(node, position)], stored)
                seen.add(name)


def _copy(
    graph: Any, tensor: Any, name: str, places: list[tuple[Any, int]], stored: dict[str, Any]
) -> None:
    copied = graph.initializer.add()
    copied.CopyFrom(tensor)
    copied.name = name
    stored[name] = copied
    for node, position in places:
        node.input[position] = name


def _free_name(stored: Collection[str], wished: str) -> str:
    while wished in stored:
        wished += "_"
    return wished


def _channel_axis(node: Any) -> int:
    if node.op_type == "Gemm":
        return 0 if Graph.attribute(node, "transB", 0) else 1
    return _CHANNELS[node.op_type]
