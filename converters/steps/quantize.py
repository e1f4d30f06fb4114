"""Quantize the weights of an ONNX model to 8 bits with ONNX Runtime's own tools."""

from __future__ import annotations

from pathlib import Path

from converters.libraries import load, quiet
from converters.settings import Int8Settings
from nearfar.errors import ConversionError


def quantize_int8(source: Path, target: Path, work: Path, settings: Int8Settings) -> None:
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
            algorithm = nbits.DefaultWeightOnlyQuantConfig(
                bits=8,
                block_size=settings.block_size,
                is_symmetric=True,
                accuracy_level=settings.accuracy_level,
                op_types_to_quantize=("MatMul",),
            )
            quantizer = nbits.MatMulNBitsQuantizer(model, algo_config=algorithm)
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
