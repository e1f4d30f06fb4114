"""Run the requests of one served model: admit, queue, compute in a thread, measure.

The event loop never blocks on an engine. Each admitted request has a thread from a pool that is
exactly as large as what may run and wait, so nothing queues where it is not seen; the slot gate
orders the waiting ones and gives up those whose deadline passes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cloud_runtime.relay import Completion, TokenRelay
from nearfar.engines.base import CancelToken
from nearfar.engines.model import LoadedModel
from nearfar.engines.slots import SlotGate
from nearfar.errors import Cancelled, DeadlineExceeded, Overloaded
from nearfar.generation import GenerationOptions, Prompt
from nearfar.units import Deadline
from nearfar.wire.messages import InputForm

#: Weight of the newest observation: ten requests after a change the estimate has followed by 90 %.
_SMOOTHING = 0.2

#: A stop-string or end of turn usually comes well before `max_new_tokens`; expecting the limit
#: would make the queue look several times longer than it is.
_TYPICAL_FILL = 0.5


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
        self._gate = SlotGate(slots, max_waiting)
        self._capacity = slots + max_waiting
        self._admitted = 0
        self._pace = _Pace()
        self._pool = ThreadPoolExecutor(
            max_workers=self._capacity, thread_name_prefix=f"nearfar-{model.manifest.name}"
        )

    @property
    def expected_wait_ms(self) -> float:
        """How long a request that came now would wait for its slot."""
        return self._gate.state().expected_wait_s * 1000.0

    async def infer(
        self, work: InferWork, *, deadline: Deadline, cancel: CancelToken
    ) -> InferOutcome:
        """Compute one batch; the caller may stop waiting, the computation then ends by itself.

        Raises:
            InvalidInput: A name, dtype or shape does not fit.
            DeadlineExceeded: The deadline passed in the queue.
            Overloaded: Too many requests wait already.
            Cancelled: `cancel` was set before a slot was free.
            EngineError: The engine failed.
        """
        self._admit()
        loop = asyncio.get_running_loop()
        try:
            future = loop.run_in_executor(
                self._pool, self._infer, work, deadline, cancel, time.monotonic()
            )
        except BaseException:
            self._admitted -= 1
            raise
        future.add_done_callback(self._leave)
        return await asyncio.shield(future)

    def generate(
        self, prompt: Prompt, options: GenerationOptions, *, deadline: Deadline
    ) -> TokenRelay:
        """Start an answer; its tokens and its end come through the relay.

        Raises:
            Overloaded: Too many requests wait already.
        """
        self._admit()
        loop = asyncio.get_running_loop()
        relay = TokenRelay(loop, deadline=deadline)
        try:
            future = loop.run_in_executor(
                self._pool, self._generate, prompt, options, deadline, relay, time.monotonic()
            )
        except BaseException:
            self._admitted -= 1
            raise
        future.add_done_callback(self._leave)
        return relay

    def close(self) -> None:
        """Start no more work; what runs ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _admit(self) -> None:
        if self._admitted >= self._capacity:
            raise Overloaded(
                f"{self._capacity} requests for {self.model.manifest.name!r} run or wait already",
                fix="Try again later, or raise --slots or --max-waiting of the cloud runtime",
            )
        self._admitted += 1

    def _leave(self, future: asyncio.Future[object]) -> None:
        self._admitted -= 1
        if not future.cancelled():
            future.exception()  # seen by whoever waits; nobody may be waiting any more

    # What follows runs in worker threads.

    def _infer(
        self, work: InferWork, deadline: Deadline, cancel: CancelToken, arrived_s: float
    ) -> InferOutcome:
        with self._gate.acquire(deadline, self._pace.infer_s):
            started_s = time.monotonic()
            _check_still_wanted(deadline, cancel)
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
        arrived_s: float,
    ) -> None:
        try:
            expected_s = self._pace.expected_generation_s(options.max_new_tokens)
            with self._gate.acquire(deadline, expected_s):
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
        _check_still_wanted(deadline, relay.cancel)
        first_s = started_s
        chunks = self.model.generate(prompt, options, cancel=relay.cancel)
        with contextlib.closing(chunks):
            for count, chunk in enumerate(chunks):
                now_s = time.monotonic()
                if count == 0:
                    first_s = now_s
                if chunk.finish_reason is None:
                    if not relay.put(chunk):
                        break
                    if now_s >= deadline.at_s:
                        _check_still_wanted(deadline, relay.cancel)
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


def _check_still_wanted(deadline: Deadline, cancel: CancelToken) -> None:
    if cancel.is_cancelled:
        raise Cancelled("The request was cancelled")
    if deadline.is_set and time.monotonic() >= deadline.at_s:
        raise DeadlineExceeded(
            "The deadline passed before the answer was complete",
            tried=("cloud",),
            fix="Allow more time with deadline_ms, or ask for a shorter answer",
        )
