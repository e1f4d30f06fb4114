from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from benchmarks import wire
from benchmarks.harness import Run
from benchmarks.wire import Settings
from benchmarks.wire_ends import SIDES, Server
from nearfar.cli import main
from nearfar.errors import EngineError
from sdk.cloud.connection import tls_context

BARS = [
    ("session, 1 KiB: CPU per echo ÷ raw", 1.4, "at_most", ""),
    ("session, 150 kB: CPU per echo ÷ raw", 1.25, "at_most", ""),
    ("session, 1 MiB: CPU per echo ÷ raw", 1.25, "at_most", ""),
    ("session, 1 KiB, 32 in flight: messages/s ÷ raw", 0.75, "at_least", ""),
    ("handshake: CPU of both sessions", 3.0, "at_most", "ms"),
    ("runtime: memory of an idle connection", 100.0, "at_most", "kB"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("wire"), loop="asyncio", is_bare=False) as running:
        yield running


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("bare"), loop="asyncio", is_bare=True) as running:
        yield running


@pytest.mark.parametrize("name", list(SIDES))
@pytest.mark.parametrize("size_bytes", [1, 1024, 150_000, 1 << 20])
def test_every_side_gives_back_what_it_was_sent(server, bare, name, size_bytes):
    payload = np.frombuffer(np.random.default_rng(7).bytes(size_bytes), np.uint8)

    async def scenario():
        config = (bare if name == "raw" else server).config(name)
        echo = await SIDES[name].open(config, tls_context(config))
        try:
            sealed = [await echo.echo(payload) for _ in range(2)]
            await echo.pipeline(payload, 9, 4)
            return sealed
        finally:
            await echo.close()

    first, second = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert first == second
    assert first == size_bytes if name == "raw" else first > size_bytes


def test_the_server_tells_its_time_and_memory(server):
    before_s = server.cpu_s()
    assert server.cpu_s() >= before_s > 0
    assert 10e6 < server.memory_bytes() < 2e9


def test_a_server_that_does_not_start_is_an_error(tmp_path):
    with pytest.raises(EngineError, match="server ended with status"):
        Server(tmp_path / "state", loop="asyncio", is_bare=False, max_connections=10**9)


def test_too_many_connections_are_refused_before_anything_is_measured():
    with pytest.raises(EngineError, match="open files are needed"):
        wire.measure(Settings(connections=10**9), lambda title, steps: lambda: None)


def test_a_wrong_answer_stops_the_benchmark(bare):
    async def scenario():
        config = bare.config("raw")
        echo = await SIDES["raw"].open(config, tls_context(config))
        await echo._websocket.send(b"something else")
        try:
            await echo.echo(np.zeros(4, np.uint8))
        finally:
            await echo.close()

    with pytest.raises(EngineError, match="did not come back"):
        asyncio.run(asyncio.wait_for(scenario(), 60))


def test_the_command_measures_every_bar_and_writes_them_all(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(wire, "has_uvloop", lambda: False)
    path = tmp_path / "wire.json"
    options = "--rounds 2 --echoes 4 --connections 4 --seed 3"
    assert main(["bench", "wire", *options.split(), "--json", str(path)]) == 0
    assert "CPU per echo" in capfd.readouterr().out
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["bench"] == "wire"
    assert report["seed"] == 3
    assert report["settings"]["connections"] == 4
    assert report["settings"]["event_loops"] == "asyncio"
    found = [(bar["name"], bar["limit"], bar["direction"], bar["unit"]) for bar in report["bars"]]
    assert found == BARS
    assert all(bar["value"] > 0 for bar in report["bars"][:4])
    assert {"websockets", "msgspec", "cryptography"} <= set(report["versions"])
    figures = {figure["name"]: figure for figure in report["figures"]}
    assert len(figures) == len(report["figures"])
    for side in SIDES:
        assert figures[f"{side}, 1 KiB: CPU per echo"]["summary"]["p50"] > 0
        assert figures[f"{side}, 1 KiB: wall time per echo"]["summary"]["count"] == 8
    # Noise cannot change sizes: header, record and padding of one tensor.
    assert 0 < figures["session, 1 KiB: answer on the wire, beyond it"]["summary"]["p50"] < 1024


def test_uvloop_adds_figures_but_no_bars(tmp_path):
    pytest.importorskip("uvloop")
    settings = Settings(rounds=2, echoes=2, connections=2)
    report = wire.measure(settings, lambda title, steps: lambda: None)
    assert [(bar.name, bar.limit, bar.direction, bar.unit) for bar in report.bars] == BARS
    assert report.settings["event_loops"] == "asyncio, uvloop"
    names = {figure.name for figure in report.figures}
    assert "uvloop: session, 1 KiB: CPU per echo ÷ raw" in names
    assert "uvloop: runtime: memory of an idle connection" in names


def test_check_says_in_one_line_which_bar_falls_short(monkeypatch, capfd):
    asked = []

    def measure(settings, begin):
        asked.append(settings)
        begin("fake part", 1)()
        figure = wire.Figure.of_rounds("session: fake", "", [2.0, 2.1])
        bars = [figure.bar(1.4, "at_most")]
        return Run("wire", seed=settings.seed).report(bars=bars, figures=[figure], settings={})

    monkeypatch.setattr(wire, "measure", measure)
    assert main(["bench", "wire", "--check", "--rounds", "5", "--echoes", "6"]) == 1
    said = capfd.readouterr()
    assert (said.out + said.err).splitlines() == [
        "wire: falls short: session: fake: 2.05, the bar is at most 1.4"
    ]
    assert asked == [Settings(rounds=5, echoes=6)]
