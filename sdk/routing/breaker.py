"""A circuit breaker, so that an unreachable cloud is not waited for on every request.

Sans-IO: `now_s` is passed in, jitter comes from a given random generator.
"""

from __future__ import annotations

import enum
import random


class BreakerState(enum.Enum):
    """States of a `CircuitBreaker`."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Opens after consecutive failures, lets one probe through after a jittered backoff."""

    def __init__(
        self,
        *,
        failure_threshold: int = 2,
        base_backoff_s: float = 1.0,
        max_backoff_s: float = 60.0,
        probe_timeout_s: float = 10.0,
        rng: random.Random | None = None,
    ) -> None: ...

    def state(self, now_s: float) -> BreakerState:
        """State at that time; changes nothing."""
        raise NotImplementedError

    def can_try(self, now_s: float) -> bool:
        """Whether a request may use the endpoint now; changes nothing (for decisions)."""
        raise NotImplementedError

    def acquire(self, now_s: float) -> bool:
        """Ask to use the endpoint now; in HALF_OPEN takes the one probe."""
        raise NotImplementedError

    def record_success(self, now_s: float) -> None:
        """The endpoint answered (even with a typed error of its own): close."""
        raise NotImplementedError

    def record_failure(self, now_s: float) -> None:
        """The endpoint could not be reached or went away."""
        raise NotImplementedError

    def release(self, now_s: float) -> None:
        """The attempt says nothing about the endpoint (cancelled): give the probe back."""
        raise NotImplementedError

    def retry_in_s(self, now_s: float) -> float:
        """Seconds until the endpoint may be tried; 0 when it may be tried now."""
        raise NotImplementedError

    def describe(self, now_s: float) -> str:
        """Why it is not tried, for `RouteState.detail`: "it failed 3 times, next try in 4 s"."""
        raise NotImplementedError
