"""What `nearfar explain` shows of decisions: a table for people, JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from sdk.routing.hedging import plan

if TYPE_CHECKING:
    from sdk.routing import Candidate, RouteDecision


def print_json(decision: RouteDecision, others: Sequence[RouteDecision]) -> None:
    """Write one JSON object to standard output.

    Args:
        decision: The one that holds.
        others: The same request with each other cloud.
    """
    error, planned, verdict = decision.error(), plan(decision), decision.verdict
    inputs = decision.inputs
    facts: dict[str, Any] = {
        "model": inputs.model,
        "route": decision.route,
        "endpoint": inputs.endpoint if decision.route == "cloud" else None,
        "fallback": decision.fallback,
        "meets_deadline": decision.meets_deadline,
        "reason": decision.reason,
        "error": None if error is None else {"code": error.code, "problem": error.problem},
        "hedge": None if planned is None else msgspec.structs.asdict(planned),
        "policy": {
            "edge": verdict.edge,
            "cloud": verdict.cloud,
            "rules": verdict.rule_ids,
            "reason": verdict.reason,
            "hash": verdict.policy_hash,
        },
        "asked": {
            "sensitivity": inputs.sensitivity,
            "mode": inputs.mode,
            "objective": inputs.objective,
            "weights": inputs.weights,
            "remaining_ms": inputs.remaining_ms,
            "confidence": inputs.confidence,
            **msgspec.structs.asdict(inputs.size),
        },
        "candidates": [_facts(one, candidate) for one, candidate in _candidates(decision, others)],
    }
    sys.stdout.write(msgspec.json.encode(facts).decode() + "\n")


def _facts(decision: RouteDecision, candidate: Candidate) -> dict[str, Any]:
    state = decision.inputs.state(candidate.route)
    return {
        "route": candidate.route,
        "endpoint": decision.inputs.endpoint if candidate.route == "cloud" else None,
        "eligible": candidate.is_eligible,
        "note": candidate.note,
        "detail": state.detail,
        "probability": candidate.probability,
        "meets_deadline": candidate.meets_deadline,
        "ahead": state.ahead,
        "quality_rank": state.quality_rank,
        "quality": state.quality,
        "cost": state.cost,
        "energy_j": state.energy_j,
        "prediction": msgspec.structs.asdict(candidate.prediction),
    }


def print_table(decision: RouteDecision, others: Sequence[RouteDecision]) -> None:
    """Print the decision with all routes to the terminal; arguments as `print_json`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from nearfar.units import format_ms

    console = Console(highlight=False)
    console.print(Text(f"{decision.route or 'no route'}", style="bold"), end="  ")
    console.print(Text(decision.reason.removeprefix(f"{decision.route}: ")))
    shown = _candidates(decision, others)
    states = [one.inputs.state(candidate.route) for one, candidate in shown]
    extras = [
        (title, [getattr(state, name) for state in states], form)
        for title, name, form in (
            ("quality", "quality", "{:.4g}"),
            ("costs", "cost", "{:.3g}"),
            ("energy", "energy_j", "{:.3g} J"),
        )
    ]
    extras = [extra for extra in extras if any(value is not None for value in extra[1])]
    has_deadline = decision.inputs.remaining_ms is not None
    table = Table(box=None, padding=(0, 2, 0, 0))
    titles = ["route", "may take part", "about", "19 of 20 within"]
    titles += ["in time"] if has_deadline else []
    for title in (*titles, *(extra[0] for extra in extras), "known from", "note"):
        # In a narrow terminal words give way, figures and names do not.
        table.add_column(title, header_style="dim", no_wrap=title in ("route", "costs", "energy"))
    for row, (one, candidate) in enumerate(shown):
        is_chosen = one is decision and candidate.route == decision.route
        late = "" if candidate.meets_deadline else " (too late)"
        name = candidate.route
        endpoint = one.inputs.endpoint
        cells = [
            f"{name} {endpoint}" if others and name == "cloud" else name,
            "yes" if candidate.is_eligible else "no",
            format_ms(candidate.prediction.p50_ms),
            f"{format_ms(candidate.prediction.p95_ms)}{late}",
        ]
        if has_deadline:
            is_known = candidate.prediction.p50_ms is not None
            cells.append(f"{100 * candidate.probability:.1f} %" if is_known else "—")
        for _, values, form in extras:
            value = values[row]
            cells.append("—" if value is None else form.format(value))
        detail = states[row].detail
        note = f"{candidate.note} ({detail})" if detail else candidate.note
        cells += [candidate.prediction.basis, note]
        table.add_row(*(Text(cell) for cell in cells), style="bold" if is_chosen else "")
    console.print(table)
    planned = plan(decision)
    if planned is not None:
        console.print(
            Text(
                f"hedge: {planned.other} as well after {format_ms(planned.after_ms)} of silence "
                f"({planned.why})"
            )
        )
    verdict = decision.verdict
    rules = ", ".join(verdict.rule_ids) or "none"
    console.print(Text(f"policy: {verdict.reason} (rules: {rules})", style="dim"))


def _candidates(
    decision: RouteDecision, others: Sequence[RouteDecision]
) -> list[tuple[RouteDecision, Candidate]]:
    """Both routes of the decision, and the cloud route of each other one."""
    return [
        *((decision, candidate) for candidate in decision.candidates),
        *((other, other.candidates[1]) for other in others),
    ]
