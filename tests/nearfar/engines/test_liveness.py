"""Signs of life, from made-up files of a kernel and from the real ones."""

from __future__ import annotations

import sys
import threading

import pytest

from nearfar.engines.liveness import Sample, life, sample
from nearfar.patience import Life

WORKER, POOL = 70, 71


def kernel(root, *tasks):
    for task, run_ns, queue_ns, state in tasks:
        folder = root / str(task)
        folder.mkdir(exist_ok=True)
        (folder / "schedstat").write_text(f"{run_ns} {queue_ns} 5\n")
        (folder / "stat").write_text(f"{task} (near far) :) {state} 1 2 3\n")
    return sample(WORKER, root)


@pytest.mark.parametrize(
    ("worker", "pool", "expected"),
    [
        ((100, 0, "S"), (100, 0, "S"), Life.STILL),
        ((900_000, 0, "S"), (100, 0, "S"), Life.STILL),  # it woke up and went to sleep again
        ((9_000_000, 0, "S"), (100, 0, "S"), Life.ALIVE),
        ((100, 9_000_000, "S"), (100, 0, "S"), Life.ALIVE),  # others had the processor
        ((100, 0, "R"), (100, 0, "S"), Life.ALIVE),
        ((100, 0, "D"), (100, 0, "S"), Life.ALIVE),  # memory comes from a disk
        ((100, 0, "S"), (9_000_000, 0, "S"), Life.ALIVE),  # its own threads compute for it
    ],
)
def test_life_is_time_on_a_processor_or_in_its_queue(tmp_path, worker, pool, expected):
    before = kernel(tmp_path, (WORKER, 0, 0, "S"), (POOL, 0, 0, "S"))
    after = kernel(tmp_path, (WORKER, *worker), (POOL, *pool))
    assert life(before, after) is expected


def test_where_nothing_tells_nothing_is_known(tmp_path):
    known = Sample({WORKER: 0}, is_busy=False)
    assert sample(WORKER, tmp_path / "none") is None
    assert sample(WORKER, tmp_path) is None  # it has ended
    assert life(None, known) is Life.UNSEEN  # one look says nothing yet
    assert life(known, None) is Life.UNKNOWN


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_other_threads_of_python_are_not_looked_at():
    end, ids = threading.Event(), []

    def run():
        ids.append(threading.get_native_id())
        end.wait(20)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not ids:
            pass
        found = sample(threading.get_native_id())
        if found is None:
            pytest.skip("this kernel does not count")
        assert threading.get_native_id() in found.used_ns
        assert ids[0] not in found.used_ns
    finally:
        end.set()
        thread.join()
