"""Weights stored in fewer bits and computed with in 32: for operators without such a kernel.

ONNX Runtime's weight-only quantizer knows matrix products (`MatMulNBits`). Convolutions, `Gemm`
and recurrent layers get their weights through `DequantizeLinear` (ONNX 13) instead, one scale for
each output channel, or through a `Cast` from 16 bits, FP16 or BF16. Files become smaller, and
nothing is rounded but the weights; it is no faster.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

import numpy as np

from converters.libraries import load

#: Operator to the inputs that are weights.
_WEIGHTS = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1,), "LSTM": (1, 2), "GRU": (1, 2)}
_LEAST_OPSET = 13

#: The largest number that 16 bits hold, of FP16 and BF16. What is larger, such as a mask of
#: -3.4e38, would become infinite.
LARGEST = {"fp16": 65504.0, "bf16": 3.3895e38}

Half = Literal["fp16", "bf16"]
_Store = Callable[[str, np.ndarray], list[Any]]


def round_weights(model: Any, keep: Collection[str], *, least_weights: int) -> int:
    """Store weights of these operators in 8 bits, in place; also those inside branches.

    Args:
        model: An `onnx.ModelProto`.
        keep: Names of nodes to leave as they are.
        least_weights: Smaller ones stay.

    Returns:
        How many were rounded; 0 for models below opset 13, which cannot say it.
    """
    onnx = load("onnx")
    if _opset(model) < _LEAST_OPSET:
        return 0
    # A branch may read what an outer graph stores; no name is there twice.
    axes: dict[str, int] = {}
    for graph in _graphs(model.graph):
        for node in graph.node:
            if node.op_type in _WEIGHTS and node.name not in keep:
                for position in _WEIGHTS[node.op_type]:
                    if position < len(node.input):
                        axes[node.input[position]] = _channel_axis(node)

    def eight_bits(name: str, weights: np.ndarray) -> list[Any]:
        axis = axes[name]
        others = tuple(i for i in range(weights.ndim) if i != axis)
        scales = np.abs(weights).max(axis=others) / np.float32(127)
        scales = np.where(scales == 0, np.float32(1), scales).astype(np.float32)
        shape = [-1 if i == axis else 1 for i in range(weights.ndim)]
        codes = np.rint(weights / scales.reshape(shape)).astype(np.int8)
        return [
            _constant(onnx, f"{name}_int8", codes),
            _constant(onnx, f"{name}_scales", scales),
            onnx.helper.make_node(
                "DequantizeLinear", [f"{name}_int8", f"{name}_scales"], [name],
                name=f"{name}_widened", axis=axis,
            ),
        ]  # fmt: skip

    return sum(
        _replace(onnx, graph, axes, least_weights, eight_bits) for graph in _graphs(model.graph)
    )


def halve_weights(model: Any, *, least_weights: int, kind: Half = "fp16") -> int:
    """Store all large FP32 constants in 16 bits, in place; those inside branches too.

    Args:
        model: An `onnx.ModelProto`.
        least_weights: Smaller ones stay.
        kind: ``fp16`` has three more bits of precision, ``bf16`` the range of FP32.

    Returns:
        How many were stored so; one that 16 bits cannot hold stays as it is. 0 for ``bf16`` and
        models below opset 13, which cannot say it.
    """
    onnx = load("onnx")
    if kind == "bf16" and _opset(model) < _LEAST_OPSET:
        return 0

    def sixteen_bits(name: str, weights: np.ndarray) -> list[Any]:
        stored = bfloat16_tensor(weights) if kind == "bf16" else weights.astype(np.float16)
        return [
            _constant(onnx, f"{name}_{kind}", stored),
            onnx.helper.make_node(
                "Cast", [f"{name}_{kind}"], [name], name=f"{name}_widened",
                to=onnx.TensorProto.FLOAT,
            ),
        ]  # fmt: skip

    return sum(
        _replace(onnx, graph, None, least_weights, sixteen_bits, LARGEST[kind])
        for graph in _graphs(model.graph)
    )


def bfloat16_tensor(weights: np.ndarray) -> Any:
    """A tensor of BF16: the upper half of FP32, rounded to the nearest, ties to even."""
    onnx = load("onnx")
    bits = np.ascontiguousarray(weights, np.float32).view(np.uint32)
    codes = ((bits + (((bits >> 16) & 1) + 0x7FFF).astype(np.uint32)) >> 16).astype("<u2")
    kind = onnx.TensorProto.BFLOAT16
    return onnx.helper.make_tensor("", kind, weights.shape, codes.tobytes(), raw=True)


def _opset(model: Any) -> int:
    return next((int(entry.version) for entry in model.opset_import if not entry.domain), 0)


def _replace(
    onnx: Any,
    graph: Any,
    wanted: Collection[str] | None,
    least_weights: int,
    store: _Store,
    largest: float = LARGEST["fp16"],
) -> int:
    """Put nodes that give a constant in the place of the constant; readers notice nothing."""
    taken = {value.name for value in graph.input}
    new: list[Any] = []
    replaced = 0

    def narrowed(name: str, tensor: Any) -> bool:
        is_large = int(np.prod(tensor.dims)) >= least_weights
        if tensor.data_type != onnx.TensorProto.FLOAT or not is_large or name in taken:
            return False
        if wanted is not None and name not in wanted:
            return False
        weights = onnx.numpy_helper.to_array(tensor)
        if not np.isfinite(weights).all() or np.abs(weights).max() > largest:
            return False
        new.extend(store(name, weights))
        return True

    for tensor in list(graph.initializer):
        if narrowed(tensor.name, tensor):
            graph.initializer.remove(tensor)
            replaced += 1
    for node in list(graph.node):
        value = next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)
        if node.op_type == "Constant" and value is not None and narrowed(node.output[0], value):
            graph.node.remove(node)
            replaced += 1
    # All of them are constants, so they may stand first.
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*new, *rest])
    return replaced


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _graphs(inner)


def _constant(onnx: Any, name: str, array: Any) -> Any:
    """A node; `array` is numpy's, or a tensor as ONNX has it."""
    value = onnx.numpy_helper.from_array(array, name) if isinstance(array, np.ndarray) else array
    value.name = name
    return onnx.helper.make_node("Constant", [], [name], name=name, value=value)


def _channel_axis(node: Any) -> int:
    """Along which axis of its weights the outputs of an operator lie."""
    if node.op_type == "Gemm":
        is_turned = any(a.name == "transB" and a.i for a in node.attribute)
        return 0 if is_turned else 1
    return 0 if node.op_type == "Conv" else 1
