"""The attempts of one request: `sdk.routing.attempts`, answered by policy and router."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from sdk.results import RouteName
from sdk.routing import Attempt, Outcome, RouteDecision, attempts

if TYPE_CHECKING:
    from sdk.core import Core
    from sdk.requests import Request


def repair(core: Core, request: Request, first: RouteDecision) -> Generator[Attempt, Outcome, None]:
    """The attempts of one request, within its deadline and the budget of retries.

    Args:
        core: Of the client.
        request: What is asked for.
        first: The decision that it begins with.

    Raises:
        NearfarError: As `attempts`.
    """
    return attempts(
        first,
        _decide_again(core, request, first),
        at_s=request.deadline.at_s,
        max_attempts=core.max_attempts,
        budget=core.retries,
    )


def _decide_again(
    core: Core, request: Request, first: RouteDecision
) -> Callable[[tuple[RouteName, ...], float], RouteDecision]:
    """Policy is asked again before any other route is taken.

    Each decision that it gives is the next attempt, so the clouds that failed are those that the
    decisions so far named.
    """
    last = first
    left: tuple[str, ...] = ()

    def again(failed: tuple[RouteName, ...], now_s: float) -> RouteDecision:
        nonlocal last, left
        if last.route == "cloud":
            left = (*left, last.inputs.endpoint)
        # Without a retry left, a cloud that nobody asked yet is no way on either.
        spent = tuple(one.name for one in core.known.endpoints)
        others = left if core.retries.can_retry(now_s) else spent
        last = core.decide(request, failed, others)
        if core.record is not None:
            core.record(last)
        return last

    return again
