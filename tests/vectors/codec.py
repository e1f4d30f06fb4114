"""Vectors of the wire protocol's encoding; see README.md."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import numpy as np

from nearfar.errors import NearfarError
from nearfar.tensors import datatype_of
from nearfar.wire import messages as wire
from nearfar.wire.codec import MAX_DIMENSIONS, decode, describe, encode
from nearfar.wire.limits import Limits
from tests.vectors import samples

#: Small enough for vectors that exceed them.
LIMITS = {"max_message_bytes": 8192, "max_header_bytes": 2048, "max_tensors": 16}


def accepted() -> dict[str, Any]:
    """Every message and what it is in bytes."""
    vectors = []
    for group in (samples.messages(), samples.numbers(), samples.tensors()):
        for name, message, arrays in group:
            vectors.append(
                {
                    "name": name,
                    "type": type(message).__name__,
                    "header": samples.header_of(message),
                    "tensors": [_tensor(array) for array in arrays],
                    "message": b"".join(encode(message, arrays)).hex(),
                }
            )
    return {"limits": LIMITS, "vectors": vectors}


def _tensor(array: np.ndarray) -> dict[str, Any]:
    fields: dict[str, Any] = {"datatype": datatype_of(array), "shape": list(array.shape)}
    if array.dtype == object:
        fields["elements"] = [element.hex() for element in array.ravel().tolist()]
    else:
        _, data, *_ = encode(_result(describe({"x": array})), [array])
        fields["data"] = bytes(data).hex()
    return fields


def _result(headers: tuple[wire.TensorHeader, ...]) -> wire.Result:
    return wire.Result(
        stream=1, tensors=headers, variant="v", execution_provider="E", queue_ms=0.0, compute_ms=0.0
    )


def refused() -> dict[str, Any]:
    """Bytes that are no message, with the class of reason."""
    vectors = []
    for name, reason, data in _malformed():
        try:
            decode(data, Limits(**LIMITS))
        except NearfarError as error:
            vectors.append(
                {"name": name, "reason": reason, "error": error.code, "message": data.hex()}
            )
        else:
            raise AssertionError(f"accepted: {name}")
    return {"limits": LIMITS, "vectors": vectors}


def _framed(header: Any, *data: bytes) -> bytes:
    packed = header if isinstance(header, bytes) else msgspec.msgpack.encode(header)
    lead = struct.pack("<I", len(packed)) + packed
    return b"".join(part + bytes(-len(part) % 8) for part in (lead, *data))


def _with(*tensors: list[Any], data: tuple[bytes, ...] = ()) -> bytes:
    """A Result with these tensor headers, whatever they say."""
    header = msgspec.msgpack.decode(msgspec.msgpack.encode(_result(())))
    header[header.index([])] = list(tensors)
    return _framed(header, *data)


def _malformed() -> list[tuple[str, str, bytes]]:
    eight = bytes(8)
    ping = b"".join(encode(wire.Ping(id=3)))
    good = _with(["x", "INT32", [2], 8], data=(eight,))
    decode(good, Limits(**LIMITS))  # what the others differ from is right
    cases = [
        ("nothing", "cut", b""),
        ("half a length", "cut", b"\x01\x00"),
        ("length beyond the end", "cut", struct.pack("<I", 9) + eight),
        ("length beyond all limits", "limit", b"\xff\xff\xff\xff" + bytes(60)),
        ("header longer than allowed", "limit", _framed(bytes(LIMITS["max_header_bytes"] + 1))),
        ("message longer than allowed", "limit", ping + bytes(LIMITS["max_message_bytes"])),
        ("no header", "header", struct.pack("<I", 0) + bytes(4)),
        ("header of a reserved byte", "header", _framed(b"\xc1")),
        ("header that is a map", "header", _framed({"a": 1})),
        ("header that is a number", "header", _framed(7)),
        ("header that is an empty array", "header", _framed([])),
        ("tag that is text", "header", _framed(["12", 1])),
        ("tag that nobody has", "header", _framed([99, 1])),
        ("tag below zero", "header", _framed([-1, 1])),
        ("mandatory field missing", "header", _framed([8, 1])),
        ("text where a number belongs", "header", _framed([12, "id"])),
        ("float where an integer belongs", "header", _framed([12, 1.5])),
        ("nil where a number belongs", "header", _framed([12, None])),
        ("text that is not UTF-8", "header", _framed(b"\x94\x08\x01\x00\xa2\xff\xfe")),
        ("surrogate in UTF-8", "header", _framed(b"\x94\x08\x01\x00\xa3\xed\xa0\x80")),
        ("array longer than the header", "header", _framed(b"\x93\x04\x01\xdd\xff\xff\xff\xff")),
        ("text longer than the header", "header", _framed(b"\x94\x08\x01\x00\xdb\xff\xff\xff\xff")),
        ("nesting without end", "header", _framed(b"\x93\x0c\x01" + b"\x91" * 2000)),
        ("two headers", "header", _framed(b"\x92\x0c\x03\x92\x0c\x03")),
        ("byte after the header", "header", _framed(b"\x92\x0c\x03\xc0")),
        ("padding missing", "padding", ping[:-1]),
        ("padding not zero", "padding", ping[:-1] + b"\x01"),
        ("padding of a tensor not zero", "padding",
         _with(["x", "INT8", [1], 1], data=(b"\x01" + b"\x01" * 7,))),
        ("padding of a tensor missing", "padding", _with(["x", "INT8", [1], 1]) + b"\x01"),
        ("tensor missing", "cut", good[:-8]),
        ("tensor cut", "cut", good[:-1]),
        ("second tensor missing", "cut",
         _with(["x", "INT32", [2], 8], ["y", "INT32", [2], 8], data=(eight,))),
        ("bytes after the message", "trailing", ping + eight),
        ("bytes after the last tensor", "trailing", good + eight),
        ("unknown datatype", "tensor", _with(["x", "COMPLEX", [1], 8], data=(eight,))),
        ("datatype in small letters", "tensor", _with(["x", "int32", [2], 8], data=(eight,))),
        ("size smaller than the shape", "tensor",
         _with(["x", "INT32", [2], 4], data=(bytes(4),))),
        ("size larger than the shape", "tensor", _with(["x", "INT32", [1], 8], data=(eight,))),
        ("size without elements", "tensor", _with(["x", "INT32", [0], 8], data=(eight,))),
        ("negative dimensions", "tensor", _with(["x", "INT32", [-1, -2], 8], data=(eight,))),
        ("negative size", "tensor", _with(["x", "BYTES", [0], -8])),
        ("shape beyond the limit", "tensor", _with(["x", "INT8", [2**40], 2**40])),
        ("shape beyond the limit behind a zero", "tensor", _with(["x", "INT8", [0, 2**62], 0])),
        ("shape whose product overflows 64 bits", "tensor",
         _with(["x", "INT8", [2**32, 2**32], 0])),
        ("too many dimensions", "tensor",
         _with(["x", "INT8", [1] * (MAX_DIMENSIONS + 1), 1], data=(b"\x00",))),
        ("too many tensors", "limit",
         _with(*[["x", "INT8", [0], 0]] * (LIMITS["max_tensors"] + 1))),
        ("tensor header without size", "header", _with(["x", "INT32", [2]], data=(eight,))),
        ("more BYTES elements than bytes", "tensor",
         _with(["x", "BYTES", [2**18], 8], data=(eight,))),
        ("BYTES element longer than its tensor", "tensor",
         _with(["x", "BYTES", [1], 8], data=(b"\x05\x00\x00\x00abcd",))),
        ("BYTES element longer than memory", "tensor",
         _with(["x", "BYTES", [1], 8], data=(b"\xff\xff\xff\xffabcd",))),
        ("BYTES tensor that ends inside a length", "tensor",
         _with(["x", "BYTES", [2], 9], data=(b"\x03\x00\x00\x00abc\x00\x00",))),
        ("bytes after the last BYTES element", "tensor",
         _with(["x", "BYTES", [1], 8], data=(b"\x03\x00\x00\x00abc!",))),
        ("data in a BYTES tensor without elements", "tensor",
         _with(["x", "BYTES", [0], 8], data=(eight,))),
        ("BOOL of 2", "tensor", _with(["x", "BOOL", [2], 2], data=(b"\x00\x02",))),
        ("BOOL of 255", "tensor", _with(["x", "BOOL", [2], 2], data=(b"\xff\x01",))),
    ]  # fmt: skip
    cases += [(f"Ping cut to {size} bytes", "cut", ping[:size]) for size in range(1, len(ping) - 1)]
    return cases
