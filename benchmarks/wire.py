"""`nearfar bench wire`: what the protocol and the secure channel add to a bare TLS 1.3 websocket.

A bare `websockets` echo, the session in the least shell that serves it, and the whole cloud runtime
take turns with the same payloads between the same two processes. Bars are held against the session;
the runtime, which also queues, remembers and logs each request, is shown beside it.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.harness import Figure, Report, Run, interleave, per_round
from benchmarks.subjects import Begin, Part
from benchmarks.wire_ends import SIDES, Echo, Server, Timed
from benchmarks.wire_server import allow_files
from benchmarks.wire_timed import CLOCK
from nearfar.eventloop import LoopName, has_uvloop, new_event_loop
from sdk.cloud.connection import tls_context as client_tls

T = TypeVar("T")
Work = Callable[[], Coroutine[Any, Any, None]]

#: Payload bytes, their name, the bar on the session's CPU, and how many of the smallest payload
#: one of them counts for.
PAYLOADS = ((1024, "1 KiB", 1.4, 1), (150_000, "150 kB", 1.25, 4), (1 << 20, "1 MiB", 1.25, 16))
MAX_HANDSHAKE_MS = 3.0
MIN_PIPELINED_RATIO = 0.75
MAX_IDLE_KB = 100.0

#: Requests in flight on one connection; half of what a server allows.
IN_FLIGHT = 32
#: In a row, so that the first one of a turn, which finds cold caches on both sides, counts little.
_HANDSHAKES = 10
_HANDSHAKE_ROUNDS = 5  # for each round of the others; short ones, so that some are quiet
_MORE_ROUNDS = 2
#: Connections made at once for the memory figure: enough to keep both processes busy.
_CONNECTING = 16
_WARM_CONNECTIONS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        rounds: How often each side is measured.
        echoes: Echoes of the smallest payload in a round; larger payloads take fewer.
        connections: Idle connections for the memory figure.
        seed: The order of the sides is drawn from it.
    """

    rounds: int = 12
    echoes: int = 200
    connections: int = 1000
    seed: int = 0


def measure(settings: Settings, begin: Begin) -> Report:
    """Run all comparisons, on asyncio's own event loop, and on uvloop where it is installed.

    Args:
        settings: What is measured.
        begin: Shows progress.

    Raises:
        EngineError: The server's process did not start, or too few files may be open.
    """
    allow_files(settings.connections + 256)
    run = Run("wire", seed=settings.seed)
    parts = []
    loops: tuple[LoopName, ...] = ("asyncio", "uvloop") if has_uvloop() else ("asyncio",)
    with tempfile.TemporaryDirectory(prefix="nearfar-bench-") as folder:
        for loop in loops:
            with _Bench(Path(folder), loop, settings, run, begin) as bench:
                measured = [*(bench.echoes(*payload) for payload in PAYLOADS), bench.pipelined()]
                if loop == "asyncio":
                    measured.append(bench.handshakes())
                parts += measured
            parts.append(_idle(Path(folder), loop, settings, begin))
    return run.report(
        bars=[bar for part in parts for bar in part.bars],
        figures=[figure for part in parts for figure in part.figures],
        settings={
            "rounds": settings.rounds,
            "echoes": settings.echoes,
            "connections": settings.connections,
            "in_flight": IN_FLIGHT,
            "event_loops": ", ".join(loops),
        },
    )


class _Bench:
    """The servers' processes, this process's event loop, and one open connection of each kind.

    Bars belong to asyncio's own loop, which is always there; another loop adds figures.
    """

    def __init__(
        self, folder: Path, loop: LoopName, settings: Settings, run: Run, begin: Begin
    ) -> None:
        self._settings = settings
        self._run = run
        self._begin = begin
        self._has_bars = loop == "asyncio"
        self._prefix = "" if self._has_bars else f"{loop}: "
        self._loop = new_event_loop(loop)
        self._bare = Server(folder, loop=loop, is_bare=True)
        self._server = Server(folder, loop=loop, is_bare=False)
        self._tls = client_tls(self._bare.config("raw"))
        self._echoes: dict[str, Echo] = {}

    def __enter__(self) -> _Bench:
        for name in SIDES:
            self._echoes[name] = self._do(self._open(name))
        return self

    def __exit__(self, *_: object) -> None:
        for echo in self._echoes.values():
            self._do(echo.close())
        self._bare.close()
        self._server.close()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def echoes(self, size_bytes: int, name: str, limit: float, weight: int) -> Part:
        """One request at a time: processor time of both ends, wall time, size on the wire."""
        count = max(2, self._settings.echoes // weight)
        payload = self._payload(size_bytes)
        step = self._begin(f"{self._prefix}echo of {name}", self._settings.rounds)
        walls: dict[str, list[float]] = {side: [] for side in self._echoes}
        sealed: dict[str, int] = {}

        def side(side_name: str, echo: Echo) -> Callable[[], float]:
            async def work() -> None:
                for _ in range(count):
                    started_s = time.perf_counter()
                    sealed[side_name] = await echo.echo(payload)
                    walls[side_name].append((time.perf_counter() - started_s) * 1e6)

            return lambda: self._cpu_of(work) / count * 1e6

        # The first echoes fill caches and grow buffers.
        for echo in self._echoes.values():
            self._do(echo.echo(payload))
        cpu_us = self._interleave({k: side(k, echo) for k, echo in self._echoes.items()}, step)
        ratios = {
            side_name: Figure.of_rounds(
                f"{self._prefix}{side_name}, {name}: CPU per echo ÷ raw",
                "",
                per_round(lambda x, y: x / y, cpu_us[side_name], cpu_us["raw"]),
            )
            for side_name in ("session", "runtime")
        }
        figures = [ratios["runtime"], *([] if self._has_bars else [ratios["session"]])]
        for side_name in self._echoes:
            title = f"{self._prefix}{side_name}, {name}"
            figures += [
                Figure.of_rounds(f"{title}: CPU per echo", "µs", cpu_us[side_name]),
                Figure.of_calls(f"{title}: wall time per echo", "µs", walls[side_name]),
            ]
        if self._has_bars:
            extra = float(sealed["session"] - size_bytes)
            figures.append(
                Figure.of_rounds(f"session, {name}: answer on the wire, beyond it", "B", [extra])
            )
        bars = (ratios["session"].bar(limit, "at_most"),) if self._has_bars else ()
        return Part(bars, tuple(figures))

    def pipelined(self) -> Part:
        """Many requests in flight on one connection: messages in a second."""
        payload = self._payload(PAYLOADS[0][0])
        count = max(2 * IN_FLIGHT, self._settings.echoes * 2)
        step = self._begin(f"{self._prefix}{IN_FLIGHT} in flight", self._settings.rounds)

        def side(echo: Echo) -> Callable[[], float]:
            def once() -> float:
                started_s = time.perf_counter()
                self._do(echo.pipeline(payload, count, IN_FLIGHT))
                return count / (time.perf_counter() - started_s)

            return once

        speeds = self._interleave({k: side(echo) for k, echo in self._echoes.items()}, step)
        title = f"{PAYLOADS[0][1]}, {IN_FLIGHT} in flight: messages/s"
        ratios = {
            side_name: Figure.of_rounds(
                f"{self._prefix}{side_name}, {title} ÷ raw",
                "",
                per_round(lambda x, y: x / y, speeds[side_name], speeds["raw"]),
            )
            for side_name in ("session", "runtime")
        }
        figures = [ratios["runtime"], *([] if self._has_bars else [ratios["session"]])]
        figures += [
            Figure.of_rounds(f"{self._prefix}{side_name}, {title}", "/s", samples)
            for side_name, samples in speeds.items()
        ]
        bars = (ratios["session"].bar(MIN_PIPELINED_RATIO, "at_least"),) if self._has_bars else ()
        return Part(bars, tuple(figures))

    def handshakes(self) -> Part:
        """Processor time of both ends until requests may flow.

        The bar is on what the sessions take in both processes, in the quietest round: a time, not
        a ratio, and whoever shares the machine makes it longer, never shorter (as `timeit` of the
        standard library says of its minimum). All rounds, and what connecting takes in all, with
        the turns of the event loop that the messages cost, stand beside it.
        """
        rounds = _HANDSHAKE_ROUNDS * self._settings.rounds
        step = self._begin("handshakes", rounds)

        def side(name: str, cpu_of: Callable[[Work], float]) -> Callable[[], float]:
            def once() -> float:
                opened: list[Echo] = []

                async def work() -> None:
                    for _ in range(_HANDSHAKES):
                        opened.append(await self._open(name))

                cpu_ms = cpu_of(work) / _HANDSHAKES * 1e3
                for echo in opened:
                    self._do(echo.close())
                return cpu_ms

            return once

        sides = {name: side(name, self._cpu_of) for name in SIDES}
        sides["timed"] = side("timed", self._handshake_cpu_of)
        cpu_ms = self._interleave(sides, step, rounds=rounds)
        inside_ms = cpu_ms.pop("timed")
        name = "handshake: CPU of both sessions"
        quietest = Figure.of_rounds(name, "ms", [min(inside_ms)])
        every = Figure.of_rounds(f"{name}, all rounds", "ms", inside_ms)
        beyond = Figure.of_rounds(
            "session: CPU of both ends to connect, beyond raw",
            "ms",
            per_round(lambda x, y: x - y, cpu_ms["session"], cpu_ms["raw"]),
        )
        figures = [
            Figure.of_rounds(f"{name}: CPU of both ends to connect", "ms", samples)
            for name, samples in cpu_ms.items()
        ]
        return Part((quietest.bar(MAX_HANDSHAKE_MS, "at_most"),), (every, *figures, beyond))

    async def _open(self, name: str) -> Echo:
        kind = Timed if name == "timed" else SIDES[name]
        server = self._bare if name == "raw" else self._server
        return await kind.open(server.config(name), self._tls)

    def _payload(self, size_bytes: int) -> np.ndarray:
        return np.frombuffer(self._run.random.randbytes(size_bytes), np.uint8)

    def _interleave(
        self, sides: Mapping[str, Callable[[], float]], step: Callable[[], None], rounds: int = 0
    ) -> dict[str, list[float]]:
        return interleave(
            sides, rounds=rounds or self._settings.rounds, random=self._run.random, on_round=step
        )

    def _cpu_of(self, work: Work) -> float:
        """Processor time, in seconds, that some work takes at both ends."""
        before_s = self._cpu_s()
        self._do(work())
        return self._cpu_s() - before_s

    def _cpu_s(self) -> float:
        return time.process_time() + self._bare.cpu_s() + self._server.cpu_s()

    def _handshake_cpu_of(self, work: Work) -> float:
        """What of it the timed sessions took for their handshakes."""
        before_s = CLOCK.spent_s + self._server.handshakes_s()
        self._do(work())
        return CLOCK.spent_s + self._server.handshakes_s() - before_s

    def _do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(coroutine)


def _idle(folder: Path, loop: LoopName, settings: Settings, begin: Begin) -> Part:
    """Memory of a server for each connection that only waits."""
    has_bars = loop == "asyncio"
    prefix = "" if has_bars else f"{loop}: "
    step = begin(f"{prefix}{settings.connections} idle connections", len(SIDES))
    kb = {}
    for name in SIDES:
        # A process for each, so that none inherits memory that another one gave back.
        places = settings.connections + 64
        with Server(folder, loop=loop, is_bare=name == "raw", max_connections=places) as server:
            kb[name] = asyncio.run(_idle_kb(server, name, settings.connections))
        step()
    figures = {
        name: Figure.of_rounds(f"{prefix}{name}: memory of an idle connection", "kB", [value])
        for name, value in kb.items()
    }
    if not has_bars:
        return Part((), tuple(figures.values()))
    bar = figures["runtime"].bar(MAX_IDLE_KB, "at_most")
    return Part((bar,), tuple(figures.values()))


async def _idle_kb(server: Server, name: str, count: int) -> float:
    config = server.config(name)
    tls = client_tls(config)
    # The client's whole shell would only fill this process; what the server holds is the same.
    kind = SIDES["raw" if name == "raw" else "session"]
    opened: list[Echo] = []

    async def open_some(share: int) -> None:
        for _ in range(share):
            opened.append(await kind.open(config, tls))

    async def open_all(total: int) -> None:
        shares = [total // _CONNECTING + (i < total % _CONNECTING) for i in range(_CONNECTING)]
        await asyncio.gather(*(open_some(share) for share in shares))

    await open_all(_WARM_CONNECTIONS)  # stay open: what they leave behind must not be reused
    before = await asyncio.to_thread(server.memory_bytes)
    await open_all(count)
    after = await asyncio.to_thread(server.memory_bytes)
    await asyncio.gather(*(echo.close() for echo in opened))
    return (after - before) / count / 1e3
