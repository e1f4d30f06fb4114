"""What all benchmarks share: bars as data, interleaved rounds, one report for people and programs.

A benchmark measures, makes a `Report`, and ends with `conclude`, so every ``nearfar bench NAME``
takes ``--json FILE`` and ``--check`` and means the same by them.
"""

from __future__ import annotations

import math
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from benchmarks.machine import Machine, load_average, this_machine, usable_cores, versions
from nearfar.errors import InvalidInput

if TYPE_CHECKING:
    from rich.table import Table

Direction = Literal["at_least", "at_most"]

#: Format of the JSON file; counts up when a field changes its meaning.
FORMAT_VERSION = 1


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """One promise about a figure, and the figure.

    Attributes:
        name: What is measured, unique in its report.
        value: What came out; NaN (nothing could be measured) falls short.
        limit: What was promised.
        direction: Whether the value must reach the limit or stay within it.
        unit: Unit of both; ``""`` for a ratio.
        lowest: Smallest value of a single round, so that the spread can be seen.
        highest: Largest value of a single round.
        is_decided: Whether the rounds agree enough to tell on which side of the limit the median
            lies (95 %). On a busy machine they may not; a bar that falls short then says so.
    """

    name: str
    value: float
    limit: float
    direction: Direction
    unit: str
    lowest: float = math.nan
    highest: float = math.nan
    is_decided: bool = True

    @property
    def is_met(self) -> bool:
        """Whether the promise holds."""
        if self.direction == "at_least":
            return self.value >= self.limit
        return self.value <= self.limit

    @property
    def promise(self) -> str:
        """The limit in words: ``at most 100 µs``."""
        return f"{self.direction.replace('_', ' ')} {format_value(self.limit, self.unit)}"

    def __str__(self) -> str:
        text = f"{self.name}: {format_value(self.value, self.unit)}, the bar is {self.promise}"
        return text if self.is_decided else text + " (noise: the rounds differ too much to be sure)"


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Samples in short. All in the unit of the figure."""

    count: int
    min: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """Summarise; quantiles are interpolated linearly.

        Raises:
            ValueError: There are no samples.
        """
        if not samples:
            raise ValueError("no samples to summarise")
        ordered = sorted(samples)
        return cls(
            count=len(ordered),
            min=ordered[0],
            p50=quantile(ordered, 0.5),
            p90=quantile(ordered, 0.9),
            p99=quantile(ordered, 0.99),
            max=ordered[-1],
        )


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """Something measured, with or without a bar on it.

    Attributes:
        name: What is measured.
        unit: Of all samples.
        summary: The samples in short.
        rounds: One value for each round, in the order they were measured; empty when the samples
            are single calls, which are too many to keep.
    """

    name: str
    unit: str
    summary: Summary
    rounds: tuple[float, ...] = ()

    @classmethod
    def of_rounds(cls, name: str, unit: str, rounds: Sequence[float]) -> Figure:
        """Figure that keeps its samples."""
        return cls(name=name, unit=unit, summary=Summary.of(rounds), rounds=tuple(rounds))

    @classmethod
    def of_calls(cls, name: str, unit: str, calls: Sequence[float]) -> Figure:
        """Figure that keeps only the summary of its samples."""
        return cls(name=name, unit=unit, summary=Summary.of(calls))

    def bar(self, limit: float, direction: Direction) -> Bar:
        """A bar on this figure's median."""
        return Bar(
            name=self.name,
            value=self.summary.p50,
            limit=limit,
            direction=direction,
            unit=self.unit,
            lowest=self.summary.min,
            highest=self.summary.max,
            is_decided=is_decided(self.rounds, limit),
        )


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one run of a benchmark found out.

    Attributes:
        bench: Its name, as in ``nearfar bench NAME``.
        seed: What the order of the sides was drawn from.
        settings: What it was asked to do, and on which models.
        bars: Promises, with what came out.
        figures: What was measured.
        machine: Where.
        versions: With which packages.
        started_at: When, in UTC.
        duration_s: How long it took.
        load_average: One-minute load before and after; figures of a busy machine say less.
    """

    bench: str
    seed: int
    settings: dict[str, str | int]
    bars: tuple[Bar, ...]
    figures: tuple[Figure, ...]
    machine: Machine
    versions: dict[str, str]
    started_at: str
    duration_s: float
    load_average: tuple[float | None, float | None]
    format_version: int = FORMAT_VERSION

    @property
    def short(self) -> tuple[Bar, ...]:
        """Bars that are not met."""
        return tuple(bar for bar in self.bars if not bar.is_met)

    def verdict(self) -> str:
        """One line: which bars fall short and by how much, or that none does."""
        if self.short:
            return f"{self.bench}: falls short: " + "; ".join(str(bar) for bar in self.short)
        return f"{self.bench}: all {len(self.bars)} bars are met"

    def to_json(self) -> bytes:
        """The report as indented JSON; each bar also says whether it is met."""
        tree = msgspec.to_builtins(self)
        for entry, bar in zip(tree["bars"], self.bars, strict=True):
            entry["is_met"] = bar.is_met
        return msgspec.json.format(msgspec.json.encode(tree), indent=2) + b"\n"


class Run:
    """One run of a benchmark: seeded order, clock, load. Make it before measuring anything."""

    def __init__(self, bench: str, *, seed: int = 0) -> None:
        self.bench = bench
        self.seed = seed
        self.random = random.Random(seed)
        self._started_at = datetime.now(timezone.utc)
        self._started_s = time.monotonic()
        self._load_before = load_average()

    def report(
        self,
        *,
        bars: Sequence[Bar],
        figures: Sequence[Figure],
        settings: Mapping[str, str | int],
    ) -> Report:
        """Close the run."""
        return Report(
            bench=self.bench,
            seed=self.seed,
            settings=dict(settings),
            bars=tuple(bars),
            figures=tuple(figures),
            machine=this_machine(),
            versions=versions(),
            started_at=self._started_at.isoformat(timespec="seconds"),
            duration_s=round(time.monotonic() - self._started_s, 3),
            load_average=(self._load_before, load_average()),
        )


def interleave(
    sides: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    random: random.Random,
    on_round: Callable[[], None] = lambda: None,
    max_rounds: int = 0,
    is_enough: Callable[[dict[str, list[float]]], bool] = lambda samples: True,
) -> dict[str, list[float]]:
    """Measure several sides in turn, so that what disturbs the machine disturbs them alike.

    In every round each side runs once. Which goes first alternates (A B, B A, A B, …) from an
    order that is drawn at random, so that drift within a round favours nobody.

    Args:
        sides: Name to a function that measures once and returns the sample.
        rounds: How many samples of each, at least.
        random: Draws the order of the first round.
        on_round: Called after each round, for progress.
        max_rounds: How many samples of each, at most, while `is_enough` says no.
        is_enough: Looks at the samples so far. It should ask whether the noise is small enough,
            never whether the outcome is pleasant.

    Returns:
        Name to samples; samples with the same index are from the same round.
    """
    order = list(sides)
    random.shuffle(order)
    samples: dict[str, list[float]] = {name: [] for name in sides}
    done = 0
    while done < rounds or (done < max_rounds and not is_enough(samples)):
        for name in order:
            samples[name].append(sides[name]())
        order.reverse()
        on_round()
        done += 1
    return samples


def per_round(
    combine: Callable[[float, float], float], one: Sequence[float], other: Sequence[float]
) -> list[float]:
    """Combine the samples of two sides round by round; the median of that is robust to drift."""
    return [combine(x, y) for x, y in zip(one, other, strict=True)]


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Interval that holds the true median in 95 of 100 cases, whatever the distribution.

    From the order statistics (binomial, normal approximation). Of fewer than six samples it is
    their whole range, which says less.
    """
    ordered = sorted(samples)
    count = len(ordered)
    half = 1.96 * math.sqrt(count) / 2
    low = max(0, math.floor(count / 2 - half))
    high = min(count - 1, math.ceil(count / 2 + half))
    return ordered[low], ordered[high]


def is_decided(samples: Sequence[float], limit: float) -> bool:
    """Whether the noise is small enough to say on which side of a limit the median lies."""
    low, high = median_interval(samples)
    return limit <= low or high < limit


def quantile(ordered: Sequence[float], q: float) -> float:
    """Quantile of samples in ascending order, interpolated linearly."""
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def format_value(value: float, unit: str) -> str:
    """Three significant digits, with the unit: ``0.972``, ``41.3 µs``."""
    digits = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{digits} {unit}".rstrip()


# -- the command line's part -----------------------------------------------------------------------


def check_json_path(path: Path | None) -> None:
    """Find out before minutes of measuring that the result could not be written.

    Raises:
        InvalidInput: The folder does not exist, or the path is a folder.
    """
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InvalidInput(
            f"The report cannot be written to {path}",
            field="--json",
            fix="Name a file in a folder that exists",
        )


@contextmanager
def progress(*, is_quiet: bool) -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """Show on standard error how far a benchmark is.

    Args:
        is_quiet: Show nothing where standard error is not a terminal; without it, such a place
            (a log) gets one line for each part.

    Yields:
        ``begin(title, steps)``, which starts a part and returns what to call after each step.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:

        def begin(title: str, steps: int) -> Callable[[], None]:
            if not console.is_terminal and not is_quiet:
                console.print(f"measuring: {title}", markup=False)
            task = bars.add_task(title, total=steps)
            return lambda: bars.advance(task)

        yield begin


def conclude(report: Report, *, json_path: Path | None, check: bool) -> None:
    """Write the JSON file and say what came out: a table, or with `check` one line.

    Raises:
        typer.Exit: Status 1, with `check` and a bar that is not met.
    """
    import typer

    if json_path is not None:
        json_path.write_bytes(report.to_json())
    if not check:
        print_tables(report)
        return
    typer.echo(report.verdict(), err=bool(report.short))
    if report.short:
        raise typer.Exit(1)


def print_tables(report: Report) -> None:
    """Print bars and figures as people read them."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    if report.bars:
        console.print(_bars_table(report.bars))
        console.print()
    console.print(_figures_table(report.figures))
    machine = report.machine
    flags = f" ({', '.join(machine.cpu_flags)})" if machine.cpu_flags else ""
    console.print()
    console.print(
        Text(
            f"{machine.logical_cores} cores of {machine.processor}{flags}; "
            f"Python {platform.python_version()}; seed {report.seed}; {report.duration_s:.0f} s",
            style="dim",
        )
    )
    note = load_note(report.load_average)
    if note:
        console.print(Text(note, style="yellow"))


def load_note(load: tuple[float | None, float | None]) -> str:
    """A sentence when the machine was busy before the benchmark began, else ``""``.

    The load after it says nothing: the benchmark itself keeps the cores busy.
    """
    before, cores = load[0], usable_cores()
    if before is None or before < 0.5 * cores:
        return ""
    return (
        f"The load average was {before:.1f} on {cores} cores before the first sample: other work "
        "took part. Ratios of interleaved rounds suffer least; absolute figures are too slow."
    )


def _bars_table(bars: Sequence[Bar]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="bars", title_justify="left", title_style="bold", box=None)
    table.add_column("")
    table.add_column("")
    for column in ("median", "bar", "rounds"):
        table.add_column(column, justify="right", no_wrap=True)
    for bar in bars:
        spread = ""
        if not math.isnan(bar.lowest):
            spread = f"{format_value(bar.lowest, '')} – {format_value(bar.highest, bar.unit)}"
        table.add_row(
            Text("✓", style="green") if bar.is_met else Text("✗", style="bold red"),
            Text(bar.name),
            Text(format_value(bar.value, bar.unit), style="bold"),
            Text(f"{'≥' if bar.direction == 'at_least' else '≤'} {format_value(bar.limit, '')}"),
            Text(spread),
        )
    return table


def _figures_table(figures: Sequence[Figure]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="figures", title_justify="left", title_style="bold", box=None)
    table.add_column("")
    for column in ("unit", "min", "p50", "p90", "p99", "max", "samples"):
        table.add_column(column, justify="left" if column == "unit" else "right", no_wrap=True)
    for figure in figures:
        seen = figure.summary
        cells = [format_value(x, "") for x in (seen.min, seen.p50, seen.p90, seen.p99, seen.max)]
        table.add_row(Text(figure.name), figure.unit, *cells, str(seen.count))
    return table
