"""Bytes of one message: golden layouts, identity, and every way to be malformed."""

from __future__ import annotations

import struct
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.errors import InvalidInput, LocalProtocolError, RemoteProtocolError
from nearfar.tensors import DATATYPES, EXTENDED, datatype_of, numpy_of
from nearfar.wire import messages as wire
from nearfar.wire.codec import decode, describe, encode, named, tensor_headers
from nearfar.wire.limits import Limits
from tests.support.wire import LIMITS, arrays, infer, messages, result


def joined(message: wire.Message, *tensors: np.ndarray) -> bytes:
    return b"".join(encode(message, tensors))


# Golden bytes: these change only with the protocol version.

GOLDEN: dict[str, tuple[wire.Message, dict[str, np.ndarray], str]] = {
    "ping": (
        wire.Ping(id=3),
        {},
        "03000000" "920c03" "00",
    ),
    "token": (
        wire.Token(stream=1, index=2, text="é"),
        {},
        "07000000" "9408" "01" "02" "a2c3a9" "0000000000",
    ),
    "auth": (
        wire.Auth(token="key", client="app"),
        {},
        "11000000" "9601" "01" "a36b6579" "a3617070" "c400" "a36f6666" "000000",
    ),
    "credit": (
        wire.Credit(stream=1, tokens=32, received=40),
        {},
        "05000000" "940b" "01" "20" "28" "00000000000000",
    ),
    "resume": (
        wire.Resume(
            stream=2, request_id=bytes(range(16)), ticket=bytes(range(32)), next_index=7, credit=64
        ),
        {},
        "39000000" "9610" "02"
        "c410" "000102030405060708090a0b0c0d0e0f"
        "c420" "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
        "07" "40" "000000",
    ),
    "result with an FP32 and a BYTES tensor": (
        wire.Result(
            stream=5,
            tensors=(
                wire.TensorHeader("y", "FP32", (1, 3), 12),
                wire.TensorHeader("s", "BYTES", (2,), 11),
            ),
            variant="v",
            execution_provider="E",
            queue_ms=0.0,
            compute_ms=1.5,
        ),
        {
            "y": np.array([[1.0, -2.0, 0.5]], dtype=np.float32),
            "s": np.array([b"abc", b""], dtype=object),
        },
        "32000000"
        "9706" "05"
        "92" "94" "a179" "a446503332" "920103" "0c"
        "94" "a173" "a54259544553" "9102" "0b"
        "a176" "a145" "cb0000000000000000" "cb3ff8000000000000"
        "0000"
        "0000803f" "000000c0" "0000003f" "00000000"
        "03000000" "616263" "00000000" "0000000000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_messages_have_these_very_bytes(name: str) -> None:
    message, named, expected = GOLDEN[name]
    assert joined(message, *named.values()).hex() == expected
    decoded, tensors = decode(bytes.fromhex(expected), LIMITS)
    assert decoded == message
    for received, sent in zip(tensors, named.values(), strict=True):
        assert received.tolist() == sent.tolist()


def test_every_message_has_its_own_tag_and_none_is_reused() -> None:
    kinds = wire.Message.__args__  # type: ignore[attr-defined]
    tags = [kind.__struct_config__.tag for kind in kinds]
    assert sorted(tags) == list(range(1, len(kinds) + 1))


# Identity


@settings(deadline=None, max_examples=200)
@given(messages)
def test_decoding_what_was_encoded_gives_the_same_message(
    case: tuple[wire.Message, tuple[np.ndarray, ...]],
) -> None:
    message, tensors = case
    decoded, received = decode(joined(message, *tensors), LIMITS)
    assert decoded == message
    assert len(received) == len(tensors)
    for got, sent in zip(received, tensors, strict=True):
        assert got.dtype == sent.dtype
        assert got.shape == sent.shape
        if sent.dtype == object:
            assert got.tolist() == sent.tolist()
        else:
            assert got.tobytes() == sent.tobytes()  # bit for bit, NaN included


@pytest.mark.parametrize("datatype", [name for name in sorted(DATATYPES) if name != "BYTES"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_every_datatype_travels_in_every_shape(datatype: str, shape: tuple[int, ...]) -> None:
    if datatype in EXTENDED:
        pytest.importorskip("ml_dtypes")
    array = np.ones(shape).astype(numpy_of(datatype))
    _, (received,) = decode(joined(infer(arrays={"x": array}), array), LIMITS)
    assert datatype_of(received) == datatype
    assert received.shape == shape
    assert received.tolist() == array.tolist()


def test_arrays_in_any_memory_order_arrive_in_c_order() -> None:
    base = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    flat = base.reshape(-1)
    for array in (base.T, base[:, ::2], np.asfortranarray(base), base[::-1], flat[::2], flat[::-1]):
        _, (received,) = decode(joined(infer(arrays={"x": array}), array), LIMITS)
        assert np.array_equal(received, array)


@pytest.mark.parametrize(
    "array",
    [
        np.array(["née", "x"], dtype=object),
        np.array(["née", "x"]),
        np.array(["née".encode(), b"x"]),
    ],
    ids=["str objects", "U", "S"],
)
def test_text_arrays_arrive_as_utf8_bytes(array: np.ndarray) -> None:
    _, (received,) = decode(joined(infer(arrays={"x": array}), array), LIMITS)
    assert received.tolist() == ["née".encode(), b"x"]


def test_encoding_makes_views_of_contiguous_tensors() -> None:
    array = np.zeros(2000, np.float32)
    parts = encode(infer(arrays={"x": array}), [array])
    array[0] = 1.0
    assert bytes(parts[1])[:4] == struct.pack("<f", 1.0)


def test_decoded_tensors_are_aligned_read_only_views_of_the_data() -> None:
    named: dict[str, np.ndarray] = {"a": np.ones(3, np.uint8), "b": np.ones(2, np.float64)}
    data = bytearray(joined(infer(arrays=named), *named.values()))
    _, tensors = decode(data, LIMITS)
    for tensor in tensors:
        assert not tensor.flags.writeable
        assert np.shares_memory(tensor, np.frombuffer(data, np.uint8))
        assert tensor.flags.aligned
        with pytest.raises(ValueError, match="read-only"):
            tensor[0] = 2


def test_bfloat16_is_not_copied_and_4_bit_integers_travel_two_in_a_byte() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    named_arrays = {
        "b": np.array([1.5, -2.0], ml_dtypes.bfloat16),
        "i": np.array([[-8, 7, -1]], ml_dtypes.int4),
        "u": np.array([1, 2, 3, 15], ml_dtypes.uint4),
    }
    parts = encode(infer(arrays=named_arrays), list(named_arrays.values()))
    data = b"".join(parts)
    sent = [bytes(part) for part in parts[1::2]]
    assert sent == [bytes.fromhex("c03f00c0"), bytes.fromhex("780f"), bytes.fromhex("21f3")]
    _, tensors = decode(data, LIMITS)
    assert [tensor.tolist() for tensor in tensors] == [a.tolist() for a in named_arrays.values()]
    assert np.shares_memory(tensors[0], np.frombuffer(data, np.uint8))
    assert not any(tensor.flags.writeable for tensor in tensors)


@pytest.mark.parametrize(("datatype", "size_bytes"), [("BF16", 6), ("INT4", 2), ("UINT4", 2)])
def test_without_ml_dtypes_a_tensor_is_refused_where_it_is_taken_out(
    monkeypatch: pytest.MonkeyPatch, datatype: str, size_bytes: int
) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    data = _result(["x", datatype, [3], size_bytes], data=(bytes(size_bytes),))
    message, tensors = decode(data, LIMITS)  # the connection lives on
    assert tensors[0].shape == (3,)
    with pytest.raises(InvalidInput, match="ml_dtypes"):
        named(tensor_headers(message), tensors)


def test_fields_added_by_a_newer_peer_are_skipped() -> None:
    header = msgspec.msgpack.encode([12, 7, "new", {"deep": [1]}])
    lead = struct.pack("<I", len(header)) + header
    message, _ = decode(lead + bytes(-len(lead) % 8), LIMITS)
    assert message == wire.Ping(id=7)


# Malformed


def _message(header: object, *data: bytes) -> bytes:
    packed = header if isinstance(header, bytes) else msgspec.msgpack.encode(header)
    lead = struct.pack("<I", len(packed)) + packed
    return b"".join(part + bytes(-len(part) % 8) for part in (lead, *data))


def _result(*tensors: list[object], data: tuple[bytes, ...] = ()) -> bytes:
    return _message([6, 1, list(tensors), "v", "E", 0.0, 0.0], *data)


GOOD = _result(["x", "INT32", [2], 8], data=(bytes(8),))

MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "half a length": b"\x01\x00",
    "length beyond the end": struct.pack("<I", 9) + bytes(8),
    "length beyond all bounds": b"\xff\xff\xff\xff" + bytes(60),
    "no header": struct.pack("<I", 0) + bytes(4),
    "4-bit tensor of another size": _result(["x", "INT4", [3], 3], data=(bytes(3),)),
    "4-bit tensor with a used half too many": _result(["x", "INT4", [1], 1], data=(b"\x10",)),
    "BF16 of another size": _result(["x", "BF16", [3], 3], data=(bytes(3),)),
    "header is not msgpack": _message(b"\xc1"),
    "header is not a message": _message({"a": 1}),
    "unknown tag": _message([99, 1]),
    "missing field": _message([8, 1]),
    "wrong type": _message([12, "id"]),
    "invalid UTF-8": _message(b"\x94\x08\x01\x00\xa2\xff\xfe"),
    "array longer than the header": _message(b"\x93\x04\x01\xdd\xff\xff\xff\xff"),
    "endless nesting": _message(b"\x93\x0c\x01" + b"\x91" * 50_000),
    "two headers": _message(b"\x92\x0c\x03\x92\x0c\x03"),
    "padding is missing": joined(wire.Ping(id=3))[:-1],
    "padding is not zero": joined(wire.Ping(id=3))[:-1] + b"\x01",
    "tensor missing": GOOD[:-8],
    "tensor cut": GOOD[:-1],
    "bytes after the last tensor": GOOD + bytes(8),
    "unknown datatype": _result(["x", "COMPLEX", [1], 8], data=(bytes(8),)),
    "size smaller than the shape": _result(["x", "INT32", [2], 4], data=(bytes(4),)),
    "size larger than the shape": _result(["x", "INT32", [1], 8], data=(bytes(8),)),
    "negative dimension": _result(["x", "INT32", [-1, -2], 8], data=(bytes(8),)),
    "negative size": _result(["x", "BYTES", [0], -8]),
    "shape beyond memory": _result(["x", "INT8", [2**40], 2**40]),
    "shape beyond memory hidden behind a zero": _result(["x", "INT8", [0, 2**62], 0]),
    "too many dimensions": _result(["x", "INT8", [1] * 33, 1], data=(b"\x00",)),
    "too many tensors": _result(*[["x", "INT8", [0], 0]] * (LIMITS.max_tensors + 1)),
    "more BYTES elements than bytes": _result(["x", "BYTES", [2**18], 8], data=(bytes(8),)),
    "BYTES element longer than its tensor": _result(
        ["x", "BYTES", [1], 8], data=(b"\x05\x00\x00\x00abcd",)
    ),
    "BYTES tensor ends inside a length": _result(
        ["x", "BYTES", [2], 9], data=(b"\x03\x00\x00\x00abc\x00\x00",)
    ),
    "bytes after the last BYTES element": _result(
        ["x", "BYTES", [1], 8], data=(b"\x03\x00\x00\x00abc!",)
    ),
    "data in a BYTES tensor of no elements": _result(["x", "BYTES", [0], 8], data=(bytes(8),)),
    "BOOL that is neither": _result(["x", "BOOL", [2], 2], data=(b"\x00\x02",)),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_message_is_refused(name: str) -> None:
    with pytest.raises(RemoteProtocolError, match="cannot be read"):
        decode(MALFORMED[name], LIMITS)


def test_the_message_the_malformed_ones_differ_from_is_good() -> None:
    _, (tensor,) = decode(GOOD, LIMITS)
    assert tensor.tolist() == [0, 0]


def test_message_over_the_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(RemoteProtocolError, match="1 are allowed"):
        decode(joined(wire.Ping(id=3)), Limits(max_message_bytes=1))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_message_or_a_remote_protocol_error(data: bytes) -> None:
    _decodes_or_refuses(data)


@settings(deadline=None, max_examples=200)
@given(messages, st.data())
def test_any_damage_to_a_message_gives_a_message_or_a_remote_protocol_error(
    case: tuple[wire.Message, tuple[np.ndarray, ...]], data: st.DataObject
) -> None:
    message, tensors = case
    good = bytearray(joined(message, *tensors))
    for position in data.draw(st.lists(st.integers(0, len(good) - 1), max_size=4)):
        good[position] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(good)))
    _decodes_or_refuses(bytes(good))
    _decodes_or_refuses(bytes(good[:cut]))
    _decodes_or_refuses(bytes(good) + bytes(8))


def _decodes_or_refuses(data: bytes) -> None:
    try:
        message, tensors = decode(data, LIMITS)
    except RemoteProtocolError:
        return
    # What was understood must be something we could have said.
    assert isinstance(message, wire.Message.__args__)  # type: ignore[attr-defined]
    joined(message, *tensors)


# Mistakes of our own


@given(arrays)
@settings(deadline=None)
def test_describe_states_what_encode_writes(array: np.ndarray) -> None:
    (header,) = describe({"x": array})
    parts = encode(infer(arrays={"x": array}), [array])
    assert len(parts[1]) == header.size_bytes
    assert header.shape == array.shape


ARRAY = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    "tensors",
    [(), (ARRAY, ARRAY), (ARRAY.astype(np.float64),), (ARRAY.T,), (ARRAY[:1],)],
    ids=["none", "too many", "dtype", "shape", "size"],
)
def test_tensors_that_differ_from_their_headers_are_our_mistake(
    tensors: tuple[np.ndarray, ...],
) -> None:
    with pytest.raises(LocalProtocolError):
        encode(infer(arrays={"x": ARRAY}), tensors)


def test_tensors_on_a_message_without_tensors_are_our_mistake() -> None:
    with pytest.raises(LocalProtocolError, match="describes 0 tensors but has 1"):
        encode(wire.Ping(id=1), [ARRAY])


@pytest.mark.parametrize("dtype", ["complex64", ">f4", "datetime64[s]"])
def test_dtypes_without_a_name_are_refused_with_the_fix(dtype: str) -> None:
    with pytest.raises(InvalidInput, match="Convert to one of"):
        describe({"x": np.zeros(1, dtype)})


@pytest.mark.parametrize("element", [1, None, ["x"], "\ud800"])
def test_objects_other_than_bytes_are_refused_by_name(element: object) -> None:
    array = np.empty(1, dtype=object)
    array[0] = element
    with pytest.raises(InvalidInput, match="Tensor words holds a"):
        describe({"words": array})


@pytest.mark.parametrize(
    "message",
    [
        wire.Token(stream=1, index=0, text="secret \ud800"),
        wire.Ping(id=2**70),
    ],
)
def test_values_that_do_not_fit_are_our_mistake_and_are_not_quoted(message: wire.Message) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        encode(message)
    assert "secret" not in str(caught.value)


def test_result_encodes_like_infer() -> None:
    decoded, (received,) = decode(joined(result(arrays={"x": ARRAY}), ARRAY), LIMITS)
    assert isinstance(decoded, wire.Result)
    assert np.array_equal(received, ARRAY)
