"""What a sensor of the device's clocks says in the laboratory's worlds: late, coarse and not exact.

Assumed, since no recording of a real device is at hand: see docs/reference/bench.md.
"""

from __future__ import annotations

import math
import random

from benchmarks.routing.world import Nature, factor_at

#: As often as the client looks (`edge_runtime.sensing`).
EVERY_S = 0.25
#: Cooling states and steps of clocks: a share of the full clock.
STEP = 0.05
#: How far what the clocks say is off from what the model takes, drawn once for each run: standard
#: deviation of the logarithm. Memory does not slow down with the clocks, and other units do.
ERROR = 0.15


class Sensor:
    """The device's speed as its clocks show it.

    At full speed it says so. Where the device is slower by a factor, the speed is one over that
    factor, off by the same error throughout a run, in steps of `STEP`, as it was when it was last
    looked at.

    Args:
        nature: When the device is slower, and by how much.
        seed: For the error and for what is missed.
        missed: Part of the times in which the device is slow that no clock shows: another app.
    """

    def __init__(self, nature: Nature, seed: int, *, missed: float = 0.0) -> None:
        rng = random.Random(f"sensor {seed}")
        self.missed = missed
        self._error = math.exp(rng.gauss(0.0, ERROR))
        self._windows = [window for window in nature.thermal if rng.random() >= missed]

    def speed(self, now_s: float) -> float:
        """Share of the full clock, as it was at the last look."""
        factor = factor_at(self._windows, math.floor(now_s / EVERY_S) * EVERY_S)
        if factor == 1.0:
            return 1.0
        steps = round(1.0 / (factor * self._error) / STEP)
        return min(max(steps * STEP, STEP), 1.0)
