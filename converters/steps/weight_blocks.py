"""Weights of matrix products in blocks of few bits (`MatMulNBits`); activations stay in float.

The rounding is that of ONNX Runtime's `matmul_nbits_quantizer`. It knows `MatMul`; `Gemm`, which
PyTorch's `Linear` becomes for inputs of two axes, is written as a product and a sum first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from converters.libraries import load, quiet
from converters.steps.quantize_tables import quantize_tables
from converters.steps.round_weights import round_weights

#: Smaller constants are positions, scales and shapes: nothing to gain.
LEAST_WEIGHTS = 1024
_SIZES = (256, 128, 64, 32, 16)
_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """How weights are rounded; see `converters.settings.Int8Settings`.

    Attributes:
        bits: Of a weight in a product; of tables and other operators' weights it is 8.
        block_size: The most weights that share a scale.
        symmetric: Whether blocks have no zero point.
        accuracy_level: Of the kernel.
        tables: One scale for each ``row`` of a lookup table, or one for the ``tensor``.
    """

    bits: Literal[4, 8]
    block_size: int
    symmetric: bool
    accuracy_level: int
    tables: Literal["row", "tensor"] = "row"

    def size_for(self, rows: int) -> int:
        """The size of a block for a matrix of so many rows.

        The last block is filled up, so a small matrix in large blocks could be larger than it was
        in 32 bits: the size is taken that needs the fewest bytes, of such the largest.
        """

        def bytes_(size: int) -> float:
            count = -(-rows // size)
            zero_point = 0.0 if self.symmetric else self.bits / 8
            return count * (size * self.bits / 8 + _SCALE_BYTES + zero_point)

        return min((size for size in _SIZES if size <= self.block_size), key=bytes_)


def quantize_blocks(
    source: Path, target: Path, blocks: Blocks, keep: Collection[str], work: Path
) -> int:
    """Write a model with its weights in blocks.

    Args:
        source: FP32 model.
        target: The file.
        blocks: How.
        keep: Names of nodes to leave as they are.
        work: Folder for intermediate files.

    Returns:
        How many products have weights in blocks now.
    """
    nbits = load("onnxruntime.quantization.matmul_nbits_quantizer")
    with quiet():
        model = _with_tables(source, blocks, keep, work / f"{target.stem}-tables.onnx")
        _gemm_to_products(model, keep)
        round_weights(model, keep, least_weights=LEAST_WEIGHTS)
        rows = {name: height for name, height in _products(model) if name not in keep}
        sizes = {name: blocks.size_for(height) for name, height in rows.items()}
        others = set(keep) | {node.name for _, node in _nodes(model.graph) if node.name not in rows}
        for size in sorted(set(sizes.values())):
            algorithm = nbits.DefaultWeightOnlyQuantConfig(
                bits=blocks.bits,
                block_size=size,
                is_symmetric=blocks.symmetric,
                accuracy_level=blocks.accuracy_level,
                op_types_to_quantize=("MatMul",),
            )
            elsewhere = {name for name in sizes if sizes[name] != size}
            quantizer = nbits.MatMulNBitsQuantizer(
                model, algo_config=algorithm, nodes_to_exclude=sorted(others | elsewhere)
            )
            quantizer.process()
            model = quantizer.model.model
        for graph in _graphs(model.graph):
            _store_once(graph)
        load("onnx").save(model, str(target))
    return len(sizes)


def weighty_operators(source: Path) -> dict[str, int]:
    """Operators that read a large constant, and how many there are of each."""
    onnx = load("onnx")
    model = onnx.load(str(source))
    counts: dict[str, int] = {}
    for stored, node in _nodes(model.graph):
        if any(name in stored and _size(stored[name]) >= LEAST_WEIGHTS for name in node.input):
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def _products(model: Any) -> Iterator[tuple[str, int]]:
    """(name, rows of its matrix) of each product with a constant matrix; all get a name."""
    floats = load("onnx").TensorProto.FLOAT
    for stored, node in _nodes(model.graph):
        if node.op_type == "MatMul" and len(node.input) == 2:
            matrix = stored.get(node.input[1])
            dims = list(matrix.dims) if matrix is not None else []
            is_float = matrix is not None and matrix.data_type == floats
            # As the quantizer has it: axes before the last two must be 1.
            if is_float and len(dims) >= 2 and all(size == 1 for size in dims[:-2]):
                node.name = node.name or f"{node.output[0]}_product"
                yield node.name, dims[-2]


def _gemm_to_products(model: Any, keep: Collection[str]) -> None:
    """Write ``Gemm`` with large constant weights as ``MatMul`` and ``Add``, in place.

    The product keeps the node's name. Those with another first operand than as it stands, or other
    factors than 1, stay; PyTorch makes none.
    """
    onnx = load("onnx")
    turned: set[str] = set()
    for graph in _graphs(model.graph):
        stored = {tensor.name: tensor for tensor in graph.initializer}
        nodes = list(graph.node)
        del graph.node[:]
        for node in nodes:
            values = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
            matrix = stored.get(node.input[1]) if len(node.input) > 1 else None
            if (
                node.op_type != "Gemm"
                or node.name in keep
                or matrix is None
                or _size(matrix) < LEAST_WEIGHTS
                or values.get("transA", 0)
                or values.get("alpha", 1.0) != 1.0
                or (values.get("beta", 1.0) != 1.0 and len(node.input) > 2)
            ):
                graph.node.append(node)
                continue
            name = matrix.name
            if values.get("transB", 0):
                name = f"{matrix.name}_turned"
                if name not in turned:
                    array = np.ascontiguousarray(onnx.numpy_helper.to_array(matrix).T)
                    graph.initializer.append(onnx.numpy_helper.from_array(array, name))
                    turned.add(name)
            has_bias = len(node.input) > 2 and bool(node.input[2])
            made = f"{node.output[0]}_product" if has_bias else node.output[0]
            graph.node.append(
                onnx.helper.make_node("MatMul", [node.input[0], name], [made], name=node.name)
            )
            if has_bias:
                graph.node.append(
                    onnx.helper.make_node(
                        "Add", [made, node.input[2]], [node.output[0]], name=f"{node.name}_bias"
                    )
                )
        _drop_unread(graph, {name.removesuffix("_turned") for name in turned})


def _store_once(graph: Any) -> None:
    """Of weights that several products read, the quantizer writes as many copies, alike in name."""
    seen: set[str] = set()
    for position in range(len(graph.initializer) - 1, -1, -1):
        name = graph.initializer[position].name
        if name in seen:
            del graph.initializer[position]
        seen.add(name)


def _drop_unread(graph: Any, names: Collection[str]) -> None:
    """Remove initializers of these names that nothing reads any more."""
    read = {name for _, node in _nodes(graph) for name in node.input}
    read |= {output.name for output in graph.output}
    for tensor in list(graph.initializer):
        if tensor.name in names and tensor.name not in read:
            graph.initializer.remove(tensor)
            for value in list(graph.input):
                if value.name == tensor.name:
                    graph.input.remove(value)


def _with_tables(source: Path, blocks: Blocks, keep: Collection[str], temporary: Path) -> Any:
    """The model with its lookup tables in 8 bits."""
    onnx = load("onnx")
    if blocks.tables == "row":
        model = onnx.load(str(source))
        quantize_tables(model, keep, least_weights=LEAST_WEIGHTS)
        return model
    quantization = load("onnxruntime.quantization")
    try:
        quantization.quantize_dynamic(
            str(source),
            str(temporary),
            op_types_to_quantize=["Gather"],
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=sorted(keep),
        )
        return onnx.load(str(temporary))
    finally:
        temporary.unlink(missing_ok=True)


def _nodes(graph: Any, outer: dict[str, Any] | None = None) -> Iterator[tuple[dict[str, Any], Any]]:
    """(constants that it can read, node) of all nodes, those inside branches too."""
    stored = {**(outer or {}), **{tensor.name: tensor for tensor in graph.initializer}}
    for node in graph.node:
        yield stored, node
        for inner in _branches(node):
            yield from _nodes(inner, stored)


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for inner in _branches(node):
            yield from _graphs(inner)


def _branches(node: Any) -> Sequence[Any]:
    found: list[Any] = []
    for attribute in node.attribute:
        found.extend(attribute.graphs)
        if attribute.HasField("g"):
            found.append(attribute.g)
    return found


def _size(tensor: Any) -> int:
    return int(np.prod(tensor.dims))
