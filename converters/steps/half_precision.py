"""FP16 typed ONNX: what TensorRT, strongly typed, and CUDA run as it is written."""

from __future__ import annotations

from pathlib import Path

from converters.libraries import load, quiet
from nearfar.errors import ConversionError


def to_half(source: Path, target: Path) -> None:
    """Write a model whose floats are FP16; inputs and outputs stay as they are.

    ONNX Runtime's own converter. Constants beyond FP16's range become its largest numbers, so masks
    of -3e38 still mask; whether the rest holds is for the verifying step to say.

    Raises:
        ConversionError: The model cannot be converted.
    """
    onnx = load("onnx")
    float16 = load("onnxruntime.transformers.float16")
    try:
        with quiet():
            model = float16.convert_float_to_float16(onnx.load(str(source)), keep_io_types=True)
            onnx.save(model, str(target))
    except Exception as exc:  # the converter raises plain exceptions of every kind
        raise ConversionError(
            f"The model cannot be written with FP16 ({exc})",
            fix="Take the variant trt-fp32, or leave it out",
        ) from exc
