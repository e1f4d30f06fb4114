"""OpenTelemetry, where it is asked for: one trace from the app over the wire to the server.

Needs the package ``opentelemetry-api``; where spans and figures go, and whether they go anywhere,
is the app's own set-up of OpenTelemetry. Nothing here is imported unless telemetry is turned on.
Spans hold names of models, ids, sizes, durations and error codes; no content.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nearfar.errors import ConfigError
from nearfar.wire.checks import TRACE_BYTES

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.metrics import Meter
    from opentelemetry.trace import Span, Tracer

_TRACE_ID_BYTES = 16


def tracer(name: str) -> Tracer:
    """The tracer of one of our packages.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    require()
    from opentelemetry import trace

    return trace.get_tracer(name)


def meter(name: str) -> Meter:
    """The meter of one of our packages.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    require()
    from opentelemetry import metrics

    return metrics.get_meter(name)


def trace_of(span: Span) -> bytes:
    """What of a span goes over the wire: trace id and span id, 24 bytes.

    Returns:
        ``b""`` for a span that is not sampled: then the server's would be nobody's child.
    """
    context = span.get_span_context()
    if not context.is_valid or not context.trace_flags.sampled:
        return b""
    return context.trace_id.to_bytes(_TRACE_ID_BYTES, "big") + context.span_id.to_bytes(
        TRACE_BYTES - _TRACE_ID_BYTES, "big"
    )


def context_of(trace_bytes: bytes) -> Context:
    """The parent that came over the wire; an empty context, and so a new trace, without one."""
    from opentelemetry import trace
    from opentelemetry.context import Context

    if len(trace_bytes) != TRACE_BYTES:
        return Context()
    parent = trace.SpanContext(
        trace_id=int.from_bytes(trace_bytes[:_TRACE_ID_BYTES], "big"),
        span_id=int.from_bytes(trace_bytes[_TRACE_ID_BYTES:], "big"),
        is_remote=True,
        trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(parent), Context())


def mark_failed(span: Span, code: str) -> None:
    """Note that what the span is about failed; texts of errors may quote the caller."""
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("nearfar.error", code)
    span.set_status(Status(StatusCode.ERROR, code))


def require() -> None:
    """Make sure that OpenTelemetry is there.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import opentelemetry.metrics
        import opentelemetry.trace  # noqa: F401
    except ImportError as exc:
        raise ConfigError(
            "Telemetry is on, and OpenTelemetry is not installed",
            field="telemetry",
            fix="pip install 'nearfar[telemetry]', or turn it off",
        ) from exc
