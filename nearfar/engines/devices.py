"""What this machine has for running models.

Inference libraries are not imported into this process to find out: a GPU build of ONNX Runtime
lists providers whose libraries are missing, and native libraries without their driver can crash the
process that loads them. So GPU libraries are tried in a child process; where the installed package
has none, no child is needed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import msgspec

#: A child that loads CUDA libraries from a cold disk takes seconds; a hung one must not hang us.
_PROBE_TIMEOUT_S = 60.0

_CPU = "CPUExecutionProvider"

#: Provider library in the onnxruntime package -> the provider's name, in the order of preference.
_PROVIDER_LIBRARIES = {
    "libonnxruntime_providers_tensorrt.so": "TensorrtExecutionProvider",
    "libonnxruntime_providers_cuda.so": "CUDAExecutionProvider",
}

#: CPU features that decide whether INT8 and BF16 models pay.
_TELLING_CPU_FLAGS = frozenset(
    {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16",
     "asimddp", "i8mm", "bf16", "sve"}
)  # fmt: skip

#: Runs in the child: print the providers whose libraries load, and the GPU, as one JSON line.
_PROBE = """
import ctypes, json, sys
folder, names = sys.argv[1], sys.argv[2:]
result = {"loads": [], "why_not": {}, "sm_arch": None, "gpu_memory_bytes": 0}
try:
    import onnxruntime  # its __init__ puts the CUDA libraries of pip packages on the path
    getattr(onnxruntime, "preload_dlls", lambda: None)()
    cuda = ctypes.CDLL("libcuda.so.1")
    status, device = cuda.cuInit(0), ctypes.c_int()
    if status or cuda.cuDeviceGet(ctypes.byref(device), 0):
        raise OSError(f"the CUDA driver finds no device (status {status})")
    sm, memory = [ctypes.c_int(), ctypes.c_int()], ctypes.c_size_t()
    for attribute, value in zip((75, 76), sm):  # compute capability, major and minor
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    result["sm_arch"] = f"{sm[0].value}{sm[1].value}"
    result["gpu_memory_bytes"] = memory.value
    ctypes.CDLL(f"{folder}/libonnxruntime_providers_shared.so", ctypes.RTLD_GLOBAL)
except Exception as error:
    result["why_not"] = {name: str(error) for name in names}
    names = []
for name in names:
    try:
        ctypes.CDLL(f"{folder}/{name}")
        result["loads"].append(name)
    except OSError as error:
        result["why_not"][name] = str(error)
print(json.dumps(result))
"""


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """What models can use here.

    Attributes:
        machine: CPU model and the cores this process may use, for people.
        execution_providers: ONNX Runtime providers that work here, best first; empty when
            onnxruntime is not installed.
        missing_providers: Providers the installed package has but that do not load, and why.
        physical_cores: Cores this process may use, without hyper-threads.
        memory_bytes: Memory this process may use: physical, or the container's limit.
        has_genai: Whether onnxruntime-genai is installed.
        cpu_flags: CPU features that matter for INT8 and BF16.
        sm_arch: CUDA compute capability such as ``87``, or `None` without a usable GPU.
        gpu_memory_bytes: Memory of the first GPU; on Jetson it is the same as the machine's.
    """

    machine: str
    execution_providers: tuple[str, ...]
    physical_cores: int
    memory_bytes: int
    has_genai: bool
    missing_providers: dict[str, str] = {}
    cpu_flags: tuple[str, ...] = ()
    sm_arch: str | None = None
    gpu_memory_bytes: int = 0


@functools.lru_cache(maxsize=1)
def probe() -> Device:
    """Look at this machine once; later calls return the same."""
    cores = physical_cores()
    name, flags = _cpu()
    providers, missing, sm_arch, gpu_memory_bytes = _providers()
    return Device(
        machine=f"{name}, {cores} cores",
        execution_providers=providers,
        missing_providers=missing,
        physical_cores=cores,
        memory_bytes=_memory_bytes(),
        has_genai=importlib.util.find_spec("onnxruntime_genai") is not None,
        cpu_flags=flags,
        sm_arch=sm_arch,
        gpu_memory_bytes=gpu_memory_bytes,
    )


#: A multiply-add of U8 and S8 into 32 bits. Without it ONNX Runtime uses VPMADDUBSW, whose sums of
#: two products have 16 bits and saturate (ONNX Runtime: "Quantize ONNX models", on x86-64).
_VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


def cpu_kind(device: Device) -> str:
    """What its 8-bit kernels are like: ``x86-vnni``, ``x86`` (sums may saturate), or ``other``."""
    if _VNNI & set(device.cpu_flags):
        return "x86-vnni"
    return "x86" if {"avx2", "avx512f"} & set(device.cpu_flags) else "other"


@functools.lru_cache(maxsize=1)
def physical_cores() -> int:
    """Physical cores this process may use, at least 1.

    Inference libraries count the machine's cores, which is too many in a container: threads then
    wait for each other. So the CPU mask and the container's quota are taken into account.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    siblings = set()
    for cpu in allowed or range(os.cpu_count() or 1):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(topology.read_text().strip())
        except OSError:
            siblings.add(str(cpu))
    cores = len(siblings)
    quota = _cpu_quota()
    if quota is not None:
        cores = min(cores, max(1, round(quota)))
    return max(1, cores)


def _cpu_quota() -> float | None:
    """CPUs the container may use at once, or `None` without a limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period)


def _cpu() -> tuple[str, tuple[str, ...]]:
    name = platform.processor() or platform.machine()
    flags: set[str] = set()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return name, ()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            name = value.strip() or name
        elif key.strip() in ("flags", "Features"):
            flags.update(value.split())
    board = Path("/proc/device-tree/model")  # "NVIDIA Jetson Orin Nano Developer Kit"
    if board.exists():
        name = board.read_text().rstrip("\0\n") or name
    return name, tuple(sorted(flags & _TELLING_CPU_FLAGS))


def _memory_bytes() -> int:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return physical
    return physical if limit == "max" else min(physical, int(limit))


def _providers() -> tuple[tuple[str, ...], dict[str, str], str | None, int]:
    """Providers that work, those that do not and why, and the GPU."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return (), {}, None, 0
    folder = Path(spec.origin).parent / "capi"
    libraries = [name for name in _PROVIDER_LIBRARIES if (folder / name).exists()]
    if not libraries:
        return (_CPU,), {}, None, 0
    found = _probe_in_child(folder, libraries)
    working = [_PROVIDER_LIBRARIES[name] for name in libraries if name in found.loads]
    missing = {_PROVIDER_LIBRARIES[name]: why for name, why in found.why_not.items()}
    return (*working, _CPU), missing, found.sm_arch, found.gpu_memory_bytes


class _Found(msgspec.Struct):
    loads: list[str] = []
    why_not: dict[str, str] = {}
    sm_arch: str | None = None
    gpu_memory_bytes: int = 0


def _probe_in_child(folder: Path, libraries: list[str]) -> _Found:
    command = [sys.executable, "-c", _PROBE, str(folder), *libraries]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False, text=True
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return _Found(why_not=dict.fromkeys(libraries, f"the probe did not finish: {error}"))
    try:
        return msgspec.json.decode(done.stdout.strip().rpartition("\n")[2], type=_Found)
    except (msgspec.DecodeError, UnicodeDecodeError):
        why = f"loading it ended the probe with status {done.returncode}"
        return _Found(why_not=dict.fromkeys(libraries, why))
