"""Plain ONNX Runtime sessions for comparing models; the serving engines live elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.libraries import load, told_by_onnxruntime
from converters.steps.shared_weights import part_all
from nearfar.errors import ConversionError

#: Where exact integer products are asked for, ONNX Runtime 1.31 writes the same widened weight once
#: for each product that reads it, and refuses the second.
_SHARED = "Attempt to replace the existing tensor"


def open_session(path: Path, *, is_unfused: bool = False) -> Any:
    """CPU session on the cores this process may use.

    Args:
        path: The model.
        is_unfused: Compute quantize-dequantize pairs as they are written, in float, and integer
            products with exact sums, rather than with the CPU's fast 8-bit kernels, which saturate
            where it has no VNNI instructions.

    Raises:
        ConversionError: ONNX Runtime refuses the model.
    """
    from nearfar.engines.devices import physical_cores

    ort = load("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = physical_cores()
    options.log_severity_level = 3
    if is_unfused:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        try:
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # ONNX Runtime's exceptions have no common base but Exception
            if not is_unfused or _SHARED not in str(exc):
                raise
            return ort.InferenceSession(_parted(path), options, providers=["CPUExecutionProvider"])
    except Exception as exc:
        raise ConversionError(
            f"ONNX Runtime cannot load the converted model {path.name} "
            f"({told_by_onnxruntime(exc)})",
            fix="Report it with the model's name and the versions in the manifest",
        ) from exc


def _parted(path: Path) -> bytes:
    """The model with an integer weight of its own for every product."""
    model = load("onnx").load(str(path))
    part_all(model)
    return bytes(model.SerializeToString())


def run(session: Any, feeds: Mapping[str, np.ndarray], *, name: str) -> dict[str, np.ndarray]:
    """One call; inputs the model does not have are left out.

    Raises:
        ConversionError: The call failed, or an output has a NaN or infinity.
    """
    wanted = {argument.name for argument in session.get_inputs()}
    names = [argument.name for argument in session.get_outputs()]
    try:
        arrays = session.run(names, {key: feeds[key] for key in feeds if key in wanted})
    except Exception as exc:  # ONNX Runtime's exceptions have no common base but Exception
        raise ConversionError(
            f"Model {name} fails on a valid input ({told_by_onnxruntime(exc)})",
            fix="Check the model in its own framework first",
        ) from exc
    outputs = dict(zip(names, arrays, strict=True))
    for key, array in outputs.items():
        check_finite(np.asarray(array), f"output {key!r} of {name}")
    return outputs


def check_finite(array: np.ndarray, what: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        ConversionError: There is one.
    """
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ConversionError(
            f"There are NaN or infinite numbers in {what}",
            fix="The model is broken, or this precision does not suit it; leave the variant out",
        )
