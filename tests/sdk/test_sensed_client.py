"""A client whose device says how fast it may run."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import sensing
from sdk import Client, parse_policy
from tests.support.scripted_cloud import TENSOR
from tests.support.scripted_edge import ScriptedEdge, put_into

POLICY = parse_policy(
    """
version = 1
classes = ["public", "secret"]
[[rule]]
id = "here"
when = { sensitivity = "secret" }
effect = "edge_only"
"""
)
X = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}


@pytest.fixture
def client(tmp_path, monkeypatch):
    monkeypatch.setattr(sensing, "EVERY_S", 0.005)
    monkeypatch.setattr(sensing, "_uses_gpu", lambda: False)
    cap(tmp_path, 250)
    with Client(models=tmp_path, policy=POLICY, sensitivity="secret") as made:
        put_into(made, ScriptedEdge((TENSOR,)))
        made._edge.root = tmp_path
        yield made


def cap(root: Path, khz: int) -> None:
    policy = root / "sys/devices/system/cpu/cpufreq/policy0"
    policy.mkdir(parents=True, exist_ok=True)
    (policy / "cpuinfo_max_freq").write_text("1000\n")
    (policy / "scaling_max_freq").write_text(f"{khz}\n")


def sensors() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "nearfar-sensor"]


def slower_becomes(client: Client, value: float) -> None:
    end_s = time.monotonic() + 10.0
    while client._known.predictor.slower != value:
        assert time.monotonic() < end_s
        time.sleep(0.002)


def test_with_a_deadline_the_predictor_knows_how_fast_the_device_may_run(client, tmp_path) -> None:
    client.infer("tensor", X)
    assert sensors() == []  # only the device, whenever it is done: nothing depends on its speed
    client.infer("tensor", X, deadline_ms=60_000)
    slower_becomes(client, 4.0)
    cap(tmp_path, 500)
    slower_becomes(client, 2.0)
    client.close()
    assert sensors() == []


def test_a_device_that_says_nothing_changes_nothing(client, tmp_path) -> None:
    client._edge.root = tmp_path / "nothing"
    client.infer("tensor", X, deadline_ms=60_000)
    end_s = time.monotonic() + 10.0
    while sensors():
        assert time.monotonic() < end_s
        time.sleep(0.002)
    client.infer("tensor", X, deadline_ms=60_000)
    assert sensors() == []
    assert client._known.predictor.slower == 1.0
