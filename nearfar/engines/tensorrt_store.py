"""Engines that TensorRT built on this device, by what they were built of and with.

An engine runs only with the TensorRT and the kind of GPU that built it. So its name in the store is
a hash of these, the variant's files and its plan: whatever changes, another engine is looked for.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import msgspec

from nearfar.bundle.hashing import sha256_of
from nearfar.bundle.manifest import Variant
from nearfar.errors import BundleError, EngineError

#: Another folder than the default for engines.
FOLDER_VARIABLE = "NEARFAR_TENSORRT_ENGINES"
#: Importing TensorRT from a cold disk takes seconds; a hung driver must not hang us.
_PROBE_TIMEOUT_S = 60.0
#: Strongly typed networks came with 10.0; JetPack 6.0 has 8.6.
LEAST_VERSION = (10, 0)

#: Runs in the child: TensorRT's version and the first GPU, as one JSON line.
_PROBE = """
import ctypes, json, sys
result = {"version": "", "gpu": "", "sm_arch": "", "why_not": ""}
try:
    import tensorrt
    result["version"] = str(tensorrt.__version__)
    cuda = ctypes.CDLL("libcuda.so.1")
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    sm = [ctypes.c_int(), ctypes.c_int()]
    status = cuda.cuInit(0)
    if status or cuda.cuDeviceGet(ctypes.byref(device), 0):
        raise OSError(f"the CUDA driver finds no device (status {status})")
    cuda.cuDeviceGetName(name, 256, device)
    for attribute, value in zip((75, 76), sm):  # compute capability, major and minor
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    result["gpu"] = name.value.decode(errors="replace")
    result["sm_arch"] = f"{sm[0].value}{sm[1].value}"
except Exception as error:
    result["why_not"] = f"{type(error).__name__}: {error}"
print(json.dumps(result))
"""


class TensorrtDevice(msgspec.Struct, frozen=True, kw_only=True):
    """What builds and runs engines here.

    Attributes:
        version: Of TensorRT; "" when it is not installed.
        gpu: Name of the first GPU.
        sm_arch: Its compute capability, such as ``87``.
        why_not: What is missing, in words; "" when engines can run.
    """

    version: str = ""
    gpu: str = ""
    sm_arch: str = ""
    why_not: str = ""


class BuiltEngine(msgspec.Struct, frozen=True, kw_only=True):
    """What lies beside an engine.

    Attributes:
        model: Bundle and variant, for people.
        sha256: Of the engine's file.
        size_bytes: Its size.
        library: TensorRT with its version.
        gpu: Name of the GPU it was built on.
        build_s: Seconds that building took.
    """

    model: str
    sha256: str
    size_bytes: int
    library: str
    gpu: str
    build_s: float


@functools.lru_cache(maxsize=1)
def probe_tensorrt() -> TensorrtDevice:
    """Look once, in a child process; later calls return the same."""
    if importlib.util.find_spec("tensorrt") is None:
        return TensorrtDevice(
            why_not="the Python package tensorrt is not installed (on a Jetson it comes with "
            "JetPack: make the environment with --system-site-packages)"
        )
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return TensorrtDevice(why_not=f"the probe did not finish: {error}")
    try:
        found = msgspec.json.decode(done.stdout.strip().rpartition(b"\n")[2], type=TensorrtDevice)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return TensorrtDevice(
            why_not=f"loading TensorRT ended the probe with status {done.returncode}"
        )
    if not found.why_not and _version(found.version) < LEAST_VERSION:
        return msgspec.structs.replace(
            found,
            why_not=f"TensorRT {found.version} has no strongly typed networks; 10.0 and later have "
            "(JetPack 6.1)",
        )
    return found


def why_not(variant: Variant) -> str | None:
    """Why a variant of the engine ``tensorrt`` cannot run here now; `None` when it can."""
    device = probe_tensorrt()
    if device.why_not:
        return f"TensorRT does not work here: {device.why_not}"
    if not engine_path(variant, device).is_file():
        return "its engine has not been built on this device: nearfar edge build BUNDLE"
    return None


def folder() -> Path:
    """Where engines are: ``nearfar/tensorrt`` in the user's cache folder, or `FOLDER_VARIABLE`."""
    stated = os.environ.get(FOLDER_VARIABLE)
    if stated:
        return Path(stated)
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "nearfar" / "tensorrt"


def engine_path(variant: Variant, device: TensorrtDevice) -> Path:
    """Where the engine of a variant is, once it was built on this device."""
    parts = {
        "files": sorted((entry.path, entry.sha256) for entry in variant.files),
        "entry": variant.entry,
        "plan": msgspec.to_builtins(variant.tensorrt),
        "tensorrt": device.version,
        "gpu": device.gpu,
        "sm_arch": device.sm_arch,
        "machine": platform.machine(),
    }
    digest = hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()
    return folder() / f"{digest}.engine"


def timing_cache_path(device: TensorrtDevice) -> Path:
    """What TensorRT remembers about the speed of kernels, for all engines of one device."""
    name = hashlib.sha256(f"{device.version}|{device.gpu}|{device.sm_arch}".encode()).hexdigest()
    return folder() / f"timing-{name[:16]}.cache"


def make_folder() -> Path:
    """The folder, made for its owner alone.

    Raises:
        EngineError: Others may write into it: an engine is code.
    """
    place = folder()
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_owner(place)
    return place


def _check_owner(place: Path) -> None:
    status = place.stat()
    if status.st_mode & 0o022 or status.st_uid not in (os.getuid(), 0):
        raise EngineError(
            f"Others may write into {place}, and engines are code",
            fix=f"chmod go-w {place}, or name another folder in {FOLDER_VARIABLE}",
        )


def keep_engine(path: Path, made: Path, facts: BuiltEngine) -> None:
    """Put an engine into the store, whole or not at all; `made` is moved."""
    note = path.with_suffix(".json")
    temporary = note.with_name(f".{note.name}.{os.getpid()}")
    temporary.write_bytes(msgspec.json.encode(facts))
    os.replace(temporary, note)
    os.replace(made, path)


def read_engine(path: Path) -> bytes:
    """An engine from the store.

    Raises:
        EngineError: It is not there, others may write into the store.
        BundleError: It is damaged.
    """
    try:
        _check_owner(path.parent)
        facts = msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=BuiltEngine)
        if sha256_of(path) != facts.sha256:
            raise BundleError(
                f"The engine {path.name} is damaged",
                fix="Build it again: nearfar edge build BUNDLE --force",
            )
        return path.read_bytes()
    except (OSError, msgspec.DecodeError) as exc:
        raise EngineError(
            f"The engine {path.name} cannot be read ({exc})",
            fix="Build it on this device: nearfar edge build BUNDLE",
        ) from exc


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
