"""The report's first table, for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from converters.report.contents import Report
from converters.report.page import share
from nearfar.units import format_bytes, format_ms

_STYLES = {"packed": "green", "not taken": "blue", "refused": "red", "failed": "red"}
_PLOT = 8


def variants_table(report: Report) -> Table:
    """One row a variant, best first; the Pareto front is marked, and sizes are drawn."""
    most = max((one.size_bytes for one in report.variants), default=1) or 1
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in ("size", "p50", "lost"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", min_width=1)
    table.add_column("", min_width=_PLOT, no_wrap=True)
    table.add_column("", min_width=len("not taken"), no_wrap=True)
    order = sorted(report.variants, key=lambda one: (one.lost is None, one.lost or 0.0))
    for one in order:
        told = "taken" if one.outcome == "packed" else one.outcome
        style = _STYLES[one.outcome]
        table.add_row(
            Text(one.id, style="bold" if one.outcome == "packed" else ""),
            format_bytes(one.size_bytes) if one.size_bytes else "—",
            format_ms(one.latency_ms),
            share(one.lost),
            "●" if one.is_front else "",
            Text("▇" * round(_PLOT * one.size_bytes / most), style=style),
            Text(told, style=style),
        )
    table.caption = "● nothing else is at least as small, as fast and as good"
    table.caption_justify = "left"
    return table
