"""A link between real processes: a proxy that delays, limits to a trace, and breaks on command.

Runs as a process of its own (``python -m benchmarks.emulator``), so that neither end shares its
interpreter with the link. It reads commands from standard input, one JSON object in a line, and
answers each on standard output; it ends when its standard input does. `EmulatedLink` is the other
side of that.

What it models: a delay in each direction, a bandwidth in each direction that follows a trace in
Mahimahi's format (looped; one packet of 1,500 bytes at each of its moments), and a queue. A full
queue holds the sender back, as the socket of a real modem does; nothing is dropped, because what
the ends see of a dropped packet is TCP's business. All connections share the link.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.routing.links import Link, read_trace
from nearfar.errors import CloudUnavailable

HOST = "127.0.0.1"
#: Read at once: small enough that a large message does not cross in one jump.
_CHUNK_BYTES = 4 * 1500
#: What the system may hold beside the emulated queue.
_SOCKET_BYTES = 32 * 1024
QUEUE_BYTES = 256 * 1024
_START_TIMEOUT_S = 60.0
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST at once


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """What a link is like.

    Attributes:
        up: Trace of the direction towards the cloud; `None` does not limit it.
        down: Of the other one.
        offset_s: Where in the traces it begins.
        rtt_ms: Delay in both directions together.
        queue_bytes: What each direction holds before it makes senders wait.
    """

    up: Path | None = None
    down: Path | None = None
    offset_s: float = 0.0
    rtt_ms: float = 0.0
    queue_bytes: int = QUEUE_BYTES


class Direction:
    """One direction of the link, shared by all connections. Sans-IO.

    Args:
        link: When packets can cross; `None` for at once.
        delay_s: How long they travel.
        queue_bytes: What it holds.
    """

    def __init__(self, link: Link | None, *, delay_s: float, queue_bytes: int) -> None:
        self._link = link
        self._delay_s = delay_s
        self._queue_bytes = queue_bytes
        self._free = 0
        self.queued_bytes = 0
        self.passed_bytes = 0

    def has_room(self, size_bytes: int) -> bool:
        """Whether a message may be queued now."""
        return not self.queued_bytes or self.queued_bytes + size_bytes <= self._queue_bytes

    def enter(self, size_bytes: int, at_s: float) -> float:
        """Queue a message; says when it comes out at the other end."""
        self.queued_bytes += size_bytes
        if self._link is not None:
            at_s, self._free = self._link.cross(size_bytes, at_s=at_s, free=self._free)
        return at_s + self._delay_s

    def leave(self, size_bytes: int) -> None:
        """A message has come out."""
        self.queued_bytes -= size_bytes
        self.passed_bytes += size_bytes


class Emulator:
    """The proxy. Used from one event loop.

    Args:
        target: Port that connections go to.
        spec: What the link is like.
    """

    def __init__(self, target: int, spec: LinkSpec) -> None:
        delay_s = spec.rtt_ms / 2000.0
        self._target = target
        self._up, self._down = (
            Direction(_link_of(path, spec.offset_s), delay_s=delay_s, queue_bytes=spec.queue_bytes)
            for path in (spec.up, spec.down)
        )
        self._loop = asyncio.get_running_loop()
        self._began_s = self._loop.time()
        self._moving = asyncio.Event()
        self._moving.set()
        self._changed = asyncio.Event()
        self._open: set[asyncio.StreamWriter] = set()
        self._refuses = False
        self.connections = 0

    async def start(self) -> int:
        """Listen; returns the port."""
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
        listening.bind((HOST, 0))
        self._server = await asyncio.start_server(self._forward, sock=listening, limit=_CHUNK_BYTES)
        port: int = listening.getsockname()[1]
        return port

    def obey(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Do what one command says; returns what came of it.

        Raises:
            KeyError: There is no such command.
        """
        actions: dict[str, Callable[[], object]] = {
            "reset": self._reset,
            "stall": self._moving.clear,
            "resume": self._moving.set,
            "refuse": lambda: self._refuse(True),
            "accept": lambda: self._refuse(False),
            "stats": lambda: None,
        }
        actions[command["do"]]()
        return {
            "connections": self.connections,
            "open": len(self._open) // 2,
            "up_bytes": self._up.passed_bytes,
            "down_bytes": self._down.passed_bytes,
        }

    def _refuse(self, refuses: bool) -> None:
        self._refuses = refuses

    def _reset(self) -> None:
        """End every connection at once, as a network does that has forgotten them."""
        for writer in tuple(self._open):
            _abort(writer)
        self._open.clear()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._refuses:
            _abort(writer)
            return
        try:
            away = await asyncio.open_connection(HOST, self._target, limit=_CHUNK_BYTES)
        except OSError:  # nothing listens there
            _abort(writer)
            return
        there_reader, there_writer = away
        ends = (writer, there_writer)
        for end in ends:
            end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._open.update(ends)
        directions = [
            asyncio.ensure_future(self._carry(reader, there_writer, self._up)),
            asyncio.ensure_future(self._carry(there_reader, writer, self._down)),
        ]
        try:
            # When one side has said its last word, the other has what is on its way to it.
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            return  # the emulator ends
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)
            for end in ends:
                _abort(end)
                self._open.discard(end)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Direction
    ) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sending = asyncio.ensure_future(self._send(queue, writer, way))
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(_CHUNK_BYTES):
                    while not way.has_room(len(data)):
                        self._changed.clear()
                        await self._changed.wait()
                    due_s = way.enter(len(data), self._loop.time() - self._began_s)
                    queue.put_nowait((due_s, data))
            queue.put_nowait((0.0, b""))
            await sending
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            while not queue.empty():  # what was on its way is lost, and takes no room any more
                way.leave(len(queue.get_nowait()[1]))
            self._changed.set()

    async def _send(
        self,
        queue: asyncio.Queue[tuple[float, bytes]],
        writer: asyncio.StreamWriter,
        way: Direction,
    ) -> None:
        while True:
            due_s, data = await queue.get()
            if not data:
                return
            try:
                left_s = self._began_s + due_s - self._loop.time()
                if left_s > 0.0:
                    await asyncio.sleep(left_s)
                await self._moving.wait()
                writer.write(data)
                with contextlib.suppress(OSError):
                    await writer.drain()
            finally:
                way.leave(len(data))
                self._changed.set()


def _link_of(path: Path | None, offset_s: float) -> Link | None:
    if path is None:
        return None
    link = read_trace(path)
    return Link(link.times_s, link.period_s, offset_s % link.period_s)


def _abort(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


class EmulatedLink:
    """An emulator process; a context manager. Thread-safe.

    Args:
        target: Port that connections go to.
        spec: What the link is like.

    Attributes:
        port: Where it listens.
    """

    def __init__(self, target: int, spec: LinkSpec = LinkSpec()) -> None:
        arguments = [
            f"--target={target}", f"--offset-s={spec.offset_s}",
            f"--rtt-ms={spec.rtt_ms}", f"--queue-bytes={spec.queue_bytes}",
        ]  # fmt: skip
        for name, path in (("up", spec.up), ("down", spec.down)):
            if path is not None:
                arguments.append(f"--{name}={path}")
        self._arguments = arguments
        self._lock = threading.Lock()
        self.port = 0

    def __enter__(self) -> EmulatedLink:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.emulator", *self._arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        watchdog = threading.Timer(_START_TIMEOUT_S, self._process.kill)
        watchdog.start()
        try:
            self.port = self._answer()["port"]
        finally:
            watchdog.cancel()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def do(self, command: str) -> dict[str, Any]:
        """Break or mend the link.

        Args:
            command: ``reset`` (RST on every connection), ``stall`` (nothing passes) and
                ``resume``, ``refuse`` (new connections are reset) and ``accept``, ``stats``.

        Returns:
            Connections so far and open, and bytes passed in each direction.

        Raises:
            CloudUnavailable: The emulator is not there any more.
        """
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps({"do": command}) + "\n")
            self._process.stdin.flush()
            return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CloudUnavailable(f"The link emulator ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


async def _serve(target: int, spec: LinkSpec) -> None:
    emulator = Emulator(target, spec)
    _say({"port": await emulator.start()})
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        _say(emulator.obey(json.loads(line)))


def _say(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run an emulator until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=int, required=True)
    parser.add_argument("--up", type=Path)
    parser.add_argument("--down", type=Path)
    parser.add_argument("--offset-s", type=float, default=0.0)
    parser.add_argument("--rtt-ms", type=float, default=0.0)
    parser.add_argument("--queue-bytes", type=int, default=QUEUE_BYTES)
    given = parser.parse_args()
    spec = LinkSpec(
        up=given.up, down=given.down, offset_s=given.offset_s, rtt_ms=given.rtt_ms,
        queue_bytes=given.queue_bytes,
    )  # fmt: skip
    asyncio.run(_serve(given.target, spec))


if __name__ == "__main__":
    main()
