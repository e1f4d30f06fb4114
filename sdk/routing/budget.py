"""How many requests may be sent to the clouds again, so that retries cannot feed an outage.

A cloud that is overloaded fails requests; clients that each try three times then triple its load.
A budget for each client bounds that to a part of its requests, however they fail. After Finagle's
`RetryBudget` (com.twitter.finagle.service.RetryBudget: a token bucket that requests fill by 20 %,
with a small reserve for clients that rarely ask) and Beyer et al., "Site Reliability Engineering"
(O'Reilly 2016), chapter 21. Unlike Finagle's, tokens do not expire after ten seconds; the bucket is
small instead, so that a quiet hour does not save up for a storm.

Sans-IO: `now_s` is passed in. Not locked: a race between threads costs at most one retry more.
"""

from __future__ import annotations

from nearfar.errors import ConfigError

#: Retries that requests earn, as a part of them. Finagle: ``percentCanRetry = 0.2``.
RETRY_SHARE = 0.2
#: Retries that the bucket holds at most, and at the start: a burst that meets a server restart.
BURST = 10.0
#: Retries that come back without any request: an app that asks once in a while may try again.
RESERVE_PER_S = 1.0


class RetryBudget:
    """A token bucket of retries.

    In any period of `t` seconds with `n` requests, at most
    ``BURST + RESERVE_PER_S * t + share * n`` retries are granted.

    Args:
        share: Retries that requests earn, as a part of them; 0 allows none at all.

    Raises:
        ConfigError: `share` is not between 0 and 1.
    """

    __slots__ = ("_at_s", "_tokens", "granted", "refused", "share")

    def __init__(self, share: float = RETRY_SHARE) -> None:
        self.share = check_share(share)
        #: Retries granted and refused so far.
        self.granted = 0
        self.refused = 0
        self._tokens = BURST if share > 0.0 else 0.0
        self._at_s: float | None = None

    def request(self) -> None:
        """A request comes, which earns its part of a retry."""
        tokens = self._tokens + self.share
        self._tokens = tokens if tokens < BURST else BURST

    def can_retry(self, now_s: float) -> bool:
        """Whether `withdraw` would grant a retry now; takes nothing."""
        return self._filled(now_s) >= 1.0

    def withdraw(self, now_s: float) -> bool:
        """Ask for one retry."""
        if self._filled(now_s) < 1.0:
            self.refused += 1
            return False
        self._tokens -= 1.0
        self.granted += 1
        return True

    def _filled(self, now_s: float) -> float:
        if self.share > 0.0:
            if self._at_s is not None and now_s > self._at_s:
                earned = RESERVE_PER_S * (now_s - self._at_s)
                self._tokens = min(BURST, self._tokens + earned)
            self._at_s = now_s
        return self._tokens


def check_share(share: float) -> float:
    """The share, checked.

    Raises:
        ConfigError: It is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise ConfigError(
            f"'retry_budget' is {share!r}",
            field="retry_budget",
            fix="Give a part of all requests, as in retry_budget = 0.2, or 0 for no retries",
        )
    return share
