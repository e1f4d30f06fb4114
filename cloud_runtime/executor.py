"""Run the requests of one served model: admit, queue, compute in a thread, measure.

The event loop never blocks on an engine. Each admitted request has a thread from a pool that is
exactly as large as what may run and wait, so nothing queues where it is not seen; the slot gate
orders the waiting ones and gives up those whose deadline passes.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from cloud_runtime.relay import Completion, TokenRelay
from nearfar.engines.base import CancelToken
from nearfar.engines.model import LoadedModel
from nearfar.engines.slots import SlotGate
from nearfar.errors import Cancelled, Overloaded
from nearfar.generation import GenerationOptions, Prompt
from nearfar.units import Deadline
from nearfar.wire.messages import InputForm

_T = TypeVar("_T")

#: Weight of the newest observation: ten requests after a change the estimate has followed by 90 %.
_SMOOTHING = 0.2

#: A stop-string or end of turn usually comes well before `max_new_tokens`; expecting the limit
#: would make the queue look several times longer than it is.
_TYPICAL_FILL = 0.5


class Ticket:
    """Decides between computing and cancelling: exactly one of the two happens.

    Attributes:
        cancelled: Lets a request that was cancelled leave the queue.
    """

    def __init__(self) -> None:
        self.cancelled = CancelToken()
        self._lock = threading.Lock()
        self._state: Literal["waiting", "begun", "cancelled"] = "waiting"

    def begin(self) -> None:
        """Called before the engine computes.

        Raises:
            Cancelled: It was cancelled first.
        """
        with self._lock:
            if self._state == "cancelled":
                raise Cancelled("The request was cancelled")
            self._state = "begun"

    def cancel(self) -> bool:
        """Says whether it came before the engine; the request then never runs."""
        with self._lock:
            if self._state == "waiting":
                self._state = "cancelled"
                self.cancelled.cancel()
            return self._state == "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class InferWork:
    """What to compute.

    Attributes:
        form: ``tensors`` uses `feeds`; ``text`` and ``bytes`` use `items`, which are preprocessed.
        feeds: Input name to array.
        items: One element per row of the batch.
    """

    form: InputForm
    feeds: Mapping[str, np.ndarray]
    items: Sequence[str | bytes] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class InferOutcome:
    """Outputs in model order, and what they took."""

    outputs: dict[str, np.ndarray]
    queue_ms: float
    compute_ms: float


class _Pace:
    """Smoothed durations of this model on this machine, for the queue estimate."""

    def __init__(self) -> None:
        self.infer_s: float | None = None
        self.prefill_s: float | None = None
        self.token_s: float | None = None

    @staticmethod
    def blend(old: float | None, new: float) -> float:
        return new if old is None else old + _SMOOTHING * (new - old)

    def expected_generation_s(self, max_new_tokens: int) -> float | None:
        if self.prefill_s is None or self.token_s is None:
            return None
        return self.prefill_s + self.token_s * max_new_tokens * _TYPICAL_FILL


class ModelExecutor:
    """Threads, slots and measurements of one loaded model. Used from one event loop.

    Args:
        model: Runs the requests; blocking and thread-safe.
        slots: Requests that compute at once.
        max_waiting: Requests that may wait for a slot; more are refused with `Overloaded`.
    """

    def __init__(self, model: LoadedModel, *, slots: int = 1, max_waiting: int = 32) -> None:
        self.model = model
        self._gate = SlotGate(slots, max_waiting, name=model.manifest.name)
        self._capacity = slots + max_waiting
        self._admitted = 0
        self._pace = _Pace()
        self._pool = ThreadPoolExecutor(
            max_workers=self._capacity, thread_name_prefix=f"nearfar-{model.manifest.name}"
        )

    @property
    def tokens_per_s(self) -> float | None:
        """How fast answers come, by those that were measured; `None` before the first."""
        return 1.0 / self._pace.token_s if self._pace.token_s else None

    @property
    def expected_wait_ms(self) -> float:
        """How long a request that came now would wait for its slot."""
        return self._gate.state().expected_wait_s * 1000.0

    def infer(
        self, work: InferWork, *, deadline: Deadline, ticket: Ticket, priority: int = 5
    ) -> asyncio.Future[InferOutcome]:
        """Compute one batch; `priority` orders those that wait for a slot, 0 to 9.

        Never cancel the future: the computation could not follow, and its place would be given
        away while it is still taken. Stop waiting for it instead.

        Returns:
            Future of the outcome, or of `InvalidInput` (a name, dtype or shape does not fit),
            `DeadlineExceeded` or `Cancelled` (before a slot was free), or `EngineError`.

        Raises:
            Overloaded: Too many requests wait already.
        """
        return self._submit(self._infer, work, deadline, ticket, priority, time.monotonic())

    def generate(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        *,
        deadline: Deadline,
        priority: int = 5,
    ) -> TokenRelay:
        """Start an answer; its tokens and its end come through the relay; `priority` as `infer`.

        Raises:
            Overloaded: Too many requests wait already.
        """
        relay = TokenRelay(asyncio.get_running_loop(), deadline=deadline)
        self._submit(self._generate, prompt, options, deadline, relay, priority, time.monotonic())
        return relay

    def close(self) -> None:
        """Start no more work and send away what waits; what runs ends by itself."""
        self._gate.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, run: Callable[..., _T], *arguments: object) -> asyncio.Future[_T]:
        if self._admitted >= self._capacity:
            raise Overloaded(
                f"{self._capacity} requests for {self.model.manifest.name!r} run or wait already",
                fix="Try again later, or raise --slots or --max-waiting of the cloud runtime",
            )
        future = asyncio.get_running_loop().run_in_executor(self._pool, run, *arguments)
        self._admitted += 1
        future.add_done_callback(self._leave)
        return future

    def _leave(self, future: asyncio.Future[_T]) -> None:
        self._admitted -= 1
        if not future.cancelled():
            future.exception()  # seen by whoever waits; nobody may be waiting any more

    # What follows runs in worker threads.

    def _infer(
        self,
        work: InferWork,
        deadline: Deadline,
        ticket: Ticket,
        priority: int,
        arrived_s: float,
    ) -> InferOutcome:
        with self._gate.acquire(
            deadline, self._pace.infer_s, cancel=ticket.cancelled, priority=priority
        ):
            started_s = time.monotonic()
            deadline.check("cloud")
            ticket.begin()
            if work.form == "tensors":
                outputs = self.model.infer(work.feeds)
            else:
                outputs = self.model.infer_raw(work.form, work.items)
            compute_s = time.monotonic() - started_s
            self._pace.infer_s = _Pace.blend(self._pace.infer_s, compute_s)
        return InferOutcome(
            outputs=outputs,
            queue_ms=(started_s - arrived_s) * 1000.0,
            compute_ms=compute_s * 1000.0,
        )

    def _generate(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        deadline: Deadline,
        relay: TokenRelay,
        priority: int,
        arrived_s: float,
    ) -> None:
        try:
            expected_s = self._pace.expected_generation_s(options.max_new_tokens)
            with self._gate.acquire(deadline, expected_s, cancel=relay.cancel, priority=priority):
                relay.end(self._stream(prompt, options, deadline, relay, arrived_s))
        except BaseException as error:  # noqa: BLE001 (crosses to the loop, which reports it)
            relay.cancel.cancel()
            relay.end(error)

    def _stream(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        deadline: Deadline,
        relay: TokenRelay,
        arrived_s: float,
    ) -> Completion:
        started_s = time.monotonic()
        deadline.check("cloud")
        first_s = started_s
        chunks = self.model.generate(prompt, options, cancel=relay.cancel)
        with contextlib.closing(chunks):
            for count, chunk in enumerate(chunks):
                now_s = time.monotonic()
                if count == 0:
                    first_s = now_s
                if chunk.finish_reason is None:
                    if not relay.put(chunk):
                        break  # cancelled, too late or disconnected: the relay knows
                    continue
                if chunk.text:  # what the stop-string check had held back
                    relay.put(chunk)
                assert chunk.usage is not None
                self._pace.prefill_s = _Pace.blend(self._pace.prefill_s, first_s - started_s)
                if count > 1:
                    self._pace.token_s = _Pace.blend(
                        self._pace.token_s, (now_s - first_s) / (count - 1)
                    )
                return Completion(
                    finish_reason=chunk.finish_reason,
                    usage=chunk.usage,
                    queue_ms=(started_s - arrived_s) * 1000.0,
                    prefill_ms=(first_s - started_s) * 1000.0,
                    decode_ms=(now_s - first_s) * 1000.0,
                )
        raise Cancelled("The request was cancelled")
