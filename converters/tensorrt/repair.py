"""Change an ONNX graph so that TensorRT takes it, keeping what it computes where that is possible.

Exact are: biases as floats, tables dequantized before they are looked up, `MatMulNBits` as
`DequantizeLinear` and `MatMul`, inputs fixed to a value. Not exact are ranges made symmetric: the
same range then has up to half as many steps. Compare the result with the original.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from converters.libraries import load
from converters.tensorrt.branches import decide_branches, fix_inputs, has_open_branch
from converters.tensorrt.findings import Finding, Kind
from converters.tensorrt.graph import Graph
from nearfar.bundle.manifest import ShapeRange

#: `DequantizeLinear` in blocks came with opset 21.
_BLOCKS_OPSET = 21
#: Between these and 21, operators only took more types; GroupNormalization changed its meaning.
_LEAST_TO_RAISE = 18


def repair(
    model: Any,
    findings: list[Finding],
    *,
    fixed: Mapping[str, float] | None = None,
    ranges: Sequence[ShapeRange] = (),
) -> list[Finding]:
    """Fix in place what can be fixed.

    Args:
        model: An `onnx.ModelProto`.
        findings: What was found in it.
        fixed: Inputs to replace by a value.
        ranges: Sizes that the inputs will have; branches that go one way for all of them are kept.

    Returns:
        The findings, those that are gone marked as fixed.

    Raises:
        ConversionError: `fixed` names something that is no input of one number.
    """
    if fixed:
        fix_inputs(model, fixed)
    kinds = {finding.kind for finding in findings}
    done: set[Kind] = set()
    for kinds_of, step in _STEPS:
        wanted = kinds & set(kinds_of)
        if wanted and step(model):
            done |= wanted
    if fixed or "control-flow" in kinds:
        decide_branches(model, ranges)
        if not has_open_branch(model):
            done.add("control-flow")
    if fixed:
        done.add("shape-input")
    _drop_unused_domains(model)
    return [
        msgspec.structs.replace(one, is_fixed=True) if one.kind in done else one for one in findings
    ]


def _float_biases(model: Any) -> bool:
    """``DequantizeLinear(INT32)`` becomes the floats it makes: TensorRT takes 8 bits and less."""
    onnx = load("onnx")
    graph = Graph(model)
    done = True
    for node in graph.nodes:
        if node.op_type != "DequantizeLinear":
            continue
        stored = graph.initializers.get(node.input[0])
        if stored is None or stored.data_type != onnx.TensorProto.INT32:
            continue
        scale = graph.constant(node.input[1])
        point = graph.constant(node.input[2]) if len(node.input) > 2 else None
        if scale is None:
            done = False
            continue
        codes = onnx.numpy_helper.to_array(stored).astype(np.float64)
        axis = Graph.attribute(node, "axis", 1)
        values = (codes - _along(point, codes, axis)) * _along(scale, codes, axis)
        new = onnx.numpy_helper.from_array(values.astype(scale.dtype), node.output[0])
        _remove(model, node)
        model.graph.initializer.append(new)
    _drop_unread(model)
    return done


def _symmetric(model: Any) -> bool:
    """Every pair of scale and zero point becomes a signed one around 0 that covers its range."""
    onnx = load("onnx")
    graph = Graph(model)
    done = True
    made: dict[tuple[str, str], tuple[str, str]] = {}
    weights: dict[str, tuple[str, str, str]] = {}
    stale: set[str] = set()
    for node in graph.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        names = (node.input[1], node.input[2] if len(node.input) > 2 else "")
        point = graph.constant(names[1]) if names[1] else None
        if point is None and node.op_type == "DequantizeLinear":
            continue
        scale = graph.constant(names[0])
        if scale is None or (names[1] and point is None):
            done = False
            continue
        if point is None:
            point = np.zeros(scale.shape, np.uint8)
        if point.dtype.name not in ("int8", "uint8"):
            done = done and not point.any()
            continue
        if point.dtype == np.int8 and not point.any():
            continue
        stored = graph.initializers.get(node.input[0])
        if stored is not None and node.op_type == "DequantizeLinear":
            if stored.name not in weights:
                axis = Graph.attribute(node, "axis", 1)
                weights[stored.name] = _signed_weights(model, stored, scale, point, axis)
            node.input[0], *rest = weights[stored.name]
        elif node.op_type == "DequantizeLinear" and node.input[0] not in graph.makers:
            done = False  # a quantized input of the model: others write it
            continue
        else:
            if names not in made:
                wide, zero = _signed_range(scale, point)
                made[names] = (f"{names[0]}_signed_{len(made)}", f"{names[0]}_zero_{len(made)}")
                model.graph.initializer.extend(
                    [
                        onnx.numpy_helper.from_array(wide, made[names][0]),
                        onnx.numpy_helper.from_array(zero, made[names][1]),
                    ]
                )
            rest = list(made[names])
        while len(node.input) < 3:
            node.input.append("")
        node.input[1], node.input[2] = rest
        stale.add(node.output[0])
        if node.op_type == "QuantizeLinear":
            for attribute in [a for a in node.attribute if a.name == "output_dtype"]:
                node.attribute.remove(attribute)
    for value in [one for one in model.graph.value_info if one.name in stale]:
        model.graph.value_info.remove(value)
    _drop_unread(model)
    return done


def _signed_range(scale: np.ndarray, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    info = np.iinfo(point.dtype)
    zero = point.astype(np.int32)
    # 128 of 255 is 0 of 127 with the same steps: nothing is lost.
    is_exact = (point.dtype == np.uint8) & (zero == 128)
    reach = np.maximum(zero - info.min, info.max - zero)
    widened = scale.astype(np.float64) * reach / 127.0
    wide = np.where(is_exact, scale, widened).astype(scale.dtype)
    return wide, np.zeros(point.shape, np.int8)


def _signed_weights(
    model: Any, stored: Any, scale: np.ndarray, point: np.ndarray, axis: int
) -> tuple[str, str, str]:
    onnx = load("onnx")
    codes = onnx.numpy_helper.to_array(stored).astype(np.int32)
    shifted = codes - _along(point, codes, axis).astype(np.int32)
    wide = scale
    if shifted.min(initial=0) < -128 or shifted.max(initial=0) > 127:
        rest = tuple(i for i in range(codes.ndim) if scale.ndim == 0 or i != axis % codes.ndim)
        reach = np.abs(shifted).max(axis=rest).reshape(scale.shape)
        factor = np.maximum(reach, 1) / 127.0
        wide = (scale * factor).astype(scale.dtype)
        shifted = np.rint(shifted / _along(factor, codes, axis)).astype(np.int32)
    names = (f"{stored.name}_signed", f"{stored.name}_signed_scale", f"{stored.name}_signed_zero")
    arrays = (shifted.astype(np.int8), wide, np.zeros(point.shape, np.int8))
    for name, array in zip(names, arrays, strict=True):
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return names


def _along(values: np.ndarray | None, like: np.ndarray, axis: int) -> np.ndarray:
    """Numbers of one axis, in a shape that goes with all of them."""
    if values is None:
        return np.zeros((), np.int32)
    if values.ndim == 0 or values.size == 1:
        return values.reshape(())
    shape = [1] * like.ndim
    shape[axis] = values.size
    return values.reshape(shape)


def _dequantized_tables(model: Any) -> bool:
    """``Mul(Cast(Gather(codes)), Gather(scales))`` becomes ``Gather(DequantizeLinear(codes))``."""
    onnx = load("onnx")
    done = True
    while True:
        graph = Graph(model)
        bare = [
            node for node in graph.nodes
            if node.op_type == "Gather" and node.input[0] in graph.initializers
            and graph.initializers[node.input[0]].data_type == onnx.TensorProto.INT8
        ]  # fmt: skip
        match = next((found for node in bare if (found := _table(graph, node))), None)
        if match is None:
            done = done and not bare
            break
        lookup, cast, scale, times = match
        table = lookup.input[0]
        deq = f"{table}_dequantized"
        if deq not in graph.makers:
            codes = onnx.numpy_helper.to_array(graph.initializers[table])
            stored = onnx.numpy_helper.to_array(graph.initializers[scale.input[0]])
            name = f"{table}_row_scales"
            model.graph.initializer.append(
                onnx.numpy_helper.from_array(stored.reshape(codes.shape[0]), name)
            )
            model.graph.node.insert(
                0, onnx.helper.make_node("DequantizeLinear", [table, name], [deq], deq, axis=0)
            )
        lookup.input[0] = deq
        lookup.output[0] = times.output[0]
        for value in [v for v in model.graph.value_info if v.name == lookup.output[0]]:
            model.graph.value_info.remove(value)
        for node in (cast, scale, times):
            _remove(model, node)
    _drop_unread(model)
    return done


def _table(graph: Graph, lookup: Any) -> tuple[Any, Any, Any, Any] | None:
    """(lookup, cast, lookup of the scales, product), where it is that pattern."""
    casts = graph.readers.get(lookup.output[0], [])
    if len(casts) != 1 or casts[0].op_type != "Cast" or Graph.attribute(lookup, "axis", 0) != 0:
        return None
    products = graph.readers.get(casts[0].output[0], [])
    if len(products) != 1 or products[0].op_type != "Mul":
        return None
    other = next((n for n in products[0].input if n != casts[0].output[0]), "")
    scale = graph.makers.get(other)
    if scale is None or scale.op_type != "Gather" or scale.input[1] != lookup.input[1]:
        return None
    rows = graph.initializers[lookup.input[0]].dims[0]
    stored = graph.initializers.get(scale.input[0])
    if stored is None or list(stored.dims) not in ([rows, 1], [rows]):
        return None
    return lookup, casts[0], scale, products[0]


def _plain_products(model: Any) -> bool:
    """``MatMulNBits`` becomes ``MatMul`` with weights dequantized in blocks, or in full."""
    onnx = load("onnx")
    graph = Graph(model)
    domain = [one for one in model.opset_import if one.domain in ("", "ai.onnx")]
    is_raised = graph.opset >= _BLOCKS_OPSET or (
        graph.opset >= _LEAST_TO_RAISE
        and all(node.op_type != "GroupNormalization" for node in graph.nodes)
    )
    done, has_blocks = True, False
    for node in graph.nodes:
        if node.op_type != "MatMulNBits":
            continue
        unpacked = _unpacked(graph, node)
        if unpacked is None:
            done = False
            continue
        codes, scales, block = unpacked  # (K, N), (K / block, N)
        codes, scales = _positive(codes, scales, block)
        stem = node.name or node.output[0]
        weights = f"{stem}_weights"
        is_blocked = is_raised and codes.shape[0] % block == 0 and _fits(codes)
        if is_blocked:
            has_blocks = True
            stored = onnx.numpy_helper.from_array(codes.astype(np.int8), f"{stem}_codes")
            if _fits(codes, 8):
                stored = onnx.helper.make_tensor(
                    stored.name, onnx.TensorProto.INT4, codes.shape, codes.reshape(-1).tolist()
                )
            model.graph.initializer.extend(
                [stored, onnx.numpy_helper.from_array(scales, f"{stem}_scales")]
            )
            made = [
                onnx.helper.make_node(
                    "DequantizeLinear", [stored.name, f"{stem}_scales"], [weights],
                    f"{stem}_dequantize", axis=0, block_size=block,
                )
            ]  # fmt: skip
        else:
            full = codes * np.repeat(scales, block, axis=0)[: codes.shape[0]]
            model.graph.initializer.append(
                onnx.numpy_helper.from_array(full.astype(scales.dtype), weights)
            )
            made = []
        bias = node.input[5] if len(node.input) > 5 else ""
        product = f"{node.output[0]}_product" if bias else node.output[0]
        made.append(onnx.helper.make_node("MatMul", [node.input[0], weights], [product], stem))
        if bias:
            made.append(
                onnx.helper.make_node("Add", [product, bias], [node.output[0]], f"{stem}_bias")
            )
        place = list(model.graph.node).index(node)
        model.graph.node.remove(node)
        for offset, one in enumerate(made):
            model.graph.node.insert(place + offset, one)
    if has_blocks and domain[0].version < _BLOCKS_OPSET:
        domain[0].version = _BLOCKS_OPSET
    _drop_unread(model)
    return done


def _positive(codes: np.ndarray, scales: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The same numbers with scales above 0, as TensorRT wants; ONNX Runtime gives -128 a sign."""
    each = np.repeat(scales, block, axis=0)[: codes.shape[0]]
    codes = codes * np.sign(each).astype(codes.dtype)
    return codes, np.where(scales == 0, 1, np.abs(scales)).astype(scales.dtype)


def _fits(codes: np.ndarray, half: int = 128) -> bool:
    return bool(codes.min(initial=0) >= -half and codes.max(initial=0) < half)


def _unpacked(graph: Graph, node: Any) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Signed codes (K, N), scales (K / block, N) and the size of a block.

    Layout: ONNX Runtime, "Contrib Operators", MatMulNBits.
    """
    onnx = load("onnx")
    get = Graph.attribute
    bits, block = get(node, "bits"), get(node, "block_size")
    depth, width = get(node, "K"), get(node, "N")
    packed, scale = (graph.initializers.get(name) for name in node.input[1:3])
    if packed is None or scale is None or bits not in (4, 8):
        return None
    if len(node.input) > 4 and node.input[4]:
        return None  # g_idx: rows in another order
    blocks = -(-depth // block)
    data = onnx.numpy_helper.to_array(packed).reshape(width, blocks, -1)
    codes = _nibbles(data) if bits == 4 else data.astype(np.int32)
    points = np.full((width, blocks), 1 << (bits - 1), np.int32)
    if len(node.input) > 3 and node.input[3]:
        stored = graph.constant(node.input[3])
        if stored is None or stored.dtype != np.uint8:
            return None
        stored = stored.reshape(width, -1)
        points = (_nibbles(stored) if bits == 4 else stored.astype(np.int32))[:, :blocks]
        if bits == 4:
            return None if not _is_middle(points) else _finish(codes, points, scale, depth, block)
    return _finish(codes, points, scale, depth, block)


def _is_middle(points: np.ndarray) -> bool:
    """Whether 4-bit codes stay 4-bit ones when their zero points are taken off."""
    return bool((points == 8).all())


def _finish(
    codes: np.ndarray, points: np.ndarray, scale: Any, depth: int, block: int
) -> tuple[np.ndarray, np.ndarray, int]:
    width, blocks = points.shape
    signed = (codes - points[:, :, None]).reshape(width, -1)[:, :depth].T
    scales = load("onnx").numpy_helper.to_array(scale).reshape(width, blocks).T
    return np.ascontiguousarray(signed), np.ascontiguousarray(scales), block


def _nibbles(data: np.ndarray) -> np.ndarray:
    """Two numbers of each byte, the lower half first."""
    return np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1).astype(np.int32)


def _remove(model: Any, node: Any) -> None:
    model.graph.node.remove(node)


def _drop_unread(model: Any) -> None:
    """Initializers that nobody reads any more would only take room."""
    read = {name for node in model.graph.node for name in node.input}
    for node in model.graph.node:
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                read |= {name for inner in graph.node for name in inner.input}
    read |= {value.name for value in model.graph.output}
    for tensor in [one for one in model.graph.initializer if one.name not in read]:
        model.graph.initializer.remove(tensor)


def _drop_unused_domains(model: Any) -> None:
    used = {node.domain for node in model.graph.node} | {"", "ai.onnx"}
    for one in [item for item in model.opset_import if item.domain not in used]:
        model.opset_import.remove(one)


_STEPS: tuple[tuple[tuple[Kind, ...], Callable[[Any], bool]], ...] = (
    (("int32-bias",), _float_biases),
    (("asymmetric-zero-point", "unsigned-quantization"), _symmetric),
    (("bare-int8-table",), _dequantized_tables),
    (("matmul-nbits",), _plain_products),
)
