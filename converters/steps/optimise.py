"""Make an ONNX graph smaller without changing what it computes."""

from __future__ import annotations

from pathlib import Path

from converters.libraries import load, quiet
from nearfar.errors import ConversionError


def slim(source: Path, target: Path) -> bool:
    """Fold constants and drop dead nodes with onnxslim.

    Returns:
        Whether `target` was written: `False` when onnxslim cannot handle the model, which then
        stays as it is. Whether the result computes the same is for the verifying step to say.

    Raises:
        ConversionError: onnxslim is not installed.
    """
    onnx = load("onnx")
    onnxslim = load("onnxslim")
    try:
        with quiet():
            model = onnxslim.slim(str(source))
            onnx.save(model, str(target))
    except Exception as exc:  # an optimiser's failure is no reason to fail: the model is fine
        if isinstance(exc, (ConversionError, MemoryError)):
            raise
        target.unlink(missing_ok=True)
        return False
    return True
