"""Spans and figures of a client's requests, for OpenTelemetry (opt-in).

A request is a span, a child of whatever span the app is in. Each step that it takes (connect, run
here, run there, wait) is a child of it; what runs on the cloud carries the ids of its span over the
wire, so that the server's span is its child in turn. See docs/how-to/trace-requests.md.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from opentelemetry import trace
from opentelemetry.trace import SpanKind

from nearfar.errors import DeadlineExceeded, NearfarError
from nearfar.generation import GenerationChunk
from nearfar.telemetry import mark_failed, meter, trace_of, tracer
from sdk.answer import AnswerState, Summary
from sdk.core import Completed, Core
from sdk.racing import Race
from sdk.requests import Request
from sdk.results import Chunk, RouteName
from sdk.routing import RouteDecision
from sdk.steps import Answer, RunHere, RunThere, Step

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from edge_runtime import Stall
    from sdk.cloud.egress import Permit

T = TypeVar("T")

_SCOPE = "nearfar.sdk"


class Telemetry:
    """What one client tells OpenTelemetry. Thread-safe.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """

    def __init__(self) -> None:
        self._tracer = tracer(_SCOPE)
        figures = meter(_SCOPE)
        self._duration = figures.create_histogram(
            "nearfar.client.duration", unit="s", description="From a call to its complete answer"
        )
        self._sent = figures.create_counter(
            "nearfar.client.sent", unit="By", description="Sealed bytes that left the device"
        )
        self._stalls = figures.create_counter(
            "nearfar.client.stalls", description="Engines of the device that stalled"
        )

    def stalled(self, stall: Stall) -> None:
        """Count an engine that stalled."""
        self._stalls.add(1, {"model": stall.model, "phase": stall.phase})

    def run(
        self, request: Request, life: Generator[Step, Any, Completed]
    ) -> Generator[Step, Any, Completed]:
        """The life of one batch, with its spans; performs the same steps."""
        root = self.begin(request)
        started_s = time.perf_counter()
        code, route, sent_bytes = "cancelled", "", 0
        try:
            done = yield from self.steps(root, life)
            code, route, sent_bytes = "", done.route.name, done.bytes_sent
            root.set_attributes(
                {
                    "nearfar.route": done.route.name,
                    "nearfar.path": done.route.path,
                    "nearfar.variant": done.answer.variant,
                    "nearfar.queue_ms": done.answer.queue_ms,
                    "nearfar.compute_ms": done.answer.compute_ms,
                    "nearfar.bytes_sent": sent_bytes,
                }
            )
            return done
        except NearfarError as error:
            code = error.code
            raise
        finally:
            self.end(root, request, started_s, code, route, sent_bytes)

    def steps(self, root: Span, life: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        """The steps of a life, each with a span."""
        try:
            step = next(life)
            while True:
                first = step.first if isinstance(step, Race) else step
                span = self.child(root, _name_of(first), is_remote=isinstance(first, RunThere))
                if isinstance(step, Race):
                    step.carry(trace_of(span))
                elif isinstance(step, RunThere):
                    step = msgspec.structs.replace(step, trace=trace_of(span))
                code = "cancelled"
                try:
                    came = yield step
                    code = ""
                except NearfarError as error:
                    code = error.code
                    failed = error
                finally:
                    if isinstance(step, Race) and step.hedge:
                        span.set_attribute("nearfar.hedge", step.hedge)
                    if code:
                        mark_failed(span, code)
                    elif isinstance(came, Answer):
                        span.set_attribute("nearfar.queue_ms", came.queue_ms)
                        span.set_attribute("nearfar.compute_ms", came.compute_ms)
                    span.end()
                step = life.throw(failed) if code else life.send(came)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            life.close()

    def begin(self, request: Request) -> Span:
        """The span of a request."""
        return self._tracer.start_span(
            f"nearfar {request.method}",
            attributes={
                "nearfar.model": request.model,
                "nearfar.mode": request.mode,
                "nearfar.upload_bytes": request.size.upload_bytes,
            },
        )

    def child(self, root: Span, name: str, *, is_remote: bool) -> Span:
        """A span inside another one, whichever thread it is in."""
        return self._tracer.start_span(
            name,
            context=trace.set_span_in_context(root),
            kind=SpanKind.CLIENT if is_remote else SpanKind.INTERNAL,
        )

    def end(
        self, root: Span, request: Request, started_s: float, code: str, route: str, sent: int
    ) -> None:
        """End the span of a request, and count it."""
        if code:
            mark_failed(root, code)
        root.end()
        labels = {
            "method": request.method, "model": request.model, "route": route, "error": code,
        }  # fmt: skip
        self._duration.record(time.perf_counter() - started_s, labels)
        if sent:
            self._sent.add(sent, {"model": request.model})

    def answer(self, request: Request) -> TracedAnswer:
        """The spans of a streamed answer, from now on."""
        return TracedAnswer(self, request)


class TracedAnswer:
    """The span of one streamed answer, while its route is sought and after.

    Attributes:
        root: The span.
        has_ended: Whether it has.
    """

    def __init__(self, telemetry: Telemetry, request: Request) -> None:
        self.telemetry = telemetry
        self.request = request
        self.root = telemetry.begin(request)
        self._started_s = time.perf_counter()
        self.has_ended = False

    def route(self, life: Generator[Any, Any, RouteDecision]) -> Generator[Any, Any, RouteDecision]:
        """The life of the decision; the span ends with it when there is no route."""
        code = "cancelled"
        try:
            decision = yield from self.telemetry.steps(self.root, life)
            code = ""
            return decision
        except NearfarError as error:
            code = error.code
            raise
        finally:
            if code:
                self.end(code, "", 0)

    def state(self, core: Core, decision: RouteDecision) -> TracedState:
        """The state of the answer."""
        return TracedState(core, self, decision)

    def end(self, code: str, route: str, sent_bytes: int) -> None:
        """End the span; idempotent."""
        if not self.has_ended:
            self.has_ended = True
            request = self.request
            self.telemetry.end(self.root, request, self._started_s, code, route, sent_bytes)


class TracedState(AnswerState):
    """As `AnswerState`, with a span for each route that is tried."""

    def __init__(self, core: Core, traced: TracedAnswer, decision: RouteDecision) -> None:
        self._traced = traced
        self._span: Span | None = None
        self._beside_span: Span | None = None
        super().__init__(core, traced.request, decision)

    def opening(self, permit: Permit | None = None) -> None:
        super().opening(permit)
        route = self.attempt.route
        self._span = self._traced.telemetry.child(
            self._traced.root, f"nearfar {route}", is_remote=route == "cloud"
        )
        self.trace = trace_of(self._span) if route == "cloud" else b""

    def begins_beside(self, route: RouteName, permit: Permit | None = None) -> None:
        super().begins_beside(route, permit)
        self._beside_span = self._traced.telemetry.child(
            self._traced.root, f"nearfar {route}", is_remote=route == "cloud"
        )
        if route == "cloud":
            self.trace = trace_of(self._beside_span)

    def outrun(self) -> bool:
        try:
            is_other = super().outrun()
        finally:
            self._end_if_over()
        if is_other:
            self._end_span("cancelled")
            self._span, self._beside_span = self._beside_span, None
        return is_other

    def goes_on_beside(self, error: BaseException) -> bool:
        goes_on = super().goes_on_beside(error)
        if goes_on:
            self._span, self._beside_span = self._beside_span, None
        return goes_on

    def has_begun(self) -> None:
        super().has_begun()
        span, self._beside_span = self._beside_span, None
        if span is not None:  # it lost
            mark_failed(span, "cancelled")
            span.end()

    def take(self, piece: GenerationChunk, summary: Summary | None) -> Chunk | None:
        if self._span is not None and piece.text and self._first_s is None:
            self._span.add_event("first text")
        try:
            return super().take(piece, summary)
        finally:
            self._end_if_over()

    def fail(self, error: NearfarError) -> None:
        self._end_span(error.code)
        try:
            super().fail(error)
        finally:
            self._end_if_over()

    def expire(self, error: DeadlineExceeded | None = None) -> None:
        try:
            super().expire(error)
        finally:
            self._end_if_over()

    def cancel(self) -> None:
        super().cancel()
        self._end_if_over()

    def _end_span(self, code: str) -> None:
        span, self._span = self._span, None
        if span is not None:
            if code:
                mark_failed(span, code)
            span.end()

    def _end_if_over(self) -> None:
        if not self.is_over or self._traced.has_ended:
            return
        code = self.error.code if self.error is not None else ""
        if self.finish_reason == "cancelled":
            code = "cancelled"
        self._end_span(code)
        root, timings = self._traced.root, self.timings
        root.set_attributes(
            {
                "nearfar.route": self.attempt.route,
                "nearfar.path": self.route.path,
                "nearfar.variant": self.variant,
                "nearfar.finish_reason": self.finish_reason or "",
                "nearfar.tokens": self._kept_tokens,
                "nearfar.queue_ms": timings.queue_ms,
                "nearfar.compute_ms": timings.compute_ms,
                "nearfar.bytes_sent": self.bytes_sent,
            }
        )
        if timings.ttft_ms is not None:
            root.set_attribute("nearfar.ttft_ms", timings.ttft_ms)
        self._traced.end(code, self.attempt.route, self.bytes_sent)


def _name_of(step: object) -> str:
    if isinstance(step, RunHere):
        return "nearfar edge"
    if isinstance(step, RunThere):
        return "nearfar cloud"
    return f"nearfar {type(step).__name__.lower()}"
