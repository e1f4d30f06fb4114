"""Start the other route when the first one is late: when, how often, and whether at all.

After Dean and Barroso, "The Tail at Scale" (CACM 2013): a second request once the first has been
out for longer than most take costs a few percent of requests and cuts the tail off. Here the two
are not replicas of one another, so the moment also depends on what the second route would take.

Sans-IO. `plan` is a pure function of a decision and therefore part of what a decision record
tells; `Hedging` holds the budget and what switches hedging off.
"""

from __future__ import annotations

import math

import msgspec

from nearfar.units import format_ms
from sdk.routing.estimates import Quantiles, share_in_time
from sdk.routing.types import (
    HEDGE_BUDGET,
    DecisionInputs,
    Prediction,
    Route,
    RouteDecision,
    exclusion,
)

#: A quiet hour does not save up for a storm: at most so many hedges at once.
BURST = 10.0
# Tokens left below which a hedge waits for the 99th percentile instead of the 95th.
PLENTY = 3.0
# Without a deadline. Where all answers take about the same, a hair later than usual is no sign.
MARGIN, MARGIN_MS = 1.25, 5.0
# Nothing is known to expect: a person notices a second, and so may the router.
COLD_PATIENCE_MS = 1000.0
# A route that has been silent for t will on average be silent for as long again (heavy tails), so
# another one is worth starting when it would take at most twice as long as was waited.
PATIENCE = 0.5
# Least probability of saving the request that justifies a second one while the budget is full, and
# what it is worth when one hedge is left; in between in proportion to what is left.
MIN_GAIN, LAST_GAIN = 0.05, 0.5
# An answer at once is worth so much more than one just in time.
HASTE = 1.0
# A device that is slowed down as much as busy phones are would still be in time.
SLOWEST_DEVICE = 8.0
# Part of the requests that are never answered, for reasons that no quantile tells beforehand.
NEVER = 0.02
# A moment that is so close is now.
SOON_MS = 5.0
# After an `Overloaded` from either route more requests are the last thing that helps.
OVERLOAD_PAUSE_S = 5.0
# When so many of the last requests were late, lateness is a state, which the router handles.
OUTAGE_SHARE = 0.3
_OUTAGE_WEIGHT = 1.0 / 16.0
# A queue so many times as long as the work itself is an overload.
OVERLOAD_QUEUE = 3.0
# How long after its 99th percentile a silent route counts as stalled: a multiple of its spread.
STALL_SPREADS, STALL_LEAST_MS, STALL_MOST_MS = 3.0, 50.0, 500.0
COLD_STALL_MS = 1500.0


class HedgePlan(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """When the other route would be started for a request.

    Attributes:
        first: The route that was chosen.
        other: The one that would be started beside it.
        after_ms: Silence of the first one, from its start, after which it would be.
        why: That moment in words.
        is_counted: Whether it was taken note of that the first one is late.
    """

    first: Route
    other: Route
    after_ms: float
    why: str
    is_counted: bool = False


def plan(decision: RouteDecision) -> HedgePlan | None:
    """When to start the other route, if it may be started at all.

    It may when policy, mode and availability left both routes in the decision, neither failed for
    this request before, and the budget that the decision recorded has a hedge left.
    """
    inputs, first, other = decision.inputs, decision.route, decision.fallback
    if inputs.hedge_tokens < 1.0 or first is None or other is None or inputs.failed:
        return None
    expected, instead = inputs.state(first).prediction, inputs.state(other).prediction
    if _is_overloaded(instead) or _would_lose_quality(inputs, first, other):
        return None
    found = _moment(inputs, first, expected, instead)
    if found is None:
        return None
    return HedgePlan(first=first, other=other, after_ms=found[0], why=found[1])


def _moment(
    inputs: DecisionInputs, first: Route, expected: Prediction, instead: Prediction
) -> tuple[float, str] | None:
    remaining_ms = inputs.remaining_ms
    known, other = expected.first_answer(), instead.first_answer()
    if known is None:
        at_ms, why = COLD_PATIENCE_MS, "nothing was known to expect of it"
        if remaining_ms is not None:
            at_ms = min(at_ms, 0.5 * remaining_ms)
        return at_ms, why
    if remaining_ms is not None and other is not None:
        if first == "edge":
            if SLOWEST_DEVICE * known[3] <= remaining_ms:
                return None
            return _best_moment(inputs, expected, instead, silent_ms=0.0)
        # By then half of the answers have come; what has not is looked at again.
        if known[1] >= remaining_ms:
            return None
        return known[1], f"if it is worth it then; half come within {format_ms(known[1])}"
    if first == "edge":
        return None
    _, q50, _, q95, q99 = known
    if inputs.hedge_tokens >= PLENTY:
        at_ms, why = q95, f"95 of 100 come within {format_ms(q95)}"
    else:
        at_ms, why = q99, f"99 of 100 come within {format_ms(q99)}"
    at_ms = max(at_ms, MARGIN * q50 + MARGIN_MS)
    if other is not None and at_ms < PATIENCE * other[1]:
        at_ms = PATIENCE * other[1]
        why = f"the other route takes about {format_ms(other[1])}"
    return at_ms, why


def _best_moment(
    inputs: DecisionInputs, expected: Prediction, instead: Prediction, *, silent_ms: float
) -> tuple[float, str] | None:
    """When starting the other route is worth most, from the start of the first one.

    Started at `t`, a second request is paid for by all that are silent until then, and saves those
    that would have been late: ``P(T > d) P(other <= d - t) - price P(T > t)``.

    Args:
        inputs: Of the decision that is made now.
        expected: What was expected of the first route when it was started.
        instead: What is expected of the other one now.
        silent_ms: How long the first one has been silent.
    """
    known, other, left_ms = expected.first_answer(), instead.first_answer(), inputs.remaining_ms
    assert known is not None
    assert other is not None
    assert left_ms is not None
    end_ms = silent_ms + left_ms
    answers = 1.0 - max(expected.silence, NEVER)
    late = 1.0 - answers * (1.0 - outlasts(known, end_ms, expected.tail))
    price = max(MIN_GAIN, LAST_GAIN / inputs.hedge_tokens)
    best, found_ms = 0.0, None
    _, q50, q80, q95, q99 = known
    _, other50, other80, other95, other99 = other
    for at_ms in (
        0.0, q50, q80, q95, q99, 1.5 * q99, 2.0 * q99, 3.0 * q99, 5.0 * q99,
        end_ms - other99, end_ms - other95, end_ms - other80, end_ms - other50,
    ):  # fmt: skip
        moment_ms = max(at_ms, silent_ms)
        if moment_ms >= end_ms:
            continue
        likely = (1.0 - instead.silence) * share_in_time(other, end_ms - moment_ms)
        saved = max(0.0, (end_ms - moment_ms - other50) / end_ms)
        silent = 1.0 - answers * (1.0 - outlasts(known, moment_ms, expected.tail))
        worth = late * likely * (1.0 + HASTE * saved) - price * silent
        if worth > best + 1e-9:
            best, found_ms = worth, moment_ms
    if found_ms is None:
        return None
    return found_ms, "when the other route saves most deadlines"


def outlasts(known: Quantiles, limit_ms: float, tail: float) -> float:
    """Probability that a duration is longer than a limit.

    Beyond p95 the quantiles of what came say too little: an answer that waits for a link to come
    back does not follow them. There the tail is one of Pareto's, with an exponent that was learned.
    """
    longer = 1.0 - share_in_time(known, limit_ms)
    q95 = known[3]
    if limit_ms > q95 > 0.0:
        longer = max(longer, 0.05 * (q95 / limit_ms) ** tail)
    return longer


def _is_overloaded(prediction: Prediction) -> bool:
    service_ms = prediction.service_ms
    return service_ms is not None and prediction.queue_ms > OVERLOAD_QUEUE * service_ms


def _would_lose_quality(inputs: DecisionInputs, first: Route, other: Route) -> bool:
    """An app that wants quality and can wait is not given less of it for speed."""
    if inputs.objective in ("cost", "energy") and inputs.remaining_ms is None:
        return True  # nor is one that counts its money made to pay twice
    if inputs.objective != "quality" or inputs.remaining_ms is not None:
        return False
    here, there = inputs.state(first).quality_rank, inputs.state(other).quality_rank
    return here is not None and there is not None and there > here


def loses_quality(decision: RouteDecision) -> bool:
    """Whether its fallback would give an app that can wait less than it asked for."""
    first, other = decision.route, decision.fallback
    if first is None or other is None:
        return False
    return _would_lose_quality(decision.inputs, first, other)


def gain(first: Prediction, other: Prediction, *, silent_ms: float, left_ms: float | None) -> float:
    """Probability that starting the other route now saves the deadline.

    Args:
        first: What was expected of the route that is silent.
        other: What is expected of the other one now.
        silent_ms: How long the first one has been silent.
        left_ms: What is left of the deadline; without one, what is saved is the time.
    """
    if left_ms is None:
        return 1.0
    likely = 1.0 - other.silence
    in_time = other.first_answer()
    if in_time is not None:
        likely *= share_in_time(in_time, left_ms)
    known = first.first_answer()
    if known is None:
        return likely
    answers = 1.0 - max(first.silence, NEVER)
    silent = 1.0 - answers * (1.0 - outlasts(known, silent_ms, first.tail))
    late = 1.0 - answers * (1.0 - outlasts(known, silent_ms + left_ms, first.tail))
    return likely * late / max(silent, 1e-9)


def stalls_after_ms(prediction: Prediction) -> float:
    """Silence after which a route counts as stalled, from its start, in milliseconds.

    At most 0.5 s beyond what 99 of 100 answers stay within where that was measured, and 1.5 s
    where nothing is known.
    """
    known = prediction.first_answer()
    if known is None:
        return COLD_STALL_MS
    return suspicious_after_ms(known, is_measured=prediction.basis == "measured")


def suspicious_after_ms(known: Quantiles, *, is_measured: bool) -> float:
    """Silence that is none of the usual ones: well beyond what 99 of 100 stay within."""
    _, q50, _, _, q99 = known
    spread_ms = min(max(STALL_SPREADS * (q99 - q50), STALL_LEAST_MS), STALL_MOST_MS)
    after_ms = q99 + spread_ms
    return after_ms if is_measured else max(after_ms, COLD_STALL_MS)


class Hedging:
    """The budget of hedges, and what switches them off. Not locked: a race costs one hedge.

    Args:
        share: Extra requests that hedging may cause, as a part of all; 0 turns it off.
    """

    __slots__ = ("_late_share", "_overloaded_at_s", "_tokens", "share", "started")

    def __init__(self, share: float = HEDGE_BUDGET) -> None:
        self.share = share
        #: Hedges started so far.
        self.started = 0
        # One in advance: the first request may meet a server that is wedged already.
        self._tokens = 1.0 if share > 0.0 else 0.0
        self._late_share = 0.0
        self._overloaded_at_s = -math.inf

    def request(self) -> None:
        """A request comes, which earns its part of a hedge."""
        self._tokens = min(BURST, self._tokens + self.share)
        self._late_share -= _OUTAGE_WEIGHT * self._late_share

    def tokens(self, now_s: float) -> float:
        """Hedges that may be started now, for `DecisionInputs.hedge_tokens`; below 1 none."""
        if now_s - self._overloaded_at_s < OVERLOAD_PAUSE_S or self._late_share > OUTAGE_SHARE:
            return 0.0
        return self._tokens

    def overloaded(self, now_s: float) -> None:
        """A route refused a request because it has too many."""
        self._overloaded_at_s = now_s

    def stalled(self) -> None:
        """The other route is started because the first has stalled, whatever is left for that."""
        self._tokens = max(0.0, self._tokens - 1.0)
        self.started += 1

    def start(
        self, planned: HedgePlan, began: RouteDecision, again: RouteDecision
    ) -> str | HedgePlan | None:
        """The planned moment has come and there is no answer: start the other route?

        Args:
            planned: From `plan`, or from this.
            began: The decision that the attempt began with.
            again: What policy and router say now. Only if both allow the other route it is taken.

        Returns:
            Why it is started, in words; a later moment at which to ask again; `None` when it is not
            started at all.
        """
        other, inputs = planned.other, again.inputs
        first = began.inputs.state(planned.first).prediction
        instead = inputs.state(other).prediction
        known = first.first_answer()
        if not planned.is_counted and (known is None or planned.after_ms >= known[3]):
            self._late_share += _OUTAGE_WEIGHT
            planned = msgspec.structs.replace(planned, is_counted=True)
        if (
            self.share <= 0.0
            or inputs.hedge_tokens < 1.0
            or self._tokens < 1.0
            or not began.verdict.allows(other)
            or exclusion(other, inputs)
        ):
            return None
        if inputs.remaining_ms is None or known is None or instead.first_answer() is None:
            left_ms = inputs.remaining_ms
            if gain(first, instead, silent_ms=planned.after_ms, left_ms=left_ms) < MIN_GAIN:
                return None
        else:
            found = _best_moment(inputs, first, instead, silent_ms=planned.after_ms)
            if found is None:
                return None
            if found[0] > planned.after_ms + SOON_MS:
                return msgspec.structs.replace(planned, after_ms=found[0], why=found[1])
        self._tokens -= 1.0
        self.started += 1
        return (
            f"the {planned.first} had not answered after {format_ms(planned.after_ms)} "
            f"({planned.why})"
        )
