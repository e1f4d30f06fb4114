"""Learn from every answer how long each route takes, per model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import msgspec

from nearfar.bundle.manifest import LatencyFigure
from sdk.routing.types import Prediction, RequestSize, Route


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

    def seed(
        self,
        route: Route,
        model: str,
        figures: Iterable[LatencyFigure],
        *,
        size_bytes: int = 0,
    ) -> None:
        """Give a (route, model) its variant's measured figures to start from.

        Args:
            figures: `Variant.latency` of the variant that would answer.
            size_bytes: `Variant.size_bytes`; gives a first guess of the time to load it.
        """
        raise NotImplementedError

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
        raise NotImplementedError

    def observe_round_trip(self, rtt_ms: float, *, now_s: float) -> None:
        """Learn the cloud link's round trip from a ping."""
        raise NotImplementedError

    def report_queue(self, model: str, queue_ms: float, *, now_s: float) -> None:
        """Note the wait for a slot that the cloud runtime reports for a model."""
        raise NotImplementedError

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
            queue_ms: Wait for a slot where it is known (`EdgeRuntime.state`); `None` on the cloud
                uses what the server last reported.
            loaded: Whether the model is in memory; when not, the time to load it is added.
        """
        raise NotImplementedError


class LatencyEstimate(Protocol):
    """Seam for better statistics: an online estimate of one latency as a function of size."""

    def observe(self, size: float, value_ms: float, *, now_s: float) -> None:
        """Learn one measurement."""

    def quantiles(self, size: float, *, now_s: float) -> tuple[float, float] | None:
        """(p50, p95) in milliseconds for that size; `None` when nothing is known."""
