"""What the last minute of records says about routes, for `nearfar top`. No I/O."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

import msgspec

from sdk.records.entries import Decided, Entry, Finished, Stalled
from sdk.routing.types import ROUTES, Route, exclusion

#: As many as a ring holds.
_MAX_ENTRIES = 4096


class RouteRow(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one route, within the window.

    Attributes:
        model: Name of the model.
        route: Which route.
        chosen: Decisions that took it.
        considered: Decisions about the model.
        expected_p50_ms: As last predicted; `None` when unknown.
        expected_p95_ms: As last predicted.
        expected_p99_ms: As last predicted.
        basis: What the prediction rests on.
        answered: Attempts that answered.
        p50_ms: Of the attempts that answered; `None` when there were none.
        p95_ms: Likewise.
        p99_ms: Likewise.
        queue_p50_ms: Their median wait for a slot.
        ahead: Requests running or waiting there, at the last decision.
        note: What kept the route out of the last decision, ``""`` for nothing.
    """

    model: str
    route: Route
    chosen: int
    considered: int
    expected_p50_ms: float | None
    expected_p95_ms: float | None
    expected_p99_ms: float | None
    basis: str
    answered: int
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    queue_p50_ms: float | None
    ahead: int
    note: str


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What `nearfar top` shows at one moment.

    Attributes:
        decisions: Within the window.
        decisions_per_s: Over the part of the window that has records.
        repairs: Decisions after a failure, which cost an extra attempt each.
        denied: Decisions that found no route.
        late: Decisions for a route that was not expected in time.
        stalls: Engines of the device that stalled.
        rtt_ms: The link's round trip; `None` before the first decision.
        bandwidth_mbit_per_s: The link's bandwidth.
        breaker: State of the circuit breaker.
        failures: Failures of the cloud in a row.
        hedges_left: Extra requests that the budget of hedging had left at the last decision; `None`
            before the first one.
        rows: One for each model and route that had a part in a decision.
        last: The last decisions, newest first: Unix time, model, reason.
    """

    decisions: int
    decisions_per_s: float
    repairs: int
    denied: int
    late: int
    stalls: int
    rtt_ms: float | None
    bandwidth_mbit_per_s: float | None
    breaker: str
    failures: int
    hedges_left: float | None
    rows: tuple[RouteRow, ...]
    last: tuple[tuple[float, str, str], ...]


class Board:
    """Records of the last while.

    Args:
        window_s: How long a record counts.
    """

    def __init__(self, window_s: float = 60.0) -> None:
        self.window_s = window_s
        self._entries: deque[Entry] = deque(maxlen=_MAX_ENTRIES)
        self._newest: Decided | None = None

    def add(self, entries: Iterable[Entry]) -> None:
        """Take records in, the oldest first."""
        for entry in entries:
            self._entries.append(entry)
            if isinstance(entry, Decided):
                self._newest = entry

    def view(self, now_s: float) -> View:
        """What they say now, Unix time."""
        while self._entries and self._entries[0].at_s < now_s - self.window_s:
            self._entries.popleft()
        decided = [entry for entry in self._entries if isinstance(entry, Decided)]
        finished = [entry for entry in self._entries if isinstance(entry, Finished)]
        newest = self._newest
        moment = None if newest is None else newest.moment
        span_s = min(self.window_s, max(1.0, now_s - decided[0].at_s)) if decided else 1.0
        return View(
            decisions=len(decided),
            decisions_per_s=len(decided) / span_s,
            repairs=sum(bool(entry.decision.inputs.failed) for entry in decided),
            denied=sum(entry.decision.route is None for entry in decided),
            late=sum(
                entry.decision.route is not None and not entry.decision.meets_deadline
                for entry in decided
            ),
            stalls=sum(isinstance(entry, Stalled) for entry in self._entries),
            rtt_ms=None if moment is None else moment.delay_ms,
            bandwidth_mbit_per_s=None
            if moment is None or moment.ms_per_byte <= 0
            else 1.0 / (moment.ms_per_byte * 125.0),
            breaker="" if moment is None else moment.breaker,
            failures=0 if moment is None else moment.failures,
            hedges_left=None if newest is None else newest.decision.inputs.hedge_tokens,
            rows=tuple(_rows(decided, finished)),
            last=tuple(
                (entry.at_s, entry.decision.inputs.model, entry.decision.reason)
                for entry in reversed(decided[-8:])
            ),
        )


def _rows(decided: list[Decided], finished: list[Finished]) -> Iterable[RouteRow]:
    latest = {entry.decision.inputs.model: entry.decision.inputs for entry in decided}
    considered = Counter(entry.decision.inputs.model for entry in decided)
    chosen = Counter((entry.decision.inputs.model, entry.decision.route) for entry in decided)
    for model in sorted(latest):
        inputs = latest[model]
        for route in ROUTES:
            state = inputs.state(route)
            note = exclusion(route, inputs)
            if state.obstacle == "not_configured":
                continue
            answers = [f for f in finished if (f.model, f.route) == (model, route)]
            totals = sorted(answer.total_ms for answer in answers)
            prediction = state.prediction
            yield RouteRow(
                model=model,
                route=route,
                chosen=chosen[model, route],
                considered=considered[model],
                expected_p50_ms=prediction.p50_ms,
                expected_p95_ms=prediction.p95_ms,
                expected_p99_ms=prediction.p99_ms,
                basis=prediction.basis,
                answered=len(answers),
                p50_ms=_quantile(totals, 0.5),
                p95_ms=_quantile(totals, 0.95),
                p99_ms=_quantile(totals, 0.99),
                queue_p50_ms=_quantile(sorted(answer.queue_ms for answer in answers), 0.5),
                ahead=state.ahead,
                note=f"{note}: {state.detail}" if note and state.detail else note,
            )


def _quantile(ordered: list[float], level: float) -> float | None:
    """The nearest rank."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, int(level * len(ordered)))]
