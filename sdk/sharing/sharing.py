"""Equal requests share one computation, while it runs and for a while after.

Who comes first computes; who comes meanwhile waits for it, each by his own deadline. Nobody
suffers for another: when the first gives up (its deadline, its cancellation), one of those who wait
computes in its place, and who has less time than the first had does not wait for it at all.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import msgspec

from nearfar.bundle.manifest import Manifest
from nearfar.errors import Cancelled, DeadlineExceeded, NearfarError
from sdk.core import Completed, Core
from sdk.requests import Request
from sdk.results import Route
from sdk.routing import RouteDecision
from sdk.sharing.config import CacheConfig
from sdk.sharing.keys import key_of, may_share
from sdk.steps import Answer

if TYPE_CHECKING:
    import numpy as np

#: What an answer takes beside its outputs: route, decision, timings.
_ENTRY_BYTES = 2048

#: What somebody who waits gets instead of an answer when the first one gave up.
_GAVE_UP = None


class _Kept(msgspec.Struct, frozen=True, eq=False):
    """An answer without the request it answered."""

    answer: Answer
    route: Route
    decision: RouteDecision
    manifest: Manifest
    size_bytes: int
    until_s: float


class _Flight:
    """A computation under way.

    Attributes:
        outcome: The answer, why there is none, or `_GAVE_UP`.
        until_s: Deadline of whoever computes, `Deadline.at_s`.
    """

    __slots__ = ("outcome", "until_s")

    def __init__(self, until_s: float) -> None:
        self.until_s = until_s
        self.outcome: concurrent.futures.Future[_Kept | None] = concurrent.futures.Future()
        # From now on nobody who waits can cancel it for the others.
        self.outcome.set_running_or_notify_cancel()


class _Cache:
    """Answers of one model, the one that was used last at the end."""

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.size_bytes = 0
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: bytes, now_s: float) -> _Kept | None:
        kept = self._kept.get(key)
        if kept is None:
            return None
        if kept.until_s <= now_s:
            self._drop(key)
            return None
        self._kept.move_to_end(key)
        return kept

    def put(self, key: bytes, kept: _Kept) -> None:
        self._drop(key)
        if not self.config.ttl_s or kept.size_bytes > self.config.max_bytes:
            return
        self._kept[key] = kept
        self.size_bytes += kept.size_bytes
        while len(self._kept) > self.config.max_entries or self.size_bytes > self.config.max_bytes:
            self._drop(next(iter(self._kept)))

    def clear(self) -> None:
        self._kept.clear()
        self.size_bytes = 0

    def _drop(self, key: bytes) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.size_bytes -= kept.size_bytes


class Sharing:
    """What one client shares. Thread-safe.

    Args:
        configs: By model.
        core: Policy of the client, and what binds it.
        clock: Monotonic time, in seconds.
    """

    def __init__(
        self,
        configs: Mapping[str, CacheConfig],
        core: Core,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._clock = clock
        self._lock = threading.Lock()
        self._caches = {model: _Cache(config) for model, config in configs.items()}
        self._flights: dict[bytes, _Flight] = {}

    def key(self, request: Request) -> bytes | None:
        """Under what the request is shared; `None` when it is not."""
        if request.model not in self._caches or request.method == "generate":
            return None
        if self._core.states_agreement(request):
            return None  # which route answers is then drawn anew for each request
        sensitivity = request.sensitivity or self._core.default_sensitivity
        if not may_share(self._core.policy, sensitivity):
            return None
        return key_of(request, sensitivity, self._core.known.variant_wanted(request))

    def run(self, key: bytes, request: Request, compute: Callable[[], Completed]) -> Completed:
        """The answer to a request: kept, shared or computed.

        Raises:
            NearfarError: As `compute`; `DeadlineExceeded` while waiting for another's.
        """
        started_s = time.perf_counter()
        while True:
            found = self._look(key, request)
            if isinstance(found, Completed):
                return found
            if found is None:
                return self._remember(key, compute())
            flight, is_first = found
            if is_first:
                with self._flying(key, flight):
                    done = compute()
                    self._land(key, flight, done)
                    return done
            try:
                kept = flight.outcome.result(request.deadline.timeout_s())
            except (TimeoutError, concurrent.futures.TimeoutError):
                raise _late() from None
            except NearfarError as error:
                raise copy.copy(error) from error
            if kept is not _GAVE_UP:
                return _given(kept, request, "in_flight", started_s)

    async def run_async(
        self, key: bytes, request: Request, compute: Callable[[], Awaitable[Completed]]
    ) -> Completed:
        """As `run`."""
        started_s = time.perf_counter()
        while True:
            found = self._look(key, request)
            if isinstance(found, Completed):
                return found
            if found is None:
                return self._remember(key, await compute())
            flight, is_first = found
            if is_first:
                with self._flying(key, flight):
                    done = await compute()
                    self._land(key, flight, done)
                    return done
            try:
                kept = await asyncio.wait_for(
                    asyncio.wrap_future(flight.outcome), request.deadline.timeout_s()
                )
            except (TimeoutError, asyncio.TimeoutError):
                raise _late() from None
            except NearfarError as error:
                raise copy.copy(error) from error
            if kept is not _GAVE_UP:
                return _given(kept, request, "in_flight", started_s)

    def clear(self) -> None:
        """Forget all answers."""
        with self._lock:
            for cache in self._caches.values():
                cache.clear()

    def held(self, model: str) -> tuple[int, int]:
        """Entries and bytes that are kept for a model."""
        with self._lock:
            cache = self._caches[model]
            return len(cache), cache.size_bytes

    def _look(self, key: bytes, request: Request) -> Completed | tuple[_Flight, bool] | None:
        """A kept answer; or a computation under way, and whether to do it; or `None` to compute
        apart from it."""
        started_s = time.perf_counter()
        with self._lock:
            kept = self._caches[request.model].get(key, self._clock())
            if kept is None:
                flight = self._flights.get(key)
                if flight is None:
                    flight = self._flights[key] = _Flight(request.deadline.at_s)
                    return flight, True
                # It was routed to meet the other's deadline, which may be too late here.
                return (flight, False) if flight.until_s <= request.deadline.at_s else None
        return _given(kept, request, "cache", started_s)

    @contextlib.contextmanager
    def _flying(self, key: bytes, flight: _Flight) -> Iterator[None]:
        """Let nobody wait in vain, however the computation ends."""
        try:
            yield
        except (DeadlineExceeded, Cancelled):
            raise  # its own; the others may still have time
        except NearfarError as error:
            self._leave(key, flight)
            flight.outcome.set_exception(error)
            raise
        finally:
            self._leave(key, flight)
            if not flight.outcome.done():
                flight.outcome.set_result(_GAVE_UP)

    def _land(self, key: bytes, flight: _Flight, done: Completed) -> None:
        kept = self._keep(key, done)
        self._leave(key, flight)
        flight.outcome.set_result(kept)

    def _remember(self, key: bytes, done: Completed) -> Completed:
        self._keep(key, done)
        return done

    def _keep(self, key: bytes, done: Completed) -> _Kept:
        answer = done.answer
        if done.request.method == "embed":
            # The first vectors bind a client to their variant, which is part of the key.
            key = self.key(done.request) or key
        outputs = _copies(answer.outputs)  # the caller may write into its own
        size_bytes = _ENTRY_BYTES + sum(_size(array) for array in outputs.values())
        cache = self._caches[done.request.model]
        kept = _Kept(
            msgspec.structs.replace(answer, outputs=outputs),
            done.route,
            done.decision,
            done.manifest,
            size_bytes,
            self._clock() + cache.config.ttl_s,
        )
        with self._lock:
            cache.put(key, kept)
        return kept

    def _leave(self, key: bytes, flight: _Flight) -> None:
        with self._lock:
            if self._flights.get(key) is flight:
                del self._flights[key]


def _given(
    kept: _Kept, request: Request, source: Literal["in_flight", "cache"], started_s: float
) -> Completed:
    """An answer for somebody who did not compute it: nothing was sent for him, or computed."""
    return Completed(
        request=request,
        answer=msgspec.structs.replace(
            kept.answer,
            outputs=_copies(kept.answer.outputs),
            queue_ms=0.0,
            compute_ms=0.0,
            load_ms=0.0,
            total_ms=0.0,
        ),
        route=msgspec.structs.replace(kept.route, source=source),
        decision=kept.decision,
        manifest=kept.manifest,
        total_ms=(time.perf_counter() - started_s) * 1000.0,
        bytes_sent=0,
    )


def _copies(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in outputs.items()}


def _size(array: np.ndarray) -> int:
    if array.dtype.kind == "O":
        return int(array.nbytes) + sum(len(element) for element in array.reshape(-1))
    return int(array.nbytes)


def _late() -> DeadlineExceeded:
    return DeadlineExceeded(
        "The deadline passed while an equal request was being computed",
        fix="Allow more time with deadline_ms",
    )
