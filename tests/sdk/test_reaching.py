"""A device that can answer does not wait for a cloud that is away."""

from __future__ import annotations

import socket
import time

import numpy as np
import pytest

import sdk.cloud.link as link_module
from nearfar.errors import CloudUnavailable, DeadlineExceeded
from nearfar.secure.identity import ServerIdentity
from sdk import Client, CloudConfig, reaching
from sdk.policy import parse_policy
from tests.support import tiny

pytest.importorskip("onnxruntime")

X = {"x": np.ones((1, 4), np.float32)}
OPEN = parse_policy('version = 1\n[[rule]]\nid = "all"\nwhen = {}\neffect = "cloud_ok"\n')
#: Far longer than any test may take; a request that waits for connecting to end would be noticed.
CONNECTING_S = 120.0


@pytest.fixture
def mute():
    """A server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def client(mute, tmp_path, monkeypatch):
    monkeypatch.setattr(link_module, "CONNECT_TIMEOUT_S", CONNECTING_S)
    monkeypatch.setattr(reaching, "PATIENCE_S", 0.1)
    tiny.write_tiny_tensor_bundle(tmp_path / "tiny", task="tensor")
    (tmp_path / "key").write_text("nfk_" + "a" * 43)
    (tmp_path / "key").chmod(0o600)
    config = CloudConfig(
        url=f"wss://127.0.0.1:{mute.getsockname()[1]}/v1/nearfar",
        identity=str(ServerIdentity.generate().pin),
        credentials=f"file:{tmp_path / 'key'}",
    )
    with Client(models=tmp_path, cloud=config, policy=OPEN, sensitivity="public") as made:
        yield made


@pytest.mark.parametrize("mode", ["auto", "prefer_cloud"])
def test_a_cloud_that_says_nothing_is_waited_for_a_moment_once(client, mode):
    started_s = time.monotonic()
    for _ in range(5):
        assert client.infer("tiny", X, mode=mode).route.name == "edge"
    assert time.monotonic() - started_s < CONNECTING_S / 4
    assert client._link.reaching_since_s is not None  # the first attempt, still under way


def test_a_connection_that_was_begun_a_moment_later_is_not_waited_for_without_end(
    client, monkeypatch
):
    """The loop begins to connect after the caller has begun to wait, and its moment ends later."""
    ended = reaching.worth_waiting_until_s
    monkeypatch.setattr(
        reaching,
        "worth_waiting_until_s",
        lambda core, names, now_s: max(ended(core, names, now_s), now_s + 0.02),
    )
    started_s = time.monotonic()
    assert client.infer("tiny", X, mode="prefer_cloud").route.path == "cloud → edge"
    assert time.monotonic() - started_s < CONNECTING_S / 4


def test_a_cloud_that_refused_is_connected_to_beside_the_next_requests(client, mute, monkeypatch):
    monkeypatch.setattr(reaching, "PATIENCE_S", CONNECTING_S)
    mute.close()  # nothing listens there any more
    assert client.infer("tiny", X).route.name == "edge"
    assert client._link.is_away
    steps = []
    perform = client._perform
    client._perform = lambda step: (steps.append(step), perform(step))[1]
    assert client.infer("tiny", X, deadline_ms=60_000).route.name == "edge"
    waited = [step.is_waited for step in steps if hasattr(step, "is_waited")]
    assert waited == [False]


def test_who_has_no_other_way_waits_as_long_as_the_request_may(client):
    with pytest.raises(DeadlineExceeded):
        client.infer("tiny", X, mode="cloud_only", deadline_ms=300)


def test_each_attempt_to_connect_counts_once_however_many_wait(client, mute):
    mute.close()
    for _ in range(2):
        with pytest.raises(CloudUnavailable):
            client.infer("tiny", X, mode="cloud_only")
    assert client._known.breaker.failures == 2
