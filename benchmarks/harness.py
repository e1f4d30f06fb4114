"""What every benchmark shares: bars as data, fair turns, a report for people and for programs."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

import typer

T = TypeVar("T")

Direction = Literal["at_least", "at_most"]

#: Packages whose version can move a figure.
_PACKAGES = (
    "nearfar", "numpy", "msgspec", "websockets", "cryptography",
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "tokenizers",
)  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """One figure and the limit it must hold.

    Attributes:
        name: What was measured, as in the list of bars.
        value: The figure.
        limit: What it must reach, or not exceed.
        direction: Which of the two.
        unit: For people.
    """

    name: str
    value: float
    limit: float
    direction: Direction
    unit: str = ""

    @property
    def holds(self) -> bool:
        """Whether the figure is on the right side of the limit; a NaN never is."""
        if self.direction == "at_least":
            return self.value >= self.limit
        return self.value <= self.limit

    def __str__(self) -> str:
        sign = "≥" if self.direction == "at_least" else "≤"
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.name}: {self.value:.4g}{unit} (bar {sign} {self.limit:g}{unit})"


@dataclass(frozen=True)
class Report:
    """What one benchmark found.

    Attributes:
        benchmark: Its name, as on the command line.
        bars: Figures with a limit.
        figures: Further medians for people: name to text.
        samples: Raw measurements: name to values, with the unit in the name.
        settings: What it was run with, the seed among them.
    """

    benchmark: str
    bars: Sequence[Bar]
    figures: dict[str, str] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def short(self) -> list[Bar]:
        """Bars that are not held."""
        return [bar for bar in self.bars if not bar.holds]

    def to_json(self) -> str:
        """The report with versions and machine, for archives and comparisons."""
        bars = [{**asdict(bar), "holds": bar.holds} for bar in self.bars]
        content = {**asdict(self), "bars": bars, "environment": environment()}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def environment() -> dict[str, Any]:
    """What the figures depend on: versions and machine."""
    from nearfar.engines.devices import probe

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = probe()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "machine": device.machine,
        "cpu_flags": device.cpu_flags,
        "execution_providers": device.execution_providers,
        "versions": versions,
    }


def take_turns(
    contenders: dict[str, Callable[[], T]],
    rounds: int,
    *,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, list[T]]:
    """Run contenders in turns, forwards and backwards (A B, B A, …), and collect what they return.

    A machine that gets slower or busier meanwhile then hits all of them alike. Contenders warm up
    by themselves before.
    """
    found: dict[str, list[T]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            found[name].append(contenders[name]())
        on_round(number + 1)
    return found


def median(values: Sequence[float]) -> float:
    """Middle value; NaN for none, which holds no bar."""
    return statistics.median(values) if values else float("nan")


def finish(report: Report, *, json_path: Path | None, check: bool) -> None:
    """Print a report, save it, and end the command as ``--check`` asks.

    Raises:
        typer.Exit: With status 1 when `check` is set and a bar is not held.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, title=f"bench {report.benchmark}", title_justify="left")
    for column in ("", "measured", "bar", ""):
        table.add_column(column, justify="right" if column in ("measured", "bar") else "left")
    for bar in report.bars:
        sign = "≥" if bar.direction == "at_least" else "≤"
        verdict = "[green]holds[/]" if bar.holds else "[red]falls short[/]"
        table.add_row(
            bar.name, f"{bar.value:.4g} {bar.unit}", f"{sign} {bar.limit:g} {bar.unit}", verdict
        )
    for name, text in report.figures.items():
        table.add_row(f"[dim]{name}[/]", f"[dim]{text}[/]", "", "")
    console.print(table)
    if json_path is not None:
        json_path.write_text(report.to_json(), encoding="utf-8")
        console.print(f"[dim]raw figures: {json_path}[/]")
    if check and report.short:
        bars = "; ".join(str(bar) for bar in report.short)
        print(f"bench {report.benchmark} falls short: {bars}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(1)
