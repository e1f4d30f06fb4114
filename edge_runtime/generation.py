"""An answer that an engine of this process is giving, and its timings."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from types import TracebackType

from edge_runtime.hands import Hands
from edge_runtime.stalls import Followed, Stall, StallWatch
from nearfar.engines.base import CancelToken
from nearfar.engines.slots import Slot
from nearfar.errors import Cancelled
from nearfar.generation import GenerationChunk
from nearfar.patience import Patience
from nearfar.units import Deadline


class Watching:
    """How an answer is watched: each piece is computed in a thread that can be given up.

    Args:
        model: Name of the model.
        patience: How long it may be silent.
        hands: Make the calls.
        watch: Keeps their time.
        on_stall: Told of a stall, before the caller is; ends the work.
    """

    def __init__(
        self, model: str, patience: Patience, hands: Hands, watch: StallWatch,
        on_stall: Callable[[Stall], None],
    ) -> None:  # fmt: skip
        self._model = model
        self._patience = patience
        self._hands = hands
        self._watch = watch
        self._on_stall = on_stall

    def piece(
        self, advance: Callable[[], GenerationChunk | None], deadline: Deadline,
        cancel: CancelToken, *, is_first: bool,
    ) -> GenerationChunk | None:  # fmt: skip
        """Compute one piece.

        Raises:
            EngineError: It failed or stalled.
            DeadlineExceeded: The deadline passed first.
        """
        patience = self._patience
        work = self._hands.do(advance)

        def stalled(stall: Stall) -> None:
            work.give_up(stall.error(), lambda: self._on_stall(stall))

        followed = Followed(
            self._model, "prompt" if is_first else "token",
            patience.first_s if is_first else patience.token_s, is_cold=patience.is_cold,
            began_s=time.monotonic(), thread=lambda: work.native_id, on_stall=stalled,
        )  # fmt: skip
        self._watch.follow(followed)
        try:
            piece: GenerationChunk | None = work.wait(deadline)
        except BaseException:
            cancel.cancel()
            raise
        finally:
            if work.has_returned:
                followed.end()
        return piece


class EdgeGeneration(Iterator[GenerationChunk]):
    """Iterator over the chunks of one answer. Holds a slot until it ends or is closed.

    The work is done in the thread that asks for the next chunk, or in another one for it when it is
    watched. One thread at a time may ask; `close` may be called from any.

    Args:
        chunks: The engine's generator.
        slot: The slot it runs in; given back here.
        deadline: Looked at between tokens.
        cancel: The token the engine looks at.
        variant: Id of the variant that answers.
        execution_provider: What it runs on.
        watching: How it is watched; `None` when it is not.

    Attributes:
        queue_s: Seconds spent waiting for the slot.
        prefill_s: Seconds from the first request for a chunk to its arrival; `None` before.
        decode_s: Seconds from the first chunk to the last one; `None` before the end.
        pause_s: The longest time between two chunks so far, computing alone.
    """

    def __init__(
        self,
        chunks: Generator[GenerationChunk, None, None],
        *,
        slot: Slot,
        deadline: Deadline,
        cancel: CancelToken,
        variant: str,
        execution_provider: str,
        watching: Watching | None = None,
    ) -> None:
        self.variant = variant
        self.execution_provider = execution_provider
        self.queue_s: float = slot.queue_s
        self.prefill_s: float | None = None
        self.decode_s: float | None = None
        self.pause_s = 0.0
        self._watching = watching
        self._is_left = False
        self._chunks = chunks
        self._slot = slot
        self._deadline = deadline
        self._cancel = cancel
        self._first_s = 0.0
        # Held while the engine works, so that closing from another thread waits for its turn.
        self._busy = threading.Lock()

    def __next__(self) -> GenerationChunk:
        """The next chunk.

        Raises:
            StopIteration: The chunk with `finish_reason` was the last.
            DeadlineExceeded: The deadline passed between two tokens; the answer is cut here.
            EngineError: The engine failed.
        """
        watching = self._watching
        if watching is None:
            chunk = self._step()
        else:
            if self._is_left:
                raise Cancelled("The answer was given up")
            try:
                chunk = watching.piece(
                    self._step, self._deadline, self._cancel, is_first=self.prefill_s is None
                )
            except BaseException:
                self._is_left = True  # whoever computes it now ends it, see `_step`
                self.close()
                raise
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Stop and free slot and KV cache: at once, or after the token that is being computed.

        Idempotent; from any thread.
        """
        self._cancel.cancel()
        if self._busy.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._busy.release()
        # Otherwise the thread that is inside sees the token, and ends the answer itself.

    def __enter__(self) -> EdgeGeneration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # An app that drops an answer half-way must not keep the slot from others.
        with contextlib.suppress(AttributeError):  # __init__ had failed
            self._end()

    def _step(self) -> GenerationChunk | None:
        """The next chunk; `None` after the last."""
        try:
            with self._busy:
                try:
                    return self._advance()
                except StopIteration:
                    self._end()
                    return None
                except BaseException:
                    self._end()
                    raise
        finally:
            if self._is_left:  # nobody asks for another piece, and nobody could end it until now
                self.close()

    def _advance(self) -> GenerationChunk:
        self._deadline.check("edge")
        started_s = time.monotonic()
        chunk = next(self._chunks)
        ended_s = time.monotonic()
        if self.prefill_s is None:
            self._first_s = ended_s
            self.prefill_s = ended_s - started_s
        else:
            self.pause_s = max(self.pause_s, ended_s - started_s)
        if chunk.finish_reason is not None:
            self.decode_s = time.monotonic() - self._first_s
            self._end()
        return chunk

    def _end(self) -> None:
        self._chunks.close()
        self._slot.release()
