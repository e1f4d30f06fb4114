"""Links as moments at which one packet can cross: the Mahimahi format, read or generated.

Format: one line per packet of 1,500 bytes, the millisecond at which it can cross; the file starts
again after its last line (Netravali et al., "Mahimahi", USENIX ATC 2015).
"""

from __future__ import annotations

import math
import random
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from nearfar.errors import InvalidInput

PACKET_BYTES = 1500
#: A trace that is larger is not one of these; the largest published ones have a few MB.
MAX_TRACE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of a link.

    Attributes:
        times_s: When a packet can cross, ascending, within one period.
        period_s: After that it starts again.
        offset_s: Where in the period the simulation begins.
    """

    times_s: Sequence[float]
    period_s: float
    offset_s: float = 0.0

    def opportunity(self, at_s: float) -> int:
        """Number of the first opportunity at or after a moment, counted through all periods."""
        periods, within = divmod(at_s + self.offset_s, self.period_s)
        return int(periods) * len(self.times_s) + bisect_left(self.times_s, within)

    def moment_s(self, opportunity: int) -> float:
        """When an opportunity is."""
        periods, index = divmod(opportunity, len(self.times_s))
        return periods * self.period_s + self.times_s[index] - self.offset_s

    def cross(self, size_bytes: int, *, at_s: float, free: int = 0) -> tuple[float, int]:
        """Send a message.

        Args:
            size_bytes: Its size.
            at_s: When it is handed to the link.
            free: First opportunity that nothing before it has taken.

        Returns:
            When its last packet has crossed, and the first opportunity left to the next message.
        """
        first = max(free, self.opportunity(at_s))
        last = first + max(1, math.ceil(size_bytes / PACKET_BYTES)) - 1
        return max(at_s, self.moment_s(last)), last + 1

    @property
    def mean_bytes_per_s(self) -> float:
        """Bandwidth over a whole period."""
        return len(self.times_s) * PACKET_BYTES / self.period_s


def read_trace(path: Path) -> Link:
    """Read one direction of a recorded link.

    Raises:
        InvalidInput: The file is not in Mahimahi's format.
    """
    fix = "Name a folder of Mahimahi traces: one whole number of milliseconds per line, ascending"
    try:
        if path.stat().st_size > MAX_TRACE_BYTES:
            raise InvalidInput(
                f"The trace {path} is larger than any trace is", field="--traces", fix=fix
            )
        times = array("d", (int(line) / 1000.0 for line in path.read_text("ascii").split()))
    except (OSError, ValueError) as exc:
        raise InvalidInput(
            f"The trace {path} cannot be read ({exc})", field="--traces", fix=fix
        ) from exc
    if not times or times[0] < 0 or any(a > b for a, b in pairwise(times)):
        raise InvalidInput(
            f"The trace {path} is empty, or its times do not ascend", field="--traces", fix=fix
        )
    if times[-1] <= 0:
        raise InvalidInput(f"The trace {path} covers no time", field="--traces", fix=fix)
    return Link(times, times[-1])


def write_trace(link: Link, path: Path) -> None:
    """Write one period of a link as `read_trace` reads it; to the millisecond."""
    times_ms = [round(time_s * 1000.0) for time_s in link.times_s]
    times_ms[-1] = max(times_ms[-1], round(link.period_s * 1000.0), 1)
    path.write_text("".join(f"{time_ms}\n" for time_ms in times_ms), encoding="ascii")


@dataclass(frozen=True, slots=True)
class Weather:
    """One state of a generated link.

    Attributes:
        mbit_s: Bandwidth while it lasts; 0 is an outage.
        stay_s: Mean time it lasts; exponentially distributed.
    """

    mbit_s: float
    stay_s: float


def markov_link(
    states: Sequence[Weather], rng: random.Random, *, duration_s: float, jitter: float = 0.25
) -> Link:
    """Generate a link that moves between states at random, each followed by any other.

    Args:
        states: Where it can be.
        rng: What everything is drawn from.
        duration_s: Length of a period.
        jitter: Standard deviation of the logarithm of the gap between two packets.
    """
    times = array("d")
    at_s, index = 0.0, rng.randrange(len(states))
    while at_s < duration_s:
        state = states[index]
        until_s = min(duration_s, at_s + rng.expovariate(1.0 / state.stay_s))
        if state.mbit_s > 0:
            gap_s = PACKET_BYTES * 8.0 / (state.mbit_s * 1e6)
            while at_s < until_s:
                times.append(at_s)
                at_s += gap_s * math.exp(rng.gauss(0.0, jitter))
        at_s = until_s
        if len(states) > 1:
            index = (index + rng.randrange(1, len(states))) % len(states)
    if not times:  # nothing but outage was drawn
        times.append(duration_s)
    return Link(times, max(duration_s, times[-1]))


def steady_link(mbit_s: float) -> Link:
    """A link that never changes."""
    gap_s = PACKET_BYTES * 8.0 / (mbit_s * 1e6)
    return Link(array("d", [i * gap_s for i in range(1000)]), 1000 * gap_s)
