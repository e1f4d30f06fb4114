"""One attempt that may be joined by another on the other route: the first answer wins.

Sans-IO, like `sdk.core`: a client performs the `Race` step in its own way. It starts `first`, asks
`timeout_s` how long to wait for it, calls `wake` when that time has passed, starts the step that
`wake` gives, if it gives one, and says how it ended. `sdk.core` and `sdk.routing.hedging` decide.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from bisect import insort
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Union

import msgspec

from nearfar.engines.base import CancelToken
from nearfar.errors import CloudUnavailable, NearfarError, Overloaded
from nearfar.units import Deadline, format_ms
from sdk.background import BackgroundLoop, result_of
from sdk.results import RouteName
from sdk.routing import RouteDecision, Ticket
from sdk.routing.hedging import HedgePlan, loses_quality, stalls_after_ms
from sdk.routing.types import exclusion
from sdk.steps import Answer, RunHere, RunThere, run_here

if TYPE_CHECKING:
    from sdk.cloud.egress import Permit
    from sdk.cloud.endpoints import Endpoint
    from sdk.core import Core
    from sdk.edge import EdgeRoute
    from sdk.requests import Request

logger = logging.getLogger(__name__)

Run = Union[RunHere, RunThere]

#: A living cloud answers a ping within this time, however busy its engines are.
CHECK_TIMEOUT_S = 0.5


class Race:
    """Step: run one batch, and another one beside it once the first is late.

    Args:
        core: Asked again before the other route is started.
        request: What is asked for.
        decision: The one that chose the first route.
        planned: When the other is to be started; `None` never, and then only stalls are watched.
        make_other: Makes the step of the other route from a fresh decision; `None` when it cannot
            be taken now.

    Attributes:
        first: The step to begin with.
        winner: Route whose answer it was; `None` until there is one.
        other_ticket: The other attempt's, once it was started.
        permit: The other attempt's, if it went to the cloud.
        hedge: What was started beside the first and why, in words; ``""`` when nothing was.
        is_silent: Whether the cloud took part and did not answer.
        again: The decision under which the other attempt was started; `None` before.
    """

    def __init__(
        self,
        core: Core,
        request: Request,
        decision: RouteDecision,
        first: Run,
        planned: HedgePlan | None,
        make_other: Callable[[RouteDecision], Run | None],
    ) -> None:
        self._core = core
        self._request = request
        self._decision = decision
        self._planned = planned
        self._make_other = make_other
        self._began_s = time.monotonic()
        self._moments: list[tuple[float, bool]] = []  # (seconds after the start, is it a stall)
        if planned is not None:
            self._moments.append((planned.after_ms / 1000.0, False))
        if isinstance(first, RunThere):
            expected = decision.inputs.cloud.prediction
            self._moments.append((stalls_after_ms(expected) / 1000.0, True))
        self._moments.sort()
        self.first = first
        self._trace = b""
        self.winner: RouteName | None = None
        self.other_ticket: Ticket | None = None
        self.permit: Permit | None = None
        self.hedge = ""
        self.is_silent = False
        self.again: RouteDecision | None = None

    def carry(self, trace: bytes) -> None:
        """Tell the cloud the trace of the request, whichever step goes there."""
        self._trace = trace
        if isinstance(self.first, RunThere):
            self.first = msgspec.structs.replace(self.first, trace=trace)

    def is_first(self, route: RouteName) -> bool:
        """Whether it is the route that was begun with."""
        return (route == "cloud") == isinstance(self.first, RunThere)

    def timeout_s(self) -> float | None:
        """Until `wake` is to be called; `None` when it need not be."""
        if not self._moments:
            return None
        return max(0.0, self._began_s + self._moments[0][0] - time.monotonic())

    def wake(self) -> Run | None:
        """The first route is late: the step to start beside it, if one is to be started.

        Beside a route that has stalled the other one is started whatever the budget of hedges says:
        that is no second request for speed, but most likely the one that is answered.

        Raises:
            CloudUnavailable: It has stalled, and the configuration wants no two requests at once.
        """
        at_s, is_stall = self._moments.pop(0)
        known = self._core.known
        if is_stall:
            self.is_silent = True
            known.endpoint_of(self._decision).silent(self._request.model, time.monotonic())
            logger.info("the cloud is silent after %.0f ms", at_s * 1000.0)
            if self.other_ticket is not None or loses_quality(self._decision):
                return None
            stalled = f"the cloud was silent for {format_ms(at_s * 1000.0)}: it stalled"
            again = self._core.decide(self._request)
            if exclusion("edge", again.inputs) or not self._decision.verdict.allows("edge"):
                return None
            if self._core.hedging.share <= 0.0:  # never two at once: one after the other
                raise CloudUnavailable(stalled[:1].upper() + stalled[1:])
            self._core.hedging.stalled()
            return self._start("edge", again, stalled)
        assert self._planned is not None
        if self.other_ticket is not None:
            return None  # since it stalled
        again = self._core.decide(self._request)
        why = self._core.hedging.start(self._planned, self._decision, again)
        if isinstance(why, HedgePlan):  # not yet
            self._planned = why
            insort(self._moments, (why.after_ms / 1000.0, False))
            return None
        return None if why is None else self._start(self._planned.other, again, why)

    def _start(self, route: RouteName, again: RouteDecision, why: str) -> Run | None:
        """The other route's step, if it can be taken now."""
        known = self._core.known
        step = self._make_other(again)
        if step is None:
            return None
        if isinstance(step, RunThere):
            step = msgspec.structs.replace(step, trace=self._trace)
        self.hedge = f"the {route} was started as well: {why}"
        now_s = time.monotonic()
        self.again = again
        if route == "cloud":
            known.endpoint_of(again).acquire(self._request.model, now_s)
        self.other_ticket = known.predictor_of(again, route).start(
            route,
            self._request.model,
            known.size(self._request),
            again.inputs.state(route).prediction,
            now_s=now_s,
        )
        return step

    def won(self, route: RouteName, answer: Answer) -> Answer:
        """An answer came; what else was started is to be cancelled."""
        self.winner = route
        is_cloud_first = isinstance(self.first, RunThere)
        self.is_silent = is_cloud_first and route == "edge"
        now_s = time.monotonic()
        if self.other_ticket is not None:
            self._stop_other(now_s)
            if not is_cloud_first:
                endpoint = self._endpoint()
                if route == "cloud":
                    endpoint.answered(self._request.model, now_s)
                else:
                    endpoint.released(self._request.model, now_s)
            took = format_ms((now_s - self._began_s) * 1000.0)
            self.hedge += f"; the {route} answered first, after {took}"
        return answer

    def failed(self, route: RouteName, error: BaseException) -> None:
        """What was started as the other route ended without an answer."""
        now_s = time.monotonic()
        if self.other_ticket is not None:
            self._stop_other(now_s)
        if isinstance(error, Overloaded):
            self._core.hedging.overloaded(now_s)
        if route == "cloud":
            endpoint = self._endpoint()
            if isinstance(error, CloudUnavailable):
                endpoint.failed(self._request.model, type(error), now_s)
            else:
                endpoint.released(self._request.model, now_s)

    @property
    def deadline(self) -> Deadline:
        """Of the request."""
        return self._request.deadline

    @property
    def silent_endpoint(self) -> str:
        """Name of the cloud that did not answer."""
        return self._decision.inputs.endpoint

    def _stop_other(self, now_s: float) -> None:
        assert self.other_ticket is not None
        assert self.again is not None
        predictor = self._core.known.predictor_of(self.again, self.other_ticket.route)
        predictor.stop(self.other_ticket, now_s=now_s)

    def _endpoint(self) -> Endpoint:
        """The cloud that took part as the other route."""
        return self._core.known.endpoint_of(self.again or self._decision)


def race_in_thread(
    race: Race,
    edge: EdgeRoute,
    loop: BackgroundLoop,
    there: Callable[[RunThere], concurrent.futures.Future[Answer]],
) -> Answer:
    """Perform a `Race` for a caller that may block.

    What runs on the device runs in the calling thread, the cloud on the loop; whichever answers
    cancels the other.

    Raises:
        NearfarError: Neither answered; the first route's error.
    """
    if isinstance(race.first, RunThere):
        return _from_cloud(race, edge, there(race.first))
    return _from_edge(race, edge, loop, there)


def _from_cloud(race: Race, edge: EdgeRoute, first: concurrent.futures.Future[Answer]) -> Answer:
    try:
        while not first.done():
            timeout_s = race.timeout_s()
            if timeout_s is None or timeout_s >= race.deadline.remaining_s():
                break
            concurrent.futures.wait((first,), timeout_s)
            if first.done():
                break
            step = race.wake()
            if isinstance(step, RunHere):
                answer = _beside(race, edge, step, first)
                if answer is not None:
                    return answer
        return race.won("cloud", result_of(first, race.deadline))
    except BaseException:
        first.cancel()
        raise


def _beside(
    race: Race, edge: EdgeRoute, step: RunHere, first: concurrent.futures.Future[Answer]
) -> Answer | None:
    """Run on the device while the cloud may still answer; `None` when the device did not."""
    cancel = CancelToken()

    def done(future: concurrent.futures.Future[Answer]) -> None:
        if not future.cancelled() and future.exception() is None:
            cancel.cancel()

    first.add_done_callback(done)
    try:
        answer = run_here(edge, step, cancel)
    except NearfarError as error:
        race.failed("edge", error)
        return None
    first.cancel()
    return race.won("edge", answer)


def _from_edge(
    race: Race,
    edge: EdgeRoute,
    loop: BackgroundLoop,
    there: Callable[[RunThere], concurrent.futures.Future[Answer]],
) -> Answer:
    assert isinstance(race.first, RunHere)
    cancel = CancelToken()
    second: list[concurrent.futures.Future[Answer]] = []
    lock, is_over = threading.Lock(), False

    async def later() -> None:
        while not second and (timeout_s := race.timeout_s()) is not None:
            await asyncio.sleep(timeout_s)
            with lock:  # the device's answer does not come between question and start
                if is_over:
                    return
                step = race.wake()
                if isinstance(step, RunThere):
                    future = there(step)
                    second.append(future)
                    future.add_done_callback(answered)

    def answered(future: concurrent.futures.Future[Answer]) -> None:
        if not future.cancelled() and future.exception() is None:
            cancel.cancel()

    timer = loop.submit(later())
    failure: NearfarError | None = None
    answer: Answer | None = None
    try:
        try:
            answer = run_here(edge, race.first, cancel)
        except NearfarError as error:
            failure = error
        finally:
            timer.cancel()
            with lock:
                is_over = True
        if answer is not None:
            return race.won("edge", answer)
        assert failure is not None
        if not second:
            raise failure
        try:
            return race.won("cloud", result_of(second[0], race.deadline))
        except NearfarError as other:
            race.failed("cloud", other)
            raise failure from None
    finally:
        for future in second:
            future.cancel()


async def race_in_tasks(
    race: Race,
    here: Callable[[RunHere, CancelToken], Awaitable[Answer]],
    there: Callable[[RunThere], Awaitable[Answer]],
) -> Answer:
    """Perform a `Race` on the running event loop.

    Raises:
        NearfarError: Neither answered; the first route's error.
    """
    cancel = CancelToken()
    tasks: dict[asyncio.Future[Answer], RouteName] = {}

    def begin(step: Run) -> None:
        if isinstance(step, RunHere):
            tasks[asyncio.ensure_future(here(step, cancel))] = "edge"
        else:
            tasks[asyncio.ensure_future(there(step))] = "cloud"

    begin(race.first)
    first_error: NearfarError | None = None
    try:
        while True:
            timeout_s = race.timeout_s() if len(tasks) == 1 and race.other_ticket is None else None
            done, _ = await asyncio.wait(
                tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                step = race.wake()
                if step is not None:
                    begin(step)
                continue
            for task in sorted(done, key=lambda task: task.exception() is not None):
                route = tasks.pop(task)
                error = task.exception()
                if error is None:
                    return race.won(route, task.result())
                if not isinstance(error, NearfarError):
                    raise error
                if race.is_first(route):
                    first_error = error
                else:
                    race.failed(route, error)
            if not tasks:
                assert first_error is not None
                raise first_error
    finally:
        cancel.cancel()
        for task in tasks:
            task.cancel()


async def look_after(endpoint: Endpoint) -> None:
    """Ask a cloud that was silent whether it lives; open the breaker if it does not say so."""
    try:
        await endpoint.link.ping(CHECK_TIMEOUT_S)
    except CloudUnavailable:
        endpoint.breaker.trip(time.monotonic())
    except NearfarError as error:
        logger.debug("the cloud cannot be asked whether it lives: %s", error)
