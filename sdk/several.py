"""A request of a client with several clouds: which one it goes to, and connecting to them.

Belongs to `sdk.core`; imported only where there is more than one cloud.
"""

from __future__ import annotations

import random
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from nearfar.units import Deadline
from sdk.cloud.endpoints import choose
from sdk.reaching import connect
from sdk.steps import Connect

if TYPE_CHECKING:
    from sdk.cloud.endpoints import Endpoint
    from sdk.core import Core
    from sdk.requests import Request

# Spreads requests over clouds; nothing secret hangs on it.
_RNG = random.Random()  # noqa: S311


def endpoint_for(core: Core, request: Request, left: tuple[str, ...], now_s: float) -> Endpoint:
    """The cloud that the cloud route means for this request, now.

    Args:
        core: Of the client.
        request: What is asked for.
        left: Clouds that failed for it.
        now_s: Monotonic time.
    """
    known, valuation, remaining_ms = core.known, core.valuation, request.deadline.remaining_ms()
    allowed: dict[tuple[object, ...], bool] = {}

    def allows(endpoint: Endpoint) -> bool:
        seen = (endpoint.region(), endpoint.shaping(), endpoint.attested())  # all that policy sees
        verdict = allowed.get(seen)
        if verdict is None:
            verdict = allowed[seen] = core.verdict(request, endpoint).cloud
        return verdict

    def in_time(endpoint: Endpoint) -> bool:
        state = known.cloud_state(request, known.size(request), now_s, endpoint)
        return state.prediction.probability_in_time(remaining_ms) >= core.confidence

    return choose(
        known.endpoints,
        model=request.model,
        allows=allows,
        serves=lambda endpoint: known.serves(request, endpoint),
        left=left,
        now_s=now_s,
        rng=_RNG,
        price=None if valuation is None else valuation.pricing(request, known),
        in_time=None if remaining_ms is None else in_time,
    )


def reach(core: Core, request: Request, *, has_edge: bool) -> Generator[Connect, Any, None]:
    """Connect to the clouds that policy allows for this request: one that can be used is waited for
    if there is none yet, and the others are connected to beside.

    Args:
        core: Of the client.
        request: What is asked for; nothing of it leaves.
        has_edge: Whether the device has the model.

    Raises:
        NearfarError: As `sdk.reaching.connect`.
    """
    if request.mode == "edge_only":
        return
    known = core.known
    allowed = [one for one in known.endpoints if core.verdict(request, one).cloud]
    away = [one for one in allowed if not one.link.state.is_connected]
    if not away:
        return
    now_s = time.monotonic()
    worth = tuple(one.name for one in away if one.breaker.can_try(now_s))
    if len(away) < len(allowed):
        fresh = tuple(name for name in worth if not known.is_reaching(name))
        if fresh:
            yield Connect(Deadline(), fresh, is_waited=False)
        return
    device_can = has_edge and any(core.verdict(request, one).edge for one in allowed)
    if device_can and (request.mode == "prefer_edge" or not worth):
        return
    names = worth or tuple(one.name for one in away)
    yield from connect(core, request, has_edge=has_edge, names=names)
