"""`nearfar replay`: decide recorded decisions again."""

from __future__ import annotations

import sys
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from nearfar.errors import InvalidInput
from nearfar.units import format_bytes, format_ms
from sdk.records.entries import Decided
from sdk.records.ring import RingReader
from sdk.records.whatif import Comparison, WhatIf, compare

if TYPE_CHECKING:
    from sdk.routing import RouteDecision


def replay(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help='File of [routing] record = "FILE".')
    ],
    deadline_ms: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="What if so much time had been left; inf for no deadline."),
    ] = None,
    rtt_ms: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="What if the link had had this round trip."),
    ] = None,
    bandwidth: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="What if the link had had this bandwidth, in Mbit/s."),
    ] = None,
    confidence: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="What if routes had to be in time with this probability."),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Only decisions about this model."),
    ] = None,
    last: Annotated[int, typer.Option(help="Show at most so many, the latest; 0 for all.")] = 20,
    changed: Annotated[
        bool, typer.Option("--changed", help="Show only those that would go elsewhere.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Decide recorded decisions again, and ask what would have been.

    Exit status 1 when a decision is not reproduced: another version of the router wrote it.
    """
    what_if = WhatIf(
        deadline_ms=deadline_ms,
        rtt_ms=rtt_ms,
        bandwidth_mbit_per_s=bandwidth,
        confidence=confidence,
    )
    if changed and what_if.is_nothing:
        raise InvalidInput(
            "--changed shows what would go elsewhere if something were different",
            field="changed",
            fix="Give --deadline-ms, --rtt-ms, --bandwidth or --confidence with it",
        )
    if last < 0:
        raise InvalidInput(f"last is {last}", field="last", fix="It must be 0 or more")
    reader = RingReader(file)
    compared = [
        compare(entry, what_if)
        for entry in reader.entries()
        if isinstance(entry, Decided) and model in (None, entry.decision.inputs.model)
    ]
    shown = [one for one in compared if one.is_changed or not changed]
    shown = shown[-last:] if last else shown
    if json:
        _print_json(shown)
    else:
        _print_tables(compared, shown, what_if, reader.damaged)
    if not all(one.is_reproduced for one in compared):
        raise SystemExit(1)


def _print_json(shown: list[Comparison]) -> None:
    import msgspec

    for one in shown:
        facts: dict[str, Any] = {
            "at": _when(one),
            "model": one.record.decision.inputs.model,
            "reproduced": one.is_reproduced,
            "recorded": _facts(one.record.decision),
            "inputs": msgspec.to_builtins(_named(one.record.decision.inputs)),
        }
        if not one.is_reproduced:
            facts["again"] = _facts(one.again)
        if one.what_if is not None:
            facts["changed"] = one.is_changed
            facts["what_if"] = _facts(one.what_if)
        sys.stdout.write(msgspec.json.encode(facts).decode() + "\n")


def _named(value: Any) -> Any:
    """Structs as objects with names, though they are encoded as arrays."""
    import msgspec

    if isinstance(value, msgspec.Struct):
        return {name: _named(getattr(value, name)) for name in type(value).__struct_fields__}
    return value


def _facts(decision: RouteDecision) -> dict[str, Any]:
    return {
        "route": decision.route,
        "fallback": decision.fallback,
        "meets_deadline": decision.meets_deadline,
        "reason": decision.reason,
    }


def _print_tables(
    compared: list[Comparison], shown: list[Comparison], what_if: WhatIf, damaged: int
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if shown:
        table = Table(box=None, padding=(0, 2, 0, 0))
        titles = ["at", "model", "size", "left", "edge", "cloud", "route"]
        for title in (*titles, *([] if what_if.is_nothing else ["what if"])):
            table.add_column(title, header_style="dim", no_wrap=title in ("route", "what if"))
        for one in shown:
            inputs = one.record.decision.inputs
            cells = [
                _when(one)[11:19],
                inputs.model,
                format_bytes(inputs.size.upload_bytes),
                format_ms(inputs.remaining_ms),
                format_ms(inputs.edge.prediction.p50_ms),
                format_ms(inputs.cloud.prediction.p50_ms),
                _route(one.record.decision) + ("" if one.is_reproduced else " (not reproduced)"),
            ]
            if one.what_if is not None:
                cells.append(_route(one.what_if))
            style = "bold" if one.is_changed else ""
            table.add_row(*(Text(cell, style=style) for cell in cells))
        console.print(table)
    same = sum(one.is_reproduced for one in compared)
    console.print(Text(f"{len(compared)} decisions, {same} reproduced bit by bit"), end="")
    console.print(Text(f", {damaged} damaged records left out" if damaged else ""))
    console.print(Text(f"as recorded: {_counts(one.record.decision for one in compared)}"))
    if not what_if.is_nothing:
        whats = [one.what_if for one in compared if one.what_if is not None]
        moved = sum(one.is_changed for one in compared)
        console.print(Text(f"what if:     {_counts(whats)}; {moved} would go elsewhere"))


def _counts(decisions: Any) -> str:
    decisions = list(decisions)
    routes = Counter(decision.route or "no route" for decision in decisions)
    in_time = sum(decision.meets_deadline for decision in decisions if decision.route)
    parts = [f"{count} {route}" for route, count in sorted(routes.items())]
    return f"{', '.join(parts) or 'none'}; {in_time} expected in time"


def _route(decision: RouteDecision) -> str:
    late = "" if decision.meets_deadline or decision.route is None else ", late"
    return f"{decision.route or 'none'}{late}"


def _when(one: Comparison) -> str:
    return datetime.fromtimestamp(one.record.at_s, timezone.utc).isoformat(timespec="milliseconds")
