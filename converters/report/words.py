"""How a variant was made, in words for people."""

from __future__ import annotations

from collections.abc import Sequence

from converters.report.evidence import LayerErrors
from converters.settings import Settings

_INT4 = {
    "auto": "the file's own blocks where it has them, else k-quant with some layers in 8 bits",
    "carry": "the file's own blocks",
    "rtn": "rounded to the nearest",
    "awq": "scaled by AWQ, then rounded to the nearest",
    "gptq": "codes chosen by GPTQ",
    "k_quant": "k-quant",
    "k_quant_last": "k-quant, the last matrix in 8 bits",
    "k_quant_mixed": "k-quant, some layers in 8 bits",
}

_PLAIN = {
    "fp32": "FP32",
    "fp16": "FP16",
    "int8": "INT8 weights in blocks of 32",
    "int4": "INT4 weights in blocks of 32",
}

_OTHERS = {
    "fp16": "weights in 16 bits",
    "bf16": "weights in 16 bits (BF16)",
    "pruned": "narrower layers, in 32 bits",
    "slim": "sliced, in 32 bits",
}


def method_of(precision: str, settings: Settings) -> str:
    """How a variant of that precision is made with these settings."""
    text = _method_of(precision, settings)
    is_sliced = settings.slim.is_wished and precision not in ("slim", "fp32")
    return f"sliced, {text}" if is_sliced else text


def _method_of(precision: str, settings: Settings) -> str:
    if precision == "int4":
        int4 = settings.int4
        text = f"INT4, {_INT4[int4.algorithm]}"
        sizes = {"rtn": int4.block_size, "gptq": int4.gptq.block_size}
        size = sizes.get(int4.algorithm)
        text += f" in blocks of {size}" if size is not None else ""
        return text + (", without zero points" if int4.symmetric else "") + _kept(int4.keep)
    if precision.startswith("onnx-"):
        return f"{_PLAIN[precision.removeprefix('onnx-')]}, a plain graph with its KV cache"
    if precision.startswith("trt-"):
        return f"{precision.removeprefix('trt-').upper()}, typed for TensorRT"
    if precision in _OTHERS:
        return _OTHERS[precision]
    if precision != "int8":
        return f"{precision.upper()}, not compressed"
    int8 = settings.int8
    if int8.method == "weights":
        text = f"INT8 weights in blocks of {int8.block_size}"
        text += "" if int8.symmetric else " with zero points"
        text += "" if int8.tables == "row" else ", one scale for each table"
    elif int8.method == "dynamic":
        text = "INT8, activations rounded in every call"
    else:
        text = f"INT8, activations calibrated ({int8.calibration.method})"
        text += " for TensorRT" if int8.calibration.target == "tensorrt" else ""
    if int8.method != "weights" and not int8.per_channel:
        text += ", one scale for each weight"
    text += f", smoothed (alpha {int8.smooth:g})" if int8.smooth is not None else ""
    return text + _kept(int8.keep)


def _kept(nodes: Sequence[str]) -> str:
    plural = "s" if len(nodes) > 1 else ""
    return f", {len(nodes)} node{plural} in full precision" if nodes else ""


#: Layers that are named. More are in the report.
_NAMED = 3
#: What does less than this share of the damage is not worth keeping.
_LEAST_SHARE = 0.05
#: Precisions whose recipes can leave nodes alone.
_KEEP = {"int8": "int8.keep", "int4": "int4.keep", "trt-int8": "tensorrt.keep"}


def damage_of(found: LayerErrors) -> str:
    """Which layers make the error: ``the damage comes from node_7 (61 %) and node_9 (20 %)``."""
    named = [f"{node} ({part:.0%})" for node, part in _worst(found)]
    if not named:
        return "the damage comes from many layers alike"
    *first, last = named
    return f"the damage comes from {', '.join(first)}{' and ' if first else ''}{last}"


def mending_of(found: LayerErrors, precision: str, kept: Sequence[str] = ()) -> str:
    """What to do about it, to follow "Try"; empty where a recipe cannot do it.

    Args:
        found: The layers.
        precision: Of the variant.
        kept: Nodes that stay in full precision already.
    """
    setting = _KEEP.get(precision)
    names = [*kept, *(node for node, _ in _worst(found) if node not in kept)]
    if setting is None or len(names) == len(kept):
        return ""
    listed = ", ".join(f'"{name}"' for name in names)
    return f"keeping them in higher precision, in a recipe: {setting} = [{listed}]"


def _worst(found: LayerErrors) -> list[tuple[str, float]]:
    total = found.error or sum(one.error for one in found.errors) or 1.0
    shares = [(one.node, one.error / total) for one in found.errors[:_NAMED]]
    return [(node, part) for node, part in shares if part >= _LEAST_SHARE]
