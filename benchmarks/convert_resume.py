"""Conversions that are killed again and again, and end with the same bundle all the same."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from benchmarks.convert_process import command, convert
from benchmarks.harness import Bar, Figure, Run
from benchmarks.subjects import Begin, Part
from nearfar.bundle.paths import walk_files

_MOST_ATTEMPTS = 4
_OPTIONS = ("--variants", "fp32,int8", "--no-measure", "--name", "killed")


def measure_resume(source: Path, work: Path, kills: int, run: Run, begin: Begin) -> Part:
    """Kill a conversion at random points, then let it end.

    Args:
        source: A small ONNX model.
        work: Where the bundles go.
        kills: How often.
        run: Draws the points.
        begin: Shows progress.
    """
    step = begin("a conversion that is killed", kills + 2)
    whole = convert(source, work / "whole", *_OPTIONS, "--no-cache")
    step()
    cache, target = work / "cache", work / "killed"
    killed = attempts = 0
    # One that goes on with what others left may end before its moment has come; then another one.
    while killed < kills and attempts < _MOST_ATTEMPTS * kills:
        attempts += 1
        after_s = run.random.uniform(0.02, 1.0) * whole.seconds
        if _kill(source, target, cache, after_s):
            killed += 1
            step()
    left = _left_overs(work)
    for path in left:
        os.utime(path, (0, 0))  # as if the machine had been left alone for a minute
    again = convert(source, target, *_OPTIONS, "--cache", str(cache), "--force")
    step()
    different = sum(
        (work / "whole" / path).read_bytes() != (target / path).read_bytes()
        if (work / "whole" / path).is_file() and (target / path).is_file()
        else True
        for path in {*walk_files(work / "whole"), *walk_files(target)}
    )
    bars = (
        _bar("kill -9: bytes differ afterwards, in so many files", float(different)),
        _bar("kill -9: folders left over", float(len(_left_overs(work)))),
        Bar(name="kill -9: conversions killed", value=float(killed), limit=float(kills),
            direction="at_least", unit=""),
    )  # fmt: skip
    figures = (
        Figure.of_rounds("kill -9: conversions that ended before", "", [float(attempts - killed)]),
        Figure.of_rounds("kill -9: folders they left for the next one", "", [float(len(left))]),
        Figure.of_rounds("kill -9: time of a whole conversion", "s", [whole.seconds]),
        Figure.of_rounds("kill -9: time of the last one", "s", [again.seconds]),
    )
    return Part(bars, figures)


def _kill(source: Path, target: Path, cache: Path, after_s: float) -> bool:
    """Whether it was still running."""
    process = subprocess.Popen(
        command(source, target, *_OPTIONS, "--cache", str(cache), "--force"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    is_killed = process.wait() == -signal.SIGKILL
    if not is_killed:
        # The next one shall have something to do.
        shutil.rmtree(cache, ignore_errors=True)
    return is_killed


def _left_overs(work: Path) -> list[Path]:
    return [path for path in work.iterdir() if path.name.startswith(".killed.")]


def _bar(name: str, value: float) -> Bar:
    return Bar(name=name, value=value, limit=0, direction="at_most", unit="")
