"""Charts as inline SVG: no script, no font, no network.

Colours come from CSS classes of house.css (`edge`, `cloud`, `both`, `denied`, `error`), so that
light and dark are one stylesheet. Texts are escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

ROW, LABEL, PLOT, VALUE = 26, 250, 560, 110
WIDTH = LABEL + PLOT + VALUE

Scale = Callable[[float], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One row of `bar_chart`.

    Attributes:
        label: Left of it.
        value: How long it is.
        text: What stands at its end.
        kind: CSS class that gives the colour.
        is_faint: Whether it is drawn lightly, for what was not taken.
    """

    label: str
    value: float
    text: str
    kind: str = "cloud"
    is_faint: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One mark of `scatter_chart`; those with `is_front` are full and joined by a line."""

    label: str
    x: float
    y: float
    kind: str = "cloud"
    is_front: bool = False


def open_chart(height: float, label: str, width: float = WIDTH) -> str:
    """The opening tag; `label` is what a screen reader says."""
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label, quote=True)}">'
    )


def row_label(text: str, y: float) -> str:
    """A label left of a row whose bar begins at `y`."""
    shown = text if len(text) <= 44 else f"…{text[-43:]}"
    title = f"<title>{escape(text)}</title>" if shown != text else ""
    return f'<text class="label" x="{LABEL - 10}" y="{y + 12}">{escape(shown)}{title}</text>'


def bar(
    x: float, y: float, width: float, kind: str, *, title: str = "", is_faint: bool = False
) -> str:
    """One bar of a row."""
    told = f"<title>{escape(title)}</title>" if title else ""
    faint = " faint" if is_faint else ""
    return (
        f'<rect class="bar {kind}{faint}" x="{x}" y="{y}" height="15" rx="3" '
        f'width="{max(width, 2):.1f}">{told}</rect>'
    )


def value_text(x: float, y: float, text: str) -> str:
    """What stands at the end of a row's bar."""
    return f'<text class="value" x="{x + 8:.1f}" y="{y + 12}">{escape(text)}</text>'


def bar_chart(
    bars: Sequence[Bar],
    label: str,
    *,
    scale: Scale = float,
    limit: float | None = None,
    limit_text: str = "",
) -> str:
    """Rows of bars from the left; `limit` is drawn as a line across all of them.

    Args:
        bars: From top to bottom.
        label: What a screen reader says.
        scale: From a value to a length in any unit; such as `math.sqrt`, or `logarithmic`.
        limit: A value that should not be exceeded.
        limit_text: What stands at its line.
    """
    longest = max([scale(one.value) for one in bars] + ([scale(limit)] if limit else []) + [1e-12])
    top = 22 if limit is not None else 8
    height = ROW * len(bars) + top + 6
    parts = [open_chart(height, label)]
    for row, one in enumerate(bars):
        y = top + row * ROW
        width = PLOT * max(0.0, scale(one.value)) / longest
        parts.append(row_label(one.label, y))
        if one.value:
            parts.append(bar(LABEL, y, width, one.kind, title=one.text, is_faint=one.is_faint))
        parts.append(value_text(LABEL + width, y, one.text))
    if limit is not None:
        at = LABEL + PLOT * scale(limit) / longest
        parts.append(
            f'<path class="limit" d="M{at:.1f} {top - 4}V{height - 4}"/>'
            f'<text class="limit-text" x="{at:.1f}" y="{top - 9}">{escape(limit_text)}</text>'
        )
    return "".join([*parts, "</svg>"])


def logarithmic(low: float) -> Scale:
    """Orders of magnitude above `low`, with a little left for what is below it."""
    return lambda value: math.log10(max(value, low) / low) + 0.15


def scatter_chart(
    points: Sequence[Point],
    label: str,
    *,
    x_axis: str,
    y_axis: str,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    limits: tuple[float | None, float | None] = (None, None),
) -> str:
    """Points, both axes from 0 and by the square root, so that small differences near 0 show.

    Less is better on both axes. What lies beyond a limit is shaded.
    """
    left, top, width, height = 62, 20, 430, 270
    most_x = 1.12 * max([one.x for one in points] + [limits[0] or 0.0, 1e-9])
    most_y = 1.12 * max([one.y for one in points] + [limits[1] or 0.0, 1e-3])

    def at_x(value: float) -> float:
        return left + width * math.sqrt(max(value, 0.0) / most_x)

    def at_y(value: float) -> float:
        return top + height - height * math.sqrt(max(value, 0.0) / most_y)

    parts = [open_chart(height + 62, label, left + width + 96)]
    if limits[0] is not None:
        x = at_x(limits[0])
        parts.append(
            f'<rect class="beyond" x="{x:.1f}" y="{top}" '
            f'width="{left + width - x:.1f}" height="{height}"/>'
        )
    if limits[1] is not None:
        parts.append(
            f'<rect class="beyond" x="{left}" y="{top}" width="{width}" '
            f'height="{at_y(limits[1]) - top:.1f}"/>'
        )
    for value in _ticks(most_x):
        x = at_x(value)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + height}"/>'
            f'<text class="tick" x="{x:.1f}" y="{top + height + 17}">{escape(x_text(value))}</text>'
        )
    for value in _ticks(most_y):
        y = at_y(value)
        parts.append(
            f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}"/>'
            f'<text class="tick end" x="{left - 7}" y="{y + 4:.1f}">{escape(y_text(value))}</text>'
        )
    parts.append(
        f'<text class="axis" x="{left}" y="{top + height + 42}">{escape(x_axis)} →   '
        f"{escape(y_axis)} ↑</text>"
    )
    front = _lower_left([one for one in points if one.is_front])
    if len(front) > 1:
        steps = [f"M{at_x(front[0].x):.1f} {at_y(front[0].y):.1f}"]
        steps += [f"H{at_x(one.x):.1f}V{at_y(one.y):.1f}" for one in front[1:]]
        parts.append(f'<path class="front" d="{"".join(steps)}"/>')
    taken: list[tuple[float, float]] = []
    for one in sorted(points, key=lambda point: -point.y):
        x, y = at_x(one.x), at_y(one.y)
        ring = "dot" if one.is_front else "dot hollow"
        told = f"{one.label}: {x_text(one.x)}, {y_text(one.y)}"
        parts.append(
            f'<circle class="{ring} {one.kind}" cx="{x:.1f}" cy="{y:.1f}" r="6">'
            f"<title>{escape(told)}</title></circle>"
        )
        text_y = y + 4
        while any(
            abs(x - other_x) < 110 and abs(text_y - other_y) < 13 for other_x, other_y in taken
        ):
            text_y -= 13
        taken.append((x, text_y))
        parts.append(
            f'<text class="note" x="{x + 10:.1f}" y="{text_y:.1f}">{escape(one.label)}</text>'
        )
    return "".join([*parts, "</svg>"])


def histogram(
    counts: Sequence[int], edges: tuple[float, float], kept: tuple[float, float], label: str
) -> str:
    """Counts of equal bins between `edges`; what lies outside the range `kept` is marked.

    Heights go by the square root, so that rare large numbers, which decide the range, are seen.
    """
    width, height, base = 300, 96, 74
    low, high = min(edges[0], kept[0]), max(edges[1], kept[1])
    span = (high - low) or 1.0
    step = (edges[1] - edges[0]) / max(1, len(counts))
    most = max([*counts, 1])

    def x(value: float) -> float:
        return 4 + (width - 8) * (value - low) / span

    parts = [
        open_chart(height, label, width),
        f'<rect class="range" x="{x(kept[0]):.1f}" y="4" height="{base - 4}" '
        f'width="{max(x(kept[1]) - x(kept[0]), 1):.1f}"/>',
    ]
    for place, count in enumerate(counts):
        if not count:
            continue
        start = edges[0] + place * step
        is_cut = start + step / 2 < kept[0] or start + step / 2 > kept[1]
        tall = max(1.5, (base - 12) * math.sqrt(count / most))
        parts.append(
            f'<rect class="bar {"error" if is_cut else "cloud"}" x="{x(start):.2f}" '
            f'y="{base - tall:.1f}" height="{tall:.1f}" '
            f'width="{max(x(start + step) - x(start) - 0.4, 0.8):.2f}"/>'
        )
    parts.append(
        f'<line class="grid" x1="4" y1="{base}" x2="{width - 4}" y2="{base}"/>'
        f'<text class="tick start" x="4" y="{base + 15}">{low:.3g}</text>'
        f'<text class="tick end" x="{width - 4}" y="{base + 15}">{high:.3g}</text>'
    )
    return "".join([*parts, "</svg>"])


def _ticks(most: float) -> list[float]:
    """Round values from 0: each order of magnitude once or twice, denser at the top."""
    order = 10.0 ** math.floor(math.log10(most))
    found = [0.0]
    for factor in (0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0):
        value = factor * order
        if value <= most and math.sqrt(value / most) - math.sqrt(found[-1] / most) > 0.15:
            found.append(value)
    return found


def _lower_left(points: Sequence[Point]) -> list[Point]:
    """Those that are best in two dimensions, from the left: the edge that is drawn."""
    found: list[Point] = []
    for one in sorted(points, key=lambda point: (point.x, point.y)):
        if not found or one.y < found[-1].y:
            found.append(one)
    return found
