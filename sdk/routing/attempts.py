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

from nearfar.errors import NearfarError
from sdk.routing.types import Route, RouteDecision


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
) -> Generator[Attempt, Outcome, None]:
    """Yield attempts until one succeeds.

    Args:
        first: The decision the request started with; its verdict is never widened.
        decide_again: Asks policy again before any further attempt.
        at_s: Absolute deadline, `Deadline.at_s`.
        max_attempts: Upper bound, the first one included.

    Raises:
        PolicyDenied: (and the others of `RouteDecision.raise_if_denied`) `first` has no route.
        DeadlineExceeded: The deadline passed before an attempt succeeded.
        NearfarError: The last attempt's error, when it is not retryable or nothing is left.
    """
    raise NotImplementedError
    yield
