"""Learn from every answer how long each route takes, per model.

edge  = queue + load + compute
cloud = queue + compute + round trip + bytes / bandwidth

For text generation compute = prefill(input tokens) + output tokens x time per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from sdk.routing.estimates import MeanDeviation, SizeBuckets
from sdk.routing.types import UNKNOWN, Basis, Prediction, RequestSize, Route

if TYPE_CHECKING:  # routing alone stays light to import
    from nearfar.bundle.manifest import LatencyFigure

# Until the link is measured: a home or mobile connection to a far data centre, 10 Mbit/s up.
ASSUMED_RTT_MS = 60.0
ASSUMED_MS_PER_BYTE = 8.0 / 10_000.0
# Smaller messages say something about the round trip, larger ones about bandwidth.
SMALL_TRANSFER_BYTES = 16 * 1024
LARGE_TRANSFER_BYTES = 64 * 1024
# Reading and preparing a model, before it was ever measured here; a slow disk gives this.
ASSUMED_LOAD_BYTES_PER_MS = 250_000.0
# How far off a known queue may be, as a part of it.
QUEUE_SPREAD = 0.5
# p99 - p50 of a normal distribution, in mean absolute deviations: 2.326 / 0.798.
P99_DEVIATIONS = 2.92
# Answers of a model that must have been seen before their length counts as expected.
MIN_ANSWERS = 3


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
    """

    total_ms: float
    queue_ms: float = 0.0
    compute_ms: float | None = None
    load_ms: float = 0.0
    prefill_ms: float | None = None
    decode_ms: float | None = None
    completion_tokens: int = 0
    finished: bool = True


class Predictor:
    """Latency of every (route, model) and of the cloud link.

    Sans-IO: `now_s` is passed in. Not locked: callers on several threads may lose an observation
    to a race, never more.
    """

    def __init__(self) -> None:
        self._models: dict[tuple[Route, str], _ModelLatency] = {}
        self._answers: dict[str, MeanDeviation] = {}
        self._link = _Link()

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
        if (route, model) not in self._models:
            self._models[route, model] = _ModelLatency(next(iter(figures), None), size_bytes)

    def observe(
        self,
        route: Route,
        model: str,
        size: RequestSize,
        observation: Observation,
        *,
        now_s: float,
    ) -> None:
        """Learn from one complete answer."""
        latency = self._models.setdefault((route, model), _ModelLatency(None, 0))
        seen = observation
        compute_ms = 0.0
        if seen.load_ms > 0:
            latency.load.observe(seen.load_ms, now_s=now_s)
        if seen.prefill_ms is not None:
            latency.prefill.observe(size.input_tokens, seen.prefill_ms, now_s=now_s)
            compute_ms = seen.prefill_ms + (seen.decode_ms or 0.0)
            if seen.decode_ms is not None and seen.completion_tokens > 1:
                per_token = seen.decode_ms / (seen.completion_tokens - 1)
                latency.per_token.observe(per_token, now_s=now_s)
            if seen.finished and seen.completion_tokens > 0:
                answers = self._answers.setdefault(model, MeanDeviation())
                answers.observe(seen.completion_tokens, now_s=now_s)
        elif seen.compute_ms is not None:
            latency.compute.observe(size.work, seen.compute_ms, now_s=now_s)
            compute_ms = seen.compute_ms
        if route == "cloud":
            latency.reported_queue_ms = seen.queue_ms
            latency.reported_at_s = now_s
            # A caller that reads slowly stretches the total; streams say nothing about the link.
            if seen.prefill_ms is None:
                network_ms = seen.total_ms - seen.queue_ms - seen.load_ms - compute_ms
                transferred = size.upload_bytes + size.download_bytes
                self._link.observe(max(0.0, network_ms), transferred, now_s=now_s)

    def observe_round_trip(self, rtt_ms: float, *, now_s: float) -> None:
        """Learn the cloud link's round trip from a ping."""
        self._link.observe(rtt_ms, 0, now_s=now_s)

    def report_queue(self, model: str, queue_ms: float, *, now_s: float) -> None:
        """Note the wait for a slot that the cloud runtime reports for a model."""
        latency = self._models.setdefault(("cloud", model), _ModelLatency(None, 0))
        latency.reported_queue_ms = queue_ms
        latency.reported_at_s = now_s

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

        Args:
            route: Where it would run.
            model: Name of the model.
            size: Size of the request; text generation is recognised by `max_new_tokens` > 0.
            now_s: Monotonic time.
            queue_ms: Wait for a slot where it is known (`EdgeRuntime.state`); `None` on the cloud
                uses what the server last reported.
            loaded: Whether the model is in memory; when not, the time to load it is added.
        """
        latency = self._models.get((route, model))
        if latency is None:
            return UNKNOWN
        if queue_ms is None:
            # The queue drains while nobody looks.
            elapsed_ms = (now_s - latency.reported_at_s) * 1000.0
            queue_ms = max(0.0, latency.reported_queue_ms - elapsed_ms)
        first_ms: float | None = None
        per_token_ms: float | None = None
        if size.max_new_tokens > 0:
            prefill = latency.prefill.quantiles(size.input_tokens, now_s=now_s)
            per_token = latency.per_token.quantiles(now_s=now_s)
            if prefill is None or per_token is None:
                return UNKNOWN
            tokens = self._expected_tokens(model, size.max_new_tokens, now_s)
            p50 = prefill[0] + per_token[0] * (tokens[0] - 1.0)
            p95 = prefill[1] + per_token[1] * (tokens[1] - 1.0)
            first_ms, per_token_ms = prefill[0], per_token[0]
            measured = latency.prefill.is_measured
        else:
            compute = latency.compute.quantiles(size.work, now_s=now_s)
            if compute is None:
                return UNKNOWN
            p50, p95 = compute
            measured = latency.compute.is_measured
        spread = (p95 - p50) ** 2 + (QUEUE_SPREAD * queue_ms) ** 2
        load_ms = network_ms = 0.0
        if not loaded:
            loading = latency.load.quantiles(now_s=now_s)
            if loading is not None:
                load_ms = loading[0]
                spread += (loading[1] - load_ms) ** 2
        if route == "cloud":
            network_ms, network_p95 = self._link.quantiles(
                size.upload_bytes + size.download_bytes, now_s=now_s
            )
            spread += (network_p95 - network_ms) ** 2
            measured = measured and self._link.is_measured
        before_ms = queue_ms + load_ms + network_ms
        basis: Basis = "measured" if measured else "seeded"
        return Prediction(
            basis=basis,
            p50_ms=before_ms + p50,
            # The parts vary independently, so their spreads add in quadrature.
            p95_ms=before_ms + p50 + math.sqrt(spread),
            ttft_ms=None if first_ms is None else before_ms + first_ms,
            ms_per_token=per_token_ms,
            queue_ms=queue_ms,
            network_ms=network_ms,
            load_ms=load_ms,
        )

    def _expected_tokens(self, model: str, limit: int, now_s: float) -> tuple[float, float]:
        """(p50, p95) of the answer's length; the limit itself until some were seen."""
        answers = self._answers.get(model)
        if answers is None or answers.count < MIN_ANSWERS:
            return float(limit), float(limit)
        found = answers.quantiles(now_s=now_s)
        assert found is not None
        return min(found[0], float(limit)), min(found[1], float(limit))


class _ModelLatency:
    """What is known about one model on one route."""

    __slots__ = ("compute", "load", "per_token", "prefill", "reported_at_s", "reported_queue_ms")

    def __init__(self, figure: LatencyFigure | None, size_bytes: int) -> None:
        self.load = MeanDeviation(
            size_bytes / ASSUMED_LOAD_BYTES_PER_MS if size_bytes else None,
            0.25 * size_bytes / ASSUMED_LOAD_BYTES_PER_MS,
        )
        self.compute = SizeBuckets()
        self.prefill = SizeBuckets()
        self.per_token = MeanDeviation()
        self.reported_queue_ms = 0.0
        self.reported_at_s = 0.0
        if figure is None:
            return
        deviation_ms = max(0.0, figure.p99_ms - figure.p50_ms) / P99_DEVIATIONS
        if figure.ms_per_token is None:
            self.compute = SizeBuckets(
                figure.p50_ms, deviation_ms, prior_size=figure.input_tokens or 0
            )
        else:
            self.prefill = SizeBuckets(
                figure.p50_ms, deviation_ms, prior_size=figure.input_tokens or 0
            )
            self.per_token = MeanDeviation(figure.ms_per_token, 0.1 * figure.ms_per_token)


class _Link:
    """Round trip and bandwidth of the cloud link."""

    __slots__ = ("_per_byte", "_rtt")

    def __init__(self) -> None:
        self._rtt = MeanDeviation(ASSUMED_RTT_MS, ASSUMED_RTT_MS / 4)
        self._per_byte = MeanDeviation(ASSUMED_MS_PER_BYTE, ASSUMED_MS_PER_BYTE / 4)

    @property
    def is_measured(self) -> bool:
        return self._rtt.count > 0

    def observe(self, network_ms: float, transferred_bytes: int, *, now_s: float) -> None:
        if transferred_bytes <= SMALL_TRANSFER_BYTES:
            if self._rtt.count == 0 or network_ms < (self._rtt.prior or 0.0):
                # What an old estimate returns to: the best round trip seen, as BBR keeps it.
                self._rtt.prior, self._rtt.prior_deviation = network_ms, network_ms / 4
            self._rtt.observe(network_ms, now_s=now_s)
        elif transferred_bytes >= LARGE_TRANSFER_BYTES:
            rtt_ms = self.quantiles(0, now_s=now_s)[0]
            per_byte = max(0.0, network_ms - rtt_ms) / transferred_bytes
            self._per_byte.observe(per_byte, now_s=now_s)

    def quantiles(self, transferred_bytes: int, *, now_s: float) -> tuple[float, float]:
        rtt = self._rtt.quantiles(now_s=now_s)
        per_byte = self._per_byte.quantiles(now_s=now_s)
        assert rtt is not None
        assert per_byte is not None  # both have priors
        return (
            rtt[0] + per_byte[0] * transferred_bytes,
            rtt[1] + per_byte[1] * transferred_bytes,
        )
