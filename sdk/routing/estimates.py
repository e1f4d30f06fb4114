"""Online estimates of durations as distributions: small, decayed, cheap to read.

What is forecast is learned in three layers, because they change at different speeds:

- the *shape*: how the duration grows with size, slowly;
- the *level*: how much slower than that everything is just now, fast, at once after a jump;
- the *error*: the last few ratios of what came to what was forecast, as they are.

The third is the distribution. A quantile sketch (DDSketch) was tried in its place: it forgets
nothing by itself, and one quantile of it costs 8 µs in Python, of which a decision needs ten.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from typing import Protocol

#: Which quantiles are kept of everything; `Prediction` has one field for each.
LEVELS = (0.2, 0.5, 0.8, 0.95, 0.99)
Quantiles = tuple[float, float, float, float, float]
#: The device's clocks at full speed when a call began and when it ended, or nothing known of them.
FULL = (1.0, 1.0)

# Newest measurement's weight in the level: when its forecast missed, and when it did not.
LEVEL_WEIGHT, CALM_WEIGHT = 0.5, 0.2
# The same for the shape once there are a few, and how far one measurement can pull it.
SHAPE_WEIGHT, MAX_PULL = 0.1, 1.25
# Errors kept; older ones say little about now. Fewer than this give a 95th percentile by chance.
WINDOW = 64
# A jump is believed after three forecasts in a row that missed on the same side of what 8 of 10
# errors stay within, or after two that missed by so much more.
JUMP_RUN = 3
FAR = 1.5
# A miss by less than this is none.
NEAR = 1.05
# A level that nobody confirms goes back to the usual one, so that a route that was slow is tried
# again: phones that throttle and machines in use by something else do so for seconds to minutes.
HALF_LIFE_S = 5.0
# A shape that nobody confirms goes back to its seed, if it has one.
SHAPE_HALF_LIFE_S = 300.0
STALE_S = 10.0
# One answer alone says no more about the level than this: it may have been an accident.
MAX_RATIO = 8.0
# Nothing is so much faster or slower than usual; keeps an accident from growing without bound.
LOWEST_LEVEL, HIGHEST_LEVEL = 0.01, 100.0
# Spread of a forecast that nobody has given one: standard deviation of its logarithm.
DEFAULT_SIGMA = 0.25
MIN_SIGMA = 0.02
# Late answers that the assumed exponent of a tail counts for, what is left of one after the next,
# and between what it stays.
TAIL_PRIOR, TAIL_MEMORY = 3.0, 0.95
FATTEST_TAIL, THINNEST_TAIL = 0.3, 6.0
# How fast it is learned by how much a device's clocks matter to a duration, what that may come to,
# and how much slower the clocks must be for an answer to say anything about it.
BEND_WEIGHT, MOST_BEND, TELLING = 0.3, 1.5, 1.25
# Normal quantiles of a few equally likely values; a prior distribution in nine values.
_PRIOR = (-1.59, -0.97, -0.59, -0.28, 0.0, 0.28, 0.59, 0.97, 1.59)


class LatencyEstimate(Protocol):
    """An online estimate of one duration as a function of size."""

    @property
    def is_measured(self) -> bool:
        """Whether it has seen a measurement; otherwise it rests on a seed, or on nothing."""

    def observe(self, size: float, value_ms: float, *, now_s: float) -> None:
        """Learn one measurement."""

    def quantiles(
        self, size: float, *, now_s: float, factor: float = 1.0, slower: float = 1.0
    ) -> Quantiles | None:
        """Quantiles at `LEVELS` in milliseconds; `None` when nothing is known.

        Args:
            size: What the duration is a function of.
            now_s: Monotonic time.
            factor: How much slower it is at least, as far as requests in flight show.
            slower: How much slower the device's clocks are than at full speed.
        """


class Recent:
    """The last values of something, with quantiles that cost nothing to read.

    Args:
        sigma: Spread (of the logarithm) that is assumed around 1 until values replace it.
        values: What to begin with instead, oldest first.
    """

    __slots__ = ("_ordered", "_ring", "assumed", "moments", "quantiles")

    def __init__(self, sigma: float = DEFAULT_SIGMA, values: Sequence[float] = ()) -> None:
        start = values or [math.exp(sigma * z) for z in _PRIOR]
        #: Quantiles at `LEVELS`.
        self.quantiles: Quantiles
        #: The median, and the squared distances of the others of `quantiles` from it.
        self.moments: Quantiles
        #: How many of the values nobody has measured.
        self.assumed = 0 if values else len(_PRIOR)
        self._ring: deque[float] = deque(start[-WINDOW:])
        self._ordered = sorted(self._ring)
        self._refresh()

    @property
    def values(self) -> tuple[float, ...]:
        """Measured values, oldest first."""
        return tuple(self._ring)[self.assumed :]

    @property
    def count(self) -> int:
        """How many were measured."""
        return len(self._ring) - self.assumed

    def add(self, value: float) -> None:
        """Take in a value; drops the oldest, and two assumed ones."""
        ring, ordered = self._ring, self._ordered
        drop = min(2, self.assumed) or (len(ring) >= WINDOW)
        for _ in range(drop):
            del ordered[bisect_left(ordered, ring.popleft())]
        self.assumed = max(0, self.assumed - 2)
        ring.append(value)
        insort(ordered, value)
        self._refresh()

    def _refresh(self) -> None:
        ordered = self._ordered
        self.quantiles = (
            _quantile(ordered, 0.2),
            _quantile(ordered, 0.5),
            _quantile(ordered, 0.8),
            _quantile(ordered, 0.95),
            _quantile(ordered, 0.99),
        )
        self.moments = moments_of(self.quantiles)

    def share_below(self, value: float) -> float:
        """Which part of the values is at most this one."""
        return bisect_right(self._ordered, value) / len(self._ordered)


def moments_of(quantiles: Quantiles) -> Quantiles:
    """The median, and the squared distances of p20, p80, p95 and p99 from it."""
    q20, q50, q80, q95, q99 = quantiles
    return q50, (q20 - q50) ** 2, (q80 - q50) ** 2, (q95 - q50) ** 2, (q99 - q50) ** 2


def _quantile(ordered: Sequence[float], q: float) -> float:
    # (n + 1) q, the median-unbiased kind for small samples: the largest of few is not the p99.
    position = min(max((len(ordered) + 1) * q - 1.0, 0.0), len(ordered) - 1.0)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


class Level:
    """How much slower than usual something is, and how far forecasts of it miss.

    Args:
        sigma: Assumed spread of errors until some were seen.
        half_life_s: How fast a level that nobody confirms goes back to the usual one.
    """

    __slots__ = ("_before", "_half_life_s", "_last_s", "_run", "_side", "errors", "value")

    def __init__(self, sigma: float = DEFAULT_SIGMA, *, half_life_s: float = HALF_LIFE_S) -> None:
        self.errors = Recent(sigma)
        self.value = 1.0
        self._half_life_s = half_life_s
        self._last_s = 0.0
        # The levels that forecasts in a row, missed on the same side, would have needed.
        self._run: deque[float] = deque(maxlen=JUMP_RUN)
        self._side = 0
        self._before = 1.0, 1.0 / NEAR, NEAR

    def at(self, now_s: float) -> float:
        """The level now: the last one, aged."""
        value, age_s = self.value, now_s - self._last_s
        if value == 1.0 or age_s <= 0.0:
            return value
        if age_s > 30.0 * self._half_life_s:
            return 1.0
        return float(value ** (0.5 ** (age_s / self._half_life_s)))

    def set(self, value: float, *, now_s: float) -> None:
        """Know the level from elsewhere."""
        self.value, self._last_s = value, now_s

    def shift(self, factor: float) -> None:
        """Leave a part of the level to another layer, which is divided by this factor."""
        self.value = min(max(self.value * factor, LOWEST_LEVEL), HIGHEST_LEVEL)
        before, low, high = self._before
        self._before = before * factor, low, high
        for index, level in enumerate(self._run):
            self._run[index] = level * factor

    def observe(
        self, ratio: float, *, now_s: float, cause: float | None = None, is_cut: bool = False
    ) -> None:
        """Learn how far a forecast missed.

        Args:
            ratio: What came, divided by what was forecast (the usual one times `at`).
            now_s: Monotonic time.
            cause: How much of that is due to the level, where it had only a part in the forecast:
                the level it would have taken, divided by `at`.
            is_cut: Nothing came: `ratio` is when it was given up. That moves the level, but is no
                error of the kind that the next answer will have.
        """
        level = self.at(now_s)
        cause = ratio if cause is None else cause
        run = self._run
        if not run:
            # What the forecasts of a run are compared with: the level before it, and how far
            # forecasts missed before it. A run must not hide itself.
            low, _, high, _, _ = self.errors.quantiles
            self._before = level, min(low, 1.0 / NEAR), max(high, NEAR)
        if not is_cut:
            self.errors.add(ratio)
        before, low, high = self._before
        since = ratio * level / before
        side = (since > high) - (since < low)
        cause = min(max(cause, 1.0 / MAX_RATIO), MAX_RATIO)
        if run and side == 0:
            moved = before  # an accident, and all is as it was
        else:
            moved = level * (1.0 + (LEVEL_WEIGHT if side else CALM_WEIGHT) * (cause - 1.0))
        if side != self._side:
            run.clear()
        self._side = side
        if side:
            run.append(cause * level)
            is_far = len(run) >= 2 and not 1.0 / FAR < since < FAR
            if len(run) >= JUMP_RUN or is_far:
                # What was before the jump is forgotten.
                moved = sorted(run)[1] if len(run) >= JUMP_RUN else run[-1]
                if len(run) >= JUMP_RUN:
                    run.clear()
        self.value = min(max(moved, LOWEST_LEVEL), HIGHEST_LEVEL)
        self._last_s = now_s


class Shape:
    """A duration as a function of size: one point for each power of two, lines between them.

    Args:
        prior_ms: Duration at `prior_size`, before anything is measured.
        prior_size: Size that the prior was measured at; 0 when it holds for any size.
    """

    __slots__ = ("_prior_ms", "_prior_size", "_sizes", "_slopes", "_values", "points")

    def __init__(self, prior_ms: float | None = None, *, prior_size: float = 0.0) -> None:
        self._prior_ms = prior_ms
        self._prior_size = prior_size
        #: Power of two to [mean size, mean value, measurements].
        self.points: dict[int, list[float]] = {}
        self._sizes: list[float] = []
        self._values: list[float] = []
        self._slopes: list[float] = []

    def observe(self, size: float, value_ms: float) -> None:
        """Move the point of that size."""
        index = int(size).bit_length()
        point = self.points.get(index)
        if point is None:
            # A prior counts as one measurement: it came from another run or another machine.
            prior = self.seed(size)
            self.points[index] = (
                [size, value_ms, 1.0] if prior is None else [size, (prior + value_ms) / 2, 2.0]
            )
        else:
            point[2] += 1.0
            weight = max(SHAPE_WEIGHT, 1.0 / point[2])
            point[0] += weight * (size - point[0])
            point[1] += weight * (value_ms - point[1])
        self.refresh()

    def refresh(self) -> None:
        """Make `at` see the points as they are."""
        ordered = [self.points[index] for index in sorted(self.points)]
        sizes, values = [p[0] for p in ordered], [p[1] for p in ordered]
        self._slopes = [
            (values[i + 1] - values[i]) / max(sizes[i + 1] - sizes[i], 1e-9)
            for i in range(len(sizes) - 1)
        ]
        self._sizes, self._values = sizes, values

    def at(self, size: float) -> float | None:
        """Usual duration for a size; `None` when nothing is known."""
        sizes, values = self._sizes, self._values
        if not sizes:
            return self.seed(size)
        if len(sizes) == 1:
            prior, there = self.seed(size), self.seed(sizes[0])
            if prior is not None and there:
                return values[0] * prior / there
            # Too cautious rather than too bold: larger ones in proportion, smaller ones no faster.
            if int(size).bit_length() <= int(sizes[0]).bit_length():
                return values[0]
            return values[0] * size / max(sizes[0], 1.0)
        left, last = bisect_right(sizes, size) - 1, len(sizes) - 2
        if left < 0:
            left = 0
        elif left > last:
            line = values[last] + self._slopes[last] * (size - sizes[last])
            return line if line > values[-1] else values[-1]
        least = 0.25 * values[left]
        line = values[left] + self._slopes[left] * (size - sizes[left])
        return line if line > least else least

    def covers(self, size: float) -> bool:
        """Whether sizes like it, or smaller and larger ones, were measured."""
        index, points = int(size).bit_length(), self.points
        return bool(points) and min(points) <= index <= max(points)

    def seed(self, size: float) -> float | None:
        """What the prior says of a size."""
        if self._prior_ms is None:
            return None
        # Short inputs still pay a fixed part; a quarter is what small prompts cost on CPUs.
        scale = max(0.25, size / self._prior_size) if self._prior_size else 1.0
        return self._prior_ms * scale


class SizedLatency:
    """A duration as a function of size, as a distribution: a `LatencyEstimate`.

    Shape, level and errors hold for the device at full speed. Where a sensor says how much slower
    its clocks are, the forecast is multiplied by that, raised to `bend`: 1 for work that waits for
    nothing but the clocks, less for work that waits for memory, 0 when the sensor is wrong. It is
    learned, slowly, from answers of a device that is slower; until then, and above it, the level
    corrects the forecast as fast as it always does.

    Args:
        prior_ms: Median at `prior_size`, before anything is measured.
        prior_size: Size that the prior was measured at; 0 when it holds for any size.
        sigma: Assumed spread (of the logarithm) until errors were seen.
    """

    __slots__ = ("_last_s", "bend", "is_measured", "level", "shape")

    def __init__(
        self,
        prior_ms: float | None = None,
        *,
        prior_size: float = 0.0,
        sigma: float = DEFAULT_SIGMA,
    ) -> None:
        self.shape = Shape(prior_ms, prior_size=prior_size)
        self.level = Level(sigma)
        self.bend = 1.0
        self.is_measured = False
        self._last_s = 0.0

    def observe(
        self, size: float, value_ms: float, *, now_s: float, slower: tuple[float, float] = FULL
    ) -> None:
        """Learn one measurement.

        Args:
            size: What the duration is a function of.
            value_ms: What it was.
            now_s: Monotonic time.
            slower: How much slower than at full speed the device's clocks were, when the call
                began and when it ended.
        """
        usual_ms = self.shape.at(size)
        at_full_ms = value_ms
        if slower is not FULL:
            at_full_ms /= self._slowness(usual_ms, value_ms, now_s, slower)
        self._last_s = now_s
        self.is_measured = True
        if usual_ms is None or int(size).bit_length() not in self.shape.points:
            # The first one of a size says where the shape is, not that today is unusual.
            self.shape.observe(size, at_full_ms / self.level.at(now_s))
            return
        forecast_ms = usual_ms * self.level.at(now_s)
        self.level.observe(at_full_ms / max(forecast_ms, 1e-6), now_s=now_s)
        # A jump belongs into the level, whichever size it was seen at.
        typical_ms = at_full_ms / self.level.value
        typical_ms = min(max(typical_ms, usual_ms / MAX_PULL), usual_ms * MAX_PULL)
        self.shape.observe(size, typical_ms)
        if slower is not FULL and slower[0] == slower[1] >= TELLING:
            self._learn_bend(value_ms / max(usual_ms, 1e-6), slower[0])

    def _slowness(
        self, usual_ms: float | None, value_ms: float, now_s: float, slower: tuple[float, float]
    ) -> float:
        """How much slower the clocks made this one.

        A call during which they changed ran partly at either speed, and a sensor that looks now
        and then may have seen the change late: of all speeds between the two that one is taken
        which explains the answer best.
        """
        begun, ended = float(slower[0] ** self.bend), float(slower[1] ** self.bend)
        if begun == ended or usual_ms is None:
            return ended
        low, high = (begun, ended) if begun < ended else (ended, begun)
        return min(max(value_ms / max(usual_ms * self.level.at(now_s), 1e-6), low), high)

    def _learn_bend(self, ratio: float, slower: float) -> None:
        """Move `bend` to what an answer of a slower device shows, and the level by as much back."""
        shown = math.log(max(ratio, 1e-6)) / math.log(slower)
        before = self.bend
        self.bend += BEND_WEIGHT * (min(max(shown, 0.0), MOST_BEND) - before)
        self.level.shift(slower ** (before - self.bend))

    def quantiles(
        self, size: float, *, now_s: float, factor: float = 1.0, slower: float = 1.0
    ) -> Quantiles | None:
        scale = self.scale(size, now_s, slower)
        if scale is None:
            return None
        scale *= factor
        q20, q50, q80, q95, q99 = self.level.errors.quantiles
        return scale * q20, scale * q50, scale * q80, scale * q95, scale * q99

    def scale(self, size: float, now_s: float, slower: float = 1.0) -> float | None:
        """The forecast, of which `level.errors` says how far it misses."""
        usual_ms = self.shape.at(size)
        if usual_ms is None:
            return None
        if self.is_measured and now_s - self._last_s > STALE_S:
            seed_ms = self.shape.seed(size)
            if seed_ms:
                trust = 0.5 ** ((now_s - self._last_s) / SHAPE_HALF_LIFE_S)
                usual_ms = seed_ms * float((usual_ms / seed_ms) ** trust)
        usual_ms *= self.level.at(now_s)
        return usual_ms if slower == 1.0 else usual_ms * float(slower**self.bend)


class Tail:
    """How fast late answers become rarer: the exponent of a Pareto distribution beyond p95.

    Hill's estimator (Annals of Statistics, 1975) with older ones forgotten; an attempt that was
    given up counts as one that would have taken longer (censored, as in the Kaplan-Meier method).
    """

    __slots__ = ("_count", "_logs", "exponent")

    def __init__(self, exponent: float) -> None:
        #: The exponent, between `THINNEST_TAIL` and `FATTEST_TAIL`.
        self.exponent = exponent
        self._count = TAIL_PRIOR
        self._logs = TAIL_PRIOR / exponent

    def observe(self, ratio: float, *, is_cut: bool = False) -> None:
        """Learn a late one.

        Args:
            ratio: What it took, divided by the p95 that was forecast; above 1.
            is_cut: It was given up then.
        """
        self._count = TAIL_MEMORY * self._count + (0.0 if is_cut else 1.0)
        self._logs = TAIL_MEMORY * self._logs + math.log(ratio)
        self.exponent = min(max(self._count / self._logs, FATTEST_TAIL), THINNEST_TAIL)


def sigma_of(p50: float, p99: float) -> float:
    """Spread of the logarithm that a median and a 99th percentile show."""
    if p50 <= 0 or p99 <= p50:
        return MIN_SIGMA
    return min(1.0, max(MIN_SIGMA, math.log(p99 / p50) / 2.326))


def share_in_time(quantiles: Quantiles, limit: float) -> float:
    """Probability that a duration stays within a limit, from its quantiles at `LEVELS`.

    Linear between the quantiles; below the first down to nothing at twice its distance from the
    median (a normal distribution's three sigma), above the last up to 1 as far out again.
    """
    q20, q50, q80, q95, q99 = quantiles
    if limit >= q95:
        if limit < q99:
            return 0.95 + 0.04 * (limit - q95) / (q99 - q95)
        return min(1.0, 0.99 + 0.01 * (limit - q99) / max(q99 - q95, 1e-9))
    if limit >= q80:
        return 0.8 + 0.15 * (limit - q80) / (q95 - q80)
    if limit >= q50:
        return 0.5 + 0.3 * (limit - q50) / (q80 - q50)
    if limit >= q20:
        return 0.2 + 0.3 * (limit - q20) / (q50 - q20)
    return max(0.0, 0.2 - 0.1 * (q20 - limit) / max(q50 - q20, 1e-9))
