"""A device whose engine hangs, as an app meets it: a real runtime, and a scripted cloud."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")

from nearfar.errors import EngineError
from nearfar.patience import Patience
from sdk import AsyncClient, Client, Config
from sdk.config import RoutingConfig
from sdk.records import RingReader
from sdk.records.board import Board
from tests.edge_runtime.test_stalls import Wedge, wedge
from tests.support.tiny import write_tiny_tensor_bundle
from tests.support.two_routes import POLICY, X

SHORT = Patience(first_s=0.15, token_s=0.15, is_cold=False)


@pytest.fixture
def store(tmp_path):
    write_tiny_tensor_bundle(tmp_path / "store" / "tensor", name="tensor")
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """What a stall is shall not hang on how fast this machine is."""
    monkeypatch.setattr("sdk.stalls.patience", lambda known, request, so_far="": SHORT)


@pytest.fixture
def client(cloud, store, tmp_path):
    config = Config(routing=RoutingConfig(record=tmp_path / "ring"))
    with Client(
        config, cloud=cloud.config(), models=store, policy=POLICY, sensitivity="public"
    ) as client:
        client.infer("tensor", X, mode="cloud_only")
        client.warm_up("tensor")
        yield client


def hang(client) -> Wedge:
    return wedge(client._edge.runtime, model="tensor")


def test_the_cloud_answers_where_policy_allows_it_and_the_record_says_why(client, tmp_path):
    engine = hang(client)
    result = client.infer("tensor", X, mode="prefer_edge")
    assert result.route.path == "edge → cloud"
    assert "the engine on this device does not answer (it stalled, next try in" in result.reason
    explained = client.explain("tensor", feeds=X, mode="prefer_edge")
    assert explained.route == "cloud"
    assert explained.candidates[0].note == "unreachable"
    board = Board()
    board.add(RingReader(tmp_path / "ring").entries())
    view = board.view(time.time())
    assert view.stalls == 1
    assert any("it stalled" in row.note for row in view.rows if row.route == "edge")
    engine.go_on.set()


def test_what_must_stay_on_the_device_is_told_at_once(client, monkeypatch):
    engine = hang(client)
    with pytest.raises(EngineError, match="has been silent"):
        client.infer("tensor", X, sensitivity="personal", deadline_ms=60_000)
    engine.inside.clear()
    # The breaker is open: the next one does not even ask.
    with pytest.raises(EngineError, match="does not answer"):
        client.infer("tensor", X, sensitivity="personal", deadline_ms=60_000)
    assert not engine.inside.is_set()
    engine.go_on.set()


def test_after_a_while_one_request_finds_the_model_loaded_anew(client):
    engine = hang(client)
    with pytest.raises(EngineError):
        client.infer("tensor", X, mode="edge_only")
    breaker = client._edge.breakers["tensor"]
    until_s = time.monotonic() + 20.0
    while not breaker.can_try(time.monotonic()):
        assert time.monotonic() < until_s
        time.sleep(0.02)
    assert client.infer("tensor", X, mode="edge_only").route.name == "edge"
    assert client._edge.runtime.lost_sessions("tensor") == 1
    assert breaker.can_try(time.monotonic())
    assert client.explain("tensor", feeds=X, mode="edge_only").route == "edge"
    engine.go_on.set()


def test_a_planned_call_is_watched_too(client):
    for _ in range(3):
        client.infer("tensor", X, sensitivity="personal")
    assert client._plans._of_tensors
    direct = client._edge.runtime.direct("tensor")
    engine = Wedge(direct._engine, heeds=True)
    direct._engine = engine
    with pytest.raises(EngineError, match="has been silent"):
        client.infer("tensor", X, sensitivity="personal")
    assert "tensor" in client._edge.breakers


def test_closing_a_client_does_not_wait_for_an_engine_that_hangs(cloud, store):
    client = Client(cloud=cloud.config(), models=store, policy=POLICY, sensitivity="public")
    client.warm_up("tensor")
    engine = hang(client)
    with pytest.raises(EngineError):
        client.infer("tensor", X, sensitivity="personal")
    closer = threading.Thread(target=client.close)
    closer.start()
    closer.join(20.0)
    assert not closer.is_alive()
    assert not engine.go_on.is_set()
    engine.go_on.set()


def test_the_asynchronous_client_goes_on_as_well(cloud, store):
    async def use():
        client = AsyncClient(
            cloud=cloud.config(), models=store, policy=POLICY, sensitivity="public"
        )
        async with client:
            await client.infer("tensor", X, mode="cloud_only")
            await client.warm_up("tensor")
            engine = hang(client)
            result = await client.infer("tensor", X, mode="prefer_edge")
        assert not engine.go_on.is_set()  # closing did not wait
        engine.go_on.set()
        return result

    assert asyncio.run(use()).route.path == "edge → cloud"
