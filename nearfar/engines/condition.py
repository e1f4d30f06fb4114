"""How fast this device may run just now: clocks, cooling, temperature, power mode, from sysfs.

What counts for the next call is the *cap* of a clock, not the clock: an idle CPU clocks down by
itself (`schedutil`, `ondemand`) and up again within milliseconds of work, so its present clock says
how busy it is. Heat and power modes lower the cap. Only where the processor itself says that it was
throttled for most of the time since the last look, below the kernel's caps, is its present clock
what heat leaves of it.

Sources: the Linux kernel's Documentation/admin-guide/pm/cpufreq.rst,
Documentation/ABI/testing/sysfs-class-devfreq and sysfs-class-thermal; NVIDIA, "Jetson Linux
Developer Guide" (power and thermal management). Not yet run on a Jetson.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

#: Servers have a clock for each of a hundred cores, all under one cap: so many are looked at.
_MOST_POLICIES = 16
#: Names of Jetson's GPU among the clocks of other units (17000000.ga10b, 17000000.gpu), and Mali's.
_GPU = re.compile(r"\b(gpu|g[a-z]\d{2}b|mali)\b")
#: Cooling that slows a unit down, by the beginning of its kind; fans cool without that.
_COOLS_CPU = ("cpufreq-", "thermal-cpufreq-", "Processor")
_COOLS_GPU = ("devfreq-", "thermal-devfreq-")
#: The strongest cooling leaves the lowest clock, which is rarely below a fifth of the highest.
_COOLEST = 0.2
#: Throttled for this part of the time since the last look is throttled.
_MOSTLY = 0.5


class DeviceCondition(msgspec.Struct, frozen=True):
    """What this device says of itself.

    Attributes:
        speed: Share of the full clock that it may use now, 0 to 1, of the slowest unit that models
            use; `None` where nothing says so, as in most virtual machines.
        temperature_c: The hottest sensor in degrees Celsius; `None` where there is none.
        power_mode: Jetson's power mode, such as ``15W``; `None` elsewhere.
    """

    speed: float | None = None
    temperature_c: float | None = None
    power_mode: str | None = None


class ConditionReader:
    """Reads the condition again and again. Not thread-safe.

    Args:
        root: Root of the file system.
        uses_gpu: Whether models run on the GPU, so that its clock counts too.
    """

    def __init__(self, root: Path = Path("/"), *, uses_gpu: bool = False) -> None:
        self._root = root
        cpu = root / "sys/devices/system/cpu"
        policies = sorted((cpu / "cpufreq").glob("policy*"))[:_MOST_POLICIES]
        #: Caps of the CPU's clocks, the highest clock of each, and how many cores it drives.
        self._cpu: list[tuple[Path, float, int]] = []
        for policy in policies:
            highest = _number(policy / "cpuinfo_max_freq")
            if highest:
                cores = len((_text(policy / "related_cpus") or "0").split())
                self._cpu.append((policy, highest, cores))
        self._gpu: list[tuple[Path, float]] = []
        if uses_gpu:
            for unit in sorted((root / "sys/class/devfreq").glob("*")):
                clocks = (_text(unit / "available_frequencies") or "").split()
                rates = [float(clock) for clock in clocks if clock.isdigit()]
                if _GPU.search(unit.name) and rates:
                    self._gpu.append((unit / "max_freq", max(rates)))
        # Cooling speaks for a unit whose cap cannot be read; else the cap has it in already.
        kinds: tuple[str, ...] = () if self._cpu else _COOLS_CPU
        if uses_gpu and not self._gpu:
            kinds += _COOLS_GPU
        self._cooling = _cooling(root / "sys/class/thermal", kinds)
        self._throttled = sorted(
            cpu.glob("cpu*/thermal_throttle/package_throttle_total_time_ms")
        )[:1]  # fmt: skip
        self._last_throttled: tuple[float, float] | None = None

    def speed(self, now_s: float) -> float | None:
        """See `DeviceCondition.speed`.

        Args:
            now_s: Monotonic time.
        """
        shares = [share for share in (self._cpu_share(now_s), self._gpu_share()) if share]
        for device, most in self._cooling:
            state = _number(device / "cur_state")
            if state is not None:
                shares.append(1.0 - (1.0 - _COOLEST) * min(max(state / most, 0.0), 1.0))
        return min(1.0, *shares) if shares else None

    def read(self) -> DeviceCondition:
        """Everything there is."""
        return DeviceCondition(
            speed=self.speed(time.monotonic()),
            temperature_c=temperature_c(self._root / "sys/class/thermal"),
            power_mode=power_mode(self._root),
        )

    def _cpu_share(self, now_s: float) -> float | None:
        """What the caps leave of the CPU: all clocks together, each as often as it has cores."""
        is_throttled = self._is_throttled(now_s)
        allowed = full = 0.0
        for policy, highest, cores in self._cpu:
            cap = _number(policy / "scaling_max_freq")
            if cap is None:
                continue  # the cores of this clock were taken offline
            if is_throttled:
                cap = min(cap, _number(policy / "scaling_cur_freq") or cap)
            allowed += min(cap, highest) * cores
            full += highest * cores
        return allowed / full if full else None

    def _gpu_share(self) -> float | None:
        shares = [
            cap / highest for path, highest in self._gpu if (cap := _number(path)) is not None
        ]
        return min(shares, default=None)

    def _is_throttled(self, now_s: float) -> bool:
        """Whether the processor throttled itself for most of the time since the last look."""
        for path in self._throttled:
            total_ms = _number(path)
            if total_ms is None:
                break
            last, self._last_throttled = self._last_throttled, (total_ms, now_s)
            if last is not None and now_s > last[1]:
                return (total_ms - last[0]) / 1000.0 >= _MOSTLY * (now_s - last[1])
        return False


def read_condition(root: Path = Path("/"), *, uses_gpu: bool = False) -> DeviceCondition:
    """The condition of this device, once."""
    return ConditionReader(root, uses_gpu=uses_gpu).read()


def describe(condition: DeviceCondition) -> str:
    """The condition in a line for people."""
    heat, speed = condition.temperature_c, condition.speed
    return "   ".join(
        (
            f"temperature {'—' if heat is None else f'{heat:.0f} °C'}",
            f"speed {'—' if speed is None else f'{100.0 * speed:.0f} %'}",
            f"power mode {condition.power_mode or '—'}",
        )
    )


def temperature_c(root: Path = Path("/sys/class/thermal")) -> float | None:
    """The hottest sensor of this device in degrees Celsius; `None` where there is none to read.

    Source: Documentation/driver-api/thermal/sysfs-api.rst of the Linux kernel: millidegrees.
    """
    hottest: float | None = None
    for path in root.glob("thermal_zone*/temp"):
        value = _number(path)  # a sensor that is asleep says so by an error
        if value is not None and -40.0 < value / 1000.0 < 200.0:
            hottest = value / 1000.0 if hottest is None else max(hottest, value / 1000.0)
    return hottest


def power_mode(root: Path = Path("/")) -> str | None:
    """Name of Jetson's power mode, or its number where the name is not to be found; else `None`."""
    found = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status") or "")
    if found is None:
        return None
    number = int(found.group(1))
    names = re.search(
        rf"POWER_MODEL\s+ID={number}\s+NAME=(\S+)", _text(root / "etc/nvpmodel.conf") or ""
    )
    return names.group(1) if names else str(number)


def _cooling(root: Path, kinds: Sequence[str]) -> list[tuple[Path, float]]:
    """Cooling devices of these kinds, and their strongest states."""
    found = []
    for device in sorted(root.glob("cooling_device*")) if kinds else ():
        kind, most = _text(device / "type") or "", _number(device / "max_state")
        is_gpu = kind.startswith(_COOLS_GPU)
        if most and kind.startswith(tuple(kinds)) and (not is_gpu or _GPU.search(kind)):
            found.append((device, most))
    return found


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None
