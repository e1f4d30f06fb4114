"""Where the pieces of a streamed answer come from: an engine in this process, or the cloud."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

from nearfar.generation import GenerationChunk
from nearfar.units import Deadline, exceeded
from sdk.answer import Summary

if TYPE_CHECKING:
    from edge_runtime import EdgeGeneration
    from nearfar.engines.base import CancelToken
    from nearfar.wire.messages import Fin, Token
    from sdk.cloud.resumption import ResumableStream
    from sdk.due import Watched


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
    """Pieces from an engine in this process; runs it in the caller's thread.

    Args:
        generation: Makes them.
        cancel: Ends it, in the middle of a token too.
        deadline: When that is done …
        watched: … by this.
        ended: Told once whether the answer came to its end.
    """

    def __init__(
        self,
        generation: EdgeGeneration,
        cancel: CancelToken,
        deadline: Deadline,
        watched: Watched | None,
        ended: Callable[[bool], None] | None = None,
    ) -> None:
        self._generation = generation
        self._cancel = cancel
        self._deadline = deadline
        self._watched = watched
        self._ended = ended

    def pull(self) -> tuple[GenerationChunk | None, Summary | None]:
        piece = next(self._generation, None)
        if piece is None or piece.finish_reason is None:
            return piece, None
        self._unwatch()
        self._tell(piece.finish_reason != "cancelled")
        if piece.finish_reason == "cancelled":
            if self._watched is not None and self._watched.is_stopped:
                raise exceeded("edge")
            self._deadline.check("edge")
        seen = self._generation
        summary = Summary(
            variant=seen.variant,
            execution_provider=seen.execution_provider,
            queue_ms=seen.queue_s * 1000.0,
            prefill_ms=(seen.prefill_s or 0.0) * 1000.0,
            decode_ms=(seen.decode_s or 0.0) * 1000.0,
            pause_ms=seen.pause_s * 1000.0,
        )
        return piece, summary

    def close(self) -> None:
        self._unwatch()
        self._tell(False)
        self._cancel.cancel()
        self._generation.close()

    def _tell(self, is_answered: bool) -> None:
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(is_answered)

    def _unwatch(self) -> None:
        if self._watched is not None:
            self._watched.end()


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

    def add(self, batch: Sequence[Token]) -> None:
        self._tokens.extend(batch)

    def next_token(self) -> GenerationChunk | None:
        if not self._tokens:
            return None
        token = self._tokens.popleft()
        return GenerationChunk(index=token.index, text=token.text)


def last_piece(fin: Fin, pause_s: float = 0.0) -> tuple[GenerationChunk, Summary]:
    """The server's last word as a piece.

    Args:
        fin: The word.
        pause_s: The longest wait for a token of the answer.
    """
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
        pause_ms=pause_s * 1000.0,
    )
    return piece, summary


class CloudSource:
    """Pieces from the cloud, fetched through the client's background event loop.

    Args:
        stream: The open stream.
        deadline: When the answer is due.
        call: Runs a coroutine on the loop and waits for its result, until a deadline.
        post: Runs a function on the loop and does not wait.
        submit: Runs a coroutine on the loop and gives its future.
        first: Tokens that were read from it already.
    """

    def __init__(
        self,
        stream: ResumableStream,
        deadline: Deadline,
        call: Callable[[Coroutine[Any, Any, list[Token]], Deadline], list[Token]],
        post: Callable[[Callable[[], None]], None],
        submit: Callable[[Coroutine[Any, Any, list[Token]]], Future[list[Token]]],
        first: Sequence[Token] = (),
    ) -> None:
        self._stream = stream
        self._deadline = deadline
        self._call = call
        self._post = post
        self._submit = submit
        self._buffer = TokenBuffer()
        self._buffer.add(first)
        self._begun: Future[list[Token]] | None = None

    def beginning(self) -> Future[list[Token]]:
        """Done when the first piece is here, or the news that none comes."""
        if self._begun is None:
            self._begun = self._submit(self._stream.tokens(self._deadline))
        return self._begun

    def pull(self) -> tuple[GenerationChunk | None, Summary | None]:
        piece = self._buffer.next_token()
        if piece is None:
            begun, self._begun = self._begun, None
            if begun is None:
                tokens = self._call(self._stream.tokens(self._deadline), self._deadline)
                self._buffer.add(tokens)
            else:
                from sdk.background import result_of

                tokens = result_of(begun, self._deadline)
                self._buffer.add(tokens)
            piece = self._buffer.next_token()
        if piece is not None:
            return piece, None
        fin = self._stream.fin
        return (None, None) if fin is None else last_piece(fin, self._stream.pause_s)

    def close(self) -> None:
        self._post(self._stream.cancel)


class AsyncCloudSource:
    """Pieces from the cloud, on the app's own event loop.

    Args:
        stream: The open stream.
        deadline: When the answer is due.
        first: Tokens that were read from it already.
    """

    def __init__(
        self, stream: ResumableStream, deadline: Deadline, first: Sequence[Token] = ()
    ) -> None:
        self._stream = stream
        self._deadline = deadline
        self._buffer = TokenBuffer()
        self._buffer.add(first)
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
        return (None, None) if fin is None else last_piece(fin, self._stream.pause_s)

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
