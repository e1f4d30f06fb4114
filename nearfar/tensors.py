"""Names of element types: Open Inference Protocol, numpy and ONNX, one table.

Source: Open Inference Protocol, "Tensor Data Types"; ONNX Runtime type strings.
"""

from __future__ import annotations

import numpy as np

from nearfar.errors import InvalidInput

#: Open Inference Protocol name -> numpy dtype. BYTES is an array of `bytes` objects.
NUMPY_OF: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}

_NAME_OF = {dtype: name for name, dtype in NUMPY_OF.items()}

#: Protocol name -> name of the type in the package ml_dtypes, where numpy has none of its own.
EXTENDED = {
    "BF16": "bfloat16",
    "FP8E4M3FN": "float8_e4m3fn",
    "FP8E4M3FNUZ": "float8_e4m3fnuz",
    "FP8E5M2": "float8_e5m2",
    "FP8E5M2FNUZ": "float8_e5m2fnuz",
    "INT4": "int4",
    "UINT4": "uint4",
}
_EXTENDED_NAME_OF = {name: datatype for datatype, name in EXTENDED.items()}

#: Two elements in a byte, in files and on the wire; ml_dtypes keeps one in a byte.
PACKED = frozenset({"INT4", "UINT4"})

#: Every name that a tensor's datatype may have.
DATATYPES = frozenset(NUMPY_OF) | frozenset(EXTENDED)

#: ONNX Runtime's type string -> Open Inference Protocol name.
OF_ONNXRUNTIME = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(uint4)": "UINT4",
    "tensor(int4)": "INT4",
    "tensor(bfloat16)": "BF16",
    "tensor(float8e4m3fn)": "FP8E4M3FN",
    "tensor(float8e4m3fnuz)": "FP8E4M3FNUZ",
    "tensor(float8e5m2)": "FP8E5M2",
    "tensor(float8e5m2fnuz)": "FP8E5M2FNUZ",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


def numpy_of(datatype: str) -> np.dtype[np.generic]:
    """The dtype whose arrays hold a datatype.

    Args:
        datatype: One of `DATATYPES`.

    Raises:
        InvalidInput: It needs the package ml_dtypes, which is not installed.
    """
    dtype = NUMPY_OF.get(datatype)
    if dtype is not None:
        return dtype
    try:
        import ml_dtypes
    except ImportError as exc:
        raise InvalidInput(
            f"Tensors of datatype {datatype} need the package ml_dtypes, which is not installed",
            field="inputs",
            fix="pip install ml_dtypes",
        ) from exc
    found: np.dtype[np.generic] = np.dtype(getattr(ml_dtypes, EXTENDED[datatype]))
    return found


def spell(datatype: str) -> str:
    """The dtype in Python, for messages: ``numpy.float32``, ``ml_dtypes.int4``."""
    if datatype in EXTENDED:
        return f"ml_dtypes.{EXTENDED[datatype]}"
    return "object" if datatype == "BYTES" else f"numpy.{NUMPY_OF[datatype]}"


def pack_4bit(array: np.ndarray) -> np.ndarray:
    """Elements of an INT4 or UINT4 array, two in a byte, the first in the low half, as ONNX does.

    Returns:
        A new array of uint8; the last high half is 0 when the number of elements is odd.
    """
    halves = array.reshape(-1).view(np.uint8)
    packed = halves[0::2] & 0x0F
    packed[: halves.size // 2] |= halves[1::2] << 4
    return packed


def unpack_4bit(packed: np.ndarray, count: int) -> np.ndarray:
    """The other way: a new array of uint8 with one element in the low half of each byte."""
    halves = np.empty(2 * packed.size, np.uint8)
    halves[0::2] = packed & 0x0F
    halves[1::2] = packed >> 4
    return halves[:count]


def datatype_of(array: np.ndarray) -> str:
    """Open Inference Protocol name of an array's dtype.

    Raises:
        InvalidInput: The dtype has no name on the wire (complex, datetime, structured …).
    """
    name = _NAME_OF.get(array.dtype)
    if name is None:
        if array.dtype.kind in "SU":
            return "BYTES"
        if array.dtype.type.__module__ == "ml_dtypes" and array.dtype.isnative:
            name = _EXTENDED_NAME_OF.get(array.dtype.name)
            if name is not None:
                return name
        raise InvalidInput(
            f"Arrays of dtype {array.dtype} cannot be sent to a model",
            field="inputs",
            fix="Convert to one of "
            + ", ".join((*map(str, NUMPY_OF.values()), *_EXTENDED_NAME_OF)),
        )
    return name
