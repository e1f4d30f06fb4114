"""A twin in FP32 of a graph in FP16 or BF16, which rounds every value that the graph rounds.

ONNX Runtime has no kernels for either on CPUs. BF16 it refuses. FP16 it widens, and drops the casts
between two widened operators (seen in 1.31): 300 x 300 x 0.001 is 90 there, and infinite on a GPU.
So variants that compute in 16 bits are judged by a twin, where casts that are written stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from converters.libraries import load, quiet
from converters.tensorrt.graph import nodes_below

#: What a value in BF16 has behind the name that it has in FP32.
BF16_SUFFIX = "_bf16"
#: Larger weights lie in a file of their own: writing them into the graph takes them twice more.
_INLINE_BYTES = 128 << 20


def write_twin(source: Path, target: Path) -> bool:
    """Write the twin of a graph.

    Values have the names that they have in FP32, so that layers can be compared.

    Args:
        source: ONNX file.
        target: ONNX file to write; large weights come beside it.

    Returns:
        Whether there is one: a graph with branches has none, and is not written.
    """
    onnx = load("onnx")
    model = onnx.load(str(source), load_external_data=False)
    if len(list(nodes_below(model.graph))) > len(model.graph.node):
        return False
    with quiet():
        known = types_of(onnx.shape_inference.infer_shapes(model))
    onnx.load_external_data_for_model(model, str(source.parent))
    halves = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    for tensor in model.graph.initializer:
        _widen(onnx, tensor, halves)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type in halves:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    nodes = list(_rounding(onnx, model, known, halves))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    is_large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > _INLINE_BYTES
    onnx.save(
        model, str(target), save_as_external_data=is_large, location=f"{target.name}.data"
    ) if is_large else onnx.save(model, str(target))
    return True


def types_of(model: Any) -> dict[str, int]:
    """Name of a value to the type of its elements, as far as the graph states it."""
    graph = model.graph
    found = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _rounding(onnx: Any, model: Any, known: dict[str, int], halves: set[int]) -> Iterator[Any]:
    """The graph's nodes, with two casts behind each value that has 16 bits."""
    wide = onnx.TensorProto.FLOAT
    renamed: dict[str, str] = {}
    given = [value.name for value in model.graph.input if known.get(value.name) in halves]
    for name in given:
        renamed[name] = f"{name}_rounded"
        yield from _casts(onnx, name, renamed[name], known[name])
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] == node.output[0] + BF16_SUFFIX:
            continue  # the value that it widens has this name already
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in halves:
                attribute.i = wide
            elif attribute.HasField("t"):
                _widen(onnx, attribute.t, halves)
        yield node
        for position, name in enumerate(node.output):
            kind = known.get(name)
            if kind not in halves:
                continue
            plain = renamed[name] = (
                name.removesuffix(BF16_SUFFIX) if node.op_type != "Cast" else name
            )
            node.output[position] = f"{plain}_exact"
            yield from _casts(onnx, f"{plain}_exact", plain, kind)


def _casts(onnx: Any, exact: str, rounded: str, kind: int | None) -> Iterator[Any]:
    short = f"{rounded}_short"
    yield onnx.helper.make_node("Cast", [exact], [short], name=short, to=kind)
    yield onnx.helper.make_node(
        "Cast", [short], [rounded], name=f"{rounded}_wide", to=onnx.TensorProto.FLOAT
    )


def _widen(onnx: Any, tensor: Any, halves: set[int]) -> None:
    if tensor.data_type in halves:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
