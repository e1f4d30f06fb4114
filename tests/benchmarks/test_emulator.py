"""The link emulator delays, limits and breaks as it is told."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from benchmarks.emulator import HOST, Direction, EmulatedLink, Emulator, LinkSpec
from benchmarks.routing.links import Link, read_trace, steady_link, write_trace


@asynccontextmanager
async def echo(spec: LinkSpec):
    """An emulator before a server that says everything again."""

    async def again(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(again, HOST, 0)
    emulator = Emulator(server.sockets[0].getsockname()[1], spec)
    yield emulator, await emulator.start()
    emulator.obey({"do": "reset"})
    server.close()


async def ask(port: int, data: bytes) -> float:
    """Seconds until the same came back."""
    reader, writer = await asyncio.open_connection(HOST, port)
    began_s = time.monotonic()
    writer.write(data)
    assert await reader.readexactly(len(data)) == data
    writer.close()
    return time.monotonic() - began_s


async def speak(writer: asyncio.StreamWriter) -> None:
    """Say something for a second; what was on its way when the connection ended may come first."""
    for _ in range(50):
        writer.write(b"three")
        await writer.drain()
        await asyncio.sleep(0.02)


def test_the_delay_and_the_bandwidth_are_never_less_than_stated(tmp_path: Path):
    trace = tmp_path / "link.up"
    write_trace(steady_link(2.4), trace)  # 300 KB/s

    async def run() -> tuple[float, float, float]:
        async with echo(LinkSpec(rtt_ms=80.0)) as (_, port):
            delayed_s = await ask(port, b"x")
        async with echo(LinkSpec(up=trace)) as (_, port):
            up_s = await ask(port, bytes(90_000))
        async with echo(LinkSpec(down=trace)) as (_, port):
            return delayed_s, up_s, await ask(port, bytes(90_000))

    delayed_s, up_s, down_s = asyncio.run(run())
    assert delayed_s >= 0.08
    assert up_s >= 0.29  # the last packet crosses at 0.295 s
    assert down_s >= 0.29


def test_connections_share_the_link_and_a_full_queue_holds_senders_back():
    link = Direction(steady_link(1.2), delay_s=0.01, queue_bytes=3000)  # 10 ms for each packet
    assert link.has_room(90_000)  # a large message passes when nothing is before it
    first = link.enter(1500, 0.0)
    second = link.enter(1500, 0.0)
    assert second - first == pytest.approx(0.01)
    assert not link.has_room(1500)
    link.leave(1500)
    assert link.has_room(1500)
    assert link.passed_bytes == 1500


def test_a_trace_that_was_written_is_the_one_that_is_read(tmp_path: Path):
    write_trace(Link([0.0, 0.5, 0.7504], 1.0), tmp_path / "x.up")
    again = read_trace(tmp_path / "x.up")
    assert list(again.times_s) == [0.0, 0.5, 1.0]
    assert again.period_s == 1.0


def test_a_process_resets_stalls_refuses_and_goes_on():
    async def run() -> None:
        async def again(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(4096):
                writer.write(data)

        server = await asyncio.start_server(again, HOST, 0)
        with EmulatedLink(server.sockets[0].getsockname()[1]) as link:
            reader, writer = await asyncio.open_connection(HOST, link.port)
            writer.write(b"one")
            assert await reader.readexactly(3) == b"one"
            link.do("stall")
            writer.write(b"two")
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(reader.read(3)), 0.2)
            link.do("resume")
            await asyncio.sleep(0.1)
            link.do("reset")
            with pytest.raises(ConnectionResetError):
                await speak(writer)
            assert link.do("stats")["connections"] == 1
            link.do("refuse")
            with pytest.raises(OSError):
                await ask(link.port, b"four")
            link.do("accept")
            assert await ask(link.port, b"five") >= 0.0
        server.close()

    asyncio.run(run())
