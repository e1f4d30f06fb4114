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
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


def datatype_of(array: np.ndarray) -> str:
    """Open Inference Protocol name of an array's dtype.

    Raises:
        InvalidInput: The dtype has no name on the wire (complex, datetime, structured …).
    """
    name = _NAME_OF.get(array.dtype)
    if name is None:
        if array.dtype.kind in "SU":
            return "BYTES"
        raise InvalidInput(
            f"Arrays of dtype {array.dtype} cannot be sent to a model",
            field="inputs",
            fix="Convert to one of " + ", ".join(str(d) for d in NUMPY_OF.values()),
        )
    return name
