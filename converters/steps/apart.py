"""Run one step in a process of its own, so that all its memory comes back when it ends.

What torch and transformers allocate for a large model stays with the process, freed or not, and
the next step would pay for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

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
    return _run(None, function, *args, **kwargs)


def run_apart_telling(
    tell: Callable[[str], None],
    function: Callable[Concatenate[Callable[[str], None], _P], _T],
    *args: _P.args,
    **kwargs: _P.kwargs,
) -> _T:
    """As `run_apart`, of a function whose first argument is called with what it is doing.

    Args:
        tell: Called here with what the function told there.
        function: As of `run_apart`.
        args: Further arguments.
        kwargs: Likewise.
    """
    return _run(tell, function, *args, **kwargs)


def _run(
    tell: Callable[[str], None] | None, function: Callable[..., _T], *args: Any, **kwargs: Any
) -> _T:
    job = (function.__module__, function.__qualname__, tell is not None, args, kwargs)
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "converters.steps.apart"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env={**os.environ, **FRUGAL},
        )
        outcome, value = "", None
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(pickle.dumps(job))
            with contextlib.suppress(EOFError, pickle.UnpicklingError):
                outcome, value = pickle.load(process.stdout)  # noqa: S301  (our own child)
                while outcome == "told":
                    if tell is not None:
                        tell(value)
                    outcome, value = pickle.load(process.stdout)  # noqa: S301
            status = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
        if status != 0 or outcome not in ("value", "error"):
            said.seek(0)
            words = said.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise ConversionError(
                f"The process for {function.__name__!r} ended with status {status} "
                f"({words or 'it said nothing'})",
                fix="If it was killed, there was not enough memory",
            )
    if outcome == "error":
        assert isinstance(value, NearfarError)
        raise value
    result: _T = value  # type: ignore[assignment]
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
    module, name, is_telling, args, kwargs = pickle.loads(sys.stdin.buffer.read())  # noqa: S301
    function = getattr(importlib.import_module(module), name)

    def tell(doing: str) -> None:
        pickle.dump(("told", doing), answers)
        answers.flush()

    if is_telling:
        args = (tell, *args)
    try:
        answer: tuple[str, object] = ("value", function(*args, **kwargs))
    except NearfarError as exc:
        answer = ("error", exc)
    with answers:
        pickle.dump(answer, answers)


if __name__ == "__main__":
    main()
