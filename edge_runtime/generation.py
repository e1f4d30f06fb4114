"""An answer that an engine of this process is giving, and its timings."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator, Iterator
from types import TracebackType

from nearfar.engines.base import CancelToken
from nearfar.engines.slots import Slot
from nearfar.generation import GenerationChunk
from nearfar.units import Deadline


class EdgeGeneration(Iterator[GenerationChunk]):
    """Iterator over the chunks of one answer. Holds a slot until it ends or is closed.

    The work is done in the thread that asks for the next chunk. One thread at a time may ask;
    `close` may be called from any.

    Args:
        chunks: The engine's generator.
        slot: The slot it runs in; given back here.
        deadline: Looked at between tokens.
        cancel: The token the engine looks at.
        variant: Id of the variant that answers.
        execution_provider: What it runs on.

    Attributes:
        queue_s: Seconds spent waiting for the slot.
        prefill_s: Seconds from the first request for a chunk to its arrival; `None` before.
        decode_s: Seconds from the first chunk to the last one; `None` before the end.
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
    ) -> None:
        self.variant = variant
        self.execution_provider = execution_provider
        self.queue_s: float = slot.queue_s
        self.prefill_s: float | None = None
        self.decode_s: float | None = None
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
        with self._busy:
            try:
                return self._advance()
            except BaseException:
                self._end()
                raise

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

    def _advance(self) -> GenerationChunk:
        self._deadline.check("edge")
        if self.prefill_s is None:
            started_s = time.monotonic()
            chunk = next(self._chunks)
            self._first_s = time.monotonic()
            self.prefill_s = self._first_s - started_s
        else:
            chunk = next(self._chunks)
        if chunk.finish_reason is not None:
            self.decode_s = time.monotonic() - self._first_s
            self._end()
        return chunk

    def _end(self) -> None:
        self._chunks.close()
        self._slot.release()
