"""What the laboratory found out, as one page that needs no script, no font and no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from benchmarks.routing.bench import ADAPTIVE, ORACLE, Outcome
from benchmarks.routing.policies import OURS

_LABEL, _PLOT, _ROW, _GAP = 190, 520, 20, 34
_COLOURS = {OURS: "#2563eb", ORACLE: "#16a34a"}
_OTHER = "#94a3b8"


def write_page(outcomes: Sequence[Outcome], folder: Path) -> Path:
    """Write ``routing.html`` with a chart of attainment and one of the p95 for each scenario.

    Raises:
        OSError: The folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "routing.html"
    parts = [
        "<!doctype html><meta charset=utf-8><title>nearfar bench routing</title>"
        "<style>body{font:14px system-ui,sans-serif;max-width:860px;margin:2em auto}"
        "text{font:12px system-ui,sans-serif;fill:currentColor}"
        "@media (prefers-color-scheme:dark){body{background:#0f172a;color:#e2e8f0}}</style>"
        "<h1>Routing policies in simulated worlds</h1>"
        "<p>Bars are means over the seeds; the thin line spans them. A request that was missed "
        "counts with its deadline.</p>"
    ]
    for outcome in outcomes:
        scenario = outcome.scenario
        parts.append(
            f"<h2>{escape(scenario.name)}</h2><p>{scenario.group}, "
            f"{scenario.use.replace('_', ' ')}, {scenario.arrivals} arrivals</p>"
        )
        parts.append(chart(outcome, "attainment", "answered in time, %"))
        parts.append(chart(outcome, "p95_ms", "p95, ms"))
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def chart(outcome: Outcome, field: str, title: str) -> str:
    """Horizontal bars: one policy each, the best fixed rule named."""
    best = outcome.best_static
    names = list(dict.fromkeys(("edge only", "cloud only", best, *ADAPTIVE)))
    values = {name: [getattr(score, field) for score in outcome.scores[name]] for name in names}
    most = max(max(each) for each in values.values()) or 1.0
    height = _GAP + _ROW * len(names)
    lines = [
        f'<svg viewBox="0 0 {_LABEL + _PLOT + 80} {height}" role="img" '
        f'aria-label="{escape(title, quote=True)}"><text x="{_LABEL}" y="16">{escape(title)}</text>'
    ]
    for row, name in enumerate(names):
        y = _GAP - 8 + row * _ROW
        mean = outcome.mean(name, field)
        low, high = (_LABEL + _PLOT * v / most for v in (min(values[name]), max(values[name])))
        label = f"{name} (best static)" if name == best else name
        lines.append(
            f'<text x="{_LABEL - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>'
            f'<rect x="{_LABEL}" y="{y}" width="{_PLOT * mean / most:.1f}" height="14" rx="3" '
            f'fill="{_COLOURS.get(name, _OTHER)}"/>'
            f'<path d="M{low:.1f} {y + 7}H{high:.1f}" stroke="currentColor"/>'
            f'<text x="{high + 8:.1f}" y="{y + 12}">{mean:.1f}</text>'
        )
    return "".join([*lines, "</svg>"])
