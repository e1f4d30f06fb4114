"""What a figure was measured on: processor, load, and versions of everything that matters."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

#: Instruction sets that decide how fast quantized kernels run.
_TELLING_FLAGS = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip

#: Packages whose version can change a figure.
PACKAGES = (
    "nearfar", "numpy", "msgspec", "websockets", "cryptography", "onnxruntime", "onnxruntime-gpu",
    "onnxruntime-genai", "onnxruntime-genai-cuda", "tokenizers", "uvloop",
)  # fmt: skip


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine, without anything that tells whose it is.

    Attributes:
        processor: Model name of the CPU.
        architecture: ``x86_64``, ``aarch64``, …
        logical_cores: Cores that this process may use.
        memory_bytes: Installed memory; 0 when unknown.
        cpu_flags: Instruction sets that decide how fast quantized kernels run.
        system: Operating system and kernel release.
    """

    processor: str
    architecture: str
    logical_cores: int
    memory_bytes: int
    cpu_flags: tuple[str, ...]
    system: str


def this_machine() -> Machine:
    """Describe the machine this runs on."""
    cpuinfo = _read("/proc/cpuinfo")
    flags = set((_cpuinfo_field(cpuinfo, "flags") or _cpuinfo_field(cpuinfo, "Features")).split())
    return Machine(
        processor=_cpuinfo_field(cpuinfo, "model name") or platform.processor() or "unknown",
        architecture=platform.machine(),
        logical_cores=usable_cores(),
        memory_bytes=_memory_bytes(),
        cpu_flags=tuple(flag for flag in _TELLING_FLAGS if flag in flags),
        system=f"{platform.system()} {platform.release()}",
    )


def usable_cores() -> int:
    """Logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float | None:
    """Runnable processes, averaged over the last minute; `None` where the system does not say."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def versions() -> dict[str, str]:
    """Python and the installed ones of `PACKAGES`, with their versions."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an extra that is not installed
    return found


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def _cpuinfo_field(cpuinfo: str, name: str) -> str:
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
