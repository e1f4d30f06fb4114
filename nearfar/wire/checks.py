"""Rules about single fields that types alone cannot state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from nearfar.wire.messages import (
    PROTOCOL_VERSION,
    Auth,
    Credit,
    Fin,
    Generate,
    GoAway,
    Infer,
    Message,
    Ping,
    Pong,
    Ready,
    Result,
    Resume,
    Token,
)

MAX_STREAM = 2**32 - 1
#: Credit that one stream may have at once.
MAX_CREDIT = 2**31 - 1
REQUEST_ID_BYTES = 16
DIGEST_BYTES = 32
PROOF_BYTES = 64  # Ed25519
#: Trace id and span id; neither may be all zeros (W3C Trace Context, section 3.2.2).
TRACE_BYTES = 16 + 8
#: Length of `Ready.resume_key`, and of the tickets made with it.
TICKET_BYTES = 32


def problem_in(message: Message) -> str | None:
    """What is wrong with a message's fields, naming the field but never its content."""
    kind = type(message)
    stream = getattr(message, "stream", 1)
    if not 0 <= stream <= MAX_STREAM:
        return f"{kind.__name__}.stream is {stream}"
    check = CHECKS.get(kind)
    if check is None or (problem := check(message)) is None:
        return None
    return f"{kind.__name__}{problem}"


def _in_auth(message: Auth) -> str | None:
    if message.protocol_version != PROTOCOL_VERSION:
        return f".protocol_version is {message.protocol_version}, not {PROTOCOL_VERSION}"
    if len(message.proof) not in (0, PROOF_BYTES):
        return f".proof has {len(message.proof)} bytes, not 0 or {PROOF_BYTES}"
    return None


def _in_ready(message: Ready) -> str | None:
    if message.protocol_version != PROTOCOL_VERSION:
        return f".protocol_version is {message.protocol_version}, not {PROTOCOL_VERSION}"
    if min(message.max_streams, message.max_message_bytes) < 1:
        return " allows no stream or no message"
    if len(message.resume_key) not in (0, TICKET_BYTES):
        return f".resume_key has {len(message.resume_key)} bytes, not {TICKET_BYTES}"
    return None


def _in_generate(message: Generate) -> str | None:
    return _in_credit_of(message) or _in_request(message)


def _in_request(message: Infer | Generate) -> str | None:
    if type(message) is Infer and message.form != "tensors" and not _is_raw(message):
        return f" of form {message.form} needs one BYTES tensor `input` of shape (batch,)"
    if len(message.request_id) != REQUEST_ID_BYTES:
        return _of_request_id(message)
    if not 0 <= message.priority <= 9:
        return f".priority is {message.priority}, not 0 to 9"
    if message.trace and not _is_trace(message.trace):
        return ".trace is not a trace id of 16 bytes and a span id of 8, neither all zeros"
    deadline_ms = message.deadline_ms
    return None if deadline_ms is None else _in_times(deadline_ms)


def _is_raw(message: Infer) -> bool:
    tensors = [(tensor.name, tensor.datatype, len(tensor.shape)) for tensor in message.tensors]
    return tensors == [("input", "BYTES", 1)]


def _is_trace(trace: bytes) -> bool:
    return len(trace) == TRACE_BYTES and any(trace[:16]) and any(trace[16:])


def _in_resume(message: Resume) -> str | None:
    if len(message.request_id) != REQUEST_ID_BYTES:
        return _of_request_id(message)
    if len(message.ticket) != TICKET_BYTES:
        return f".ticket has {len(message.ticket)} bytes, not {TICKET_BYTES}"
    if message.next_index < 0:
        return f".next_index is {message.next_index}"
    return _in_credit_of(message)


def _of_request_id(message: Infer | Generate | Resume) -> str:
    return f".request_id has {len(message.request_id)} bytes, not {REQUEST_ID_BYTES}"


def _in_credit_of(message: Generate | Resume) -> str | None:
    return None if 0 <= message.credit <= MAX_CREDIT else f".credit is {message.credit}"


def _in_result(message: Result) -> str | None:
    # Predictions are fed from these; NaN would poison every average it meets.
    if 0 <= message.queue_ms < math.inf and 0 <= message.compute_ms < math.inf:
        return None  # the most frequent, without another call
    return _in_times(message.queue_ms, message.compute_ms)


def _in_token(message: Token) -> str | None:
    return f".index is {message.index}" if message.index < 0 else None


def _in_credit(message: Credit) -> str | None:
    if not 1 <= message.tokens <= MAX_CREDIT:
        return f".tokens is {message.tokens}"
    return f".received is {message.received}" if message.received < 0 else None


def _in_fin(message: Fin) -> str | None:
    if len(message.digest) != DIGEST_BYTES:
        return f".digest has {len(message.digest)} bytes, not {DIGEST_BYTES}"
    return _in_times(message.queue_ms, message.prefill_ms, message.decode_ms)


def _in_ping(message: Ping | Pong) -> str | None:
    return None if 0 <= message.id < 2**64 else ".id does not fit 64 bits"


def _in_go_away(message: GoAway) -> str | None:
    fits = 0 <= message.last_stream <= MAX_STREAM
    return None if fits else f".last_stream is {message.last_stream}"


def _in_times(*times_ms: float) -> str | None:
    # Predictions are fed from these; NaN would poison every average it meets.
    for time_ms in times_ms:
        if not 0 <= time_ms < math.inf:  # also false for NaN
            return " holds a duration that is negative or not finite"
    return None


#: Message -> the check of its fields, which says what follows its name; most have one.
CHECKS: dict[type[Message], Callable[[Any], str | None]] = {
    Auth: _in_auth,
    Ready: _in_ready,
    Infer: _in_request,
    Result: _in_result,
    Generate: _in_generate,
    Token: _in_token,
    Fin: _in_fin,
    Credit: _in_credit,
    Ping: _in_ping,
    Pong: _in_ping,
    GoAway: _in_go_away,
    Resume: _in_resume,
}
