"""INT8 with calibrated activations (QDQ), with ONNX Runtime's own calibrators and quantizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.libraries import load, quiet
from converters.settings import CalibrationSettings, Int8Settings
from converters.steps.shared_weights import part_shared, static_form
from nearfar.errors import ConversionError

#: What is rounded. Additions are left out: in transformers they carry the residual stream and
#: attention masks of -3e38, which have no useful range of 8 bits.
OPERATORS = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "MaxPool", "AveragePool",
    "GlobalAveragePool", "Relu", "Clip",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A graph with known shapes, and the range of each of its activations."""

    model: Any
    ranges: Any


def calibrate(
    source: Path,
    feeds: Sequence[Mapping[str, np.ndarray]],
    work: Path,
    settings: CalibrationSettings,
) -> Calibrated:
    """Run inputs through the model and find the range of every activation.

    Args:
        source: FP32 model.
        feeds: Inputs of one call each; the first `settings.samples` are used.
        work: Folder for the calibrator's own files.
        settings: How ranges are found.

    Raises:
        ConversionError: ONNX Runtime cannot calibrate the model.
    """
    calibration = load("onnxruntime.quantization.calibrate")
    utilities = load("onnxruntime.quantization.quant_utils")
    method = {
        "minmax": calibration.CalibrationMethod.MinMax,
        "entropy": calibration.CalibrationMethod.Entropy,
        "percentile": calibration.CalibrationMethod.Percentile,
    }[settings.method]
    options: dict[str, Any] = {"symmetric": settings.target == "tensorrt"}
    if settings.method == "percentile":
        options["percentile"] = settings.percentile
    augmented = work / "calibrated.onnx"
    try:
        with quiet():
            calibrator = calibration.create_calibrator(
                source,
                list(OPERATORS),
                augmented_model_path=str(augmented),
                calibrate_method=method,
                extra_options=options,
            )
            wanted = {argument.name for argument in calibrator.infer_session.get_inputs()}
            for feed in feeds[: settings.samples]:
                # One at a time: the calibrator keeps all activations of what it is given at once.
                calibrator.collect_data(
                    _Reader({name: feed[name] for name in feed if name in wanted})
                )
            ranges = calibrator.compute_data()
            model = utilities.load_model_with_shape_infer(source)
    except Exception as exc:  # numpy's, protobuf's and ONNX Runtime's errors have no common base
        raise ConversionError(
            f"ONNX Runtime cannot calibrate the model ({exc})",
            fix="Give inputs that the model accepts with --samples, or use --int8 weights",
        ) from exc
    finally:
        augmented.unlink(missing_ok=True)
    return Calibrated(model, ranges)


def quantize_static(
    calibrated: Calibrated, target: Path, settings: Int8Settings, keep: frozenset[str]
) -> None:
    """Write a QDQ model.

    Raises:
        ConversionError: ONNX Runtime cannot quantize the model, or there is nothing to quantize.
    """
    quantizers = load("onnxruntime.quantization.qdq_quantizer")
    kinds = load("onnxruntime.quantization").QuantType
    is_for_tensorrt = settings.calibration.target == "tensorrt"
    model = copy.deepcopy(calibrated.model)
    part_shared(model, static_form(keep, per_channel=settings.per_channel))
    try:
        with quiet():
            quantizer = quantizers.QDQQuantizer(
                model,
                settings.per_channel,
                False,  # reduce_range: CPUs that saturate are found by measuring
                kinds.QInt8,
                kinds.QInt8 if is_for_tensorrt else kinds.QUInt8,
                calibrated.ranges,
                [],
                sorted(keep),
                list(OPERATORS),
                {
                    "ActivationSymmetric": is_for_tensorrt,
                    "WeightSymmetric": True,
                    "QuantizeBias": not is_for_tensorrt,
                    # Products of two activations (attention) lose most and weigh nothing.
                    "MatMulConstBOnly": True,
                },
            )
            quantizer.quantize_model()
            quantizer.model.save_model_to_file(str(target))
    except Exception as exc:  # the quantizer raises plain exceptions of every kind
        raise ConversionError(
            f"ONNX Runtime cannot quantize the model to static INT8 ({exc})",
            fix="Use --int8 weights, or leave the int8 variant out",
        ) from exc


class _Reader:
    """One set of inputs, in the form that calibrators read (`CalibrationDataReader`)."""

    def __init__(self, feed: Mapping[str, np.ndarray]) -> None:
        self._feeds: list[Mapping[str, np.ndarray]] = [feed]

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        return self._feeds.pop() if self._feeds else None
