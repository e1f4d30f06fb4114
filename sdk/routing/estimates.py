"""Online estimates of latency: small, decayed, O(1).

`LatencyEstimate` is the seam for better statistics: a quantile sketch fits behind it.
"""

from __future__ import annotations

from typing import Protocol

# Newest measurement's weight once there are a few: a jump is two thirds learned after 3 answers.
WEIGHT = 0.3
# An estimate that nobody confirms moves back to its prior, so that a route that was slow once is
# tried again some day.
HALF_LIFE_S = 300.0
# 95th percentile of a normal distribution over its mean absolute deviation: 1.645 / 0.798.
P95_DEVIATIONS = 2.06
# Before a second measurement says how much the first one varies (TCP takes 1/2, RFC 6298).
FIRST_DEVIATION = 0.25


class LatencyEstimate(Protocol):
    """An online estimate of one duration as a function of size."""

    @property
    def is_measured(self) -> bool:
        """Whether it has seen a measurement; otherwise it rests on a seed, or on nothing."""

    def observe(self, size: float, value_ms: float, *, now_s: float) -> None:
        """Learn one measurement."""

    def quantiles(self, size: float, *, now_s: float) -> tuple[float, float] | None:
        """(p50, p95) in milliseconds for that size; `None` when nothing is known."""


class MeanDeviation:
    """Exponentially weighted mean and mean absolute deviation of one quantity.

    Args:
        prior: What to assume before anything is measured, and to return to with time.
        prior_deviation: Mean absolute deviation of the prior.
    """

    __slots__ = ("count", "deviation", "last_s", "mean", "prior", "prior_deviation")

    def __init__(self, prior: float | None = None, prior_deviation: float = 0.0) -> None:
        self.prior = prior
        self.prior_deviation = prior_deviation
        self.mean = 0.0
        self.deviation = 0.0
        self.count = 0
        self.last_s = 0.0

    def observe(self, value: float, *, now_s: float) -> None:
        """Learn one measurement."""
        if self.count == 0:
            # A prior counts as one measurement: it came from another run or another machine.
            if self.prior is None:
                self.mean = value
                self.deviation = value * FIRST_DEVIATION
            else:
                self.mean = (self.prior + value) / 2
                self.deviation = max(self.prior_deviation, abs(value - self.prior) / 2)
        else:
            seen = self.count + (self.prior is not None)
            weight = max(WEIGHT, 1.0 / (seen + 1))
            error = value - self.mean
            self.mean += weight * error
            self.deviation += weight * (abs(error) - self.deviation)
        self.count += 1
        self.last_s = now_s

    def quantiles(self, *, now_s: float) -> tuple[float, float] | None:
        """(p50, p95), aged towards the prior; `None` when nothing is known."""
        mean, deviation = self.mean, self.deviation
        if self.count == 0:
            if self.prior is None:
                return None
            mean, deviation = self.prior, self.prior_deviation
        elif self.prior is not None and now_s > self.last_s:
            trust = 0.5 ** ((now_s - self.last_s) / HALF_LIFE_S)
            mean = trust * mean + (1.0 - trust) * self.prior
        return mean, mean + P95_DEVIATIONS * deviation


class SizeBuckets:
    """A duration as a function of size: one `MeanDeviation` per power of two.

    Between known sizes it takes the next larger one, beyond them it scales with size: too
    cautious rather than too bold, and exact again after one answer of that size.

    Args:
        prior_ms: Median at `prior_size`, before anything is measured.
        prior_deviation_ms: Its mean absolute deviation.
        prior_size: Size that the prior was measured at; 0 when it holds for any size.
    """

    __slots__ = ("_buckets", "_prior_deviation_ms", "_prior_ms", "_prior_size")

    def __init__(
        self,
        prior_ms: float | None = None,
        prior_deviation_ms: float = 0.0,
        *,
        prior_size: float = 0.0,
    ) -> None:
        self._buckets: dict[int, MeanDeviation] = {}
        self._prior_ms = prior_ms
        self._prior_deviation_ms = prior_deviation_ms
        self._prior_size = prior_size

    @property
    def is_measured(self) -> bool:
        return bool(self._buckets)

    def observe(self, size: float, value_ms: float, *, now_s: float) -> None:
        index = int(size).bit_length()
        bucket = self._buckets.get(index)
        if bucket is None:
            bucket = self._buckets[index] = self._fresh(size)
        bucket.observe(value_ms, now_s=now_s)

    def quantiles(self, size: float, *, now_s: float) -> tuple[float, float] | None:
        index = int(size).bit_length()
        bucket = self._buckets.get(index)
        if bucket is not None:
            return bucket.quantiles(now_s=now_s)
        if not self._buckets:
            return self._fresh(size).quantiles(now_s=now_s)
        larger = min((i for i in self._buckets if i > index), default=None)
        if larger is not None:
            return self._buckets[larger].quantiles(now_s=now_s)
        smaller = max(self._buckets)
        found = self._buckets[smaller].quantiles(now_s=now_s)
        assert found is not None
        scale = float(2 ** (index - smaller))
        return found[0] * scale, found[1] * scale

    def _fresh(self, size: float) -> MeanDeviation:
        if self._prior_ms is None:
            return MeanDeviation()
        # Short inputs still pay a fixed part; a quarter is what small prompts cost on CPUs.
        scale = max(0.25, size / self._prior_size) if self._prior_size else 1.0
        return MeanDeviation(self._prior_ms * scale, self._prior_deviation_ms * scale)
