"""What becomes of a job whose try failed, and how long the cloud is left alone; no I/O."""

from __future__ import annotations

import random

import msgspec

from nearfar.errors import (
    CloudUnavailable,
    DeadlineExceeded,
    NearfarError,
    Overloaded,
    PolicyDenied,
    RemoteProtocolError,
)
from sdk.jobs.store import JobStatus

#: Tries that fail for another reason than the link's or the load's: an engine that fails five times
#: over hours fails for good.
MAX_TRIES = 5
#: A job that was running each time that its process died, so often, is taken to have killed it. Not
#: fewer: devices lose their power, and apps are stopped without a goodbye.
MAX_LOST = 10
#: Pauses grow from the first to the last; a link that comes back is noticed within a minute, and a
#: radio that sleeps is woken once in one.
FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0


class Later(msgspec.Struct, frozen=True, kw_only=True):
    """Try again.

    Attributes:
        counts: Whether the try counts against `MAX_TRIES`.
        pause_s: Not before.
    """

    counts: bool
    pause_s: float


class End(msgspec.Struct, frozen=True, kw_only=True):
    """The job has ended like that."""

    status: JobStatus


def after(error: NearfarError, *, deferrable: bool, tries: int) -> Later | End:
    """What becomes of a job whose try failed.

    Args:
        error: Why it failed.
        deferrable: Whether the job waits for a route.
        tries: Earlier tries that counted.
    """
    if isinstance(error, PolicyDenied):
        return End(status="denied")
    if not deferrable:
        return End(status="failed")
    waits = isinstance(error, (CloudUnavailable, Overloaded))
    if waits and not isinstance(error, RemoteProtocolError):
        return Later(counts=False, pause_s=FIRST_PAUSE_S)
    if not (error.retryable or isinstance(error, DeadlineExceeded)) or tries + 1 >= MAX_TRIES:
        return End(status="failed")
    return Later(counts=True, pause_s=min(MAX_PAUSE_S, FIRST_PAUSE_S * 4.0**tries))


class Pace:
    """How long jobs that need the cloud are held back while it cannot be reached.

    One job tries; the others would only wait for the same.

    Args:
        chance: Source of the jitter, so that devices that lost the same cloud do not return to it
            at the same moment.
    """

    def __init__(self, chance: random.Random | None = None) -> None:
        self._chance = chance or random.Random()  # noqa: S311 - spreads load, hides nothing
        self._failures = 0
        self.until_s = 0.0

    def failed(self, now_s: float) -> None:
        """The cloud could not be reached."""
        pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self._failures, 16))
        self._failures += 1
        self.until_s = now_s + pause_s * self._chance.uniform(0.5, 1.0)

    def worked(self) -> None:
        """The cloud answered."""
        self._failures = 0
        self.until_s = 0.0

    def holds_back(self, now_s: float) -> bool:
        """Whether jobs that need the cloud shall wait; a clock that was set back holds nothing."""
        return 0.0 < self.until_s - now_s <= MAX_PAUSE_S
