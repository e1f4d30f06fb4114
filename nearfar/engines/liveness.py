"""Whether threads of this process compute, as Linux tells it.

An engine that waits for something that never comes uses no processor and does not want one. One
that is slow does: it runs, or stands in the queue of a busy processor. The kernel counts both for
each thread in ``/proc/self/task/ID/schedstat`` (time on a processor and time in its queue, ns; see
the kernel's documentation "Scheduler Statistics") and says in ``stat`` what it does just now.
"""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec

from nearfar.patience import Life

_TASKS = Path("/proc/self/task")
#: Less than this is a thread that woke up and went to sleep again.
LEAST_NS = 1_000_000
#: Running or in the queue for it; in an uninterruptible wait, as for memory that was swapped out.
_BUSY = ("R", "D")


class Sample(msgspec.Struct, frozen=True):
    """What threads had used at one moment.

    Attributes:
        used_ns: Thread id to nanoseconds on a processor and in its queue.
        is_busy: Whether one of them was running, or waiting for a processor or for a disk.
    """

    used_ns: dict[int, int]
    is_busy: bool


def sample(native_id: int, tasks: Path = _TASKS) -> Sample | None:
    """Look at one thread, and at all that Python did not start: engines have threads of their own.

    Args:
        native_id: The thread that called the engine, see `threading.get_native_id`.
        tasks: Where the kernel tells of threads.

    Returns:
        `None` where the kernel does not tell of that thread.
    """
    python = {thread.native_id for thread in threading.enumerate()}
    used: dict[int, int] = {}
    is_busy = False
    try:
        ids = [int(entry.name) for entry in tasks.iterdir()]
    except OSError:
        return None
    for task in ids:
        if task != native_id and task in python:
            continue
        try:
            run_ns, queue_ns, _ = (tasks / str(task) / "schedstat").read_text().split()
            # "ID (name) STATE …", and a name may have brackets and spaces in it.
            state = (tasks / str(task) / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, ValueError, IndexError):
            continue  # it has just ended, or the kernel does not count
        used[task] = int(run_ns) + int(queue_ns)
        is_busy = is_busy or state in _BUSY
    if native_id not in used:
        return None
    return Sample(used, is_busy)


def life(before: Sample | None, after: Sample | None) -> Life:
    """What threads did between two looks at them."""
    if after is None:
        return Life.UNKNOWN
    if before is None:
        return Life.UNSEEN
    if after.is_busy or any(
        used - before.used_ns.get(task, 0) >= LEAST_NS for task, used in after.used_ns.items()
    ):
        return Life.ALIVE
    return Life.STILL
