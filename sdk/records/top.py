"""`nearfar top`: a live view of what a client's routes do."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from nearfar.errors import ConfigError, InvalidInput
from nearfar.units import format_ms
from sdk.records.board import Board, View
from sdk.records.ring import RingReader

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from nearfar.engines.condition import ConditionReader, DeviceCondition

_QUANTILES = " p50  p95  p99"
_COLUMNS: tuple[tuple[str, Literal["left", "right"]], ...] = (
    ("\nmodel", "left"), ("\nroute", "left"), ("\ntaken", "right"),
    (f"expected, ms\n{_QUANTILES}", "right"), ("\nanswers", "right"),
    (f"measured, ms\n{_QUANTILES}", "right"), ("queue,\nms", "right"), ("\nahead", "right"),
)  # fmt: skip
_STYLE = {"closed": "green", "half_open": "yellow", "open": "bold red"}


def top(
    file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(
            metavar="[FILE]", help="File of [routing] record; without it, that of --config."
        ),
    ] = None,
    config: Annotated[Path, typer.Option("--config", "-c", help="Configuration file.")] = Path(
        "nearfar.toml"
    ),
    window_s: Annotated[float, typer.Option(help="How far back to look, in seconds.")] = 60.0,
    interval_s: Annotated[float, typer.Option(help="Between looks, in seconds.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print the view once, and end.")] = False,
    json: Annotated[bool, typer.Option("--json", help="With --once: as JSON.")] = False,
) -> None:
    """Watch a client decide: routes, quantiles, breaker, repairs, link, temperature.

    Reads the records that the client writes; the client is not asked and not slowed down.
    """
    for name, value in (("window_s", window_s), ("interval_s", interval_s)):
        if not 0 < value < 1e6:
            raise InvalidInput(f"{name} is {value}", field=name, fix="Give seconds, above 0")
    if json and not once:
        raise InvalidInput("--json shows one view", field="json", fix="Add --once")
    reader = RingReader(file or _file_of(config))
    board = Board(window_s)

    def look() -> View:
        board.add(reader.entries())
        return board.view(time.time())

    if once:
        _print_once(look(), json=json)
        return
    from rich.live import Live

    device = _device()
    with Live(render(look(), device.read()), screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval_s)
                live.update(render(look(), device.read()), refresh=True)
        except KeyboardInterrupt:
            return  # how a live view is left


def _device() -> ConditionReader:
    """What says how the device is on which `top` runs."""
    from nearfar.engines.condition import ConditionReader
    from nearfar.engines.devices import probe

    return ConditionReader(uses_gpu=probe().sm_arch is not None)


def render(view: View, device: DeviceCondition) -> RenderableType:
    """The view as rich draws it."""
    from rich.console import Group
    from rich.text import Text

    from nearfar.engines.condition import describe

    breaker = view.breaker or "—"
    failures = f" ({view.failures} failures)" if view.failures else ""
    rtt = format_ms(view.rtt_ms)
    bandwidth = view.bandwidth_mbit_per_s
    share = f"{100 * view.repairs / view.decisions:.1f} %" if view.decisions else "—"
    head = Text.assemble(
        ("nearfar top", "bold"),
        f"   {view.decisions_per_s:.1f} decisions/s   repairs {view.repairs} ({share})   "
        f"late {view.late}   no route {view.denied}\n",
        "cloud: breaker ",
        (breaker, _STYLE.get(view.breaker, "")),
        f"{failures}   round trip {rtt}   ",
        "bandwidth —" if bandwidth is None else f"bandwidth {bandwidth:.3g} Mbit/s",
        f"\nhedges left {_number(view.hedges_left)}   device: {describe(device)}",
        (f"   stalls {view.stalls}" if view.stalls else "", "bold red"),
        "\n",
    )
    last = Text()
    for at_s, model, reason in view.last:
        last.append(f"{datetime.fromtimestamp(at_s):%H:%M:%S}  ", style="dim")
        last.append(f"{model}  {reason}\n")
    return Group(head, _table(view), _notes(view), last)


def _table(view: View) -> Table:
    from rich.table import Table
    from rich.text import Text

    # Narrow enough for a terminal of 80 columns; what keeps a route out has a line of its own.
    table = Table(box=None, padding=(0, 1, 0, 0))
    for title, justify in _COLUMNS:
        table.add_column(
            Text(title), header_style="dim", justify=justify, no_wrap=True, overflow="ellipsis",
            min_width=len(title.split("\n")[-1]),
        )  # fmt: skip
    for row in view.rows:
        cells = (
            row.model, row.route, f"{row.chosen}/{row.considered}",
            _numbers(row.expected_p50_ms, row.expected_p95_ms, row.expected_p99_ms),
            str(row.answered), _numbers(row.p50_ms, row.p95_ms, row.p99_ms),
            _number(row.queue_p50_ms), str(row.ahead),
        )  # fmt: skip
        table.add_row(*(Text(cell, style="" if row.chosen else "dim") for cell in cells))
    if not view.rows:
        table.add_row(Text("no decisions within the window", style="dim"))
    return table


def _notes(view: View) -> Text:
    """What keeps routes out, or what their predictions rest on when nothing was measured."""
    from rich.text import Text

    notes = Text(style="dim")
    for row in view.rows:
        note = row.note or ("" if row.basis == "measured" else f"expected is {row.basis}")
        if note:
            notes.append(f"{row.model}, {row.route}: {note}\n")
    return notes


def _numbers(*milliseconds: float | None) -> str:
    return " ".join(f"{_number(value):>4}" for value in milliseconds)


def _number(value: float | None) -> str:
    """Four characters, as long as it is below ten seconds."""
    if value is None:
        return "—"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _print_once(view: View, *, json: bool) -> None:
    device = _device().read()
    if json:
        import msgspec

        facts = {**msgspec.structs.asdict(view), **msgspec.structs.asdict(device)}
        sys.stdout.write(msgspec.json.encode(facts).decode() + "\n")
        return
    from rich.console import Console

    Console(highlight=False).print(render(view, device))


def _file_of(config: Path) -> Path:
    from sdk.config_file import load_config

    record = load_config(config).routing.record
    if record is None:
        raise ConfigError(
            f"{config} has no [routing] record, so nothing is written down",
            field="routing.record",
            fix='Add record = "decisions.ring" to its [routing] section',
        )
    return record
