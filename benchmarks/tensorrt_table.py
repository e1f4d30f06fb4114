"""The table of `nearfar bench tensorrt`: every graph, whether TensorRT takes it, and why not."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.tensorrt import Answer, TensorrtReport
from nearfar.units import format_bytes


def show(found: TensorrtReport) -> None:
    """Print it."""
    table = Table(box=None)
    for column in ("graph", "as it is", "repaired", "engine", "build", "why not"):
        table.add_column(column, justify="right" if column in ("engine", "build") else "left")
    for answer in found.answers:
        table.add_row(*_row(answer))
    Console(highlight=False).print(table)


def _row(answer: Answer) -> tuple[str | Text, ...]:
    verdict = answer.verdict
    yes, no = Text("taken", style="green"), Text("refused", style="red")
    repaired: Text | str = ""
    if verdict is not None and not verdict.accepted and verdict.fixed_accepted is not None:
        repaired = yes if verdict.fixed_accepted else no
    has_engine = verdict is not None and verdict.engine_bytes > 0
    return (
        answer.graph,
        yes if answer.is_taken else no,
        repaired,
        format_bytes(verdict.engine_bytes) if verdict is not None and has_engine else "",
        f"{verdict.build_s:.1f} s" if verdict is not None and has_engine else "",
        Text(answer.reason),
    )
