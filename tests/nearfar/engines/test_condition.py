from __future__ import annotations

from pathlib import Path

import pytest

from nearfar.engines.condition import (
    ConditionReader,
    DeviceCondition,
    describe,
    power_mode,
    read_condition,
    temperature_c,
)

CPU = "sys/devices/system/cpu"
GPU = "sys/class/devfreq/17000000.ga10b"


def write(root: Path, **files: object) -> None:
    """Files of a device: `__` is a folder."""
    for name, value in files.items():
        put(root / name.replace("__", "/"), value)


def put(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")


def policy(root: Path, number: int, *, cap: int, highest: int, cores: str, now: int = 0) -> None:
    write(
        root / CPU / "cpufreq" / f"policy{number}", scaling_max_freq=cap, cpuinfo_max_freq=highest,
        scaling_cur_freq=now or highest // 10, related_cpus=cores,
    )  # fmt: skip


def test_a_machine_that_tells_nothing_has_no_condition(tmp_path) -> None:
    assert read_condition(tmp_path, uses_gpu=True) == DeviceCondition()
    assert describe(DeviceCondition()) == "temperature —   speed —   power mode —"


def test_the_cap_of_a_clock_counts_and_an_idle_clock_does_not(tmp_path) -> None:
    policy(tmp_path, 0, cap=2_000_000, highest=2_000_000, cores="0 1 2 3", now=200_000)
    reader = ConditionReader(tmp_path)
    assert reader.speed(0.0) == 1.0
    put(tmp_path / CPU / "cpufreq/policy0/scaling_max_freq", 500_000)
    assert reader.speed(1.0) == 0.25


def test_clocks_count_as_often_as_they_have_cores_and_offline_ones_do_not(tmp_path) -> None:
    policy(tmp_path, 0, cap=1_000_000, highest=1_000_000, cores="0 1")
    policy(tmp_path, 2, cap=1_000_000, highest=2_000_000, cores="2 3 4 5")
    reader = ConditionReader(tmp_path)
    assert reader.speed(0.0) == pytest.approx((2 * 1 + 4 * 1) / (2 * 1 + 4 * 2))
    (tmp_path / CPU / "cpufreq/policy2/scaling_max_freq").unlink()
    assert reader.speed(0.0) == 1.0


def test_the_gpu_counts_where_models_use_it_and_other_units_never_do(tmp_path) -> None:
    policy(tmp_path, 0, cap=1_510_000, highest=1_510_000, cores="0 1 2 3 4 5")
    write(
        tmp_path / GPU, max_freq=312_000_000, available_frequencies="156000000 312000000 624000000"
    )
    write(tmp_path / "sys/class/devfreq/15480000.nvdec", max_freq=1, available_frequencies="1 9")
    assert read_condition(tmp_path).speed == 1.0
    assert read_condition(tmp_path, uses_gpu=True).speed == 0.5


def test_cooling_speaks_where_the_cap_cannot_be_read_and_fans_never_do(tmp_path) -> None:
    thermal = tmp_path / "sys/class/thermal"
    write(thermal / "cooling_device0", type="pwm-fan", cur_state=3, max_state=3)
    assert read_condition(tmp_path).speed is None
    write(thermal / "cooling_device1", type="cpufreq-cpu0", cur_state=5, max_state=10)
    write(thermal / "cooling_device2", type="devfreq-17000000.gpu", cur_state=10, max_state=10)
    assert read_condition(tmp_path).speed == pytest.approx(0.6)
    assert read_condition(tmp_path, uses_gpu=True).speed == pytest.approx(0.2)
    policy(tmp_path, 0, cap=900, highest=1_000, cores="0")  # it holds what cooling did
    assert read_condition(tmp_path).speed == pytest.approx(0.9)


def test_a_processor_that_throttles_itself_has_the_clock_it_runs_at(tmp_path) -> None:
    policy(tmp_path, 0, cap=4_000, highest=4_000, cores="0", now=1_000)
    counter = tmp_path / CPU / "cpu0/thermal_throttle/package_throttle_total_time_ms"
    put(counter, 5_000)
    reader = ConditionReader(tmp_path)
    assert reader.speed(10.0) == 1.0  # that was before
    put(counter, 5_020)
    assert reader.speed(10.25) == 1.0  # for a moment
    put(counter, 5_250)
    assert reader.speed(10.5) == 0.25


def test_the_hottest_sensor_counts_and_broken_ones_do_not(tmp_path) -> None:
    assert temperature_c(tmp_path) is None
    for zone, text in enumerate(["41000", "67500", "", "-274000"]):
        put(tmp_path / f"thermal_zone{zone}" / "temp", text)
    assert temperature_c(tmp_path) == 67.5


def test_the_power_mode_has_a_name_where_the_board_says_so(tmp_path) -> None:
    assert power_mode(tmp_path) is None
    put(tmp_path / "var/lib/nvpmodel/status", "pmode:0001 fmode:quiet")
    assert power_mode(tmp_path) == "1"
    modes = "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=7W >"
    put(tmp_path / "etc/nvpmodel.conf", modes)
    assert read_condition(tmp_path) == DeviceCondition(power_mode="7W")


def test_files_that_make_no_sense_are_as_good_as_none(tmp_path) -> None:
    write(tmp_path / CPU / "cpufreq/policy0", scaling_max_freq="<unknown>", cpuinfo_max_freq="x")
    write(tmp_path / GPU, max_freq="", available_frequencies="")
    put(tmp_path / "var/lib/nvpmodel/status", "?")
    assert read_condition(tmp_path, uses_gpu=True) == DeviceCondition()
