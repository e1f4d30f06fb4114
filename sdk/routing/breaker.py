"""A circuit breaker, so that an unreachable cloud is not waited for on every request.

Sans-IO: `now_s` is passed in, jitter comes from a given random generator. Not locked: a race
between threads costs at most one probe more.
"""

from __future__ import annotations

import enum
import random
from collections import deque


class BreakerState(enum.Enum):
    """States of a `CircuitBreaker`."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Opens after consecutive failures or many among the last, then lets one probe through after a
    jittered backoff.

    Args:
        failure_threshold: Consecutive failures that open it.
        rate_threshold: Part of failures among the last `window` outcomes that opens it as well: an
            endpoint that fails every second request never fails often in a row.
        window: How many outcomes are looked at; half as many must have been seen.
        base_backoff_s: First backoff; doubles with every failed probe.
        max_backoff_s: Upper bound of the backoff.
        probe_timeout_s: A probe that reports nothing for so long is taken to be lost.
        rng: Source of jitter; a fresh one by default.
    """

    def __init__(
        self,
        *,
        failure_threshold: int = 2,
        rate_threshold: float = 0.5,
        window: int = 20,
        base_backoff_s: float = 1.0,
        max_backoff_s: float = 60.0,
        probe_timeout_s: float = 10.0,
        rng: random.Random | None = None,
    ) -> None:
        self._failure_threshold = failure_threshold
        self._rate_threshold = rate_threshold
        self._recent: deque[bool] = deque(maxlen=window)  # True: failed
        self._base_backoff_s = base_backoff_s
        self._max_backoff_s = max_backoff_s
        self._probe_timeout_s = probe_timeout_s
        # Spreads retries of many devices in time; nothing secret hangs on it.
        self._rng = rng or random.Random()  # noqa: S311
        self._failures = 0
        self._retry_at_s: float | None = None  # None: closed
        self._probe_until_s: float | None = None

    @property
    def failures(self) -> int:
        """Consecutive failures."""
        return self._failures

    def state(self, now_s: float) -> BreakerState:
        """State at that time; changes nothing."""
        if self._retry_at_s is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now_s < self._retry_at_s else BreakerState.HALF_OPEN

    def can_try(self, now_s: float) -> bool:
        """Whether a request may use the endpoint now; changes nothing (for decisions)."""
        return self.retry_in_s(now_s) == 0.0

    def acquire(self, now_s: float) -> bool:
        """Ask to use the endpoint now; in HALF_OPEN takes the one probe."""
        if not self.can_try(now_s):
            return False
        if self._retry_at_s is not None:
            self._probe_until_s = now_s + self._probe_timeout_s
        return True

    def record_success(self, now_s: float) -> None:
        """The endpoint answered (even with a typed error of its own): close."""
        if self._retry_at_s is not None:
            self._recent.clear()  # what was before it opened has been paid for
        self._recent.append(False)
        self._failures = 0
        self._retry_at_s = None
        self._probe_until_s = None

    def record_failure(self, now_s: float) -> None:
        """The endpoint could not be reached or went away."""
        if self.state(now_s) is BreakerState.OPEN:
            return  # an attempt that began before it opened says nothing new
        self._failures += 1
        self._probe_until_s = None
        self._recent.append(True)
        if self._failures >= self._failure_threshold or self._fails_often():
            doublings = min(max(0, self._failures - self._failure_threshold), 30)
            backoff_s = min(self._max_backoff_s, self._base_backoff_s * 2.0**doublings)
            # Half fixed, half random: never at once, never all devices together.
            self._retry_at_s = now_s + backoff_s * (0.5 + 0.5 * self._rng.random())

    def _fails_often(self) -> bool:
        recent = self._recent
        if 2 * len(recent) < (recent.maxlen or 0):
            return False
        return sum(recent) >= self._rate_threshold * len(recent)

    def trip(self, now_s: float) -> None:
        """The endpoint is known to be dead: open at once, however few failures there were."""
        self._failures = max(self._failures, self._failure_threshold - 1)
        self.record_failure(now_s)

    def release(self, now_s: float) -> None:
        """The attempt says nothing about the endpoint (cancelled): give the probe back."""
        self._probe_until_s = None

    def retry_in_s(self, now_s: float) -> float:
        """Seconds until the endpoint may be tried; 0 when it may be tried now."""
        if self._retry_at_s is None:
            return 0.0
        wait_s = max(0.0, self._retry_at_s - now_s)
        if self._probe_until_s is not None:
            wait_s = max(wait_s, self._probe_until_s - now_s)
        return wait_s

    def describe(self, now_s: float) -> str:
        """Why it is not tried, for `RouteState.detail`: "failed 3 times, next try in 4 s"."""
        wait_s = self.retry_in_s(now_s)
        if wait_s == 0.0:
            return ""
        times = "once" if self._failures == 1 else f"{self._failures} times"
        return f"failed {times}, next try in {wait_s:.1f} s"
