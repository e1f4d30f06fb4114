"""Connections that tell OpenTelemetry what they serve; used only where the operator asks for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from opentelemetry.trace import SpanKind

from cloud_runtime.connection import Connection, ServerWebsocket, Services
from cloud_runtime.requests import OpenStream
from nearfar.errors import NearfarError
from nearfar.telemetry import context_of, mark_failed, meter, tracer
from nearfar.wire.messages import Generate, Infer, Resume

if TYPE_CHECKING:
    import numpy as np

_SCOPE = "nearfar.cloud_runtime"
_tracer = tracer(_SCOPE)
_meter = meter(_SCOPE)
_duration = _meter.create_histogram(
    "nearfar.server.duration", unit="s", description="From a request to its last message"
)
_queue = _meter.create_histogram(
    "nearfar.server.queue", unit="s", description="Wait for a slot of the model"
)
_compute = _meter.create_histogram(
    "nearfar.server.compute", unit="s", description="Time in the engine"
)


class TracedConnection(Connection):
    """As `Connection`, with a span for each request, a child of the client's if it sent one."""

    def __init__(
        self,
        websocket: ServerWebsocket,
        services: Services,
        *,
        address: str = "",
        on_ready: Callable[[], None],
    ) -> None:
        super().__init__(websocket, services, address=address, on_ready=on_ready)
        self._failures: dict[int, str] = {}  # codes of the requests that are failing, by stream

    async def _answer(
        self, stream: OpenStream, request: Infer | Generate | Resume, tensors: Sequence[np.ndarray]
    ) -> None:
        kind = type(request).__name__.lower()
        span = _tracer.start_span(
            f"nearfar serve {kind}",
            context=context_of(getattr(request, "trace", b"")),
            kind=SpanKind.SERVER,
        )
        started_s = time.monotonic()
        code = "disconnected"
        try:
            await super()._answer(stream, request, tensors)
            # Nothing was sent, not even an error: the client had gone.
            code = self._failures.pop(stream.stream, "" if stream.out_bytes else "disconnected")
        finally:
            facts: dict[str, str | int | float | bool] = {
                "nearfar.model": stream.model,
                "nearfar.queue_ms": stream.queue_ms,
                "nearfar.compute_ms": stream.compute_ms,
                "nearfar.in_bytes": stream.in_bytes,
                "nearfar.out_bytes": stream.out_bytes,
            }
            if stream.tokens:
                facts["nearfar.tokens"] = stream.tokens
            span.set_attributes(facts)
            if code:
                mark_failed(span, code)
            span.end()
            labels = {"model": stream.model, "kind": kind, "error": code}
            _duration.record(time.monotonic() - started_s, labels)
            if not code:
                _queue.record(stream.queue_ms / 1000.0, {"model": stream.model})
                _compute.record(stream.compute_ms / 1000.0, {"model": stream.model})

    def _fail(self, stream: OpenStream, error: NearfarError) -> None:
        self._failures[stream.stream] = error.code
        super()._fail(stream, error)
