from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime import sensing
from edge_runtime.sensing import SpeedSensor
from sdk.edge import EdgeRoute


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(sensing, "EVERY_S", 0.005)
    monkeypatch.setattr(sensing, "_uses_gpu", lambda: False)


def cap(root: Path, share: float) -> None:
    policy = root / "sys/devices/system/cpu/cpufreq/policy0"
    policy.mkdir(parents=True, exist_ok=True)
    (policy / "cpuinfo_max_freq").write_text("1000\n")
    (policy / "related_cpus").write_text("0 1\n")
    fresh = policy / "new"
    fresh.write_text(f"{1000 * share:.0f}\n")
    fresh.replace(policy / "scaling_max_freq")


def until(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 10.0
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.002)


def test_nothing_runs_before_somebody_asks_nor_where_nothing_is_told(
    tmp_path,
) -> None:
    told: list[float | None] = []
    sensor = SpeedSensor(told.append, root=tmp_path)
    assert not sensor.is_running
    sensor.asked(time.monotonic())
    until(lambda: not sensor.is_running)
    cap(tmp_path, 0.5)
    sensor.asked(time.monotonic())  # it is not tried again and again
    assert not sensor.is_running
    assert told == []
    sensor.close()


def test_changes_are_told_once_and_closing_ends_the_thread(tmp_path) -> None:
    told: list[float | None] = []
    cap(tmp_path, 1.0)
    sensor = SpeedSensor(told.append, root=tmp_path)
    sensor.asked(time.monotonic())
    until(lambda: told == [1.0])
    cap(tmp_path, 0.25)
    until(lambda: len(told) > 1)
    cap(tmp_path, 1.0)
    until(lambda: len(told) > 2)
    sensor.close()
    sensor.close()
    assert told == [1.0, 0.25, 1.0]
    assert not sensor.is_running
    sensor.asked(time.monotonic())
    assert not sensor.is_running


def test_a_device_that_nobody_asks_is_left_alone_until_somebody_does(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sensing, "IDLE_S", 0.02)
    told: list[float | None] = []
    cap(tmp_path, 1.0)
    sensor = SpeedSensor(told.append, root=tmp_path)
    sensor.asked(time.monotonic())
    until(lambda: told == [1.0] and not sensor.is_running)
    cap(tmp_path, 0.5)
    sensor.asked(time.monotonic())
    until(lambda: told == [1.0, 0.5])
    sensor.close()


def test_a_device_that_stops_telling_has_no_speed(tmp_path) -> None:
    told: list[float | None] = []
    cap(tmp_path, 0.5)
    sensor = SpeedSensor(told.append, root=tmp_path)
    sensor.asked(time.monotonic())
    until(lambda: told == [0.5])
    (tmp_path / "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq").unlink()
    until(lambda: told == [0.5, None])
    until(lambda: not sensor.is_running)
    sensor.close()


def test_the_near_route_tells_whoever_asks_and_ends_it_with_itself(tmp_path) -> None:
    cap(tmp_path, 0.5)
    route = EdgeRoute(tmp_path)
    route.root = tmp_path
    told: list[float | None] = []
    route.sense(told.append, time.monotonic())
    until(lambda: told == [0.5])
    sensor = route._sensor
    assert sensor is not None
    route.close()
    assert not sensor.is_running
