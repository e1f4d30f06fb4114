"""Learn from every answer how long each route takes, per model.

edge  = queue + load + compute
cloud = queue + compute + round trip + bytes / bandwidth

For text generation compute = prefill(input tokens) + output tokens x time per token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from math import sqrt
from typing import TYPE_CHECKING

import msgspec

from sdk.routing.estimates import (
    FULL,
    Quantiles,
    Recent,
    SizedLatency,
    Tail,
    moments_of,
    sigma_of,
)
from sdk.routing.network import LinkLatency
from sdk.routing.types import UNKNOWN, USUAL_TAIL, Basis, Prediction, RequestSize, Route

if TYPE_CHECKING:  # routing alone stays light to import
    from nearfar.bundle.manifest import LatencyFigure

# Reading and preparing a model, before it was ever measured here; a slow disk gives this.
ASSUMED_LOAD_BYTES_PER_MS = 250_000.0
# How far off a known queue may be, as a part of it: p95 - p50.
QUEUE_SPREAD = 0.5
# How fast a queue at the cloud that was reported is forgotten. While others keep coming it does not
# drain by a second in a second: what fills it lasts for seconds.
QUEUE_HALF_LIFE_S = 1.5
# Answers of a model that must have been seen before their length counts as expected.
MIN_ANSWERS = 3
# Length of an answer that its limit cut: longer than that, and nobody knows by how much.
CUT_TOKENS = 1e9
# A call on the device has overrun when it takes so many times what 99 of 100 take, and is then
# taken to need so many times what it has taken.
OVERRUN, GROWTH = 1.05, 1.5
# Seeds' times per token vary little from answer to answer.
PER_TOKEN_SIGMA = 0.1
# Probability that a cloud which left so many requests in a row unanswered leaves the next one, and
# how soon that is forgotten. One is an accident more often than not.
SILENCE = (0.0, 0.04, 0.5, 0.65, 0.8)
SILENCE_HALF_LIFE_S = 5.0
# A device that says that it runs slower than this is taken to run at this.
LOWEST_SPEED = 0.02
# How far that reaches at p80 and p99, in p95 - p50 (normal distribution).
_QUEUE_REACH_80, _QUEUE_REACH_99 = 0.51, 1.41


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """Times of one complete answer, as the caller and the runtime measured them.

    Attributes:
        total_ms: From the moment the route was taken to the complete answer.
        queue_ms: Wait for a slot, as the runtime reports it.
        compute_ms: Tensor calls: time in the engine. Text generation: leave at `None`.
        load_ms: Time spent loading the model for this request (edge, first use); 0 otherwise.
        prefill_ms: Text generation: prompt processing until the first token, queue excluded.
        decode_ms: Text generation: from the first token to the last.
        completion_tokens: Text generation: tokens of the answer.
        finished: Text generation: `False` when the caller or a deadline cut the answer short.
        pause_ms: Text generation: the longest wait for a token after the first one.
    """

    total_ms: float
    queue_ms: float = 0.0
    compute_ms: float | None = None
    load_ms: float = 0.0
    prefill_ms: float | None = None
    decode_ms: float | None = None
    completion_tokens: int = 0
    finished: bool = True
    pause_ms: float | None = None


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt that has started; see `Predictor.start`.

    Attributes:
        number: Unique in its predictor.
        route: Where it runs.
        model: Name of the model.
        size: Size of the request.
        started_s: When it started.
        expected_ms: What was predicted for it (median); `None` when nothing was.
        late_ms: What was predicted to be enough for 8 of 10 such requests.
        enough_ms: What was predicted to be enough for 19 of 20.
        service_ms: For how long it was predicted to hold its slot.
        queue_ms: What wait for a slot was predicted.
        ahead_bytes: Bytes of earlier uploads that were under way when it started.
        slower: How much slower the device's clocks were than at full speed when it started.
    """

    number: int
    route: Route
    model: str
    size: RequestSize
    started_s: float
    expected_ms: float | None
    late_ms: float | None
    enough_ms: float | None
    service_ms: float | None
    queue_ms: float
    ahead_bytes: float
    slower: float = 1.0


class Predictor:
    """Latency of every (route, model) and of the cloud link.

    Sans-IO: `now_s` is passed in. Not locked: callers on several threads may lose an observation
    to a race, never more.

    Attributes:
        models: What is known about each (route, model).
        answers: Lengths of the last answers of each model, in tokens.
        link: What is known about the link to the cloud.
        slower: How much slower the device's clocks are just now than at full speed; see `sense`.
    """

    def __init__(self) -> None:
        self.models: dict[tuple[Route, str], ModelLatency] = {}
        self.answers: dict[str, Recent] = {}
        self.link = LinkLatency()
        self.slower = 1.0
        self._is_sensed = False
        self._numbers = itertools.count()
        self._unanswered = 0
        self._unanswered_at_s = 0.0
        self._in_flight: dict[Route, dict[int, Ticket]] = {"edge": {}, "cloud": {}}
        self._tails: dict[Route, Tail] = {"edge": Tail(USUAL_TAIL), "cloud": Tail(USUAL_TAIL)}
        # Since when the oldest attempt on the device has had its slot.
        self._running_since_s = 0.0

    def seed(
        self,
        route: Route,
        model: str,
        figures: Iterable[LatencyFigure],
        *,
        size_bytes: int = 0,
    ) -> None:
        """Give a (route, model) its variant's measured figures to start from.

        Does nothing when that (route, model) has been seeded or measured already.

        Args:
            route: Where the variant would answer.
            model: Name of the model.
            figures: `Variant.latency` of the variant that would answer; the first is used.
            size_bytes: `Variant.size_bytes`; gives a first guess of the time to load it.
        """
        if (route, model) not in self.models:
            self.models[route, model] = ModelLatency(next(iter(figures), None), size_bytes)

    # -- learning --------------------------------------------------------------------------------

    def sense(self, speed: float | None) -> None:
        """Know how fast the device may run just now, from a sensor; from any thread.

        What was learned is kept for full speed, so a device that becomes slow, or quick again, is
        predicted to be so before its next answer.

        Args:
            speed: Share of its full clock, 0 to 1; `None` where nothing says so.
        """
        self._is_sensed = self._is_sensed or speed is not None
        self.slower = 1.0 if speed is None else 1.0 / min(max(speed, LOWEST_SPEED), 1.0)

    def start(
        self, route: Route, model: str, size: RequestSize, prediction: Prediction, *, now_s: float
    ) -> Ticket:
        """Note that an attempt starts; `stop` must be called when it ends, however it does.

        What is in flight is known before its answer: uploads that are under way delay those after
        them, and a request that is overdue says that its route is slower than it was.

        Args:
            route: Where it runs.
            model: Name of the model.
            size: Size of the request.
            prediction: What the decision expected of the route.
            now_s: Monotonic time.
        """
        is_cloud = route == "cloud"
        ticket = Ticket(
            number=next(self._numbers),
            route=route,
            model=model,
            size=size,
            started_s=now_s,
            expected_ms=prediction.p50_ms,
            late_ms=prediction.p80_ms or prediction.p95_ms,
            enough_ms=prediction.p95_ms,
            service_ms=prediction.service_ms,
            queue_ms=prediction.queue_ms,
            ahead_bytes=self.link.ahead_bytes(now_s) if is_cloud else 0.0,
            slower=self.slower,
        )
        if is_cloud:
            self.link.sending(size.upload_bytes, now_s=now_s)
        elif not self._in_flight[route]:
            self._running_since_s = now_s
        self._in_flight[route][ticket.number] = ticket
        return ticket

    def stop(self, ticket: Ticket, *, now_s: float) -> None:
        """The attempt has ended."""
        in_flight = self._in_flight[ticket.route]
        if ticket.route == "edge" and next(iter(in_flight), None) == ticket.number:
            self._running_since_s = now_s  # the next one runs from now on
        in_flight.pop(ticket.number, None)
        if ticket.route == "cloud" and not in_flight:
            self.link.idle(now_s=now_s)

    def observe(
        self,
        route: Route,
        model: str,
        size: RequestSize,
        observation: Observation,
        *,
        now_s: float,
        ticket: Ticket | None = None,
    ) -> None:
        """Learn from one complete answer; `ticket` where its start was noted."""
        latency = self.models.setdefault((route, model), ModelLatency(None, 0))
        seen = observation
        if ticket is not None and ticket.enough_ms and seen.total_ms > ticket.enough_ms:
            self._tails[route].observe(seen.total_ms / ticket.enough_ms)
        compute_ms = 0.0
        slower = FULL
        if route == "edge":
            now, begun = self.slower, self.slower if ticket is None else ticket.slower
            if now != 1.0 or begun != 1.0:
                slower = (begun, now)
        if seen.load_ms > 0:
            latency.load.observe(0, seen.load_ms, now_s=now_s)
        if seen.prefill_ms is not None:
            latency.prefill.observe(size.input_tokens, seen.prefill_ms, now_s=now_s, slower=slower)
            compute_ms = seen.prefill_ms + (seen.decode_ms or 0.0)
            if seen.decode_ms is not None and seen.completion_tokens > 1:
                per_token = seen.decode_ms / (seen.completion_tokens - 1)
                latency.per_token.observe(0, per_token, now_s=now_s, slower=slower)
            if seen.pause_ms is not None and seen.completion_tokens > 1:
                latency.pause.observe(0, seen.pause_ms, now_s=now_s, slower=slower)
            if seen.finished and seen.completion_tokens > 0:
                is_cut = 0 < size.max_new_tokens <= seen.completion_tokens
                self._learn_length(model, CUT_TOKENS if is_cut else seen.completion_tokens)
        elif seen.compute_ms is not None:
            latency.compute.observe(size.work, seen.compute_ms, now_s=now_s, slower=slower)
            compute_ms = seen.compute_ms
        if route == "cloud":
            self._unanswered = 0
            latency.learn_queue(seen.queue_ms, now_s, None if ticket is None else ticket.queue_ms)
            # A caller that reads slowly stretches the total; streams say nothing about the link.
            if seen.prefill_ms is None:
                network_ms = seen.total_ms - seen.queue_ms - seen.load_ms - compute_ms
                transferred: float = size.upload_bytes + size.download_bytes
                if ticket is not None:
                    transferred += ticket.ahead_bytes
                self.link.observe(max(0.0, network_ms), transferred, now_s=now_s)

    def observe_late(self, ticket: Ticket, *, now_s: float) -> None:
        """Learn from an attempt that was given up: it would have taken longer still.

        On the cloud that is held against the link, whose silence it was.
        """
        elapsed_ms = (now_s - ticket.started_s) * 1000.0
        if ticket.enough_ms and elapsed_ms > ticket.enough_ms:
            self._tails[ticket.route].observe(elapsed_ms / ticket.enough_ms, is_cut=True)
        if ticket.route == "cloud":
            self._unanswered += 1
            self._unanswered_at_s = now_s
        if ticket.expected_ms is None or elapsed_ms <= ticket.expected_ms:
            return
        ratio = elapsed_ms / max(ticket.expected_ms, 1e-6)
        if ticket.route == "cloud":
            size = ticket.size
            transferred = size.upload_bytes + size.download_bytes + ticket.ahead_bytes
            self.link.observe_late(ratio, transferred, now_s=now_s)
        else:
            latency = self.models.get((ticket.route, ticket.model))
            if latency is not None and latency.compute.is_measured:
                if self.slower > ticket.slower:  # that much is no news
                    ratio *= self._sensed(latency, ticket.slower) / self._sensed(latency)
                    if ratio <= 1.0:
                        return
                latency.compute.level.observe(ratio, now_s=now_s, is_cut=True)

    def observe_round_trip(self, rtt_ms: float, *, now_s: float) -> None:
        """Learn the cloud link's round trip from a ping."""
        self.link.observe_round_trip(rtt_ms)

    def report_queue(self, model: str, queue_ms: float, *, now_s: float) -> None:
        """Note the wait for a slot that the cloud runtime reports for a model."""
        latency = self.models.setdefault(("cloud", model), ModelLatency(None, 0))
        latency.learn_queue(queue_ms, now_s, None)

    # -- predicting ------------------------------------------------------------------------------

    def predict(
        self,
        route: Route,
        model: str,
        size: RequestSize,
        *,
        now_s: float,
        queue_ms: float | None = None,
        loaded: bool = True,
    ) -> Prediction:
        """Predict one request.

        The medians of the parts are added. Their spreads are added in quadrature, at each quantile
        for itself: exact for independent normal parts, and close where one part outweighs the
        others. Parts of text generation that share a cause (time per token and tokens) are
        multiplied quantile by quantile, which is cautious.

        Args:
            route: Where it would run.
            model: Name of the model.
            size: Size of the request; text generation is recognised by `max_new_tokens` > 0.
            now_s: Monotonic time.
            queue_ms: Wait for a slot where it is known (`EdgeRuntime.state`); `None` on the cloud
                uses what the server last reported.
            loaded: Whether the model is in memory; when not, the time to load it is added.
        """
        latency = self.models.get((route, model))
        if latency is None:
            return UNKNOWN
        parts: list[tuple[float, Quantiles]] = []
        if queue_ms is None:
            queue_ms = latency.reported_queue_ms
            if queue_ms:
                age_s = now_s - latency.reported_at_s
                queue_ms = queue_ms * 0.5 ** (age_s / QUEUE_HALF_LIFE_S) if age_s < 60.0 else 0.0
            if latency.queue_errors is not None:
                parts.append((1.0, latency.queue_errors.moments))
        overdue_ms, here, slower = 0.0, 1.0, 1.0
        if route == "edge":
            slower = self.slower
        if self._in_flight[route]:
            if route == "cloud":
                overdue_ms = self._overdue_ms(now_s)
            else:
                here = self._slowed(latency, now_s)
                queue_ms *= here
                if self._is_sensed:
                    queue_ms *= self._requeued()
        prefill: Quantiles | None = None
        per_token_ms: float | None = None
        if size.max_new_tokens > 0:
            prefill = latency.prefill.quantiles(
                size.input_tokens, now_s=now_s, factor=here, slower=slower
            )
            per_token = latency.per_token.quantiles(0, now_s=now_s, factor=here, slower=slower)
            if prefill is None or per_token is None:
                return UNKNOWN
            tokens = self._expected_tokens(model, size.max_new_tokens)
            per_token_ms = per_token[1]
            compute = (
                prefill[0] + per_token[0] * (tokens[0] - 1.0),
                prefill[1] + per_token[1] * (tokens[1] - 1.0),
                prefill[2] + per_token[2] * (tokens[2] - 1.0),
                prefill[3] + per_token[3] * (tokens[3] - 1.0),
                prefill[4] + per_token[4] * (tokens[4] - 1.0),
            )
            measured = latency.prefill.is_measured
            at = len(parts)
            parts.append((1.0, moments_of(compute)))
        else:
            scale = latency.compute.scale(size.work, now_s, slower)
            if scale is None:
                return UNKNOWN
            measured = latency.compute.is_measured
            parts.append((scale * here, latency.compute.level.errors.moments))
        load_ms = network_ms = 0.0
        if not loaded:
            loading = latency.load.quantiles(0, now_s=now_s)
            if loading is not None:
                load_ms = loading[1]
                parts.append((1.0, moments_of(loading)))
        if route == "cloud":
            transferred = size.upload_bytes + size.download_bytes + self.link.ahead_bytes(now_s)
            link = self.link
            scale = link.scale(transferred, now_s) + overdue_ms
            moments = link.level.errors.moments
            network_ms = scale * moments[0]
            parts.append((scale, moments))
            measured = measured and link.is_measured
        before_ms = queue_ms + load_ms + network_ms
        p20, p50, p80, p95, p99 = _sum(parts, queue_ms)
        first_ms = first_p95_ms = None
        if prefill is not None:
            first_ms = before_ms + prefill[1]
            parts[at] = (1.0, moments_of(prefill))
            first_p95_ms = _sum(parts, queue_ms)[3]
        basis: Basis = "measured" if measured else "seeded"
        return Prediction(
            basis=basis,
            p50_ms=p50,
            p95_ms=p95,
            ttft_ms=first_ms,
            ttft_p95_ms=first_p95_ms,
            ms_per_token=per_token_ms,
            queue_ms=queue_ms,
            network_ms=network_ms,
            load_ms=load_ms,
            p20_ms=p20,
            p80_ms=p80,
            p99_ms=p99,
            silence=self._silence(now_s) if self._unanswered and route == "cloud" else 0.0,
            tail=self._tails[route].exponent,
        )

    def silences(
        self, route: Route, model: str, size: RequestSize, *, now_s: float
    ) -> tuple[tuple[Quantiles, bool] | None, tuple[Quantiles, bool] | None]:
        """How long a route is silent while it computes: without queue, loading and network.

        Returns:
            Quantiles (ms) of a batch or of a prompt, and of the longest wait for a further token;
            each with whether it rests on answers like this one. `None` where nothing is known.
        """
        latency = self.models.get((route, model))
        if latency is None:
            return None, None
        slower = self.slower if route == "edge" else 1.0
        if size.max_new_tokens <= 0:
            work = latency.compute.quantiles(size.work, now_s=now_s, slower=slower)
            is_known = latency.compute.is_measured and latency.compute.shape.covers(size.work)
            return (None if work is None else (work, is_known)), None
        tokens = size.input_tokens
        prompt = latency.prefill.quantiles(tokens, now_s=now_s, slower=slower)
        is_known = latency.prefill.is_measured and latency.prefill.shape.covers(tokens)
        pause = latency.pause.quantiles(0, now_s=now_s, slower=slower)
        is_paced = latency.pause.is_measured and latency.pause.level.errors.count >= MIN_ANSWERS
        if pause is None:
            pause = latency.per_token.quantiles(0, now_s=now_s, slower=slower)
        return (
            None if prompt is None else (prompt, is_known),
            None if pause is None else (pause, is_paced),
        )

    def _silence(self, now_s: float) -> float:
        """Probability that the cloud does not answer at all."""
        worst = SILENCE[min(self._unanswered, len(SILENCE) - 1)]
        age_s = now_s - self._unanswered_at_s
        return float(worst * 0.5 ** max(0.0, age_s / SILENCE_HALF_LIFE_S))

    def _overdue_ms(self, now_s: float) -> float:
        """By how much the oldest request in flight to the cloud is late; 0 when it is not.

        Whatever it waits for, a queue there or a link to come back, the next one waits for too.
        """
        for ticket in tuple(self._in_flight["cloud"].values())[:1]:  # threads start and stop them
            if ticket.expected_ms is None or ticket.late_ms is None:
                break
            elapsed_ms = (now_s - ticket.started_s) * 1000.0
            if elapsed_ms > ticket.late_ms:
                return elapsed_ms - ticket.expected_ms
        return 0.0

    def _slowed(self, latency: ModelLatency, now_s: float) -> float:
        """How much slower the device is than it was, as far as the attempt that runs there says.

        One that runs for longer than 99 of 100 would is taken to need half as long again: a device
        that is hot, or in use by others, stays so for longer than a call lasts.
        """
        for ticket in tuple(self._in_flight["edge"].values())[:1]:
            if not ticket.service_ms:
                break
            ratio = (now_s - self._running_since_s) * 1000.0 / ticket.service_ms
            if self.slower > ticket.slower:  # what a sensor says is not said twice
                ratio *= self._sensed(latency, ticket.slower) / self._sensed(latency)
            _, q50, _, _, q99 = latency.compute.level.errors.quantiles
            if ratio * q50 > OVERRUN * q99:
                return GROWTH * ratio
        return 1.0

    def _sensed(self, latency: ModelLatency, slower: float | None = None) -> float:
        """How much slower a model is at the present clocks, or at others."""
        known = latency.compute if latency.compute.is_measured else latency.prefill
        return float((self.slower if slower is None else slower) ** known.bend)

    def _requeued(self) -> float:
        """How much longer a queue is now, whose work was reckoned at the clocks of that time."""
        then_ms = now_ms = 0.0
        for ticket in tuple(self._in_flight["edge"].values()):
            latency = self.models.get(("edge", ticket.model))
            if latency is None or not ticket.service_ms:
                continue
            change = 1.0
            if ticket.slower != self.slower:
                change = self._sensed(latency) / self._sensed(latency, ticket.slower)
            then_ms += ticket.service_ms
            now_ms += ticket.service_ms * change
        return now_ms / then_ms if then_ms else 1.0

    def _learn_length(self, model: str, tokens: float) -> None:
        lengths = self.answers.get(model)
        if lengths is None:
            self.answers[model] = Recent(values=[tokens])
        else:
            lengths.add(tokens)

    def _expected_tokens(self, model: str, limit: int) -> Quantiles:
        """Quantiles of the answer's length; the limit itself until some were seen."""
        most = float(limit)
        lengths = self.answers.get(model)
        if lengths is None or lengths.count < MIN_ANSWERS:
            return most, most, most, most, most
        q20, q50, q80, q95, q99 = lengths.quantiles
        return min(q20, most), min(q50, most), min(q80, most), min(q95, most), min(q99, most)


def _sum(parts: list[tuple[float, Quantiles]], queue_ms: float) -> Quantiles:
    """Quantiles of a sum of independent parts: medians added, distances from them in quadrature.

    Args:
        parts: What each is a multiple of, and the moments (see `Recent.moments`) of that.
        queue_ms: Added to the median.
    """
    median = queue_ms
    d95 = (QUEUE_SPREAD * queue_ms) ** 2
    d20 = d80 = d95 * _QUEUE_REACH_80**2
    d99 = d95 * _QUEUE_REACH_99**2
    for scale, (m50, m20, m80, m95, m99) in parts:
        median += scale * m50
        scale *= scale
        d20 += scale * m20
        d80 += scale * m80
        d95 += scale * m95
        d99 += scale * m99
    low = median - sqrt(d20)
    return (
        low if low > 0.0 else 0.0,
        median,
        median + sqrt(d80),
        median + sqrt(d95),
        median + sqrt(d99),
    )


class ModelLatency:
    """What is known about one model on one route."""

    __slots__ = (
        "compute",
        "load",
        "pause",
        "per_token",
        "prefill",
        "queue_errors",
        "reported_at_s",
        "reported_queue_ms",
    )

    def __init__(self, figure: LatencyFigure | None, size_bytes: int) -> None:
        self.load = SizedLatency(size_bytes / ASSUMED_LOAD_BYTES_PER_MS if size_bytes else None)
        self.compute = SizedLatency()
        self.prefill = SizedLatency()
        self.per_token = SizedLatency()
        #: The longest wait for a token of an answer, after its first.
        self.pause = SizedLatency()
        self.reported_queue_ms = 0.0
        self.reported_at_s = 0.0
        #: By how many milliseconds forecasts of the cloud's queue missed.
        self.queue_errors: Recent | None = None
        if figure is None:
            return
        seeded = SizedLatency(
            figure.p50_ms,
            prior_size=figure.input_tokens or 0,
            sigma=sigma_of(figure.p50_ms, figure.p99_ms),
        )
        if figure.ms_per_token is None:
            self.compute = seeded
        else:
            self.prefill = seeded
            self.per_token = SizedLatency(figure.ms_per_token, sigma=PER_TOKEN_SIGMA)

    def learn_queue(self, queue_ms: float, now_s: float, expected_ms: float | None) -> None:
        """Note the wait for a slot that the cloud reports, and how far its forecast missed."""
        self.reported_queue_ms = queue_ms
        self.reported_at_s = now_s
        if expected_ms is None:
            return
        if self.queue_errors is None:
            self.queue_errors = Recent(values=[queue_ms - expected_ms])
        else:
            self.queue_errors.add(queue_ms - expected_ms)
