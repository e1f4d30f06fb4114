"""Streamed answers as an app sees them, and the sources their pieces come from.

`GenerationStream` and `AsyncGenerationStream` differ only in how they wait; what they say is in
`sdk.answer.AnswerState`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from nearfar.errors import Cancelled, NearfarError, StreamInterrupted
from nearfar.generation import FinishReason, GenerationChunk, Usage
from sdk.answer import AnswerState, Summary
from sdk.results import Chunk, Route, Timings
from sdk.routing import RouteDecision

if TYPE_CHECKING:
    from edge_runtime import EdgeGeneration
    from nearfar.engines.base import CancelToken
    from nearfar.units import Deadline
    from nearfar.wire.messages import Fin, Token
    from sdk.cloud.resumption import ResumableStream


logger = logging.getLogger(__name__)


class Source(Protocol):
    """Pieces of one attempt, for a caller that may block."""

    def pull(self) -> tuple[GenerationChunk | None, Summary | None]:
        """The next piece; with the last one its summary; `None` when it ended without one."""
        ...

    def close(self) -> None:
        """Stop the work behind it; idempotent, returns soon."""
        ...


class AsyncSource(Protocol):
    """Pieces of one attempt, for a coroutine."""

    async def pull(self) -> tuple[GenerationChunk | None, Summary | None]:
        """As `Source.pull`."""
        ...

    async def close(self) -> None:
        """As `Source.close`."""
        ...


class EdgeSource:
    """Pieces from an engine in this process; runs it in the caller's thread."""

    def __init__(self, generation: EdgeGeneration, cancel: CancelToken) -> None:
        self._generation = generation
        self._cancel = cancel

    def pull(self) -> tuple[GenerationChunk | None, Summary | None]:
        piece = next(self._generation, None)
        if piece is None or piece.finish_reason is None:
            return piece, None
        seen = self._generation
        summary = Summary(
            variant=seen.variant,
            execution_provider=seen.execution_provider,
            queue_ms=seen.queue_s * 1000.0,
            prefill_ms=(seen.prefill_s or 0.0) * 1000.0,
            decode_ms=(seen.decode_s or 0.0) * 1000.0,
        )
        return piece, summary

    def close(self) -> None:
        self._cancel.cancel()
        self._generation.close()


class Begun:
    """A source whose first piece was taken from it already."""

    def __init__(self, source: Source, first: tuple[GenerationChunk, Summary | None]) -> None:
        self._source = source
        self._first: tuple[GenerationChunk, Summary | None] | None = first

    def pull(self) -> tuple[GenerationChunk | None, Summary | None]:
        first, self._first = self._first, None
        return self._source.pull() if first is None else first

    def close(self) -> None:
        self._source.close()


class TokenBuffer:
    """Turns batches of wire tokens into pieces, and the server's `Fin` into the last one."""

    def __init__(self) -> None:
        self._tokens: deque[Token] = deque()

    def add(self, batch: list[Token]) -> None:
        self._tokens.extend(batch)

    def next_token(self) -> GenerationChunk | None:
        if not self._tokens:
            return None
        token = self._tokens.popleft()
        return GenerationChunk(index=token.index, text=token.text)


def last_piece(fin: Fin) -> tuple[GenerationChunk, Summary]:
    """The server's last word as a piece."""
    piece = GenerationChunk(
        index=fin.usage.completion_tokens,
        text="",
        finish_reason=fin.finish_reason,
        usage=fin.usage,
    )
    summary = Summary(
        variant=fin.variant,
        execution_provider=fin.execution_provider,
        queue_ms=fin.queue_ms,
        prefill_ms=fin.prefill_ms,
        decode_ms=fin.decode_ms,
    )
    return piece, summary


class CloudSource:
    """Pieces from the cloud, fetched through the client's background event loop.

    Args:
        stream: The open stream.
        deadline: When the answer is due.
        call: Runs a coroutine on the loop and waits for its result.
        post: Runs a function on the loop and does not wait.
        submit: Runs a coroutine on the loop and gives its future.
    """

    def __init__(
        self,
        stream: ResumableStream,
        deadline: Deadline,
        call: Callable[[Coroutine[Any, Any, list[Token]]], list[Token]],
        post: Callable[[Callable[[], None]], None],
        submit: Callable[[Coroutine[Any, Any, list[Token]]], Future[list[Token]]],
    ) -> None:
        self._stream = stream
        self._deadline = deadline
        self._call = call
        self._post = post
        self._submit = submit
        self._buffer = TokenBuffer()
        self._begun: Future[list[Token]] | None = None

    def begins_within(self, timeout_s: float) -> bool:
        """Wait for the first piece (or for the news that none comes), but not longer."""
        return bool(concurrent.futures.wait((self._beginning(),), timeout_s).done)

    def when_begun(self, function: Callable[[], None]) -> None:
        """Have a function called, in another thread, when the first piece is here."""

        def tell(begun: Future[list[Token]]) -> None:
            if not begun.cancelled() and begun.exception() is None:
                function()

        self._beginning().add_done_callback(tell)

    def _beginning(self) -> Future[list[Token]]:
        if self._begun is None:
            self._begun = self._submit(self._stream.tokens(self._deadline))
        return self._begun

    def pull(self) -> tuple[GenerationChunk | None, Summary | None]:
        piece = self._buffer.next_token()
        if piece is None:
            begun, self._begun = self._begun, None
            if begun is None:
                self._buffer.add(self._call(self._stream.tokens(self._deadline)))
            else:
                try:
                    self._buffer.add(begun.result())
                except concurrent.futures.CancelledError:
                    raise Cancelled("The client was closed before the answer came") from None
            piece = self._buffer.next_token()
        if piece is not None:
            return piece, None
        fin = self._stream.fin
        return last_piece(fin) if fin is not None else (None, None)

    def close(self) -> None:
        self._post(self._stream.cancel)


class AsyncCloudSource:
    """Pieces from the cloud, on the app's own event loop."""

    def __init__(self, stream: ResumableStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline
        self._buffer = TokenBuffer()
        self._begun: asyncio.Future[list[Token]] | None = None

    def beginning(self) -> asyncio.Future[list[Token]]:
        """Done when the first piece is here, or the news that none comes."""
        if self._begun is None:
            self._begun = asyncio.ensure_future(self._stream.tokens(self._deadline))
        return self._begun

    async def pull(self) -> tuple[GenerationChunk | None, Summary | None]:
        piece = self._buffer.next_token()
        if piece is None:
            begun, self._begun = self._begun, None
            self._buffer.add(await (begun or self._stream.tokens(self._deadline)))
            piece = self._buffer.next_token()
        if piece is not None:
            return piece, None
        fin = self._stream.fin
        return last_piece(fin) if fin is not None else (None, None)

    async def close(self) -> None:
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.cancel()
        self._stream.cancel()


class AsyncBegun:
    """As `Begun`."""

    def __init__(self, source: AsyncSource, first: tuple[GenerationChunk, Summary | None]) -> None:
        self._source = source
        self._first: tuple[GenerationChunk, Summary | None] | None = first

    async def pull(self) -> tuple[GenerationChunk | None, Summary | None]:
        first, self._first = self._first, None
        return await self._source.pull() if first is None else first

    async def close(self) -> None:
        await self._source.close()


class AsyncEdgeSource:
    """Pieces from an engine in this process, which runs in a worker thread."""

    def __init__(
        self,
        source: EdgeSource,
        work: Callable[[Callable[[], object]], Awaitable[object]],
    ) -> None:
        self._source = source
        self._work = work

    async def pull(self) -> tuple[GenerationChunk | None, Summary | None]:
        return await self._work(self._source.pull)  # type: ignore[return-value]

    async def close(self) -> None:
        # Cancel at once; the generator itself may still run in its thread until the next token.
        self._source.close()


class _Facts:
    """The part of both streams that does not wait."""

    def __init__(self, state: AnswerState) -> None:
        self._state = state

    @property
    def partial_text(self) -> str:
        """What has come so far; also after an error."""
        return self._state.text

    @property
    def route(self) -> Route:
        """Where the answer comes from and why; shows all routes after a handover."""
        return self._state.route

    @property
    def reason(self) -> str:
        """Why this route; the same as ``route.reason``."""
        return self._state.route.reason

    @property
    def decision(self) -> RouteDecision:
        """The routing decision, content-free and replayable."""
        return self._state.decision

    @property
    def timings(self) -> Timings:
        """Where the time went, up to the last piece."""
        return self._state.timings

    @property
    def usage(self) -> Usage | None:
        """Token counts; `None` before the end. A route that was cut does not tell prompt tokens."""
        return self._state.usage

    @property
    def finish_reason(self) -> FinishReason | None:
        """``stop``, ``length``, ``stop_string``, ``deadline``, ``cancelled``; `None` before."""
        return self._state.finish_reason

    @property
    def variant(self) -> str:
        """Variant that answered; ``""`` before the end."""
        return self._state.variant

    @property
    def execution_provider(self) -> str:
        """What it ran on; ``""`` before the end."""
        return self._state.execution_provider

    @property
    def bytes_sent(self) -> int:
        """Sealed bytes that left the device for this answer so far; 0 on the edge."""
        return self._state.bytes_sent


class GenerationStream(_Facts):
    """An answer as it comes: iterate for `Chunk` values, or take it whole with `text`.

    Ends with a `finish_reason`, or with an error; never silently cut. When a route breaks off and
    policy allows the other one, the answer goes on there, and the first chunk from it has
    `handover` set. When the deadline passes, what came so far stands with `finish_reason`
    ``deadline``; `DeadlineExceeded` is raised only when nothing came.

    Not thread-safe, but `close` may be called from another thread.
    """

    def __init__(
        self,
        state: AnswerState,
        open_source: Callable[[AnswerState], Source],
        open_edge: Callable[[AnswerState, RouteDecision, CancelToken], Source],
        check: Callable[[str], None],
    ) -> None:
        super().__init__(state)
        self._check = check
        self._open = open_source
        self._open_edge = open_edge
        self._source: Source | None = None

    def begin(self) -> GenerationStream:
        """Send the request before the first piece is asked for, when it goes to the cloud.

        The edge waits for the first `next`: until then the stream holds no slot.
        """
        if self._state.attempt.route == "cloud":
            self._ensure_source()
        return self

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        state = self._state
        while not state.is_over:
            source = self._ensure_source()
            if source is None:
                continue
            try:
                if state.silence_s() is not None and isinstance(source, CloudSource):
                    source = self._beside(source)
                piece, summary = source.pull()
                if piece is None:
                    raise StreamInterrupted("The answer stopped without its last word")
                state.refuse_empty(piece)
            except NearfarError as error:
                self._drop_source()
                if state.error is error:
                    raise
                state.fail(error)
                continue
            except BaseException:  # Ctrl-C: the work behind the answer stops as well
                self.close()
                raise
            try:
                chunk = state.take(piece, summary)
            finally:
                if state.is_over:
                    self._drop_source()
            if chunk is not None:
                return chunk
        raise StopIteration

    def _beside(self, cloud: CloudSource) -> Source:
        """Wait for the cloud to begin; the source to go on with, the device's if that was first."""
        state = self._state
        while (silence_s := state.silence_s()) is not None:
            if cloud.begins_within(silence_s):
                break
            again = state.wake()
            if again is None:
                continue
            from nearfar.engines.base import CancelToken

            cancel = CancelToken()
            cloud.when_begun(cancel.cancel)
            first: tuple[GenerationChunk | None, Summary | None] = None, None
            edge: Source | None = None
            try:
                edge = self._open_edge(state, again, cancel)
                first = edge.pull()
            except NearfarError as error:
                logger.debug("the device did not begin either: %s", error)
            piece, summary = first
            if edge is None or piece is None or cancel.is_cancelled:
                if edge is not None:
                    edge.close()
                state.held()
            else:
                try:
                    is_first = state.outrun()
                except NearfarError:
                    edge.close()
                    raise
                if is_first:
                    cloud.close()
                    self._check(state.silent_endpoint)
                    self._source = Begun(edge, (piece, summary))
                    return self._source
                edge.close()
        return cloud

    def text(self) -> str:
        """Wait for the end and return the whole answer, including what was iterated already.

        Raises:
            NearfarError: The answer could not be ended; `partial_text` has what came.
        """
        for _ in self:
            pass
        if self._state.error is not None:
            raise self._state.error
        return self._state.text

    def close(self) -> None:
        """Want no more: stop the work behind the answer. Idempotent."""
        self._state.cancel()
        self._drop_source()

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # An abandoned stream must not keep a slot of the engine or of the cloud.
        if getattr(self, "_source", None) is not None:
            self.close()

    def _ensure_source(self) -> Source | None:
        while self._source is None and not self._state.is_over:
            try:
                self._source = self._open(self._state)
            except NearfarError as error:
                self._state.fail(error)
        return self._source

    def _drop_source(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()


class AsyncGenerationStream(_Facts):
    """As `GenerationStream`, with ``async for`` and ``await``."""

    def __init__(
        self,
        state: AnswerState,
        open_source: Callable[[AnswerState], Awaitable[AsyncSource]],
        open_edge: Callable[[AnswerState, RouteDecision, CancelToken], Awaitable[AsyncSource]],
        check: Callable[[str], None],
    ) -> None:
        super().__init__(state)
        self._check = check
        self._open = open_source
        self._open_edge = open_edge
        self._source: AsyncSource | None = None

    async def begin(self) -> AsyncGenerationStream:
        """As `GenerationStream.begin`."""
        if self._state.attempt.route == "cloud":
            await self._ensure_source()
        return self

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        state = self._state
        while not state.is_over:
            source = await self._ensure_source()
            if source is None:
                continue
            try:
                if state.silence_s() is not None and isinstance(source, AsyncCloudSource):
                    source = await self._beside(source)
                piece, summary = await source.pull()
                if piece is None:
                    raise StreamInterrupted("The answer stopped without its last word")
                state.refuse_empty(piece)
            except NearfarError as error:
                await self._drop_source()
                if state.error is error:
                    raise
                state.fail(error)
                continue
            except BaseException:  # the task was cancelled: the work stops as well
                await self.close()
                raise
            try:
                chunk = state.take(piece, summary)
            finally:
                if state.is_over:
                    await self._drop_source()
            if chunk is not None:
                return chunk
        raise StopAsyncIteration

    async def _beside(self, cloud: AsyncCloudSource) -> AsyncSource:
        """As `GenerationStream._beside`."""
        state = self._state
        beginning = cloud.beginning()
        while (silence_s := state.silence_s()) is not None:
            done, _ = await asyncio.wait((beginning,), timeout=silence_s)
            if done:
                break
            again = state.wake()
            if again is None:
                continue
            from nearfar.engines.base import CancelToken

            cancel = CancelToken()
            beside = asyncio.ensure_future(self._begin_edge(state, again, cancel))
            try:
                await asyncio.wait((beginning, beside), return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                cancel.cancel()
                beside.cancel()
                raise
            if beginning.done() and beginning.exception() is None:
                cancel.cancel()
            begun = await beside
            if begun is None or cancel.is_cancelled:
                if begun is not None:
                    await begun.close()
                state.held()
            else:
                try:
                    is_first = state.outrun()
                except NearfarError:
                    await begun.close()
                    raise
                if is_first:
                    await cloud.close()
                    self._check(state.silent_endpoint)
                    self._source = begun
                    return begun
                await begun.close()
        return cloud

    async def _begin_edge(
        self, state: AnswerState, again: RouteDecision, cancel: CancelToken
    ) -> AsyncSource | None:
        """The device's source with its first piece; `None` when it did not begin."""
        edge: AsyncSource | None = None
        try:
            edge = await self._open_edge(state, again, cancel)
            piece, summary = await edge.pull()
        except NearfarError as error:
            logger.debug("the device did not begin either: %s", error)
            piece = None
        if edge is None:
            return None
        if piece is None:
            await edge.close()
            return None
        return AsyncBegun(edge, (piece, summary))

    async def text(self) -> str:
        """As `GenerationStream.text`."""
        async for _ in self:
            pass
        if self._state.error is not None:
            raise self._state.error
        return self._state.text

    async def close(self) -> None:
        """As `GenerationStream.close`."""
        self._state.cancel()
        await self._drop_source()

    async def __aenter__(self) -> AsyncGenerationStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _ensure_source(self) -> AsyncSource | None:
        while self._source is None and not self._state.is_over:
            try:
                self._source = await self._open(self._state)
            except NearfarError as error:
                self._state.fail(error)
        return self._source

    async def _drop_source(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            await source.close()
