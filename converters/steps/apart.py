"""Run one step in a process of its own, so that all its memory comes back when it ends.

What torch and transformers allocate for a large model stays with the process, freed or not, and
the next step would pay for it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from nearfar.errors import ConversionError, NearfarError

#: glibc gives freed memory back at once where blocks are of a size of their own.
FRUGAL = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "262144"}

_PR_SET_PDEATHSIG = 1
_P = ParamSpec("_P")
_T = TypeVar("_T")


def run_apart(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call a function of a module in a child process.

    Args:
        function: Found by its module and name.
        args: Pickled, as is what it returns.
        kwargs: Likewise.

    Raises:
        NearfarError: What the function raised.
        ConversionError: The child died, or raised something else.
    """
    job = pickle.dumps((function.__module__, function.__qualname__, args, kwargs))
    done = subprocess.run(
        [sys.executable, "-m", "converters.steps.apart"],
        input=job,
        capture_output=True,
        env={**os.environ, **FRUGAL},
        check=False,
    )
    if done.returncode != 0 or not done.stdout:
        words = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ConversionError(
            f"The process for {function.__name__!r} ended with status {done.returncode} "
            f"({words or 'it said nothing'})",
            fix="If it was killed, there was not enough memory",
        )
    outcome, value = pickle.loads(done.stdout)  # noqa: S301  (our own child wrote it)
    if outcome == "error":
        raise value
    result: _T = value
    return result


def give_back() -> None:
    """Return freed memory to the system; the C library keeps it otherwise (glibc)."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Do what standard input says; the answer goes to standard output and nothing else does."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    module, name, args, kwargs = pickle.loads(sys.stdin.buffer.read())  # noqa: S301  (our parent)
    function = getattr(importlib.import_module(module), name)
    try:
        answer: tuple[str, object] = ("value", function(*args, **kwargs))
    except NearfarError as exc:
        answer = ("error", exc)
    with answers:
        pickle.dump(answer, answers)


if __name__ == "__main__":
    main()
