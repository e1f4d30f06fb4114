"""Properties of every message there is: strategies are made from the declarations of the fields.

A message that is added to the protocol is tested here without an edit.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import inspect

from nearfar.errors import RemoteProtocolError, SecurityError
from nearfar.wire import messages as wire
from nearfar.wire.codec import decode, describe, encode
from nearfar.wire.connection import TRANSITIONS, Connection, ConnectionState, Role
from tests.support.wire import LIMITS, NOW_S, Pair, named_arrays

KINDS: tuple[type, ...] = wire.Message.__args__  # type: ignore[attr-defined]

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_SIMPLE: dict[type, st.SearchStrategy[Any]] = {
    inspect.IntType: st.integers(0, 2**63) | st.integers(0, 300),
    inspect.FloatType: st.floats(allow_nan=False),
    inspect.StrType: _text,
    inspect.BytesType: st.binary(max_size=40),
    inspect.BoolType: st.booleans(),
    inspect.NoneType: st.none(),
}


def values(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Any value of a declared type."""
    if isinstance(kind, inspect.UnionType):
        return st.one_of(*(values(option) for option in kind.types))
    if isinstance(kind, inspect.LiteralType):
        return st.sampled_from(kind.values)
    if isinstance(kind, inspect.TupleType):
        return st.tuples(*(values(item) for item in kind.item_types))
    if isinstance(kind, inspect.VarTupleType):
        return st.lists(values(kind.item_type), max_size=2).map(tuple)
    if isinstance(kind, inspect.DictType):
        return st.dictionaries(_text, values(kind.value_type), max_size=2)
    if isinstance(kind, inspect.StructType):
        return structs(kind)
    return _SIMPLE[type(kind)]


def structs(kind: inspect.StructType) -> st.SearchStrategy[Any]:
    """Any struct; fields with a default are given or not. Tensor headers are left empty."""
    fields = {field.name: field for field in kind.fields}
    given_fields = {
        name: st.just(()) if name == "tensors" else values(field.type)
        for name, field in fields.items()
        if field.required
    }
    optional = {name: values(field.type) for name, field in fields.items() if not field.required}
    return st.fixed_dictionaries(given_fields, optional=optional).map(
        lambda found: kind.cls(**found)
    )


def any_of(kind: type) -> st.SearchStrategy[Any]:
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    return structs(info)


any_message = st.one_of(*(any_of(kind) for kind in KINDS))


def joined(message: wire.Message, *tensors: np.ndarray) -> bytes:
    return b"".join(encode(message, tensors))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_decoding_after_encoding_gives_the_same_message(kind: type, data: st.DataObject) -> None:
    message = data.draw(any_of(kind))
    decoded, tensors = decode(joined(message), LIMITS)
    assert decoded == message
    assert type(decoded) is kind
    assert tensors == ()


@pytest.mark.parametrize(
    "kind",
    [kind for kind in KINDS if "tensors" in kind.__struct_fields__],  # type: ignore[attr-defined]
)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_messages_with_tensors_carry_any_of_them(kind: type, data: st.DataObject) -> None:
    named = data.draw(named_arrays)
    message = msgspec.structs.replace(data.draw(any_of(kind)), tensors=describe(named))
    decoded, tensors = decode(joined(message, *named.values()), LIMITS)
    assert decoded == message
    for got, sent in zip(tensors, named.values(), strict=True):
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape)


@settings(deadline=None, max_examples=25)
@given(any_message, st.randoms(use_true_random=False))
def test_message_with_any_single_byte_changed_is_another_message_or_refused(
    message: Any, random: Any
) -> None:
    good = joined(message)
    for position in range(min(len(good), 120)):
        damaged = bytearray(good)
        damaged[position] ^= random.randint(1, 255)
        try:
            decoded, tensors = decode(bytes(damaged), LIMITS)
        except RemoteProtocolError:
            continue
        joined(decoded, *tensors)  # what was understood could have been said


@settings(deadline=None, max_examples=25)
@given(any_message)
def test_message_cut_anywhere_is_refused(message: Any) -> None:
    good = joined(message)
    for size in range(min(len(good), 120)):
        with pytest.raises(RemoteProtocolError):
            decode(good[:size], LIMITS)


@pytest.mark.parametrize("role", Role)
@settings(deadline=None, max_examples=40)
@given(message=any_message)
def test_any_message_in_any_state_is_taken_or_closes_the_connection(
    role: Role, message: Any
) -> None:
    """Also one with fields that no honest peer would send."""
    pair = Pair.connected()
    fresh = Connection(role, LIMITS)
    opened = (pair.client if role is Role.CLIENT else pair.server)._connection
    for connection in (fresh, opened):
        before = connection.state
        try:
            connection.receive(joined(message))
            rows = TRANSITIONS.items()
            allowed = {following for (_, state, _), following in rows if state is before}
        except RemoteProtocolError:
            allowed = {ConnectionState.CLOSED}
        assert connection.state in allowed | ({before} - {ConnectionState.NEW})


@settings(deadline=None, max_examples=40)
@given(phase=st.integers(0, 2), data=st.binary(min_size=1, max_size=40))
def test_bytes_that_come_one_at_a_time_give_a_typed_error(phase: int, data: bytes) -> None:
    """Each as a websocket message of its own."""
    pair = Pair.connected() if phase == 2 else Pair.new()
    if phase == 1:
        pair.to_client()
    for session in (pair.client, pair.server):
        for byte in data:
            with pytest.raises((SecurityError, RemoteProtocolError)):
                session.receive(bytes([byte]), now_s=NOW_S)
        assert session.is_closed
