"""The report's pictures: what `nearfar.pages.charts` has, and those that only this report has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from nearfar.pages.charts import (
    LABEL,
    PLOT,
    ROW,
    Bar,
    bar,
    bar_chart,
    open_chart,
    row_label,
    value_text,
)
from nearfar.units import format_bytes, format_ms
from sdk.quickstart.situations import Observation

_VALUE = 64


def route_class(route: str) -> str:
    """CSS class of a route: edge, cloud, both (handed over), denied or error."""
    if "→" in route:
        return "both"
    return route if route in ("edge", "cloud", "denied") else "error"


def path_diagram(seen: Observation) -> str:
    """Device on the left, cloud on the right, and the way the request took between them."""
    kind = route_class(seen.route)
    device_on = kind in ("edge", "both")
    cloud_on = kind in ("cloud", "both")
    parts = [
        '<svg class="path" viewBox="0 0 150 44" role="img" '
        f'aria-label="{escape(seen.route, quote=True)}">',
        f'<rect class="node {"edge on" if device_on else ""}" x="6" y="10" width="18" height="26"'
        ' rx="4"/><circle class="pin" cx="15" cy="31" r="1.6"/>',
        f'<path class="node {"cloud on" if cloud_on else ""}" d="M118 34h20a7 7 0 0 0 1-13.9'
        "a10 10 0 0 0-19-2.6a8.4 8.4 0 0 0-2 16.5z" + '"/>',
    ]
    if kind == "cloud":
        parts.append('<path class="wire cloud" d="M28 24H108" marker-end="url(#tip)"/>')
    elif kind == "both":
        parts.append('<path class="wire cloud cut" d="M28 19H104"/>')
        parts.append('<path class="spark" d="M66 12l-4 7h6l-4 8"/>')
        parts.append('<path class="wire edge" d="M104 30H32" marker-end="url(#tip)"/>')
    elif kind == "edge":
        parts.append('<path class="wire off" d="M36 24H108"/>')
        parts.append('<path class="wire edge" d="M26 12c14-14 26 4 4 8" marker-end="url(#tip)"/>')
    else:
        parts.append('<path class="wire off" d="M28 24H108"/>')
        parts.append(f'<path class="stop {kind}" d="M60 16l16 16m0-16l-16 16"/>')
    parts.append("</svg>")
    return "".join(parts)


def latency_chart(observations: Sequence[Observation]) -> str:
    """Bars on a logarithmic scale: whole latency, with time to first token and deadline marked."""
    low, high = 0.1, max(1000.0, *(max(o.latency_ms, o.deadline_ms or 0) for o in observations))
    high = 10 ** math.ceil(math.log10(high))

    def x(milliseconds: float) -> float:
        share = math.log10(max(milliseconds, low) / low) / math.log10(high / low)
        return LABEL + share * PLOT

    height = ROW * len(observations) + 46
    parts = [open_chart(height, "Latency of every request, logarithmic scale")]
    tick = low
    while tick <= high * 1.001:
        parts.append(
            f'<line class="grid" x1="{x(tick):.1f}" y1="14" x2="{x(tick):.1f}" y2="{height - 24}"/>'
            f'<text class="tick" x="{x(tick):.1f}" y="{height - 8}">{_tick(tick)}</text>'
        )
        tick *= 10
    for row, seen in enumerate(observations):
        y = 18 + row * ROW
        told = format_ms(seen.latency_ms)
        parts.append(row_label(_name(seen), y))
        parts.append(bar(LABEL, y, x(seen.latency_ms) - LABEL, route_class(seen.route), title=told))
        if seen.ttft_ms is not None:
            parts.append(
                f'<line class="ttft" x1="{x(seen.ttft_ms):.1f}" x2="{x(seen.ttft_ms):.1f}" '
                f'y1="{y - 1}" y2="{y + 16}">'
                f"<title>first token after {format_ms(seen.ttft_ms)}</title></line>"
            )
        if seen.deadline_ms is not None:
            at = x(seen.deadline_ms)
            parts.append(
                f'<path class="deadline" d="M{at:.1f} {y - 3}v21m-4-21h8">'
                f"<title>deadline {format_ms(seen.deadline_ms)}</title></path>"
            )
        end = x(seen.latency_ms)
        if seen.deadline_ms is not None and end < x(seen.deadline_ms) < end + _VALUE:
            end = x(seen.deadline_ms) + 6
        parts.append(value_text(end, y, told))
    return "".join([*parts, "</svg>"])


def egress_chart(observations: Sequence[Observation]) -> str:
    """Bars: bytes that left the device for each request."""
    rows = [
        Bar(
            label=_name(seen),
            value=seen.bytes_sent,
            text=format_bytes(seen.bytes_sent) if seen.bytes_sent else "nothing",
            kind=route_class(seen.route),
        )
        for seen in observations
    ]
    return bar_chart(rows, "Bytes that left the device", scale=math.sqrt)


def token_chart(observations: Sequence[Observation]) -> str:
    """Streamed answers as they arrived: pieces against time, one line per situation."""
    streams = [o for o in observations if len(o.chunk_times_ms) > 1]
    if not streams:
        return "<p>No streamed answers in this run.</p>"
    last = max(o.chunk_times_ms[-1] for o in streams)
    most = max(len(o.chunk_times_ms) for o in streams)
    left, top, width, height = 46, 14, 740, 250

    def point(index: int, milliseconds: float) -> str:
        return f"{left + width * milliseconds / last:.1f} {top + height * (1 - index / most):.1f}"

    parts = [
        f'<svg class="chart" viewBox="0 0 {left + width + 140} {height + 52}" role="img" '
        'aria-label="Pieces of the streamed answers against time">'
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        at = left + width * share
        parts.append(
            f'<line class="grid" x1="{at:.1f}" y1="{top}" x2="{at:.1f}" y2="{top + height}"/>'
            f'<text class="tick" x="{at:.1f}" y="{top + height + 18}">'
            f"{format_ms(last * share) if share else '0'}</text>"
        )
    parts.append(
        f'<text class="tick" x="{left - 8}" y="{top + 4}" text-anchor="end">{most}</text>'
        f'<text class="axis" x="{left}" y="{height + 48}">time since the request → '
        "pieces of the answer ↑</text>"
    )
    taken: list[tuple[float, float]] = []
    for seen in streams:
        cut = seen.handover_at if seen.handover_at is not None else len(seen.chunk_times_ms)
        head, tail = seen.chunk_times_ms[:cut], seen.chunk_times_ms[cut:]
        first = "cloud" if tail else route_class(seen.route)
        line = " L".join(point(i + 1, t) for i, t in enumerate(head))
        parts.append(f'<path class="line {first}" d="M{point(0, head[0])} L{line}"/>')
        if tail:
            gap = f"M{point(cut, head[-1])} L{point(cut, tail[0])}"
            parts.append(f'<path class="line gap" d="{gap}"/>')
            line = " L".join(point(cut + i, t) for i, t in enumerate(tail))
            parts.append(f'<path class="line edge" d="M{line}"/>')
            x, y = point(cut, head[-1]).split()
            parts.append(
                f'<circle class="killed" cx="{x}" cy="{y}" r="5"/>'
                f'<text class="note" x="{float(x) - 8:.0f}" y="{float(y) - 9:.0f}" '
                'text-anchor="end">cloud killed here</text>'
            )
        x, y = point(len(seen.chunk_times_ms), seen.chunk_times_ms[-1]).split()
        label_x, label_y = float(x) + 7, float(y) + 4
        while any(abs(label_x - at) < 120 and abs(label_y - up) < 14 for at, up in taken):
            label_y += 15  # below the label that stands there already
        taken.append((label_x, label_y))
        parts.append(
            f'<text class="note" x="{label_x:.0f}" y="{label_y:.0f}">'
            f"({seen.situation.key}) {escape(seen.route)}</text>"
        )
    return "".join([*parts, "</svg>"])


def _name(seen: Observation) -> str:
    return f"{seen.request} · ({seen.situation.key}) {seen.situation.title}"


def _tick(milliseconds: float) -> str:
    return f"{milliseconds / 1000:g} s" if milliseconds >= 1000 else f"{milliseconds:g} ms"
