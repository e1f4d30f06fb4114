"""The Python environment in which ``nvidia-modelopt`` runs, made when it is first needed.

modelopt wants other versions of transformers than the converters, so it cannot live beside them.
The environment is made in the cache folder beside its final place and appears by a rename, whole
or not at all. torch is always the build for CPUs: on Linux the one on PyPI brings gigabytes of CUDA
that calibration does not use, so its version is asked for with ``+cpu``, which no other build has.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.cache import TEMPORARY, default_root, mark_entry
from converters.libraries import OFFLINE
from converters.reporting import Reporter
from nearfar.errors import ConversionError
from nearfar.units import format_bytes

#: A Python that has the packages already.
INTERPRETER_VARIABLE = "NEARFAR_MODELOPT_PYTHON"
#: Where torch's builds for CPUs are, beside pip's own indexes; empty where pip finds them anyway.
TORCH_INDEX_VARIABLE = "NEARFAR_TORCH_INDEX"
_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

#: modelopt 0.47 refuses transformers 5.15 and newer, and imports requests without asking for it.
VERSIONS = {
    "torch": "2.13.0",
    "nvidia-modelopt": "0.47.0",
    "transformers": "5.14.1",
    "requests": "2.34.2",
}
#: Measured on Linux, x86-64; 0.25 GiB of it are fetched.
SIZE_BYTES = 1_500_000_000
#: On a fast line; half of it is unpacking.
TIME_S = 180.0

_STEP = "environment"
_CHECK = "import modelopt.torch.quantization, transformers, safetensors"
_ASK = (
    "import importlib.metadata as m, json, sys\n"
    "def v(n):\n"
    "    try: return m.version(n)\n"
    "    except m.PackageNotFoundError: return ''\n"
    "print(json.dumps({n: v(n) for n in sys.argv[1:]}))\n"
)
_ANOTHER_WAY = (
    "or make it elsewhere (pip install {packages}) and name its python in "
    f"{INTERPRETER_VARIABLE}, or use another int4.algorithm"
)

_Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python with modelopt.

    Attributes:
        python: Path of the program.
        versions: Package to version, of those that decide about the result.
    """

    python: str
    versions: dict[str, str]


def stated_versions() -> dict[str, str]:
    """Versions that a conversion here would use, without looking whether they are there yet.

    Raises:
        ConversionError: The person named an interpreter that does not serve.
    """
    named = os.environ.get(INTERPRETER_VARIABLE, "")
    versions = _named(named).versions if named else VERSIONS
    return {name: versions[name] for name in ("nvidia-modelopt", "torch", "transformers")}


def is_made(root: Path | None) -> bool:
    """Whether nothing has to be made, because it was before or because a Python is named."""
    return bool(os.environ.get(INTERPRETER_VARIABLE)) or _folder(root).is_dir()


def ready(root: Path | None, reporter: Reporter) -> Interpreter:
    """The interpreter that was named, or that of the environment, which is made if need be.

    Args:
        root: The converters' cache folder; `None` (no cache) takes the user's, because nobody
            wants 1.4 GB fetched for every conversion.
        reporter: Where progress goes.

    Raises:
        ConversionError: The named one lacks a package, or the environment cannot be made.
    """
    named = os.environ.get(INTERPRETER_VARIABLE, "")
    if named:
        return _named(named)
    folder = _folder(root)
    python = folder / "bin" / "python"
    if folder.is_dir():
        if _fits(_versions(str(python))):
            return Interpreter(str(python), dict(VERSIONS))
        reporter.say(f"! {folder} is damaged and is made anew")
        shutil.rmtree(folder, ignore_errors=True)
    title = f"make an environment for nvidia-modelopt, once ({format_bytes(SIZE_BYTES)})"
    with reporter.step(title) as step:
        _make(folder, step.tell)
        step.note(str(folder))
    return Interpreter(str(python), dict(VERSIONS))


def requirements() -> tuple[str, ...]:
    """What is installed, torch first."""
    pinned = dict(VERSIONS)
    if sys.platform == "linux":
        pinned["torch"] += "+cpu"
    return tuple(f"{name}=={version}" for name, version in pinned.items())


def _folder(root: Path | None) -> Path:
    key = json.dumps([sys.version_info[:2], sys.base_prefix, requirements()])
    return (root or default_root()) / _STEP / hashlib.sha256(key.encode()).hexdigest()


def _named(python: str) -> Interpreter:
    found = _versions(python)
    missing = [name for name in VERSIONS if name != "requests" and not found.get(name)]
    if not found or missing:
        raise ConversionError(
            f"{INTERPRETER_VARIABLE} is {python}, which "
            + (f"has no {', '.join(missing)}" if found else "cannot be started"),
            fix=f"Name a python of an environment with: pip install {' '.join(requirements())}",
        )
    return Interpreter(python, found)


def _versions(python: str) -> dict[str, str]:
    """Installed versions, "" where there is none; empty if the interpreter does not run."""
    try:
        done = subprocess.run(
            [python, "-I", "-c", _ASK, *VERSIONS], capture_output=True, check=False, timeout=60
        )
        found = json.loads(done.stdout) if done.returncode == 0 else {}
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return {}
    return {str(name): str(version) for name, version in found.items()}


def _fits(found: dict[str, str]) -> bool:
    return bool(found) and all(
        found.get(name, "").partition("+")[0] == version for name, version in VERSIONS.items()
    )


def _make(folder: Path, tell: _Tell) -> None:
    root = folder.parent.parent
    temporary = root / (TEMPORARY + secrets.token_hex(6))
    python = str(temporary / "bin" / "python")
    pip = [python, "-I", "-m", "pip", "install", "--no-input", "--disable-pip-version-check",
           "--progress-bar", "off", "--retries", "2", "--timeout", "30"]  # fmt: skip
    torch, *others = requirements()
    index = os.environ.get(TORCH_INDEX_VARIABLE, _TORCH_INDEX)
    extra = ["--extra-index-url", index] if index and sys.platform == "linux" else []
    try:
        root.mkdir(parents=True, exist_ok=True)
        _enough_room(root)
        tell("an empty environment")
        _run([sys.executable, "-I", "-m", "venv", str(temporary)], tell)
        _run([*pip, *extra, torch], tell)
        # torch is stated again, so that nothing that follows may exchange it.
        _run([*pip, torch, *others, *extra], tell)
        tell("see whether it works")
        _run([python, "-I", "-c", _CHECK], tell, what="modelopt cannot be imported there")
        mark_entry(temporary)
        folder.parent.mkdir(exist_ok=True)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # else another conversion made it meanwhile
                raise
    except OSError as exc:
        raise ConversionError(
            f"The environment for nvidia-modelopt cannot be made in {root} ({exc})",
            fix="Choose another folder with --cache, " + _another_way(),
        ) from exc
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _enough_room(root: Path) -> None:
    free_bytes = shutil.disk_usage(root).free
    # What pip unpacks lies there twice for a moment.
    if free_bytes < 1.5 * SIZE_BYTES:
        raise ConversionError(
            f"The environment for nvidia-modelopt takes {format_bytes(SIZE_BYTES)}, and {root} has "
            f"{format_bytes(free_bytes)} left",
            fix="Choose another folder with --cache, " + _another_way(),
        )


def _run(
    command: Sequence[str],
    tell: _Tell,
    *,
    what: str = "The environment for nvidia-modelopt cannot be made",
) -> None:
    """Run to the end; an interruption ends it and all that it started."""
    lines: list[str] = []
    # A group of its own: Ctrl-C reaches this process, which then ends the whole group.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**os.environ, **OFFLINE, "CUDA_VISIBLE_DEVICES": ""},
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines = [*lines[-40:], line.strip()]
            match = re.match(r"(Collecting|Downloading|Installing collected packages)", lines[-1])
            if match:
                tell(lines[-1][:100])
        status = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if status != 0:
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        words = " / ".join(line for line in errors[-2:] if line)[-500:]
        raise ConversionError(
            f"{what}: {words or f'status {status}'}",
            fix=f"Check the network and that {_where()} can be reached, " + _another_way(),
        )


def _where() -> str:
    index = os.environ.get(TORCH_INDEX_VARIABLE, _TORCH_INDEX)
    return f"PyPI and {index}" if index else "PyPI"


def _another_way() -> str:
    return _ANOTHER_WAY.format(packages=" ".join(requirements()))
