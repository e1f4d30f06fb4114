"""Whether a request waits for a connection to the cloud, and for how long.

Belongs to `sdk.core`. A device that can answer does not wait for a cloud that is away: connecting
is then begun, and whoever asks once it has succeeded may go there.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from nearfar.errors import CloudUnavailable, ConfigError, DeadlineExceeded, SecurityError
from nearfar.units import Deadline
from sdk.steps import Connect

if TYPE_CHECKING:
    from sdk.core import Core
    from sdk.requests import Request
    from sdk.routing import Attempt

#: How long the device waits for a connection that may well come: some six round trips of a mobile
#: link. A cloud that says nothing at all would be waited for until connecting times out.
PATIENCE_S = 1.0
#: Part of the time left that connecting may take while the device could answer instead.
_SHARE = 0.5


def is_needed(core: Core, request: Request, *, has_edge: bool) -> bool:
    """Whether a request of a client with one cloud may need a connection that is not there.

    Args:
        core: Of the client.
        request: What is asked for.
        has_edge: Whether the device has the model.
    """
    known = core.known
    if known.link is None or known.link.state.is_connected or request.mode == "edge_only":
        return False
    verdict = core.verdict(request, known.endpoints[0])
    if not verdict.cloud:
        return False
    device_can = has_edge and verdict.edge
    if request.mode == "prefer_edge" and device_can:
        return False
    return not device_can or known.breaker.can_try(time.monotonic())


def connect(
    core: Core, request: Request, *, has_edge: bool, names: tuple[str, ...] = ()
) -> Generator[Connect, Any, None]:
    """Connect before the decision is made; a device that can answer waits only a moment.

    Args:
        core: Of the client.
        request: What is asked for; nothing of it leaves.
        has_edge: Whether the device has the model.
        names: Clouds to connect to, where there are several.

    Raises:
        SecurityError, ConfigError: Somebody must look at it.
        CloudUnavailable, DeadlineExceeded: It cannot be reached, and the device cannot answer.
    """
    deadline = request.deadline
    may_give_up = (
        has_edge
        and request.mode != "cloud_only"
        and core.verdict(request, core.known.endpoints[0]).edge
    )
    if may_give_up:
        now_s = time.monotonic()
        at_s = worth_waiting_until_s(core, names, now_s)
        if at_s <= now_s:
            yield Connect(Deadline(), names, is_waited=False)
            return
        if deadline.is_set:
            at_s = min(at_s, now_s + deadline.remaining_s() * _SHARE)
        deadline = Deadline(at_s)
    try:
        yield Connect(deadline, names)
    except (SecurityError, ConfigError):
        raise  # somebody must look at this; it is not bad weather
    except (CloudUnavailable, DeadlineExceeded):
        request.deadline.check("cloud")
        if not may_give_up:
            raise


def board(
    core: Core, request: Request, attempt: Attempt, name: str
) -> Generator[Connect, Any, None]:
    """Connect for an attempt that goes to the cloud of that name.

    Raises:
        CloudUnavailable: It cannot be reached; or it is away, and the device can answer instead.
        DeadlineExceeded, SecurityError, ConfigError: As `connect`.
    """
    if attempt.decision.fallback != "edge":
        yield Connect(request.deadline, (name,))
        return
    now_s = time.monotonic()
    until_s = worth_waiting_until_s(core, (name,), now_s)
    if until_s > now_s:
        try:
            yield Connect(Deadline(min(until_s, request.deadline.at_s)), (name,))
        except DeadlineExceeded:
            request.deadline.check("cloud")
        else:
            return
    else:
        yield Connect(Deadline(), (name,), is_waited=False)
    raise CloudUnavailable(
        f"There is no connection to the cloud {name!r} yet",
        fix="The device answers until there is one; nearfar doctor says what is wrong",
    )


def worth_waiting_until_s(core: Core, names: Sequence[str], now_s: float) -> float:
    """Until when a request that the device can answer waits for a connection: not at all when the
    last attempt failed, and no longer than a moment after one began.

    Args:
        core: Of the client.
        names: Clouds that are connected to; without any, all.
        now_s: Monotonic time; what is given is not before.
    """
    until_s = now_s
    for one in core.known.endpoints:
        if (not names or one.name in names) and not one.link.is_away:
            since_s = one.link.reaching_since_s
            until_s = max(until_s, (now_s if since_s is None else since_s) + PATIENCE_S)
    return until_s
