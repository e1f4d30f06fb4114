"""Rules about single fields that types alone cannot state."""

from __future__ import annotations

import math

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
    name = type(message).__name__
    stream = getattr(message, "stream", 1)
    if not 0 <= stream <= MAX_STREAM:
        return f"{name}.stream is {stream}"
    # The most frequent first: this runs for every message, at both ends.
    if isinstance(message, Token):
        return f"{name}.index is {message.index}" if message.index < 0 else None
    if isinstance(message, (Infer, Generate)):
        return _problem_in_request(message, name)
    if isinstance(message, Result):
        return _problem_in_times(name, message.queue_ms, message.compute_ms)
    if isinstance(message, (Auth, Ready)) and message.protocol_version != PROTOCOL_VERSION:
        return f"{name}.protocol_version is {message.protocol_version}, not {PROTOCOL_VERSION}"
    if isinstance(message, Auth) and len(message.proof) not in (0, PROOF_BYTES):
        return f"Auth.proof has {len(message.proof)} bytes, not 0 or {PROOF_BYTES}"
    if isinstance(message, Ready) and min(message.max_streams, message.max_message_bytes) < 1:
        return f"{name} allows no stream or no message"
    if isinstance(message, Ready) and len(message.resume_key) not in (0, TICKET_BYTES):
        return f"{name}.resume_key has {len(message.resume_key)} bytes, not {TICKET_BYTES}"
    if isinstance(message, Resume):
        return _problem_in_resume(message, name)
    if isinstance(message, Credit):
        if not 1 <= message.tokens <= MAX_CREDIT:
            return f"{name}.tokens is {message.tokens}"
        if message.received < 0:
            return f"{name}.received is {message.received}"
    if isinstance(message, Fin):
        if len(message.digest) != DIGEST_BYTES:
            return f"{name}.digest has {len(message.digest)} bytes, not {DIGEST_BYTES}"
        return _problem_in_times(name, message.queue_ms, message.prefill_ms, message.decode_ms)
    if isinstance(message, (Ping, Pong)) and not 0 <= message.id < 2**64:
        return f"{name}.id does not fit 64 bits"
    if isinstance(message, GoAway) and not 0 <= message.last_stream <= MAX_STREAM:
        return f"{name}.last_stream is {message.last_stream}"
    return None


def _problem_in_request(message: Infer | Generate, name: str) -> str | None:
    if len(message.request_id) != REQUEST_ID_BYTES:
        return f"{name}.request_id has {len(message.request_id)} bytes, not {REQUEST_ID_BYTES}"
    if not 0 <= message.priority <= 9:
        return f"{name}.priority is {message.priority}, not 0 to 9"
    if message.deadline_ms is not None and (
        problem := _problem_in_times(name, message.deadline_ms)
    ):
        return problem
    if message.trace and not _is_trace(message.trace):
        return f"{name}.trace is not a trace id of 16 bytes and a span id of 8, neither all zeros"
    if isinstance(message, Generate):
        if not 0 <= message.credit <= MAX_CREDIT:
            return f"{name}.credit is {message.credit}"
    elif message.form != "tensors" and (
        [(tensor.name, tensor.datatype, len(tensor.shape)) for tensor in message.tensors]
        != [("input", "BYTES", 1)]
    ):
        return f"{name} of form {message.form} needs one BYTES tensor `input` of shape (batch,)"
    return None


def _is_trace(trace: bytes) -> bool:
    return len(trace) == TRACE_BYTES and any(trace[:16]) and any(trace[16:])


def _problem_in_resume(message: Resume, name: str) -> str | None:
    if len(message.request_id) != REQUEST_ID_BYTES:
        return f"{name}.request_id has {len(message.request_id)} bytes, not {REQUEST_ID_BYTES}"
    if len(message.ticket) != TICKET_BYTES:
        return f"{name}.ticket has {len(message.ticket)} bytes, not {TICKET_BYTES}"
    if not 0 <= message.credit <= MAX_CREDIT:
        return f"{name}.credit is {message.credit}"
    if message.next_index < 0:
        return f"{name}.next_index is {message.next_index}"
    return None


def _problem_in_times(name: str, *times_ms: float) -> str | None:
    # Predictions are fed from these; NaN would poison every average it meets.
    for time_ms in times_ms:
        if not 0 <= time_ms < math.inf:  # also false for NaN
            return f"{name} holds a duration that is negative or not finite"
    return None
