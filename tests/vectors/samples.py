"""One message of every kind and one tensor of every datatype, made from their type declarations.

So a message, field or datatype that is added to the protocol has its vectors by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

import msgspec
import numpy as np
from msgspec import inspect

from nearfar.tensors import NUMPY_OF
from nearfar.wire import messages as wire
from nearfar.wire.checks import problem_in
from nearfar.wire.codec import describe

Sample = tuple[str, wire.Message, tuple[np.ndarray, ...]]

#: Lengths that byte fields of fixed size have in this protocol; the first legal one is taken.
_BYTE_SIZES = (16, 32, 8, 64)
#: Lengths of optional byte fields beside others; `None` for the same as those.
_OPTIONAL_BYTE_SIZES = (None, 24, 0)
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (3,), (2, 3), (1, 0, 2))
_TEXTS = ("text", "Grüße, 世界 🙂", "")


def kinds() -> tuple[type, ...]:
    """Every message of the protocol, by tag."""
    union: tuple[type, ...] = get_args(wire.Message)
    return tuple(sorted(union, key=lambda kind: kind.__struct_config__.tag))  # type: ignore[attr-defined]


def messages() -> Iterator[Sample]:
    """Each kind with its mandatory fields only, with all fields, and with edge values."""
    for kind in kinds():
        for style in ("mandatory fields", "all fields", "edge values"):
            yield f"{kind.__name__}, {style}", _legal(kind, style), ()


def _legal(kind: type, style: str) -> Any:
    message = None
    for optional_size in _OPTIONAL_BYTE_SIZES:
        for size in _BYTE_SIZES:
            message = _struct(inspect.type_info(kind), style, size, optional_size)
            if problem_in(message) is None:
                return message
    return message


def _struct(info: inspect.Type, style: str, size: int, optional_size: int | None = None) -> Any:
    assert isinstance(info, inspect.StructType)
    fields = {}
    for field in info.fields:
        if field.name == "tensors":
            fields[field.name] = ()
        elif field.required or style != "mandatory fields":
            # The first version is the only one there is; flags and choices keep their defaults.
            has_choice = isinstance(field.type, inspect.LiteralType) and not field.required
            if field.name != "protocol_version" and not has_choice:
                own = size if field.required or optional_size is None else optional_size
                fields[field.name] = _value(field.type, style, own)
            elif field.required:
                fields[field.name] = wire.PROTOCOL_VERSION
    return info.cls(**fields)


def _value(kind: inspect.Type, style: str, size: int) -> Any:
    edge = style == "edge values"
    if isinstance(kind, inspect.UnionType):
        options = [option for option in kind.types if not isinstance(option, inspect.NoneType)]
        return None if edge and len(options) < len(kind.types) else _value(options[0], style, size)
    if isinstance(kind, inspect.StructType):
        return _struct(kind, "mandatory fields" if edge else style, size)
    if isinstance(kind, (inspect.VarTupleType, inspect.ListType)):
        items = [] if edge else [_value(kind.item_type, style, size)]
        return items if isinstance(kind, inspect.ListType) else tuple(items)
    if isinstance(kind, inspect.TupleType):
        return tuple(_value(item, style, size) for item in kind.item_types)
    if isinstance(kind, inspect.DictType):
        return {} if edge else {"key": _value(kind.value_type, style, size)}
    if isinstance(kind, inspect.LiteralType):
        return kind.values[-1] if edge else kind.values[0]
    simple: dict[type, Any] = {
        inspect.IntType: 9 if edge else 5,
        inspect.FloatType: 0.0 if edge else 12.5,
        inspect.StrType: _TEXTS[1] if edge else _TEXTS[0],
        inspect.BytesType: bytes(size) if edge else bytes(range(size)),
        inspect.BoolType: not edge,
        inspect.AnyType: None,
        inspect.NoneType: None,
    }
    return simple[type(kind)]


def numbers() -> Iterator[Sample]:
    """Integers and text where msgpack changes its encoding."""
    for value in (0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**63, 2**64 - 1):
        yield f"Ping, id {value}", wire.Ping(id=value), ()
    for length in (0, 31, 32, 255, 256):
        text = "é" * (length // 2) + "e" * (length % 2)
        yield f"Token, {length} bytes of text", wire.Token(stream=1, index=0, text=text), ()


def tensors() -> Iterator[Sample]:
    """Every datatype in every shape, special values, and several tensors in one message."""
    for position, (datatype, dtype) in enumerate(NUMPY_OF.items()):
        for shape in SHAPES:
            name = f"{datatype} of shape {list(shape)}"
            yield _with_tensors(
                name, {"x": _array(datatype, dtype, shape)}, infer=position % 2 == 0
            )
    for datatype, dtype in NUMPY_OF.items():
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            array = np.array([limits.min, limits.max], dtype)
            yield _with_tensors(f"{datatype}, smallest and largest", {"x": array})
        elif dtype.kind == "f":
            # NaN by its bits: which of the many an expression gives is not defined.
            special = np.array([-0.0, np.inf, -np.inf, np.finfo(dtype).max], dtype)
            tiny = np.array([np.finfo(dtype).smallest_subnormal], dtype)
            nan = np.frombuffer(b"\xff" * dtype.itemsize, dtype)
            array = np.concatenate([special, tiny, nan])
            yield _with_tensors(f"{datatype}, special values", {"x": array})
    for size in range(1, 10):  # every padding
        array = np.arange(size, dtype=np.uint8)
        yield _with_tensors(f"{size} bytes and their padding", {"x": array})
    many = {f"t{n}": np.full(n, n, np.int16) for n in range(4)}
    many["words"] = _array("BYTES", np.dtype(object), (3,))
    yield _with_tensors("several tensors", many)
    yield _with_tensors("32 dimensions", {"x": np.zeros((1,) * 32, np.int8)})
    yield _with_tensors("no name", {"": np.zeros(1, np.int8)})


def _array(datatype: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    count = math.prod(shape)
    if datatype == "BYTES":
        array = np.empty(count, dtype=object)
        for index in range(count):
            array[index] = ("", "é", "\x00\xff")[index % 3].encode(
                "latin-1" if index % 3 else "utf-8"
            )
        return array.reshape(shape)
    return (np.arange(count) % 7).astype(dtype).reshape(shape)


def _with_tensors(name: str, arrays: dict[str, np.ndarray], *, infer: bool = False) -> Sample:
    headers = describe(arrays)
    message: wire.Message
    if infer:
        message = wire.Infer(stream=1, request_id=bytes(range(16)), model="m", tensors=headers)
    else:
        message = wire.Result(
            stream=1,
            tensors=headers,
            variant="v",
            execution_provider="CPUExecutionProvider",
            queue_ms=0.0,
            compute_ms=1.5,
        )
    return name, message, tuple(arrays.values())


def jsonable(value: Any) -> Any:
    """A msgpack value in JSON: bytes and large integers are objects of one member."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**53:
        return {"integer": str(value)}
    if isinstance(value, list):
        return [jsonable(item) for item in value]
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    return value


def header_of(message: wire.Message) -> Any:
    """A message's header as any msgpack reader sees it."""
    return jsonable(msgspec.msgpack.decode(msgspec.msgpack.encode(message)))
