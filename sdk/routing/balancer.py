"""Choose among equal endpoints: peak EWMA of latency, power of two choices. Sans-IO.

The load of an endpoint is its latency times the requests that are open there plus one. Its latency
is an exponentially weighted moving average that follows a rise at once and a fall slowly, so that
an endpoint which became slow is left alone before many requests have met it. After Finagle's
``PeakEwma`` (com.twitter.finagle.loadbalancer.PeakEwma) and Tower's ``tower::load::peak_ewma``.

Of all endpoints two are drawn, and the one with less load is taken: nearly as good as the best of
all, and clients that know the same do not all run to the same endpoint (Mitzenmacher, "The Power of
Two Choices in Randomized Load Balancing", IEEE TPDS 12(10), 2001).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

#: Time constant of the average, as in Finagle and Linkerd.
DECAY_S = 10.0
#: Latency of an endpoint whose first answer is still awaited (Linkerd's ``default_rtt``: 30 ms).
GUESS_MS = 30.0

T = TypeVar("T")


class PeakEwma:
    """Latency of one endpoint: up at once, down slowly.

    Not locked: a race between threads loses an observation, never more.

    Args:
        decay_s: Time constant, in seconds.
    """

    __slots__ = ("_at_s", "_decay_s", "_ms")

    def __init__(self, decay_s: float = DECAY_S) -> None:
        self._decay_s = decay_s
        self._ms: float | None = None
        self._at_s = 0.0

    def observe(self, latency_ms: float, now_s: float) -> None:
        """An answer came, or was given up, after that time."""
        old_ms = self._ms
        if old_ms is None or latency_ms > old_ms:
            self._ms = latency_ms
        else:
            kept = math.exp(-max(0.0, now_s - self._at_s) / self._decay_s)
            self._ms = old_ms * kept + latency_ms * (1.0 - kept)
        self._at_s = max(self._at_s, now_s)

    def latency_ms(self, now_s: float) -> float:
        """The average now; a peak that no answer confirms fades, so that it is tried again."""
        if self._ms is None:
            return 0.0
        return self._ms * math.exp(-max(0.0, now_s - self._at_s) / self._decay_s)

    def load(self, now_s: float, open_requests: int) -> float:
        """What `pick` compares: expected time until everything that is open there is answered.

        Who was never asked is asked soon, but not by all at once (Finagle does the same).
        """
        latency_ms = self.latency_ms(now_s)
        if self._ms is None and open_requests:
            latency_ms = GUESS_MS
        return latency_ms * (open_requests + 1)


def pick(choices: Sequence[T], load: Callable[[T], float], rng: random.Random) -> T:
    """The less loaded of two that are drawn without replacement; the first when they are equal.

    Args:
        choices: At least one.
        load: As `PeakEwma.load`; asked of the two only.
        rng: Source of chance.
    """
    count = len(choices)
    if count == 1:
        return choices[0]
    first = rng.randrange(count)
    second = rng.randrange(count - 1)
    if second >= first:
        second += 1
    a, b = choices[first], choices[second]
    return b if load(b) < load(a) else a
