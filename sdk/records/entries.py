"""What a record holds: a decision and the moment it was made in, or how long an attempt took.

All of it is numbers, names of models and classes, and sentences made of these. No input, no
output, no text, no tensor, and no hash of any.
"""

from __future__ import annotations

from typing import Union

import msgspec

from nearfar.errors import InvalidInput
from sdk.routing.types import Route, RouteDecision


class Moment(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What was known beside the inputs of a decision; the decision does not depend on it.

    Attributes:
        delay_ms: The link's round trip, as it was learned.
        ms_per_byte: The link's time per byte; its inverse is the bandwidth.
        breaker: State of the circuit breaker: ``closed``, ``open`` or ``half_open``.
        failures: Failures of the cloud in a row.
    """

    delay_ms: float
    ms_per_byte: float
    breaker: str = "closed"
    failures: int = 0


class Decided(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag=1):
    """A decision.

    Attributes:
        at_s: Unix time.
        decision: With everything it was made from; at most 1,024 bytes encoded.
        moment: What was known beside.
    """

    at_s: float
    decision: RouteDecision
    moment: Moment


class Finished(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag=2):
    """An attempt that answered.

    Attributes:
        at_s: Unix time.
        route: Where.
        model: Name of the model.
        total_ms: From the moment the route was taken to the complete answer.
        queue_ms: Wait for a slot, part of it.
        tokens: Length of the answer, for text.
    """

    at_s: float
    route: Route
    model: str
    total_ms: float
    queue_ms: float = 0.0
    tokens: int = 0


class Stalled(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag=3):
    """An engine of the device that was silent for too long.

    Attributes:
        at_s: Unix time.
        model: Name of the model.
        phase: ``batch``, ``prompt`` or ``token``.
        silent_ms: For how long.
        limit_ms: From when on that was suspicious.
    """

    at_s: float
    model: str
    phase: str
    silent_ms: float
    limit_ms: float


Entry = Union[Decided, Finished, Stalled]

_DECODER: msgspec.msgpack.Decoder[Entry] = msgspec.msgpack.Decoder(Entry)


def encode_entry(entry: Entry) -> bytes:
    """The bytes of an entry: msgpack."""
    return msgspec.msgpack.encode(entry)


def decode_entry(data: bytes) -> Entry:
    """An entry from its bytes.

    Raises:
        InvalidInput: They are not one of this version.
    """
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidInput(
            f"The bytes are not a record of a decision ({exc})",
            field="record",
            fix="Read it with the version of nearfar that wrote it",
        ) from exc
