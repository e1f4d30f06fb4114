"""Answers across cut connections: a real server, a real client, and a proxy that cuts between."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from cloud_runtime.settings import ServerSettings
from nearfar.errors import Cancelled, CloudUnavailable, DeadlineExceeded, StreamInterrupted
from nearfar.generation import GenerationOptions, Prompt
from nearfar.units import Deadline
from nearfar.wire.retention import RetentionLimits
from sdk import AsyncClient, Client, CloudConfig
from sdk.cloud import resumption
from sdk.cloud.egress import Permit
from sdk.cloud.link import CloudLink
from sdk.policy import Verdict
from tests.cloud_runtime.support import ScriptedModel, make_state, running, served
from tests.support.cutting_proxy import CuttingProxy
from tests.support.scripted_cloud import manifest
from tests.support.scripted_edge import ScriptedEdge, put_into

ALLOWED = Verdict(edge=True, cloud=True, rule_ids=("r",), reason="ok", policy_hash="h")
TOKENS = 60
WHOLE = "".join(f"t{index} " for index in range(TOKENS)) + "end"
POLICY = """
version = 1
[[rule]]
id = "open"
when = { sensitivity = "public" }
effect = "cloud_ok"
"""


class World:
    """A server in a thread, a proxy before it, and what clients need to come through the proxy."""

    def __init__(self, state, keep_s: float) -> None:
        self.chat = ScriptedModel("chat", task="text-generation", token_s=0.002)
        self.tensor = ScriptedModel("scripted", delay_s=0.05)
        self.state = state
        self.settings = ServerSettings(retention=RetentionLimits(keep_s=keep_s))
        self.server = None
        self._started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(
            target=lambda: self._loop.run_until_complete(self._serve()), name="world"
        )

    async def _serve(self) -> None:
        models = served(self.chat, self.tensor)
        async with running(models, self.state, self.settings) as server:
            self.server = server
            self._started.set()
            await self._stop.wait()

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2].partition("/")[0])

    def config(self, proxy: CuttingProxy) -> CloudConfig:
        return CloudConfig(
            url=f"wss://localhost:{proxy.port}/v1/nearfar",
            identity=self.server.pin,
            credentials=f"file:{self.state.client_key}",
            ca_file=self.state.ca_certificate,
        )

    def __enter__(self) -> World:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return make_state(tmp_path_factory.mktemp("cloud") / "state")


@pytest.fixture
def world(state) -> Iterator[World]:
    with World(state, keep_s=60.0) as opened:
        yield opened


@pytest.fixture
def proxy(world) -> Iterator[CuttingProxy]:
    with CuttingProxy(world.port) as opened:
        yield opened


@contextlib.contextmanager
def client_of(world: World, proxy: CuttingProxy, tmp_path) -> Iterator[Client]:
    (tmp_path / "policy.toml").write_text(POLICY)
    with Client(
        cloud=world.config(proxy), policy=tmp_path / "policy.toml", sensitivity="public"
    ) as client:
        yield client


def with_link(config, use):
    async def body():
        link = CloudLink(config)
        try:
            return await asyncio.wait_for(use(link), 30)
        finally:
            await link.close()

    return asyncio.run(body())


async def begin(link: CloudLink, *, tokens: int = TOKENS, deadline: Deadline | None = None):
    return await link.generate(
        Permit(ALLOWED, "chat"),
        model="chat",
        prompt=Prompt(text="Once"),
        options=GenerationOptions(max_new_tokens=tokens),
        deadline=deadline or Deadline(),
    )


async def read(stream, deadline: Deadline | None = None) -> str:
    texts = []
    while batch := await stream.tokens(deadline or Deadline()):
        texts += [token.text for token in batch]
    return "".join(texts)


# What the app sees.


def test_an_answer_cut_in_the_middle_is_whole_for_the_app(world, proxy, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="sdk.cloud.resumption")
    with client_of(world, proxy, tmp_path) as client:
        stream = client.generate("chat", "Once", max_new_tokens=TOKENS, mode="cloud_only")
        chunks = []
        for chunk in stream:
            chunks.append(chunk)
            if len(chunks) == 10:
                proxy.cut()
    assert "".join(chunk.text for chunk in chunks) == WHOLE
    assert [chunk.index for chunk in chunks] == list(range(TOKENS + 1))
    assert not any(chunk.handover for chunk in chunks)
    assert stream.route.path == "cloud"
    assert stream.finish_reason == "length"
    assert stream.usage.completion_tokens == TOKENS
    assert (world.chat.runs, world.chat.tokens) == (1, TOKENS)
    assert proxy.connections == 2
    (record,) = caplog.records
    assert "goes on at token" in record.getMessage()
    assert "t1" not in record.getMessage()


def test_the_async_client_goes_on_too(world, proxy, tmp_path):
    (tmp_path / "policy.toml").write_text(POLICY)

    async def main() -> str:
        async with AsyncClient(
            cloud=world.config(proxy), policy=tmp_path / "policy.toml", sensitivity="public"
        ) as client:
            stream = await client.generate("chat", "Once", max_new_tokens=TOKENS, mode="cloud_only")
            texts = []
            async for chunk in stream:
                texts.append(chunk.text)
                if len(texts) == 10:
                    await asyncio.to_thread(proxy.cut)
            return "".join(texts)

    assert asyncio.run(asyncio.wait_for(main(), 30)) == WHOLE
    assert world.chat.runs == 1


def test_a_batch_that_was_cut_is_asked_again_and_computed_once(world, proxy, tmp_path):
    x = np.arange(4, dtype=np.float32).reshape(1, 4)
    world.tensor.hold.set()
    with client_of(world, proxy, tmp_path) as client:
        client.warm_up("scripted")

        def interfere() -> None:
            while not world.tensor.running:
                time.sleep(0.002)
            proxy.cut()
            world.tensor.hold.clear()

        thread = threading.Thread(target=interfere)
        thread.start()
        result = client.infer("scripted", {"x": x}, mode="cloud_only")
        thread.join()
    assert np.array_equal(result.outputs["y"], x)
    assert world.tensor.runs == 1
    assert proxy.connections == 2


def test_when_the_answer_is_kept_no_longer_the_device_goes_on(state, tmp_path, monkeypatch):
    monkeypatch.setattr(resumption, "_PAUSES_S", (0.6,))
    (tmp_path / "store").mkdir()
    (tmp_path / "policy.toml").write_text(POLICY)
    with (
        World(state, keep_s=0.1) as world,
        CuttingProxy(world.port) as proxy,
        Client(
            cloud=world.config(proxy),
            models=tmp_path / "store",
            policy=tmp_path / "policy.toml",
            sensitivity="public",
        ) as client,
    ):
        put_into(client, ScriptedEdge([manifest("chat", "text-generation", variants=("int4",))]))
        stream = client.generate("chat", "Once", max_new_tokens=400, mode="prefer_cloud")
        chunks = []
        for chunk in stream:
            chunks.append(chunk)
            if len(chunks) == 5:
                proxy.cut()
        assert world.chat.runs == 1
    assert stream.route.path == "cloud → edge"
    assert [chunk.index for chunk in chunks] == list(range(400))
    assert sum(chunk.handover for chunk in chunks) == 1


def test_of_two_clouds_the_one_that_holds_the_answer_is_gone_back_to(state, tmp_path):
    (tmp_path / "policy.toml").write_text(POLICY)
    with contextlib.ExitStack() as stack:
        worlds, proxies = {}, {}
        for name in ("a", "b"):
            worlds[name] = stack.enter_context(World(state, keep_s=60.0))
            proxies[name] = stack.enter_context(CuttingProxy(worlds[name].port))
        configs = [msgspec.structs.replace(worlds[n].config(proxies[n]), name=n) for n in "ab"]
        client = stack.enter_context(
            Client(cloud=configs, policy=tmp_path / "policy.toml", sensitivity="public")
        )
        client.warm_up("chat")
        stream = client.generate("chat", "Once", max_new_tokens=TOKENS)
        chunks = []
        for chunk in stream:
            chunks.append(chunk)
            if len(chunks) == 10:
                for proxy in proxies.values():
                    proxy.cut()
        assert "".join(chunk.text for chunk in chunks) == WHOLE
        assert not any(chunk.handover for chunk in chunks)
        held = stream.route.endpoint
        (other,) = {"a", "b"} - {held}
        assert (worlds[held].chat.runs, worlds[held].chat.tokens) == (1, TOKENS)
        assert worlds[other].chat.runs == 0


# The link by itself.


@pytest.mark.parametrize("seed", range(12))
def test_wherever_the_bytes_stop_nothing_is_lost_and_nothing_comes_twice(world, seed):
    """Cuts at random bytes, also in the handshake and in the answer to `Resume`."""
    sizes: list[int] = []

    async def use(link: CloudLink) -> str:
        await link.connect(Deadline())
        sizes.append(proxy.downstream_bytes)
        text = await read(await begin(link))
        sizes.append(proxy.downstream_bytes)
        return text

    with CuttingProxy(world.port) as proxy:
        assert with_link(world.config(proxy), use) == WHOLE
    connected, whole = sizes
    draw = random.Random(seed)
    cuts: list[int | None] = [
        draw.randrange(connected, whole - 100),
        draw.randrange(100, whole),
    ]
    runs = 1
    # Tokens that come together share records: the answer may be there in fewer bytes than before.
    for _ in range(5):
        runs += 1
        with CuttingProxy(world.port, cut_after=cuts) as proxy:
            assert with_link(world.config(proxy), use) == WHOLE
            if proxy.connections >= 2:
                break
    else:
        pytest.fail(f"never cut after {cuts} bytes")
    assert (world.chat.runs, world.chat.tokens) == (runs, runs * TOKENS)


def test_many_answers_on_one_connection_all_go_on(world, proxy):
    async def use(link: CloudLink) -> list[str]:
        streams = [await begin(link, tokens=20) for _ in range(4)]
        reading = [asyncio.ensure_future(read(stream)) for stream in streams]
        await asyncio.sleep(0.03)
        await asyncio.to_thread(proxy.cut)
        return await asyncio.gather(*reading)

    texts = with_link(world.config(proxy), use)
    assert texts == ["".join(f"t{index} " for index in range(20)) + "end"] * 4
    assert world.chat.runs == 4
    assert proxy.connections == 2


def test_an_answer_cut_before_its_first_token_is_computed_once(world, proxy):
    world.chat.hold.set()

    async def use(link: CloudLink) -> str:
        stream = await begin(link)
        reading = asyncio.ensure_future(read(stream))
        while not world.chat.running:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(proxy.cut)
        world.chat.hold.clear()
        return await reading

    assert with_link(world.config(proxy), use) == WHOLE
    assert world.chat.runs == 1


def test_a_resume_that_never_arrived_does_not_spend_the_ticket(world, proxy):
    async def use(link: CloudLink) -> str:
        stream = await begin(link, tokens=TOKENS)
        texts = [token.text for token in await stream.tokens(Deadline())]
        await asyncio.to_thread(proxy.cut)
        # The next connection dies with the `Resume` unsent; the one after it tries that one's
        # ticket first, which the server has never seen.
        connect = stream._connect

        async def doomed(deadline: Deadline):
            connection = await connect(deadline)
            stream._connect = connect
            connection._websocket.transport.abort()
            return connection

        stream._connect = doomed
        return "".join(texts) + await read(stream)

    assert with_link(world.config(proxy), use) == WHOLE
    assert world.chat.runs == 1


def test_a_cloud_that_stays_away_interrupts_the_answer_soon(world, proxy):
    async def use(link: CloudLink) -> None:
        stream = await begin(link, tokens=100_000)
        await stream.tokens(Deadline())
        proxy.is_closed = True
        await asyncio.to_thread(proxy.cut)
        started_s = time.monotonic()
        with pytest.raises(StreamInterrupted) as caught:
            await read(stream)
        assert time.monotonic() - started_s < resumption._WITHIN_S
        assert caught.value.received_tokens > 0
        assert type(caught.value.__cause__) is CloudUnavailable

    with_link(world.config(proxy), use)


def test_after_expiry_the_stream_is_interrupted_as_without_resumption(state, monkeypatch):
    monkeypatch.setattr(resumption, "_PAUSES_S", (0.6,))
    with World(state, keep_s=0.1) as world, CuttingProxy(world.port) as proxy:

        async def use(link: CloudLink) -> None:
            stream = await begin(link, tokens=100_000)
            await stream.tokens(Deadline())
            await asyncio.to_thread(proxy.cut)
            with pytest.raises(StreamInterrupted):
                await read(stream)

        with_link(world.config(proxy), use)
        assert world.chat.runs == 1


@pytest.mark.parametrize(
    ("is_reader_cancelled", "outcome"),
    [(False, Cancelled), (True, asyncio.CancelledError)],  # the latter: another route outran it
)
def test_cancelling_while_it_reconnects_ends_it_at_once(
    world, proxy, monkeypatch, is_reader_cancelled, outcome
):
    monkeypatch.setattr(resumption, "_PAUSES_S", (20.0,))

    async def use(link: CloudLink) -> None:
        stream = await begin(link, tokens=100_000)
        await stream.tokens(Deadline())
        await asyncio.to_thread(proxy.cut)
        reading = asyncio.ensure_future(read(stream))
        await asyncio.sleep(0.2)
        if is_reader_cancelled:
            reading.cancel()
        stream.cancel()
        with pytest.raises(outcome):
            await asyncio.wait_for(reading, 2)

    with_link(world.config(proxy), use)


def test_the_deadline_holds_while_it_reconnects(world, proxy, monkeypatch):
    monkeypatch.setattr(resumption, "_PAUSES_S", (0.0, 20.0))

    async def use(link: CloudLink) -> None:
        deadline = Deadline.after_ms(800)
        stream = await begin(link, tokens=100_000, deadline=deadline)
        await stream.tokens(deadline)
        proxy.is_closed = True
        await asyncio.to_thread(proxy.cut)
        with pytest.raises((DeadlineExceeded, StreamInterrupted)):
            await read(stream, deadline)
        assert time.monotonic() < deadline.at_s + 1.0

    with_link(world.config(proxy), use)
