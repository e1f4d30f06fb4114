"""Look at an ONNX graph for what TensorRT is known to refuse, or to compute differently.

Needs no TensorRT. What is known comes from trials with TensorRT RTX 1.7 and from NVIDIA's pages on
explicit quantization and on the ONNX parser's operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from converters.libraries import load
from converters.tensorrt.findings import Finding, Kind
from converters.tensorrt.graph import Graph, nodes_below

#: NVIDIA, "ONNX Opset Guide" of TensorRT 11; TensorRT 10.3 (JetPack 6) documents opset 20.
_MAX_OPSET, _SAFE_OPSET = 25, 20

_UNSUPPORTED_TYPES = (
    "STRING", "INT16", "UINT16", "UINT32", "UINT64", "COMPLEX64", "COMPLEX128",
)  # fmt: skip
_BY_OPERATOR: dict[str, tuple[Kind, str]] = {
    "DynamicQuantizeLinear": (
        "dynamic-quantization", "activations rounded with ranges found in every call"),
    "MatMulInteger": (
        "dynamic-quantization", "activations rounded with ranges found in every call"),
    "ConvInteger": (
        "dynamic-quantization", "activations rounded with ranges found in every call"),
    "Unique": ("data-dependent-shape", "an output whose size depends on the data: Unique"),
    "SequenceConstruct": ("unsupported-operator", "sequences of tensors"),
    "SplitToSequence": ("unsupported-operator", "sequences of tensors"),
    "StringNormalizer": ("unsupported-operator", "strings"),
    "TfIdfVectorizer": ("unsupported-operator", "strings"),
}  # fmt: skip
_CACHED_ATTENTION = ("GroupQueryAttention", "SparseAttention", "PagedAttention")


def scan(model: Any) -> list[Finding]:
    """What is found in an `onnx.ModelProto`, most telling first."""
    graph = Graph(model)
    found: dict[tuple[Kind, str], list[str]] = {}
    for kind, problem, name in (
        *_quantization(graph), *_operators(graph), *_types(graph), *_opset(graph)
    ):  # fmt: skip
        names = found.setdefault((kind, problem), [])
        if name and name not in names:
            names.append(name)
    return [
        Finding(kind=kind, problem=problem, nodes=tuple(names))
        for (kind, problem), names in found.items()
    ]


_Item = tuple[Kind, str, str]


def _quantization(graph: Graph) -> Iterator[_Item]:
    onnx = load("onnx")
    types = onnx.TensorProto
    for node in graph.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        point = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        stored = graph.initializers.get(node.input[0])
        if stored is not None and stored.data_type == types.INT32:
            yield "int32-bias", "a bias quantized to INT32", node.name
        elif point is not None and point.any():
            yield "asymmetric-zero-point", "zero points other than 0", node.name
        elif (point is not None and point.dtype.name in ("uint8", "uint16")) or (
            # Without a zero point QuantizeLinear makes UINT8.
            point is None and node.op_type == "QuantizeLinear"
            and graph.attribute(node, "output_dtype") in (None, 0, types.UINT8)
        ):  # fmt: skip
            yield (
                "unsigned-quantization",
                "unsigned numbers, which TensorRT reads as signed: the upper half is lost",
                node.name,
            )
    readers = graph.readers
    for name, tensor in graph.initializers.items():
        if tensor.data_type not in (types.INT8, types.INT4, types.UINT4) or not tensor.dims:
            continue
        bad = [node for node in readers.get(name, ()) if node.op_type not in _TAKES_INT8]
        for node in bad:
            yield (
                "bare-int8-table",
                "an INT8 constant that is read by something else than DequantizeLinear",
                node.name or name,
            )


_TAKES_INT8 = (
    "DequantizeLinear", "MatMulInteger", "ConvInteger", "MatMulNBits", "QLinearMatMul",
    "QLinearConv", "QGemm", "GatherBlockQuantized",
)  # fmt: skip


def _operators(graph: Graph) -> Iterator[_Item]:
    for node in nodes_below(graph.model.graph):
        operator = node.op_type
        if operator in _BY_OPERATOR:
            yield (*_BY_OPERATOR[operator], node.name)
        elif operator.startswith("QLinear") or operator in ("QGemm", "QAttention"):
            yield "operator-quantization", "quantized operators instead of QDQ pairs", node.name
        elif operator == "MatMulNBits":
            yield "matmul-nbits", "weights in MatMulNBits", node.name
        elif operator in _CACHED_ATTENTION:
            yield (
                "group-query-attention", "attention with ONNX Runtime's own KV cache", node.name
            )  # fmt: skip
        elif operator == "Attention" and node.domain in ("", "ai.onnx"):
            yield "attention-operator", "the operator Attention (opset 23)", node.name
        elif operator == "If" and node.input[0] in graph.depends_on_inputs:
            yield (
                "control-flow",
                "a branch that depends on an input: "
                + ", ".join(sorted(graph.depends_on_inputs[node.input[0]])),
                node.name,
            )
        elif node.domain not in ("", "ai.onnx", "ai.onnx.ml"):
            yield (
                "contrib-operator",
                f"operators of {node.domain}, which not every TensorRT knows: {operator}",
                node.name,
            )
        elif node.domain == "ai.onnx.ml":
            yield "unsupported-operator", f"an operator of classical models: {operator}", node.name


def _types(graph: Graph) -> Iterator[_Item]:
    types = load("onnx").TensorProto
    for value in (*graph.model.graph.input, *graph.model.graph.output):
        if value.name in graph.initializers:
            continue
        name = types.DataType.Name(value.type.tensor_type.elem_type)
        if name in _UNSUPPORTED_TYPES:
            yield "unsupported-dtype", f"{name}, which TensorRT does not have", value.name
        elif name == "DOUBLE":
            yield "double-precision", "FP64, which TensorRT computes as FP32", value.name


def _opset(graph: Graph) -> Iterator[_Item]:
    version = graph.opset
    if version > _MAX_OPSET:
        yield "opset-too-new", f"opset {version}; TensorRT 11 documents {_MAX_OPSET}", ""
    elif version > _SAFE_OPSET:
        yield "opset-above-20", f"opset {version}; TensorRT 10.3 documents {_SAFE_OPSET}", ""
