"""Run `nearfar convert` as a person would, and watch what its processes need."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nearfar.bundle import Bundle, open_bundle
from nearfar.errors import ConversionError

_SAMPLE_EVERY_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """One conversion that was run.

    Attributes:
        bundle: What it made.
        seconds: How long it took.
        peak_bytes: Most memory of the process and all its children together, sampled ten times a
            second: the sum of their proportional set sizes, so that a page which two of them
            share (libraries, the moment after a fork) counts once. Pages of files that are mapped
            count. 0 where there is no ``/proc``.
    """

    bundle: Bundle
    seconds: float
    peak_bytes: int


def command(source: Path, target: Path, *options: str) -> list[str]:
    """The command line of a conversion."""
    return [sys.executable, "-m", "converters", str(source), "-o", str(target), *options]


def convert(source: Path, target: Path, *options: str) -> Conversion:
    """Convert in a process of its own.

    Raises:
        ConversionError: It failed; quotes what it said last.
    """
    log = target.with_name(f"{target.name}.log")
    started_s = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(source, target, *options),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        peak_bytes = 0
        try:
            while process.poll() is None:
                peak_bytes = max(peak_bytes, tree_bytes(process.pid))
                time.sleep(_SAMPLE_EVERY_S)
        finally:
            process.kill()
            process.wait()
    seconds = time.monotonic() - started_s
    if process.returncode != 0:
        said = " ".join(log.read_text(encoding="utf-8", errors="replace").split()[-60:])
        raise ConversionError(
            f"Converting {source.name} ended with status {process.returncode}: {said}",
            fix="Run `nearfar convert` on it alone",
        )
    return Conversion(bundle=open_bundle(target), seconds=seconds, peak_bytes=peak_bytes)


def tree_bytes(pid: int) -> int:
    """Memory of a process and all below it."""
    return sum(_proportional_bytes(one) for one in _tree(pid))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            children = Path(f"/proc/{pid}/task/{task}/children").read_text()
            for child in children.split():
                yield from _tree(int(child))
    except OSError:  # ended meanwhile
        return


def _proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def hashes(bundle: Bundle) -> dict[str, str]:
    """Path to SHA-256 of all files of all variants."""
    return {entry.path: entry.sha256 for v in bundle.manifest.variants for entry in v.files}


def changed_files(one: Bundle, other: Bundle) -> int:
    """How many files two bundles do not have in common."""
    first, second = hashes(one), hashes(other)
    return sum(first.get(path) != second.get(path) for path in first.keys() | second.keys())


def cached_steps(cache: Path) -> set[Sequence[str]]:
    """Results in a cache, as (step, hash)."""
    return {(entry.parent.name, entry.name) for entry in cache.glob("*/*") if entry.is_dir()}
