"""`nearfar top`: a live view of what a client's routes do."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from nearfar.errors import ConfigError, InvalidInput
from nearfar.units import format_ms
from sdk.records.board import Board, View
from sdk.records.ring import RingReader

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from nearfar.engines.condition import ConditionReader, DeviceCondition

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
        f"\ndevice: {describe(device)}",
        (f"   stalls {view.stalls}" if view.stalls else "", "bold red"),
        "\n",
    )
    last = Text("\n")
    for at_s, model, reason in view.last:
        last.append(f"{datetime.fromtimestamp(at_s):%H:%M:%S}  ", style="dim")
        last.append(f"{model}  {reason}\n")
    return Group(head, _table(view), last)


def _table(view: View) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    titles = ("model", "route", "taken", "expected p50", "p95", "p99", "answered", "measured p50",
              "p95", "p99", "queue", "ahead", "note")  # fmt: skip
    for title in titles:
        table.add_column(title, header_style="dim", justify="left" if title in
                         ("model", "route", "note") else "right")  # fmt: skip
    for row in view.rows:
        share = f"{row.chosen}/{row.considered}"
        cells = (
            row.model, row.route, share, format_ms(row.expected_p50_ms),
            format_ms(row.expected_p95_ms), format_ms(row.expected_p99_ms), str(row.answered),
            format_ms(row.p50_ms), format_ms(row.p95_ms), format_ms(row.p99_ms),
            format_ms(row.queue_p50_ms), str(row.ahead),
            row.note or ("" if row.basis == "measured" else row.basis),
        )  # fmt: skip
        table.add_row(*(Text(cell, style="" if row.chosen else "dim") for cell in cells))
    if not view.rows:
        table.add_row(Text("no decisions within the window", style="dim"))
    return table


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
