"""What a job is made of and what it gives, as bytes that can be kept, and back.

msgpack of the structs below; nothing here is code, so reading what somebody else wrote runs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, Union

import msgspec
import numpy as np

from nearfar.errors import (
    BundleError,
    DeadlineExceeded,
    InvalidInput,
    NearfarError,
    PolicyDenied,
    from_code,
)
from nearfar.generation import FinishReason, GenerationOptions, Prompt, Usage
from nearfar.tensors import datatype_of, numpy_of
from nearfar.units import Deadline
from sdk.requests import Form, Method, Request
from sdk.results import BatchUsage, ClassifyResult, EmbedResult, InferResult, Route, Timings
from sdk.routing import Mode, Objective, RequestSize, RouteDecision

if TYPE_CHECKING:
    from sdk.streams import AsyncGenerationStream, GenerationStream

T = TypeVar("T")


class GenerateResult(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a job that generated text.

    Attributes:
        text: The whole answer.
        finish_reason: Why it ended; ``deadline`` when its `deadline_ms` cut it.
        route: Where the answer came from, and why.
        decision: The routing decision, content-free and replayable.
        timings: Where the time went, in the attempt that answered.
        usage: Token counts.
        variant: Which variant of the bundle answered.
        execution_provider: What it ran on.
        bytes_sent: Sealed bytes that left the device in that attempt.
    """

    text: str
    finish_reason: FinishReason | None
    route: Route
    decision: RouteDecision
    timings: Timings
    usage: Usage | None
    variant: str
    execution_provider: str
    bytes_sent: int = 0


JobResult = Union[InferResult, EmbedResult, ClassifyResult, GenerateResult]


class _Array(msgspec.Struct, frozen=True, array_like=True):
    """One tensor; `items` instead of `data` where its elements are byte strings."""

    datatype: str
    shape: tuple[int, ...]
    data: bytes = b""
    items: tuple[bytes, ...] = ()


class StoredRequest(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A request as it waits. `deadline_ms` counts from the start of each attempt."""

    format_version: int
    method: Method
    model: str
    sensitivity: str
    version: str | None
    purpose: str | None
    tenant: str | None
    mode: Mode
    objective: Objective
    priority: int
    deadline_ms: float | None
    form: Form
    feeds: dict[str, _Array] | None
    texts: tuple[str, ...]
    blobs: tuple[bytes, ...]
    prompt: Prompt | None
    options: GenerationOptions
    top_k: int
    size: RequestSize
    min_agreement: float | None = None
    require_agreement: bool | None = None

    def request(self, request_id: bytes) -> Request:
        """The request, its deadline beginning now.

        Raises:
            InvalidInput: A tensor's type is not known here.
        """
        feeds = None
        if self.feeds is not None:
            feeds = {name: _unpacked(array) for name, array in self.feeds.items()}
        return Request(
            method=self.method,
            model=self.model,
            deadline=Deadline.after_ms(self.deadline_ms),
            version=self.version,
            sensitivity=self.sensitivity,
            purpose=self.purpose,
            tenant=self.tenant,
            mode=self.mode,
            objective=self.objective,
            priority=self.priority,
            form=self.form,
            feeds=feeds,
            items=self.texts or self.blobs,
            prompt=self.prompt,
            options=self.options,
            top_k=self.top_k,
            size=self.size,
            min_agreement=self.min_agreement,
            require_agreement=self.require_agreement,
            request_id=request_id,
        )


class Label(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What a list of jobs shows of one."""

    method: Method
    model: str
    sensitivity: str


class _StoredResult(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    format_version: int
    method: Method
    route: Route
    decision: RouteDecision
    timings: Timings
    items: int
    output_bytes: int
    variant: str
    execution_provider: str
    bytes_sent: int
    arrays: dict[str, _Array] = {}
    label: str = ""
    score: float = 0.0
    top: tuple[tuple[str, float], ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    tokens: Usage | None = None


class _StoredError(msgspec.Struct, frozen=True, array_like=True):
    code: str
    problem: str
    fix: str
    detail: str = ""  # `PolicyDenied.rule`, `InvalidInput.field`
    tried: tuple[str, ...] = ()


def pack_request(request: Request, sensitivity: str, deadline_ms: float | None) -> bytes:
    """Bytes of a request.

    Args:
        request: The request.
        sensitivity: Its class; a default that changes while it waits must not change it.
        deadline_ms: Time for each attempt; `None` for as long as it takes.

    Raises:
        InvalidInput: An array's dtype has no name, or a text is not Unicode.
    """
    feeds = None
    if request.feeds is not None:
        feeds = {name: _packed(array) for name, array in request.feeds.items()}
    stored = StoredRequest(
        format_version=1,
        method=request.method,
        model=request.model,
        sensitivity=sensitivity,
        version=request.version,
        purpose=request.purpose,
        tenant=request.tenant,
        mode=request.mode,
        objective=request.objective,
        priority=request.priority,
        deadline_ms=deadline_ms,
        form=request.form,
        feeds=feeds,
        texts=tuple(item for item in request.items if isinstance(item, str)),
        blobs=tuple(item for item in request.items if isinstance(item, bytes)),
        prompt=request.prompt,
        options=request.options,
        top_k=request.top_k,
        size=request.size,
        min_agreement=request.min_agreement,
        require_agreement=request.require_agreement,
    )
    try:
        return msgspec.msgpack.encode(stored)
    except UnicodeEncodeError:
        raise InvalidInput(
            "The text holds characters that are not Unicode (lone surrogates)",
            field="data",
            fix="Decode it with errors='replace'",
        ) from None


def unpack_request(data: bytes) -> StoredRequest:
    """A request from its bytes.

    Raises:
        BundleError: It was written by another version.
    """
    return _decode(data, _REQUEST)


def pack_result(method: Method, result: Any) -> bytes:
    """Bytes of a result of `infer`, `embed`, `classify`, or of a `GenerateResult`."""
    arrays: dict[str, _Array] = {}
    fields: dict[str, Any] = {}
    items = output_bytes = 0
    if isinstance(result, GenerateResult):
        fields = {
            "text": result.text,
            "finish_reason": result.finish_reason,
            "tokens": result.usage,
        }
    else:
        items, output_bytes = result.usage.items, result.usage.output_bytes
        if isinstance(result, InferResult):
            arrays = {name: _packed(array) for name, array in result.outputs.items()}
        elif isinstance(result, EmbedResult):
            arrays = {"vectors": _packed(result.vectors)}
        else:
            top = tuple((label, float(score)) for label, score in result.top)
            fields = {"label": result.label, "score": float(result.score), "top": top}
    return msgspec.msgpack.encode(
        _StoredResult(
            format_version=1,
            method=method,
            route=result.route,
            decision=result.decision,
            timings=result.timings,
            items=items,
            output_bytes=output_bytes,
            variant=result.variant,
            execution_provider=result.execution_provider,
            bytes_sent=result.bytes_sent,
            arrays=arrays,
            **fields,
        )
    )


def unpack_result(data: bytes) -> JobResult:
    """A result from its bytes.

    Raises:
        BundleError: It was written by another version.
    """
    stored = _decode(data, _RESULT)
    common: dict[str, Any] = {
        "route": stored.route,
        "decision": stored.decision,
        "timings": stored.timings,
        "variant": stored.variant,
        "execution_provider": stored.execution_provider,
        "bytes_sent": stored.bytes_sent,
    }
    if stored.method == "generate":
        return GenerateResult(
            text=stored.text,
            finish_reason=stored.finish_reason,
            usage=stored.tokens,
            **common,
        )
    common["usage"] = BatchUsage(items=stored.items, output_bytes=stored.output_bytes)
    arrays = {name: _unpacked(array) for name, array in stored.arrays.items()}
    if stored.method == "infer":
        return InferResult(outputs=arrays, **common)
    if stored.method == "embed":
        return EmbedResult(vectors=arrays["vectors"], **common)
    return ClassifyResult(label=stored.label, score=stored.score, top=stored.top, **common)


def generated(stream: GenerationStream | AsyncGenerationStream) -> GenerateResult:
    """What a stream that has ended gave."""
    return GenerateResult(
        text=stream.partial_text,
        finish_reason=stream.finish_reason,
        route=stream.route,
        decision=stream.decision,
        timings=stream.timings,
        usage=stream.usage,
        variant=stream.variant,
        execution_provider=stream.execution_provider,
        bytes_sent=stream.bytes_sent,
    )


def pack_error(error: NearfarError) -> bytes:
    """Bytes of an error."""
    detail = getattr(error, "rule", "") or getattr(error, "field", "")
    return msgspec.msgpack.encode(
        _StoredError(error.code, error.problem, error.fix, detail, getattr(error, "tried", ()))
    )


def unpack_error(data: bytes) -> NearfarError:
    """An error from its bytes, of the same class.

    Raises:
        BundleError: It was written by another version.
    """
    stored = _decode(data, _ERROR)
    error = from_code(stored.code, stored.problem, stored.fix)
    if isinstance(error, PolicyDenied):
        error.rule = stored.detail
    elif isinstance(error, InvalidInput):
        error.field = stored.detail
    elif isinstance(error, DeadlineExceeded):
        error.tried = stored.tried
    return error


def pack_label(label: Label) -> bytes:
    """Bytes of a label."""
    return msgspec.msgpack.encode(label)


def unpack_label(data: bytes) -> Label:
    """A label from its bytes.

    Raises:
        BundleError: It was written by another version.
    """
    return _decode(data, _LABEL)


_REQUEST = msgspec.msgpack.Decoder(StoredRequest)
_RESULT = msgspec.msgpack.Decoder(_StoredResult)
_ERROR = msgspec.msgpack.Decoder(_StoredError)
_LABEL = msgspec.msgpack.Decoder(Label)


def _decode(data: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    try:
        value = decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise BundleError(
            f"What the queue of jobs holds was written by another version of nearfar ({exc})",
            fix="Read it with that version, or remove the job: nearfar jobs cancel --forget ID",
        ) from exc
    if getattr(value, "format_version", 1) != 1:
        raise BundleError(
            "What the queue of jobs holds was written by a newer version of nearfar",
            fix="Read it with that version, or remove the job: nearfar jobs cancel --forget ID",
        )
    return value


def _packed(array: np.ndarray) -> _Array:
    datatype = datatype_of(array)
    if datatype == "BYTES":
        items = tuple(
            item.encode() if isinstance(item, str) else bytes(item) for item in array.reshape(-1)
        )
        return _Array(datatype, array.shape, items=items)
    return _Array(datatype, array.shape, data=array.tobytes())


def _unpacked(array: _Array) -> np.ndarray:
    if array.datatype == "BYTES":
        made = np.empty(len(array.items), dtype=object)
        made[:] = array.items
        return made.reshape(array.shape)
    made = np.empty(array.shape, numpy_of(array.datatype))
    made.reshape(-1)[:] = np.frombuffer(array.data, made.dtype)
    return made
