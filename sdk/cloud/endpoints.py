"""The clouds that a client may ask, one by one: what is known about each, and which one to ask.

Each endpoint has a link, an identity, credentials and a region of its own (`CloudConfig`), so
policy is asked about each by itself. Breakers are per endpoint, for reaching it at all, and per
endpoint and model, for what fails or goes silent there. The choice is sans-IO.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING

from nearfar.errors import Cancelled, CloudUnavailable, DeadlineExceeded, EngineError, NearfarError
from sdk.routing.balancer import PeakEwma, pick
from sdk.routing.breaker import BreakerState, CircuitBreaker
from sdk.routing.router import MAX_ENDPOINT_BYTES

if TYPE_CHECKING:
    from nearfar.secure.shaping import Shaping
    from sdk.cloud.link import CloudLink
    from sdk.routing import Observation, Predictor

#: Names of models that failed come from the app and may be many.
_MAX_BREAKERS = 256

_READY, _UNKNOWN, _LEAVING, _FAILED, _OPEN, _UNFIT = range(6)


class Endpoint:
    """One cloud, as far as it is known. Not locked: a race loses an observation, never more.

    Args:
        link: The way to it.
        predictor: What requests to it take.

    Attributes:
        name: Of its section in the configuration, cut to what a decision record holds.
        breaker: For reaching it at all.
    """

    __slots__ = ("_breakers", "_loads", "breaker", "link", "name", "predictor")

    def __init__(self, link: CloudLink, predictor: Predictor) -> None:
        self.name = endpoint_name(link.config.name)
        self.link = link
        self.predictor = predictor
        self.breaker = CircuitBreaker()
        self._breakers: dict[str, CircuitBreaker] = {}
        self._loads: dict[str, PeakEwma] = {}

    def region(self) -> str | None:
        """Where it stands: what the configuration states, unless the cloud contradicts."""
        stated, claimed = self.link.config.region, self.link.state.region
        if stated and claimed and stated != claimed:
            return None  # one of them is wrong; rules that need a region then do not hold
        return stated or claimed

    def shaping(self) -> Shaping:
        """Least shaping of every connection: the session refuses a cloud that offers less."""
        return self.link.config.shaping

    def attested(self) -> bool:
        """Whether no connection is made without evidence that a plug-in accepts."""
        config = self.link.config
        return config.attestation is not None or config.verifier is not None

    # -- health ------------------------------------------------------------------------------------

    def breaker_of(self, model: str) -> CircuitBreaker:
        """The breaker of one model there; made when it is first needed."""
        breaker = self._breakers.get(model)
        if breaker is None:
            if len(self._breakers) >= _MAX_BREAKERS:
                self._breakers.clear()
            breaker = self._breakers[model] = CircuitBreaker()
        return breaker

    def retry_in_s(self, model: str, now_s: float) -> float:
        """Seconds until the model may be asked for there; 0 when it may be now."""
        wait_s = self.breaker.retry_in_s(now_s)
        breaker = self._breakers.get(model)
        return wait_s if breaker is None else max(wait_s, breaker.retry_in_s(now_s))

    def can_try(self, model: str, now_s: float) -> bool:
        """Whether the model may be asked for there now."""
        return self.retry_in_s(model, now_s) == 0.0

    def describe(self, model: str, now_s: float) -> str:
        """Why it is not asked, in words; ``""`` when it may be."""
        breaker = self._breakers.get(model)
        if self.breaker.can_try(now_s) and breaker is not None:
            return breaker.describe(now_s)
        return self.breaker.describe(now_s)

    def health(self, model: str, now_s: float) -> tuple[BreakerState, int]:
        """State of the breaker that stands in the way more, and its failures in a row."""
        worse, own = self.breaker, self._breakers.get(model)
        if (own is not None and own.retry_in_s(now_s) > worse.retry_in_s(now_s)) or (
            own is not None and worse.state(now_s) is BreakerState.CLOSED
        ):
            worse = own
        return worse.state(now_s), worse.failures

    def acquire(self, model: str, now_s: float) -> None:
        """A request is about to be sent."""
        self.breaker.acquire(now_s)
        breaker = self._breakers.get(model)
        if breaker is not None:
            breaker.acquire(now_s)

    def answered(self, model: str, now_s: float) -> None:
        """An answer came."""
        self.breaker.record_success(now_s)
        breaker = self._breakers.get(model)
        if breaker is not None:
            breaker.record_success(now_s)

    def released(self, model: str, now_s: float) -> None:
        """The request ended and says nothing about the endpoint."""
        self.breaker.release(now_s)
        breaker = self._breakers.get(model)
        if breaker is not None:
            breaker.release(now_s)

    def silent(self, model: str, now_s: float) -> None:
        """An answer is so late that the model is taken to be stalled there."""
        self.breaker_of(model).record_failure(now_s)

    def failed(self, model: str, kind: type[BaseException], now_s: float) -> None:
        """A request failed with that error."""
        if issubclass(kind, CloudUnavailable):
            self.breaker.record_failure(now_s)
            breaker = self._breakers.get(model)
            if breaker is not None:
                breaker.release(now_s)
        elif issubclass(kind, (DeadlineExceeded, Cancelled)) or not issubclass(kind, NearfarError):
            self.released(model, now_s)
        elif issubclass(kind, EngineError):
            # The endpoint is there; this model does not run on it.
            self.breaker.record_success(now_s)
            self.breaker_of(model).record_failure(now_s)
        else:
            self.answered(model, now_s)  # if only to refuse

    def connected(self, error: NearfarError | None) -> None:
        """Connecting to the only cloud there is has ended, well (`None`) or with that error.

        A wrong identity does not open the breaker: whoever asks next is to be told of it, too.
        """
        now_s = time.monotonic()
        if error is None:
            self.breaker.record_success(now_s)
        else:
            self.failed("", type(error), now_s)

    def reached(self, error: NearfarError | None, now_s: float) -> None:
        """Connecting to one of several has ended, well (`None`) or with that error."""
        if error is None:
            self.breaker.record_success(now_s)
        elif isinstance(error, (DeadlineExceeded, Cancelled)):
            self.breaker.release(now_s)
        elif isinstance(error, CloudUnavailable):
            self.breaker.record_failure(now_s)
        else:
            self.breaker.trip(now_s)  # a wrong identity does not become right by asking again

    # -- load --------------------------------------------------------------------------------------

    def observe(self, model: str, observation: Observation, now_s: float) -> None:
        """Learn from an answer: a batch by its whole time, a text by the time to its first token,
        since how long it became is not the endpoint's doing."""
        latency_ms = observation.total_ms
        if observation.prefill_ms is not None:
            rtt_ms = self.link.state.rtt_ms or 0.0
            latency_ms = observation.queue_ms + observation.prefill_ms + rtt_ms
        self.observe_latency(model, latency_ms, now_s)

    def observe_latency(self, model: str, latency_ms: float, now_s: float) -> None:
        """Learn from a request that was answered, or given up, after that time."""
        average = self._loads.get(model)
        if average is None:
            average = self._loads[model] = PeakEwma()
        average.observe(latency_ms, now_s)

    def load(self, model: str, now_s: float) -> float:
        """What the balancer compares, see `PeakEwma.load`."""
        average = self._loads.get(model) or _UNTRIED
        return average.load(now_s, self.link.in_flight)


_UNTRIED = PeakEwma()


def endpoint_name(name: str) -> str:
    """A cloud's name as decision records hold it."""
    return name.encode()[:MAX_ENDPOINT_BYTES].decode("utf-8", "ignore")


def choose(
    endpoints: Sequence[Endpoint],
    *,
    model: str,
    allows: Callable[[Endpoint], bool],
    serves: Callable[[Endpoint], bool | None],
    left: Container[str],
    now_s: float,
    rng: random.Random,
    price: Callable[[Endpoint], float] | None = None,
    in_time: Callable[[Endpoint], bool] | None = None,
) -> Endpoint:
    """The endpoint that the cloud route means for one request.

    Endpoints that policy does not allow are never chosen while there is another. Of those that
    could answer at once the balancer draws one; where there is none, one that is not connected is
    taken; then one that is going away, that failed for this request, whose breaker is open, that
    does not have the model: the decision then says so.

    Args:
        endpoints: All of them.
        model: Name of the model.
        allows: Whether policy lets the request go there.
        serves: Whether it has the model as it is wanted; `None` before it was asked.
        left: Names of endpoints that failed for this request.
        now_s: Monotonic time.
        rng: Source of chance for the balancer.
        price: For objectives other than speed: what a request costs there; only the cheapest of
            those that are equally near are drawn from.
        in_time: For requests with a deadline: whether an answer from there is expected within it;
            the others are drawn from only when all are expected late.
    """
    allowed = [endpoint for endpoint in endpoints if allows(endpoint)]
    if not allowed:
        return endpoints[0]  # policy says no to all; to which first makes no difference
    ranks = [_rank(endpoint, model, serves(endpoint), left, now_s) for endpoint in allowed]
    best = min(ranks)
    choices = [one for one, rank in zip(allowed, ranks, strict=True) if rank == best]
    if len(choices) == 1:
        return choices[0]
    if best == _OPEN:
        return min(choices, key=lambda one: one.retry_in_s(model, now_s))
    load = functools.partial(_load, model, now_s)
    chosen = pick(_cheapest(choices, price), load, rng)
    if in_time is None or best != _READY or in_time(chosen):
        return chosen
    # Forecasts are only asked of the others when they may matter: they take longer than all else.
    timely = [one for one in choices if one is not chosen and in_time(one)]
    return pick(_cheapest(timely, price), load, rng) if timely else chosen


def _cheapest(
    choices: Sequence[Endpoint], price: Callable[[Endpoint], float] | None
) -> Sequence[Endpoint]:
    if price is None or len(choices) == 1:
        return choices
    prices = [price(one) for one in choices]
    least = min(prices)
    return [one for one, cost in zip(choices, prices, strict=True) if cost == least]


def _load(model: str, now_s: float, endpoint: Endpoint) -> float:
    return endpoint.load(model, now_s)


def _rank(
    endpoint: Endpoint, model: str, serves: bool | None, left: Container[str], now_s: float
) -> int:
    if serves is False:
        return _UNFIT
    if not endpoint.can_try(model, now_s):
        return _OPEN
    if endpoint.name in left:
        return _FAILED
    link = endpoint.link
    if not link.state.is_connected or serves is None:
        return _UNKNOWN
    return _LEAVING if link.is_leaving else _READY
