"""Quantize the weights of an ONNX model to 8 bits with ONNX Runtime's own tools."""

from __future__ import annotations

from pathlib import Path

from converters.libraries import load, quiet
from nearfar.errors import ConversionError

#: Weights of one block share a scale. Measured on all-MiniLM-L6-v2 with two AVX-512 VNNI cores:
#: mean cosine to FP32, share of the ten nearest texts kept, median time for 64 tokens against FP32.
#: Blocks of 32 in MatMul: 0.9995, 0.970, 83 %; blocks of 128: 0.9991, 0.970, 64 %; one scale per
#: channel (`quantize_dynamic`): 0.9937, 0.927, 36 %; one per tensor: 0.954, 0.809, 35 %.
_BLOCK_SIZE = 128
#: Activations are rounded to 8 bits inside the kernel too, which is what makes it fast.
_ACCURACY_LEVEL_INT8 = 4


def quantize_int8(source: Path, target: Path, work: Path) -> None:
    """Write an INT8 version: block-wise for matrix products, per tensor for lookup tables.

    Raises:
        ConversionError: ONNX Runtime cannot quantize the model, or there is nothing to quantize.
    """
    onnx = load("onnx")
    load("onnxruntime")
    quantization = load("onnxruntime.quantization")
    nbits = load("onnxruntime.quantization.matmul_nbits_quantizer")
    tables = work / f"{target.stem}-tables.onnx"
    try:
        with quiet():
            quantization.quantize_dynamic(
                str(source),
                str(tables),
                op_types_to_quantize=["Gather"],
                weight_type=quantization.QuantType.QInt8,
            )
            model = onnx.load(str(tables))
            settings = nbits.DefaultWeightOnlyQuantConfig(
                bits=8,
                block_size=_BLOCK_SIZE,
                is_symmetric=True,
                accuracy_level=_ACCURACY_LEVEL_INT8,
                op_types_to_quantize=("MatMul",),
            )
            quantizer = nbits.MatMulNBitsQuantizer(model, algo_config=settings)
            quantizer.process()
            quantizer.model.save_model_to_file(str(target))
            kinds = {node.op_type for node in onnx.load(str(target)).graph.node}
    except Exception as exc:  # the quantizers raise plain exceptions of every kind
        raise ConversionError(
            f"ONNX Runtime cannot quantize the model to INT8 ({exc})",
            fix="Leave the int8 variant out: --variants fp32",
        ) from exc
    finally:
        tables.unlink(missing_ok=True)
    if not kinds & {"MatMulNBits", "DequantizeLinear"}:
        raise ConversionError(
            "The model has no matrix product or table with constant weights to quantize",
            fix="Leave the int8 variant out: --variants fp32",
        )
