"""How a variant was made, in words for people."""

from __future__ import annotations

from converters.settings import Settings

_INT4 = {
    "auto": "the file's own blocks where it has them, else k-quant with some layers in 8 bits",
    "carry": "the file's own blocks",
    "rtn": "rounded to the nearest",
    "awq": "scaled by AWQ, then rounded to the nearest",
    "k_quant": "k-quant",
    "k_quant_last": "k-quant, the last matrix in 8 bits",
    "k_quant_mixed": "k-quant, some layers in 8 bits",
}

_OTHERS = {"fp16": "weights in 16 bits", "pruned": "narrower layers, in 32 bits"}


def method_of(precision: str, settings: Settings) -> str:
    """How a variant of that precision is made with these settings."""
    if precision == "int4":
        return f"INT4, {_INT4[settings.int4.algorithm]}"
    if precision.startswith("trt-"):
        return f"{precision.removeprefix('trt-').upper()}, typed for TensorRT"
    if precision in _OTHERS:
        return _OTHERS[precision]
    if precision != "int8":
        return f"{precision.upper()}, not compressed"
    int8 = settings.int8
    if int8.method == "weights":
        text = f"INT8 weights in blocks of {int8.block_size}"
        text += "" if int8.tables == "row" else ", one scale for each table"
    elif int8.method == "dynamic":
        text = "INT8, activations rounded in every call"
    else:
        text = f"INT8, activations calibrated ({int8.calibration.method})"
        text += " for TensorRT" if int8.calibration.target == "tensorrt" else ""
    if int8.method != "weights" and not int8.per_channel:
        text += ", one scale for each weight"
    if int8.keep:
        count = len(int8.keep)
        text += f", {count} node{'s' if count > 1 else ''} in full precision"
    return text
