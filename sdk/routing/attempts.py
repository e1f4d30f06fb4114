"""Repair as a generator: yields an `Attempt`, receives its `Outcome`, ends on success.

    plan = attempts(decision, decide_again, at_s=deadline.at_s)
    attempt = next(plan)
    while True:
        outcome = ...                       # run attempt.route; Outcome(error=None) on success
        try:
            attempt = plan.send(outcome)    # raises the final NearfarError when nothing is left
        except StopIteration:
            break

`Client` and `AsyncClient` drive the same generator, so both repair alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator

import msgspec

from nearfar.errors import CloudUnavailable, DeadlineExceeded, NearfarError
from sdk.routing.budget import RetryBudget
from sdk.routing.types import Route, RouteDecision

# A route that just failed is tried once more when there is no other: a dropped connection is
# often a single event (server restart, change of network), and 100 ms outlives most of those.
SAME_ROUTE_DELAY_S = 0.1


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One try on one route.

    Attributes:
        number: 1, 2, 3 …
        route: Where to run it.
        decision: The decision that chose it.
        delay_s: Wait that long before starting (backoff); 0 for at once.
    """

    number: int
    route: Route
    decision: RouteDecision
    delay_s: float = 0.0


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How an attempt ended.

    Attributes:
        now_s: `time.monotonic()` when it ended.
        error: What went wrong; `None` for success.
        can_resume: `False` when output already reached the caller and another attempt could not
            continue it; then no further attempt is made.
    """

    now_s: float
    error: NearfarError | None = None
    can_resume: bool = True


DecideAgain = Callable[[tuple[Route, ...], float], RouteDecision]
"""Called with (routes that failed, now_s): asks policy and router again with fresh facts and
`DecisionInputs.failed` set."""


def attempts(
    first: RouteDecision,
    decide_again: DecideAgain,
    *,
    at_s: float = math.inf,
    max_attempts: int = 3,
    budget: RetryBudget | None = None,
) -> Generator[Attempt, Outcome, None]:
    """Yield attempts until one succeeds.

    After a retryable failure policy is asked again; the other route is taken when both this
    verdict and the first one allow it, so a repair never widens what the request began with.
    Without another route, a cloud that went away is tried once more. Where a decision names another
    endpoint than those that failed, that is another way: it is taken at once.

    Args:
        first: The decision the request started with.
        decide_again: Asks policy again before any further attempt.
        at_s: Absolute deadline, `Deadline.at_s`.
        max_attempts: Upper bound, the first one included.
        budget: Asked before a request goes to the clouds a second time; `None` for no bound.

    Raises:
        PolicyDenied: (and the others of `RouteDecision.raise_if_denied`) `first` has no route.
        DeadlineExceeded: The deadline passed before an attempt succeeded.
        NearfarError: The last attempt's error, when it is not retryable or nothing is left.
    """
    first.raise_if_denied()
    decision = first
    tried: list[Route] = []
    places: list[tuple[Route, str]] = []
    delay_s = 0.0
    if budget is not None:
        budget.request()
    while True:
        route = decision.route
        assert route is not None
        tried.append(route)
        places.append(_place(decision))
        outcome = yield Attempt(number=len(tried), route=route, decision=decision, delay_s=delay_s)
        error = outcome.error
        if error is None:
            return
        if not error.retryable or not outcome.can_resume:
            raise error
        if outcome.now_s >= at_s:
            raise _too_late(tried, error) from error
        if len(tried) >= max_attempts:
            raise error
        decision = decide_again(tuple(dict.fromkeys(tried)), outcome.now_s)
        route = decision.route
        if route is None or not first.verdict.allows(route):
            raise error
        delay_s = 0.0
        place = _place(decision)
        if place in places:
            went_away = place == places[-1] and isinstance(error, CloudUnavailable)
            if route != "cloud" or not went_away or tried.count(route) > 1:
                raise error
            delay_s = SAME_ROUTE_DELAY_S
            if outcome.now_s + delay_s >= at_s:
                raise _too_late(tried, error) from error
        # Going on here after the cloud failed costs nobody but this device.
        is_retry = route == "cloud" and "cloud" in tried
        if is_retry and budget is not None and not budget.withdraw(outcome.now_s):
            raise error


def _place(decision: RouteDecision) -> tuple[Route, str]:
    """Where an attempt runs: the device, or one of the clouds."""
    assert decision.route is not None
    return decision.route, decision.inputs.endpoint if decision.route == "cloud" else ""


def _too_late(tried: list[Route], error: NearfarError) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"The deadline passed before an answer was complete; tried {', then '.join(tried)}, "
        f"and the last attempt failed: {error.problem}",
        tried=tuple(tried),
        fix="Allow more time with deadline_ms",
    )
