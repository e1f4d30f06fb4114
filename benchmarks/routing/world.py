"""What a request meets: a slow device, a link, and a fast cloud that others use too.

Everything random is drawn before a policy runs, so that all policies meet the same world. What
happens to a request is computed when it starts: later requests cannot change it, because device,
upload and cloud serve in order. That is what lets the oracle know the future of a request.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.routing.links import Link
from sdk.routing import Route

Ending = Literal["answered", "late", "unavailable"]

#: The cloud's other clients have deadlines too, and give up after waiting so long.
PATIENCE_S = 0.5
#: A cancelled call gives its slot back within this time.
CANCEL_S = 0.05


@dataclass(frozen=True, slots=True)
class Window:
    """A time in which something is slower by a factor, or down."""

    begin_s: float
    end_s: float
    factor: float = math.inf


@dataclass(frozen=True, slots=True)
class Job:
    """One request, and the chances that were drawn for it.

    Attributes:
        number: 0, 1, 2 …
        arrival_s: When it comes.
        deadline_s: Until when an answer counts, absolute.
        upload_bytes: What the cloud would be sent.
        download_bytes: What would come back.
        edge_noise: Factor on the device's service time.
        cloud_noise: Factor on the cloud's service time.
        rtt_s: Round trip without transfer time.
        cloud_wedges: Whether the cloud would accept it and never answer.
    """

    number: int
    arrival_s: float
    deadline_s: float
    upload_bytes: int
    download_bytes: int
    edge_noise: float
    cloud_noise: float
    rtt_s: float
    cloud_wedges: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Service time as a function of size, before noise."""

    fixed_ms: float
    per_kb_ms: float

    def service_s(self, size_bytes: int) -> float:
        return (self.fixed_ms + self.per_kb_ms * size_bytes / 1000.0) / 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Nature:
    """All that is drawn for one run of one scenario; never changes while policies run.

    Attributes:
        jobs: Requests by arrival.
        up: Uplink.
        down: Downlink.
        edge: Speed of the device.
        cloud: Speed of the cloud.
        cloud_slots: Requests that the cloud serves at a time.
        others: (arrival, service time) of other clients' requests at the cloud.
        thermal: When the device is slower.
        slow: When the cloud is slower.
        outages: When the cloud refuses connections.
        usual_bytes: Size that a bundle's figures are measured with.
    """

    jobs: Sequence[Job]
    up: Link
    down: Link
    edge: Speed
    cloud: Speed
    cloud_slots: int
    others: Sequence[tuple[float, float]]
    thermal: Sequence[Window] = ()
    slow: Sequence[Window] = ()
    outages: Sequence[Window] = ()
    usual_bytes: int = 16_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What becomes of a request on a route.

    Attributes:
        route: Which.
        ending: How it ends.
        end_s: When the caller has the answer, or knows that there is none.
        queue_ms: Wait for a slot, as the runtime reports it.
        compute_ms: Service time, as the runtime reports it.
        after: The route's state after it, for `World.start`.
    """

    route: Route
    ending: Ending
    end_s: float
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    after: tuple[float, ...] | _CloudState | None = None


@dataclass(frozen=True, slots=True)
class _CloudState:
    free: int  # first opportunity of the uplink
    slots: tuple[float, ...]  # heap: when each slot is free
    others: int  # how many of the others' requests were taken in


class World:
    """Device, link and cloud while one policy uses them."""

    def __init__(self, nature: Nature) -> None:
        self.nature = nature
        self._edge_free_s = 0.0
        self._cloud = _CloudState(0, (0.0,) * nature.cloud_slots, 0)

    def foresee(self, route: Route, job: Job, now_s: float) -> Visit:
        """What would become of the request; changes nothing."""
        return self._edge_visit(job, now_s) if route == "edge" else self._cloud_visit(job, now_s)

    def edge_wait_s(self, now_s: float) -> float:
        """Until when the device is taken, from now."""
        return max(0.0, self._edge_free_s - now_s)

    def start(self, route: Route, job: Job, now_s: float) -> Visit:
        """Take the route."""
        visit = self.foresee(route, job, now_s)
        if isinstance(visit.after, _CloudState):
            self._cloud = visit.after
        elif visit.after is not None:
            self._edge_free_s = visit.after[0]
        return visit

    def cancel(self, visit: Visit, now_s: float) -> None:
        """Give up a visit that has not ended.

        What it holds of the device is free `CANCEL_S` later, if nobody is queued behind it. In the
        cloud and on the link it is done to its end, which is the worst case.
        """
        if visit.route == "edge" and visit.after == (self._edge_free_s,):
            begin_s = self._edge_free_s - visit.compute_ms / 1000.0
            self._edge_free_s = min(self._edge_free_s, max(begin_s, now_s + CANCEL_S))

    def _edge_visit(self, job: Job, now_s: float) -> Visit:
        begin_s = max(now_s, self._edge_free_s)
        if begin_s >= job.deadline_s:  # given up while it waited: never runs
            return Visit(route="edge", ending="late", end_s=job.deadline_s)
        nature = self.nature
        service_s = nature.edge.service_s(job.upload_bytes) * job.edge_noise
        service_s *= factor_at(nature.thermal, begin_s)
        end_s = begin_s + service_s  # a running call is not interrupted
        return Visit(
            route="edge",
            ending="answered" if end_s <= job.deadline_s else "late",
            end_s=min(end_s, job.deadline_s),
            queue_ms=(begin_s - now_s) * 1000.0,
            compute_ms=service_s * 1000.0,
            after=(end_s,),
        )

    def _cloud_visit(self, job: Job, now_s: float) -> Visit:
        nature, state = self.nature, self._cloud
        down_until_s = end_of(nature.outages, now_s)
        if down_until_s is not None:  # refused after one round trip
            end_s = now_s + job.rtt_s
            ending: Ending = "unavailable" if end_s < job.deadline_s else "late"
            return Visit(route="cloud", ending=ending, end_s=min(end_s, job.deadline_s))
        sent_s, free = nature.up.cross(job.upload_bytes, at_s=now_s, free=state.free)
        # What was given up is not sent any further.
        free = min(free, max(state.free, nature.up.opportunity(job.deadline_s)))
        arrived_s = sent_s + job.rtt_s / 2
        if arrived_s >= job.deadline_s or job.cloud_wedges:
            after = _CloudState(free, state.slots, state.others)
            return Visit(route="cloud", ending="late", end_s=job.deadline_s, after=after)
        slots, taken = self._others_until(arrived_s)
        begin_s = max(arrived_s, slots[0])
        if begin_s >= job.deadline_s:
            after = _CloudState(free, tuple(slots), taken)
            return Visit(route="cloud", ending="late", end_s=job.deadline_s, after=after)
        service_s = nature.cloud.service_s(job.upload_bytes) * job.cloud_noise
        service_s *= factor_at(nature.slow, begin_s)
        heapq.heapreplace(slots, begin_s + service_s)
        end_s = begin_s + service_s + job.rtt_s / 2
        end_s, _ = nature.down.cross(job.download_bytes, at_s=end_s)
        after = _CloudState(free, tuple(slots), taken)
        lost_s = min(
            (w.begin_s + job.rtt_s / 2 for w in nature.outages if now_s < w.begin_s < end_s),
            default=math.inf,
        )
        if lost_s < min(end_s, job.deadline_s):
            return Visit(route="cloud", ending="unavailable", end_s=lost_s, after=after)
        return Visit(
            route="cloud",
            ending="answered" if end_s <= job.deadline_s else "late",
            end_s=min(end_s, job.deadline_s),
            queue_ms=(begin_s - arrived_s) * 1000.0,
            compute_ms=service_s * 1000.0,
            after=after,
        )

    def _others_until(self, at_s: float) -> tuple[list[float], int]:
        """The cloud's slots when the others' requests until then were taken in."""
        slots, index = list(self._cloud.slots), self._cloud.others
        others = self.nature.others
        while index < len(others) and others[index][0] <= at_s:
            arrival_s, service_s = others[index]
            service_s *= factor_at(self.nature.slow, arrival_s)
            begin_s = max(arrival_s, slots[0])
            if begin_s - arrival_s < PATIENCE_S:
                heapq.heapreplace(slots, begin_s + service_s)
            index += 1
        return slots, index


def factor_at(windows: Sequence[Window], at_s: float) -> float:
    """How much slower something is at a moment."""
    return next((w.factor for w in windows if w.begin_s <= at_s < w.end_s), 1.0)


def end_of(windows: Sequence[Window], at_s: float) -> float | None:
    """When the window ends that holds a moment; `None` outside all of them."""
    return next((w.end_s for w in windows if w.begin_s <= at_s < w.end_s), None)


# -- arrivals --------------------------------------------------------------------------------------

Arrivals = Literal["poisson", "bursty", "diurnal"]


def arrival_times(
    kind: Arrivals, rate_s: float, duration_s: float, rng: random.Random
) -> list[float]:
    """When requests come, at a mean rate.

    Poisson: constant rate. Bursty: half and twice the rate, changing every 4 s on average; a third
    of the time at twice. Diurnal: a sine between a fifth of the rate and 1.8 times of it, three
    times in the whole duration.
    """
    busiest = {"poisson": 1.0, "bursty": 2.0, "diurnal": 1.8}[kind] * rate_s
    is_burst, change_s = False, rng.expovariate(1 / 5.3)
    times: list[float] = []
    at_s = rng.expovariate(busiest)
    while at_s < duration_s:
        rate = rate_s
        if kind == "bursty":
            while at_s >= change_s:
                is_burst = not is_burst
                change_s += rng.expovariate(1 / 2.7 if is_burst else 1 / 5.3)
            rate = rate_s * (2.0 if is_burst else 0.5)
        elif kind == "diurnal":
            rate = rate_s * (1.0 - 0.8 * math.cos(6.0 * math.pi * at_s / duration_s))
        if rng.random() * busiest < rate:  # thinning (Lewis and Shedler, 1979)
            times.append(at_s)
        at_s += rng.expovariate(busiest)
    return times
