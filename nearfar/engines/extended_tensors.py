"""Tensors that ONNX Runtime computes with, and its Python API does not take or give as arrays.

numpy has no bfloat16, no 8-bit floats and no 4-bit integers. ONNX Runtime (seen in 1.31) refuses
arrays of ml_dtypes as inputs, and has no arrays for such outputs. It does take the plain bytes with
a type beside them (`OrtValue.ortvalue_from_numpy_with_onnx_type`), and tells where an output lies.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from nearfar.bundle.manifest import TensorSpec
from nearfar.tensors import EXTENDED, PACKED, numpy_of, pack_4bit, unpack_4bit

#: Source: onnx.proto, `TensorProto.DataType`.
_ONNX_TYPE = {
    "BF16": 16, "FP8E4M3FN": 17, "FP8E4M3FNUZ": 18, "FP8E5M2": 19, "FP8E5M2FNUZ": 20,
    "UINT4": 21, "INT4": 22,
}  # fmt: skip


def run(
    session: Any,
    feeds: Mapping[str, np.ndarray],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> list[np.ndarray]:
    """Run a session some of whose tensors have a datatype in `EXTENDED`.

    Such inputs are copied if they are 4-bit or not contiguous; such outputs always.

    Args:
        session: An `onnxruntime.InferenceSession`.
        feeds: Checked against `inputs`.
        inputs: What the session takes.
        outputs: What it gives, in order.
    """
    binding = session.io_binding()
    buffers = []  # ONNX Runtime reads from them and does not hold them
    for spec in inputs:
        array = feeds[spec.name]
        if spec.datatype in EXTENDED:
            buffers.append(_raw(array, spec.datatype))
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
                buffers[-1], _ONNX_TYPE[spec.datatype]
            )
            binding.bind_ortvalue_input(spec.name, value)
        else:
            binding.bind_cpu_input(spec.name, array)
    for spec in outputs:
        binding.bind_output(spec.name, "cpu")
    session.run_with_iobinding(binding)
    return [
        _array(value, spec.datatype) if spec.datatype in EXTENDED else value.numpy()
        for spec, value in zip(outputs, binding.get_outputs(), strict=True)
    ]


def _raw(array: np.ndarray, datatype: str) -> np.ndarray:
    """The bytes as ONNX Runtime keeps them, in an array of the tensor's shape."""
    if datatype not in PACKED:
        return np.asarray(array, order="C").view(f"u{array.itemsize}")
    # The shape is taken from the array, which is therefore twice as long as what is read of it.
    raw = np.zeros(array.shape, np.uint8)
    packed = pack_4bit(array)
    raw.reshape(-1)[: packed.size] = packed
    return raw


def _array(value: Any, datatype: str) -> np.ndarray:
    shape = tuple(value.shape())
    count = math.prod(shape)
    dtype = numpy_of(datatype)
    if not count:
        return np.empty(shape, dtype)
    size_bytes = (count + 1) // 2 if datatype in PACKED else count * dtype.itemsize
    there = (ctypes.c_uint8 * size_bytes).from_address(value.data_ptr())
    raw = np.frombuffer(there, np.uint8).copy()  # the memory is the session's again soon
    if datatype in PACKED:
        raw = unpack_4bit(raw, count)
    array: np.ndarray = raw.view(dtype).reshape(shape)
    return array
