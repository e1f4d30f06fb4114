"""A TCP proxy on loopback that a test can cut, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable


class CuttingProxy:
    """Forwards bytes to a port until it is told to cut; a context manager.

    Attributes:
        port: Where it listens.
        connections: How many were made through it.
        cut_after: Downstream bytes after which a connection is cut, one per connection; `None`, and
            what follows the list, is never cut.
        downstream_bytes: Passed on towards clients so far.
        is_closed: New connections are cut at once.
    """

    def __init__(self, target_port: int, *, cut_after: list[int | None] | None = None) -> None:
        self.port = 0
        self.connections = 0
        self.cut_after = cut_after or []
        self.downstream_bytes = 0
        self.is_closed = False
        self._target_port = target_port
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="cutting-proxy")

    def cut(self) -> None:
        """Cut every connection at once, without a goodbye."""
        self._call(self._abort_all)

    def __enter__(self) -> CuttingProxy:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._stop.set)
        self._thread.join(10)

    def _call(self, function: Callable[[], None]) -> None:
        done = threading.Event()

        def run() -> None:
            function()
            done.set()

        self._loop.call_soon_threadsafe(run)
        assert done.wait(5)

    def _abort_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        self._abort_all()
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        limit = self.cut_after.pop(0) if self.cut_after else None
        if self.is_closed:
            writer.transport.abort()
            return
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        pair = {writer, there_writer}
        self._writers |= pair
        try:
            await asyncio.wait(
                [
                    asyncio.ensure_future(self._pump(reader, there_writer)),
                    asyncio.ensure_future(self._pump_down(there_reader, writer, limit)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for one in pair:
                one.transport.abort()
            self._writers -= pair

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(4096):
                writer.write(data)
                await writer.drain()

    async def _pump_down(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int | None
    ) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := await reader.read(4096):
                if limit is not None and passed + len(data) >= limit:
                    writer.write(data[: limit - passed])
                    return
                passed += len(data)
                self.downstream_bytes += len(data)
                writer.write(data)
                await writer.drain()
