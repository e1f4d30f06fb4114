"""What stands between a graph and TensorRT, in words that say what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

import msgspec

from nearfar.engines.tensorrt_build import BuildResult, RawError

Kind = Literal[
    "asymmetric-zero-point",
    "unsigned-quantization",
    "int32-bias",
    "bare-int8-table",
    "matmul-nbits",
    "group-query-attention",
    "attention-operator",
    "contrib-operator",
    "dynamic-quantization",
    "operator-quantization",
    "unsupported-operator",
    "unsupported-dtype",
    "double-precision",
    "data-dependent-shape",
    "control-flow",
    "shape-input",
    "missing-range",
    "impossible-range",
    "opset-too-new",
    "opset-above-20",
    "out-of-memory",
    "library",
    "crash",
    "timeout",
    "refused",
]

#: How many nodes a line names.
_MAX_NAMES = 3

#: What to do; the same words whether the graph was looked at or TensorRT refused it.
FIXES: dict[Kind, str] = {
    "asymmetric-zero-point": (
        'Calibrate for TensorRT (calibration.target = "tensorrt"), or let `nearfar tensorrt fix` '
        "widen the ranges to symmetric ones"
    ),
    "unsigned-quantization": (
        'Calibrate for TensorRT (calibration.target = "tensorrt"), or let `nearfar tensorrt fix` '
        "make them signed"
    ),
    "int32-bias": (
        'Quantize with QuantizeBias=False (calibration.target = "tensorrt"), or let `nearfar '
        "tensorrt fix` write the bias as floats"
    ),
    "bare-int8-table": "Let `nearfar tensorrt fix` dequantize the table before it is looked up",
    "matmul-nbits": (
        "Take a trt-fp16 or trt-int8 variant, or let `nearfar tensorrt fix` write the weights as "
        "DequantizeLinear and MatMul"
    ),
    "group-query-attention": (
        "The model is built for onnxruntime-genai; run it there, or convert it with --variants "
        "onnx-fp16, a plain graph with its KV cache as inputs and outputs"
    ),
    "attention-operator": "Export with opset 20, where attention is written as matrix products",
    "contrib-operator": (
        "Make the model without ONNX Runtime's own fusions: convert from the source, variant "
        "trt-fp16 or fp32"
    ),
    "dynamic-quantization": (
        "TensorRT rounds with ranges known beforehand: --int8 static with calibration.target = "
        '"tensorrt", or the variant trt-int8'
    ),
    "operator-quantization": (
        "Quantize to QDQ pairs instead of QLinear operators: --int8 static, or the variant trt-int8"
    ),
    "unsupported-operator": (
        "Express that part with other operators, or run the model with ONNX Runtime, which leaves "
        "it to CUDA or the CPU"
    ),
    "unsupported-dtype": (
        "Give the model inputs of FP32, FP16, INT64, INT32, INT8, UINT8 or BOOL; convert strings "
        "and other numbers before"
    ),
    "double-precision": "Convert the model to FP32 and compare; TensorRT has no FP64",
    "data-dependent-shape": (
        "Give the output a fixed size (a mask instead of NonZero, a fixed k for TopK), or run the "
        "model with ONNX Runtime"
    ),
    "control-flow": (
        "State the input that decides it as fixed: tensorrt.fixed in the recipe, or --fixed "
        "NAME=VALUE, so that one branch remains"
    ),
    "shape-input": (
        "State the input as fixed: tensorrt.fixed in the recipe, or --fixed NAME=VALUE"
    ),
    "missing-range": "State its sizes: tensorrt.axes in the recipe, or --axis NAME=MIN,OPT,MAX",
    "impossible-range": (
        "State sizes that the model can have: tensorrt.axes in the recipe, or --axis "
        "NAME=MIN,OPT,MAX"
    ),
    "opset-too-new": "Export with opset 20",
    "opset-above-20": "Export with opset 20 for devices with JetPack 6 (TensorRT 10.3)",
    "out-of-memory": "Build where more memory is free, or with smaller largest sizes",
    "library": (
        "Install it into an environment of its own (pip install tensorrt-rtx) and name its Python "
        "in NEARFAR_TENSORRT_PYTHON"
    ),
    "crash": "Report it with the model; other releases may build it",
    "timeout": "Allow more time with --timeout, or make the model smaller",
    "refused": "See what it says; the node's operator may have another form that it takes",
}

#: Some graphs with these are taken; only a trial tells.
_PERHAPS: frozenset[Kind] = frozenset(
    {"double-precision", "opset-above-20", "contrib-operator", "control-flow"}
)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing found.

    Attributes:
        kind: What kind.
        problem: What is the matter, in words, without the final dot.
        nodes: Names of the nodes (or tensors) it is about.
        is_refusal: Whether TensorRT said so, not only the look at the graph.
        is_fixed: Whether the graph was changed so that it is gone.
    """

    kind: Kind
    problem: str
    nodes: tuple[str, ...] = ()
    is_refusal: bool = False
    is_fixed: bool = False

    @property
    def is_fatal(self) -> bool:
        """Whether TensorRT does not take such a graph, or computes something else from it."""
        return not self.is_fixed and (self.is_refusal or self.kind not in _PERHAPS)

    @property
    def fix(self) -> str:
        return FIXES[self.kind]

    def __str__(self) -> str:
        named = ", ".join(self.nodes[:_MAX_NAMES])
        more = len(self.nodes) - _MAX_NAMES
        where = f" ({named}{f' and {more} more' if more > 0 else ''})" if named else ""
        return f"{self.kind}: {self.problem}{where}{'; fixed' if self.is_fixed else ''}"


#: First match wins. Words are those of TensorRT RTX 1.7 and the open ONNX parser of TensorRT 10;
#: matched against "operator | text".
_WORDS: tuple[tuple[str, Kind, str], ...] = (
    (r"[Nn]on-?zero zero point|shiftIsAllZeros|zero point must be zero", "asymmetric-zero-point",
     "zero points other than 0"),
    (r"^DequantizeLinear \|.*type Int32", "int32-bias", "a bias quantized to INT32"),
    (r"Quantized constant .* only allowed before DQ", "bare-int8-table",
     "an INT8 constant that is read by something else than DequantizeLinear"),
    (r"^MatMulNBits \|", "matmul-nbits", "weights in MatMulNBits, which it takes with FP16 "
     "activations and a plugin only"),
    (r"^(GroupQueryAttention|SparseAttention|PagedAttention) \|", "group-query-attention",
     "attention with ONNX Runtime's own KV cache"),
    (r"Attention operation was not supported|composite_op->is_decomposable", "attention-operator",
     "the operator Attention (opset 23) in a form without a kernel"),
    (r"^(DynamicQuantizeLinear|MatMulInteger|ConvInteger|DynamicQuantizeMatMul) \|",
     "dynamic-quantization", "activations rounded with ranges found in every call"),
    (r"^(QLinear\w+) \|", "operator-quantization", "quantized operators instead of QDQ pairs"),
    (r"^(NonZero|Unique|Compress|NonMaxSuppression) \|", "data-dependent-shape",
     "an output whose size depends on the data"),
    (r"convertDtype|[Uu]nsupported ONNX data type|ONNX da?t[ae] type", "unsupported-dtype",
     "a type of numbers that TensorRT does not have"),
    (r"graphScope|ScopeType|^(If|Loop|Scan) \|", "control-flow",
     "a branch or loop that depends on an input"),
    (r"missing values for shape input|shape input .* has no range", "shape-input",
     "an input whose value decides about sizes"),
    (r"has no range of sizes|Dynamic dimensions required for input", "missing-range",
     "an input with a free size and no range for it"),
    (r"Shape Error|reshape of empty|dimensions? .*(must be|is) (positive|non-?negative)"
     r"|violate shape constraints",
     "impossible-range", "a size within the ranges that the model cannot have"),
    (r"[Oo]ut ?of ?memory|[Ii]nsufficient memory|std::bad_alloc", "out-of-memory",
     "there is not enough memory"),
    (r"[Pp]lugin not found|No importer registered|Unsupported operator|UNSUPPORTED_NODE: false"
     r"|\| false\s*$", "unsupported-operator", "an operator that TensorRT does not have"),
)  # fmt: skip

#: What a machine without a GPU adds to every error.
_NO_DRIVER = re.compile(r"\[[^\]\n]*\] Error Code 1: Cuda Runtime \(.*cudaError 35:[^\n]*")

_PREFIX = re.compile(r"^IBuilder::\w+: Error Code \d+: ")


def explain(result: BuildResult) -> list[Finding]:
    """TensorRT's refusal as findings, one for each kind and operator; none when it built."""
    if result.is_built:
        return []
    if result.stage in ("library", "crash", "timeout"):
        words = "; ".join(error.text for error in result.errors)
        kind: Kind = "library" if result.stage == "library" else (
            "crash" if result.stage == "crash" else "timeout"
        )  # fmt: skip
        return [Finding(kind=kind, problem=_short(words), is_refusal=True)]
    grouped: dict[tuple[Kind, str], list[str]] = {}
    for error in result.errors:
        kind, problem = _meaning(error)
        names = grouped.setdefault((kind, problem), [])
        if error.node and error.node not in names:
            names.append(error.node)
    found = [
        Finding(kind=kind, problem=problem, nodes=tuple(names), is_refusal=True)
        for (kind, problem), names in grouped.items()
    ]
    telling = [one for one in found if one.kind != "refused"]
    return telling or found[:3]


def _meaning(error: RawError) -> tuple[Kind, str]:
    text = _NO_DRIVER.sub("", error.text)
    looked_at = f"{error.operator} | {text}"
    for pattern, kind, problem in _WORDS:
        if re.search(pattern, looked_at, re.DOTALL):
            if kind in ("unsupported-operator", "data-dependent-shape") and error.operator:
                return kind, f"{problem}: {error.operator}"
            if kind in ("missing-range", "shape-input", "impossible-range"):
                return kind, f"{problem}: {_short(text)}"
            return kind, problem
    words = _short(text)
    return "refused", f"{error.operator}: {words}" if error.operator else words


def _short(text: str) -> str:
    """The first telling line, without the final dot."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return _PREFIX.sub("", lines[0] if lines else "it does not say why")[:300].rstrip(". ")


def merged(*groups: Iterable[Finding]) -> list[Finding]:
    """Findings of several sources, the same kind once: the first one that names it stays."""
    kept: list[Finding] = []
    seen: set[Kind] = set()
    for group in groups:
        fresh = [one for one in group if one.kind not in seen]
        kept += fresh
        seen |= {one.kind for one in fresh}
    return kept
