"""Messages to bytes and back. Layout: docs/reference/wire.md, "One message".

Encoding copies no tensor that is C-contiguous already; decoding copies none. Only BYTES, INT4 and
UINT4, which lie otherwise in memory, are copied both ways.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from nearfar.errors import InvalidInput, LocalProtocolError, RemoteProtocolError
from nearfar.tensors import (
    DATATYPES,
    NUMPY_OF,
    PACKED,
    datatype_of,
    numpy_of,
    pack_4bit,
    unpack_4bit,
)
from nearfar.wire.limits import Limits
from nearfar.wire.messages import Infer, Message, Result, TensorHeader

if sys.byteorder != "little":  # tensors travel as they lie in memory
    raise ImportError("nearfar runs on little-endian machines only")

ALIGNMENT_BYTES = 8
#: Fits every shape that numpy 1.26 can hold.
MAX_DIMENSIONS = 32

_LENGTH = struct.Struct("<I")
#: A copy of a shorter tensor costs less than a view of it.
_SHORT_BYTES = 4096
#: Datatypes whose bytes on the wire are the array's own, whatever they are: nearly all.
_PLAIN = frozenset(NUMPY_OF) - PACKED - {"BYTES", "BOOL"}
_PADDINGS = tuple(b"\x00" * size for size in range(ALIGNMENT_BYTES))
_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def describe(arrays: Mapping[str, np.ndarray]) -> tuple[TensorHeader, ...]:
    """Headers for named arrays, in their order; goes into `Infer.tensors` or `Result.tensors`.

    Raises:
        InvalidInput: A dtype has no name on the wire, or a BYTES element is neither bytes nor str.
    """
    headers = []
    for name, array in arrays.items():
        datatype = datatype_of(array)
        is_plain = datatype in _PLAIN
        size_bytes = array.nbytes if is_plain else _size_bytes(name, datatype, array)
        headers.append(TensorHeader(name, datatype, array.shape, size_bytes))
    return tuple(headers)


def encode(message: Message, tensors: Sequence[np.ndarray] = ()) -> list[bytes | memoryview]:
    """One message as buffers to be joined; those of tensors are views, valid while they are.

    Args:
        message: The header. Its `tensors`, if it has any, must describe `tensors` exactly.
        tensors: Arrays of any memory order.

    Raises:
        LocalProtocolError: Header and tensors differ, or a value does not fit msgpack.
        InvalidInput: A tensor's dtype or element cannot be sent.
    """
    kind = type(message)
    headers = message.tensors if kind is Infer or kind is Result else ()  # type: ignore[union-attr]
    if len(headers) != len(tensors):
        raise LocalProtocolError(
            f"{type(message).__name__} describes {len(headers)} tensors but has {len(tensors)}",
            field="tensors",
            fix="Build the headers with nearfar.wire.codec.describe",
        )
    try:
        packed = _ENCODER.encode(message)
    except (UnicodeEncodeError, OverflowError, TypeError, RecursionError) as exc:
        # The text of the exception may quote a prompt, so only its type is told.
        raise LocalProtocolError(
            f"{type(message).__name__} cannot be encoded ({type(exc).__name__})",
            fix="Text must be valid Unicode without lone surrogates; integers must fit 64 bits",
        ) from None
    size_bytes = _LENGTH.size + len(packed)
    lead = _LENGTH.pack(len(packed)) + packed + _PADDINGS[-size_bytes % ALIGNMENT_BYTES]
    parts: list[bytes | memoryview] = [lead]
    for header, array in zip(headers, tensors, strict=True):
        datatype = datatype_of(array)
        if datatype in _PLAIN and array.nbytes <= _SHORT_BYTES:
            data: bytes | memoryview = array.tobytes()
        else:
            data = _data_of(header.name, datatype, array)
        size_bytes = len(data)
        if (
            header.datatype != datatype
            or header.shape != array.shape
            or header.size_bytes != size_bytes
        ):
            raise LocalProtocolError(
                f"Tensor {header.name} is {datatype} {array.shape}, {size_bytes} bytes, "
                f"but its header says {header.datatype} {header.shape}, {header.size_bytes} bytes",
                field=header.name,
                fix="Build the headers with nearfar.wire.codec.describe",
            )
        parts.append(data)
        if padding := _PADDINGS[-size_bytes % ALIGNMENT_BYTES]:
            parts.append(padding)
    return parts


def decode(
    data: bytes | bytearray | memoryview, limits: Limits
) -> tuple[Message, tuple[np.ndarray, ...]]:
    """One message and its tensors, read-only; all but BYTES are views that keep `data` alive.

    Args:
        data: Exactly one message.
        limits: Checked before memory is allocated.

    Raises:
        RemoteProtocolError: The bytes are not a message, or exceed the limits.
    """
    view = memoryview(data)
    total = len(view)
    if total > limits.max_message_bytes:
        raise _bad(f"it has {total} bytes and {limits.max_message_bytes} are allowed")
    if total < _LENGTH.size:
        raise _bad("it is shorter than a length")
    (header_bytes,) = _LENGTH.unpack_from(view)
    if header_bytes > limits.max_header_bytes:
        raise _bad(f"its header has {header_bytes} bytes, {limits.max_header_bytes} are allowed")
    end = _LENGTH.size + header_bytes
    if end > total:
        raise _bad("it ends inside its header")
    try:
        message = _DECODER.decode(view[_LENGTH.size : end])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise _bad(f"its header does not parse ({type(exc).__name__})") from None
    position = _skip_padding(view, end)
    kind = type(message)
    tensors = []
    if kind is Infer or kind is Result:
        headers: tuple[TensorHeader, ...] = message.tensors  # type: ignore[union-attr]
        if len(headers) > limits.max_tensors:
            raise _bad(f"it has {len(headers)} tensors and {limits.max_tensors} are allowed")
        for header in headers:
            end = position + header.size_bytes
            if end > total:
                raise _bad("it ends inside a tensor")
            data_of = view[position:end]
            array = _plain_array(header, data_of)
            if array is None:
                dtype = NUMPY_OF.get(header.datatype) or _dtype_of(header.datatype)
                array = _array(header, dtype, _check(header, dtype, limits), data_of)
            tensors.append(array)
            position = _skip_padding(view, end) if end % ALIGNMENT_BYTES else end
    if position != total:
        raise _bad("bytes follow its last tensor")
    return message, tuple(tensors)


def named(headers: Sequence[TensorHeader], tensors: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Decoded tensors by name.

    Raises:
        InvalidInput: One of them is of a datatype that this installation has no dtype for.
    """
    for header in headers:
        if header.datatype not in NUMPY_OF:
            numpy_of(header.datatype)
    return {header.name: tensor for header, tensor in zip(headers, tensors, strict=True)}


def tensor_headers(message: Message) -> tuple[TensorHeader, ...]:
    """The tensors a message announces; none for most messages."""
    return message.tensors if isinstance(message, (Infer, Result)) else ()


def _skip_padding(view: memoryview, position: int) -> int:
    missing = -position % ALIGNMENT_BYTES
    if not missing:
        return position
    end = position + missing
    # Zeros are demanded so that a message has one form and hides nothing.
    if view[position:end] != _PADDINGS[missing]:
        raise _bad("its padding is missing or not zero")
    return end


def _elements(name: str, array: np.ndarray) -> list[bytes]:
    elements = []
    for element in array.ravel().tolist():
        if isinstance(element, str):
            try:
                element = element.encode()
            except UnicodeEncodeError:
                raise _not_bytes(name, "str that is not valid Unicode") from None
        elif not isinstance(element, bytes):
            raise _not_bytes(name, type(element).__name__)
        elements.append(element)
    return elements


def _not_bytes(name: str, what: str) -> InvalidInput:
    return InvalidInput(
        f"Tensor {name} holds a {what} where bytes belong",
        field=name,
        fix="Give bytes or str elements, or an array of a number dtype",
    )


def _size_bytes(name: str, datatype: str, array: np.ndarray) -> int:
    if datatype in PACKED:
        return (array.size + 1) // 2
    if datatype != "BYTES":
        return array.nbytes
    return sum(_LENGTH.size + len(element) for element in _elements(name, array))


def _data_of(name: str, datatype: str, array: np.ndarray) -> bytes | memoryview:
    if datatype == "BYTES":
        return b"".join(
            piece
            for element in _elements(name, array)
            for piece in (_LENGTH.pack(len(element)), element)
        )
    if datatype in PACKED:
        return pack_4bit(array).data
    # Copies only what is not C-contiguous (reshape alone would leave `array[::2]` as it lies); the
    # uint8 view makes len() count bytes.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _plain_array(header: TensorHeader, data: memoryview) -> np.ndarray | None:
    """The usual tensor, whose sizes and bytes fit each other; `None` for all others."""
    shape = header.shape
    if header.datatype not in _PLAIN or not 0 < len(shape) <= MAX_DIMENSIONS or min(shape) < 1:
        return None
    dtype = NUMPY_OF[header.datatype]
    if math.prod(shape) * dtype.itemsize != len(data):
        return None
    array = np.frombuffer(data, dtype)
    if len(shape) > 1:
        array = array.reshape(shape)
    if not data.readonly:
        array.flags.writeable = False
    return array


def _check(header: TensorHeader, dtype: np.dtype[np.generic], limits: Limits) -> int:
    """Number of elements of a tensor whose header is believable."""
    if len(header.shape) > MAX_DIMENSIONS:
        raise _bad(f"a tensor has {len(header.shape)} dimensions")
    # A size of zero must not excuse absurd other sizes, which numpy could not represent.
    count = product = 1
    for size in header.shape:
        count *= size
        product *= size or 1
        if size < 0 or product > limits.max_message_bytes:
            raise _bad("a tensor's shape is out of bounds")
    if header.datatype == "BYTES":
        fits = count * _LENGTH.size <= header.size_bytes <= limits.max_message_bytes
        fits = fits and (count > 0 or header.size_bytes == 0)
    elif header.datatype in PACKED:
        fits = header.size_bytes == (count + 1) // 2
    else:
        fits = header.size_bytes == count * dtype.itemsize
    if not fits:
        raise _bad("a tensor's size does not follow from its shape")
    return count


def _dtype_of(datatype: str) -> np.dtype[np.generic]:
    """As `numpy_of`, but opaque bytes where ml_dtypes is missing.

    One tensor that this end cannot name must not end the connection, so it is whoever takes the
    tensor out that learns of it: see `named`.
    """
    if datatype not in DATATYPES:
        raise _bad("a tensor's datatype is unknown")
    try:
        return numpy_of(datatype)
    except InvalidInput:
        return np.dtype("V2" if datatype == "BF16" else "V1")


def _array(
    header: TensorHeader, dtype: np.dtype[np.generic], count: int, data: memoryview
) -> np.ndarray:
    array: np.ndarray
    if header.datatype == "BYTES":
        array = np.empty(count, dtype=object)
        position = 0
        for index in range(count):
            if position + _LENGTH.size > len(data):
                raise _bad("a BYTES tensor is cut")
            (size_bytes,) = _LENGTH.unpack_from(data, position)
            position += _LENGTH.size
            if position + size_bytes > len(data):
                raise _bad("a BYTES tensor is cut")
            array[index] = bytes(data[position : position + size_bytes])
            position += size_bytes
        if position != len(data):
            raise _bad("bytes follow the last element of a BYTES tensor")
    elif not count:
        array = np.empty(0, dtype)
    elif header.datatype in PACKED:
        packed = np.frombuffer(data, np.uint8)
        if count % 2 and packed[-1] > 0x0F:
            raise _bad("the unused half of a 4-bit tensor's last byte is not zero")
        array = unpack_4bit(packed, count).view(dtype)
    else:
        if header.datatype == "BOOL" and np.frombuffer(data, np.uint8).max() > 1:
            raise _bad("a BOOL tensor holds bytes other than 0 and 1")
        array = np.frombuffer(data, dtype)
    if array.shape != header.shape:
        array = array.reshape(header.shape)
    if array.flags.writeable:
        array.flags.writeable = False
    return array


def _bad(reason: str) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"A message cannot be read: {reason}",
        fix="Check that both sides run compatible nearfar versions and the same limits",
    )
