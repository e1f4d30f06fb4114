"""The messages of the wire protocol: msgpack headers. Specification: docs/reference/wire.md.

Each message is one msgspec Struct, encoded as a msgpack array whose first element is the integer
tag. New fields go to the end, with defaults, so that older peers skip them. Tensors are described
by `TensorHeader` in the header; their bytes follow it (see `nearfar.wire.codec`).

``stream`` is chosen by the client: 1, 2, 3 …, never reused on a connection; 0 is the connection.
"""

from __future__ import annotations

from typing import Literal, Union

import msgspec

from nearfar.bundle.manifest import Manifest
from nearfar.generation import FinishReason, GenerationOptions, Prompt, Usage

PROTOCOL_VERSION = 1

InputForm = Literal["tensors", "text", "bytes"]
#: What is done against an observer of sizes and times (`nearfar.secure.shaping`).
Shaping = Literal["off", "balanced", "strict"]


class TensorHeader(msgspec.Struct, frozen=True, array_like=True):
    """Describes one tensor whose bytes follow the header, in order.

    Attributes:
        name: Tensor name.
        datatype: Open Inference Protocol name.
        shape: Sizes, all known.
        size_bytes: Length of the data that follows (before alignment padding).
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    size_bytes: int


class _Message(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Base of all messages; gives them one encoding."""


class Auth(_Message, frozen=True, tag=1):
    """Client, first message: who is asking. Only ever sent inside the secure channel.

    Attributes:
        token: API key, or a token (JWT) that names the client's key.
        proof: Beside a token: signature by that key over this channel
            (`nearfar.secure.credentials.proof_message`), 64 bytes; else empty.
        shaping: How both directions shall hide sizes and times, at least.
    """

    protocol_version: int = PROTOCOL_VERSION
    token: str = ""
    client: str = ""
    proof: bytes = b""
    shaping: Shaping = "off"


class Ready(_Message, frozen=True, tag=2):
    """Server, answer to `Auth`: the connection is open for requests.

    Attributes:
        max_streams: Streams the client may have open at once.
        max_message_bytes: Largest plaintext message either side may send.
        resume_key: 32 random bytes of this connection, from which the tickets of its streams are
            derived (`nearfar.wire.retention.ticket_for`); empty: nothing can be resumed.
        shaping: In force from this message on, in both directions; never weaker than `Auth` asked.
    """

    protocol_version: int
    server: str
    max_streams: int
    max_message_bytes: int
    region: str = ""
    resume_key: bytes = b""
    shaping: Shaping = "off"


class ListModels(_Message, frozen=True, tag=3):
    """Client: ask for the models served here."""

    stream: int


class ModelOffer(msgspec.Struct, frozen=True, kw_only=True):
    """One served model.

    Attributes:
        manifest: The bundle's manifest; `variants` holds only what the server runs.
        variant: Variant that answers when the request names none.
        queue_ms: Current wait for a slot, as the server estimates it.
    """

    manifest: Manifest
    variant: str
    queue_ms: float = 0.0


class Models(_Message, frozen=True, tag=4):
    """Server: answer to `ListModels`."""

    stream: int
    models: tuple[ModelOffer, ...]


class Infer(_Message, frozen=True, tag=5):
    """Client: run one batch.

    Attributes:
        request_id: 16 random bytes, the idempotency key.
        form: ``tensors``: `tensors` are the model's own inputs. ``text`` / ``bytes``: one BYTES
            tensor named ``input`` of shape (batch,), which the server preprocesses.
        deadline_ms: Time left when the message was written; `None` for no deadline.
        priority: 0 (background) to 9 (urgent).
        trace: Trace id and span id of the client's span (W3C Trace Context, sections 3.2.2.3 and
            3.2.2.4), 16 + 8 bytes; empty when the request is not traced.
    """

    stream: int
    request_id: bytes
    model: str
    tensors: tuple[TensorHeader, ...]
    form: InputForm = "tensors"
    version: str | None = None
    variant: str | None = None
    deadline_ms: float | None = None
    priority: int = 5
    trace: bytes = b""


class Result(_Message, frozen=True, tag=6):
    """Server: the outputs of an `Infer`, raw model outputs; ends the stream."""

    stream: int
    tensors: tuple[TensorHeader, ...]
    variant: str
    execution_provider: str
    queue_ms: float
    compute_ms: float


class Generate(_Message, frozen=True, tag=7):
    """Client: continue text, streamed.

    Attributes:
        credit: Tokens the server may send before it must wait for `Credit`.
        trace: As `Infer.trace`.
    """

    stream: int
    request_id: bytes
    model: str
    prompt: Prompt
    options: GenerationOptions
    credit: int
    version: str | None = None
    variant: str | None = None
    deadline_ms: float | None = None
    priority: int = 5
    trace: bytes = b""


class Token(_Message, frozen=True, tag=8):
    """Server: one piece of an answer; `index` counts from 0 without gaps."""

    stream: int
    index: int
    text: str


class Fin(_Message, frozen=True, tag=9):
    """Server: the answer is complete; ends the stream.

    Attributes:
        count: Number of `Token` messages of the stream.
        digest: SHA-256 of the UTF-8 of all texts in order, so that a cut or a change is noticed.
    """

    stream: int
    count: int
    digest: bytes
    finish_reason: FinishReason
    usage: Usage
    variant: str
    execution_provider: str
    queue_ms: float
    prefill_ms: float
    decode_ms: float


class Cancel(_Message, frozen=True, tag=10):
    """Client: stop working on a stream; the server answers with `Error` code ``cancelled``."""

    stream: int


class Credit(_Message, frozen=True, tag=11):
    """Client: the server may send that many more tokens on the stream.

    Attributes:
        received: Index of the token wanted next; those below it are acknowledged, and the server
            need not keep them for a `Resume`.
    """

    stream: int
    tokens: int
    received: int = 0


class Ping(_Message, frozen=True, tag=12):
    """Either side: measure the round trip; answered at once with `Pong` of the same id."""

    id: int


class Pong(_Message, frozen=True, tag=13):
    """Either side: the answer to `Ping`."""

    id: int


class GoAway(_Message, frozen=True, tag=14):
    """Server: no new streams; those up to `last_stream` are still answered."""

    last_stream: int
    reason: str = ""


class Error(_Message, frozen=True, tag=15):
    """Server: a stream failed (`stream` > 0) or the connection ends (`stream` 0).

    Attributes:
        code: `NearfarError.code`; `problem` and `fix` are its texts.
    """

    stream: int
    code: str
    problem: str
    fix: str = ""


class Resume(_Message, frozen=True, tag=16):
    """Client: go on with a `Generate` whose connection was lost, on this one.

    Attributes:
        request_id: That of the `Generate`.
        ticket: Proves that the client held the stream; from `nearfar.wire.retention.ticket_for`
            with the `Ready.resume_key` of the connection on which it was last held. Good once.
        next_index: Index of the first token that is still wanted; digest and count of `Fin` are
            over the whole answer all the same.
        credit: As `Generate.credit`.
    """

    stream: int
    request_id: bytes
    ticket: bytes
    next_index: int
    credit: int


ClientMessage = Union[Auth, ListModels, Infer, Generate, Cancel, Credit, Ping, Pong, Resume]
ServerMessage = Union[Ready, Models, Result, Token, Fin, Ping, Pong, GoAway, Error]
Message = Union[
    Auth, Ready, ListModels, Models, Infer, Result, Generate, Token, Fin, Cancel, Credit,
    Ping, Pong, GoAway, Error, Resume,
]  # fmt: skip
