"""Which worlds policies are compared in.

`tuned` scenarios may be looked at while the router is worked on; `held_out` ones (other links,
other traces, other seeds) only when it is finished.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.routing.links import Link, Weather, markov_link, read_trace, steady_link
from benchmarks.routing.world import Arrivals, Job, Nature, Speed, Window, arrival_times
from nearfar.errors import InvalidInput

Group = Literal["varying", "steady", "faults", "wedges"]
Use = Literal["tuned", "held_out"]

DURATION_S = 120.0
#: Requests carry 8 to 60 KB (log-uniform): pages of text, voice, small pictures.
SMALLEST_BYTES, LARGEST_BYTES = 8_000, 60_000
DOWNLOAD_BYTES = 1_500
DEADLINE_MS = 450.0
#: A phone against a shared accelerator: 118 ms and 18 ms for a request of mean size.
EDGE = Speed(fixed_ms=15.0, per_kb_ms=4.0)
CLOUD = Speed(fixed_ms=5.0, per_kb_ms=0.5)
EDGE_NOISE, CLOUD_NOISE = 0.08, 0.15
CLOUD_SLOTS = 2
#: Other clients keep the cloud this busy.
OTHERS_LOAD = 0.5
RTT_JITTER = 0.15
#: Where links vary, the device does too: mean time at full speed, and at a third to a fifth of it.
DEVICE_FREE_S, DEVICE_BUSY_S = 15.0, 7.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What requests ask for, and how fast each route does it.

    Attributes:
        smallest_bytes: Uploads are log-uniform from here …
        largest_bytes: … to here.
        deadline_ms: Time for each.
        edge: Speed of the device.
        cloud: Speed of the cloud.
        usual_bytes: Size that a bundle's figures are measured with.
    """

    smallest_bytes: int
    largest_bytes: int
    deadline_ms: float
    edge: Speed
    cloud: Speed
    usual_bytes: int = 16_000

    @property
    def mean_bytes(self) -> int:
        smallest, largest = self.smallest_bytes, self.largest_bytes
        return round((largest - smallest) / math.log(largest / smallest))


TENSORS = Work(
    smallest_bytes=SMALLEST_BYTES, largest_bytes=LARGEST_BYTES, deadline_ms=DEADLINE_MS,
    edge=EDGE, cloud=CLOUD,
)  # fmt: skip
#: Prompts until their first token: the time to it is what a reader waits for. A slot is held for
#: that long only; decoding is left out.
FIRST_TOKENS = Work(
    smallest_bytes=500, largest_bytes=8_000, deadline_ms=4_000.0,
    edge=Speed(fixed_ms=60.0, per_kb_ms=60.0), cloud=Speed(fixed_ms=15.0, per_kb_ms=4.0),
    usual_bytes=2_000,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One world to compare policies in.

    Attributes:
        name: For people and the report.
        group: Whether its link varies, does not, or something breaks.
        use: Whether it may be looked at while the router is worked on.
        links: Draws (up, down) of one run.
        arrivals: How requests come.
        rate_s: Mean requests per second.
        rtt_ms: Median round trip without transfer.
        faults: Turns a drawn world into a faulty one.
        is_recorded: Whether the link is a recording.
        work: What is asked for.
    """

    name: str
    group: Group
    use: Use
    links: Callable[[random.Random], tuple[Link, Link]]
    arrivals: Arrivals
    rate_s: float = 4.0
    rtt_ms: float = 40.0
    faults: Callable[[Nature, random.Random], Nature] | None = None
    is_recorded: bool = False
    work: Work = TENSORS

    def draw(self, seed: int) -> Nature:
        """Everything that happens in one run; the same for every policy."""
        rng = random.Random(f"{self.name} {seed}")
        up, down = self.links(rng)
        jobs = [
            _job(number, at_s, self.rtt_ms, self.work, rng)
            for number, at_s in enumerate(
                arrival_times(self.arrivals, self.rate_s, DURATION_S, rng)
            )
        ]
        work = self.work
        mean_s = work.cloud.service_s(work.mean_bytes)
        others = [
            (at_s, rng.expovariate(1.0 / mean_s))
            for at_s in arrival_times(
                "bursty", OTHERS_LOAD * CLOUD_SLOTS / mean_s, DURATION_S + 10.0, rng
            )
        ]
        nature = Nature(
            jobs=jobs, up=up, down=down, edge=work.edge, cloud=work.cloud,
            cloud_slots=CLOUD_SLOTS, others=others, usual_bytes=work.usual_bytes,
        )  # fmt: skip
        return self.faults(nature, rng) if self.faults is not None else nature


def _job(number: int, at_s: float, rtt_ms: float, work: Work, rng: random.Random) -> Job:
    size = math.exp(rng.uniform(math.log(work.smallest_bytes), math.log(work.largest_bytes)))
    return Job(
        number=number,
        arrival_s=at_s,
        deadline_s=at_s + work.deadline_ms / 1000.0,
        upload_bytes=round(size),
        download_bytes=DOWNLOAD_BYTES,
        edge_noise=math.exp(rng.gauss(0.0, EDGE_NOISE)),
        cloud_noise=math.exp(rng.gauss(0.0, CLOUD_NOISE)),
        rtt_s=rtt_ms / 1000.0 * math.exp(rng.gauss(0.0, RTT_JITTER)),
        cloud_wedges=False,
    )


# -- links -----------------------------------------------------------------------------------------


def _generated(*states: Weather) -> Callable[[random.Random], tuple[Link, Link]]:
    def draw(rng: random.Random) -> tuple[Link, Link]:
        up = markov_link(states, rng, duration_s=DURATION_S + 10.0)
        # A downlink is several times faster and is hardly used.
        return up, steady_link(4.0 * max(state.mbit_s for state in states))

    return draw


def _recorded(up: Path, down: Path) -> Callable[[random.Random], tuple[Link, Link]]:
    links = (read_trace(up), read_trace(down))

    def draw(rng: random.Random) -> tuple[Link, Link]:
        part = rng.random()  # every seed begins elsewhere in the recording
        return (
            replace(links[0], offset_s=part * links[0].period_s),
            replace(links[1], offset_s=part * links[1].period_s),
        )

    return draw


def _steady(mbit_s: float) -> Callable[[random.Random], tuple[Link, Link]]:
    return lambda rng: (steady_link(mbit_s), steady_link(4.0 * mbit_s))


# -- faults ----------------------------------------------------------------------------------------


def _windows(first_s: float, length_s: float, every_s: float, factor: float) -> list[Window]:
    count = math.ceil((DURATION_S - first_s) / every_s)
    begins = [first_s + every_s * i for i in range(count)]
    return [Window(begin, begin + length_s, factor) for begin in begins]


def _outages(nature: Nature, rng: random.Random) -> Nature:
    return replace(nature, outages=_windows(rng.uniform(5, 25), 10.0, 40.0, math.inf))


def _slow_cloud(nature: Nature, rng: random.Random) -> Nature:
    return replace(nature, slow=_windows(rng.uniform(5, 25), 15.0, 50.0, 4.0))


def _throttled(nature: Nature, rng: random.Random) -> Nature:
    return replace(nature, thermal=_windows(rng.uniform(5, 25), 20.0, 45.0, 2.5))


def _busy_device(nature: Nature, rng: random.Random) -> Nature:
    """A device that is slower for a while: hot, saving power, or in use by another app."""
    windows: list[Window] = []
    at_s = rng.expovariate(1.0 / DEVICE_FREE_S)
    while at_s < DURATION_S:
        end_s = at_s + rng.expovariate(1.0 / DEVICE_BUSY_S)
        windows.append(Window(at_s, end_s, rng.uniform(3.0, 5.0)))
        at_s = end_s + rng.expovariate(1.0 / DEVICE_FREE_S)
    return replace(nature, thermal=windows)


def _wedges(nature: Nature, rng: random.Random) -> Nature:
    return replace(
        nature, jobs=[replace(job, cloud_wedges=rng.random() < 0.02) for job in nature.jobs]
    )


# -- all of them -----------------------------------------------------------------------------------

#: Recordings that are used when they are there: name of the files without suffix, and their use.
TRACES: tuple[tuple[str, Use, Arrivals], ...] = (
    ("ATT-LTE-driving-2016", "tuned", "poisson"),
    ("Verizon-LTE-short", "held_out", "bursty"),
)

_GENERATED = (
    # A phone in a city: good, fair, bad cells, and short holes.
    Scenario(
        name="cellular", group="varying", use="tuned", arrivals="bursty",
        links=_generated(Weather(16, 6), Weather(5, 6), Weather(1, 5), Weather(0, 1.5)),
        faults=_busy_device,
    ),
    # A wireless network that others fill from time to time.
    Scenario(
        name="busy wifi", group="varying", use="tuned", arrivals="diurnal", rtt_ms=25.0,
        links=_generated(Weather(30, 8), Weather(2, 4), Weather(0.6, 4)),
        faults=_busy_device,
    ),
    # A vehicle that loses its link for seconds.
    Scenario(
        name="vehicle", group="varying", use="tuned", arrivals="poisson", rtt_ms=55.0,
        links=_generated(Weather(10, 10), Weather(3, 5), Weather(0, 5)),
        faults=_busy_device,
    ),
    Scenario(
        name="train", group="varying", use="held_out", arrivals="poisson", rtt_ms=60.0,
        links=_generated(Weather(20, 7), Weather(4, 4), Weather(0.8, 3), Weather(0, 7)),
        faults=_busy_device,
    ),
    Scenario(
        name="walking", group="varying", use="held_out", arrivals="bursty", rtt_ms=45.0,
        links=_generated(Weather(8, 4), Weather(3, 4), Weather(1.2, 6)),
        faults=_busy_device,
    ),
    Scenario(
        name="conference", group="varying", use="held_out", arrivals="diurnal", rtt_ms=30.0,
        links=_generated(Weather(12, 3), Weather(1.5, 3), Weather(0.4, 2)),
        faults=_busy_device,
    ),
    Scenario(
        name="fibre", group="steady", use="tuned", arrivals="poisson", rtt_ms=20.0,
        links=_steady(50),
    ),
    Scenario(
        name="slow dsl", group="steady", use="tuned", arrivals="poisson", rtt_ms=30.0,
        links=_steady(1),
    ),
    Scenario(
        name="dsl", group="steady", use="held_out", arrivals="bursty", rtt_ms=30.0,
        links=_steady(6),
    ),
    Scenario(
        name="satellite", group="steady", use="held_out", arrivals="poisson",
        rtt_ms=180.0, links=_steady(15),
    ),
    Scenario(
        name="outages", group="faults", use="tuned", arrivals="poisson", links=_steady(10),
        faults=_outages,
    ),
    Scenario(
        name="slow cloud", group="faults", use="tuned", arrivals="bursty", links=_steady(10),
        faults=_slow_cloud,
    ),
    Scenario(
        name="throttled device", group="faults", use="held_out", arrivals="poisson",
        links=_generated(Weather(6, 8), Weather(3, 8)), faults=_throttled,
    ),
    Scenario(
        name="2 % wedges", group="faults", use="held_out", arrivals="poisson", links=_steady(10),
        faults=_wedges,
    ),
    Scenario(
        name="first token, 2 % wedges", group="wedges", use="tuned", arrivals="poisson",
        rate_s=2.0, links=_steady(10), faults=_wedges, work=FIRST_TOKENS,
    ),
    Scenario(
        name="first token, 2 % wedges, mobile", group="wedges", use="held_out", arrivals="bursty",
        rate_s=2.0, rtt_ms=60.0, faults=_wedges, work=FIRST_TOKENS,
        links=_generated(Weather(12, 6), Weather(4, 6), Weather(2, 4)),
    ),
)  # fmt: skip


def scenarios(traces: Path | None) -> list[Scenario]:
    """All scenarios; recorded links where the folder has them.

    Args:
        traces: Folder with ``NAME.up`` and ``NAME.down`` in Mahimahi's format; `None` for none.
            Those named in `TRACES` have their place; any other counts as held out.

    Raises:
        InvalidInput: The folder does not exist, holds no pair of files, or a file is not a trace.
    """
    found: list[Scenario] = []
    if traces is not None:
        fix = "Name a folder that holds NAME.up and NAME.down, or leave --traces out"
        if not traces.is_dir():
            raise InvalidInput(f"There is no folder {traces}", field="--traces", fix=fix)
        places = {name: (use, arrivals) for name, use, arrivals in TRACES}
        for up in sorted(traces.glob("*.up")):
            down = up.with_suffix(".down")
            if down.is_file():
                use, arrivals = places.get(up.stem, ("held_out", "poisson"))
                found.append(
                    Scenario(
                        name=up.stem, group="varying", use=use, arrivals=arrivals, rtt_ms=50.0,
                        links=_recorded(up, down), faults=_busy_device, is_recorded=True,
                    )
                )  # fmt: skip
        if not found:
            raise InvalidInput(f"The folder {traces} holds no traces", field="--traces", fix=fix)
    return found + list(_GENERATED)


def of_group(
    all_scenarios: Sequence[Scenario], group: Group, use: Use | None = None
) -> list[Scenario]:
    """Scenarios of a group, of one use or of both."""
    return [s for s in all_scenarios if s.group == group and use in (None, s.use)]
