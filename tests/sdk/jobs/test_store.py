"""The queue on disk: one life per job, one answer, bounds, and nothing readable."""

from __future__ import annotations

import sqlite3
import stat
import threading

import msgspec
import numpy as np
import pytest

from nearfar.errors import (
    BundleError,
    ConfigError,
    DeadlineExceeded,
    EngineError,
    InvalidInput,
    NearfarError,
    Overloaded,
    PolicyDenied,
    SecurityError,
)
from nearfar.generation import ChatMessage, GenerationOptions, Prompt
from nearfar.units import Deadline
from sdk.jobs import JobsConfig
from sdk.jobs.content import (
    Label,
    pack_error,
    pack_request,
    unpack_error,
    unpack_request,
    unpack_result,
)
from sdk.jobs.store import JobStore, Turn
from sdk.requests import Request

SECRET = "the patient said: 4711"
LABEL = Label(method="generate", model="assistant", sensitivity="personal")


def request(text: str = SECRET, **fields: object) -> bytes:
    made = Request(
        method="generate",
        model="assistant",
        deadline=Deadline(),
        prompt=Prompt(messages=(ChatMessage("user", text),)),
        options=GenerationOptions(max_new_tokens=3, stop=("x",)),
        **fields,  # type: ignore[arg-type]
    )
    return pack_request(made, "personal", None)


@pytest.fixture
def config(tmp_path):
    return JobsConfig(file=tmp_path / "jobs.db")


@pytest.fixture
def store(config):
    opened = JobStore(config)
    yield opened
    opened.close()


def add(store: JobStore, *, priority: int = 5, now_s: float = 100.0, text: str = SECRET) -> str:
    return store.add(request(text), LABEL, priority=priority, deferrable=True, now_s=now_s)


def take(store: JobStore, now_s: float = 100.0):
    return store.claim(now_s, max_wait_s=120.0)


def finish(store: JobStore, job, now_s: float = 101.0, text: bytes = b"r") -> bool:
    return store.finish(job, "failed", now_s, error=pack_error(EngineError("broke")))


def test_a_job_waits_runs_and_ends(store):
    job_id = add(store)
    assert store.status(job_id) == "waiting"
    job = take(store)
    assert (job.id, store.status(job_id)) == (job_id, "running")
    assert job.request.prompt.messages[0].content == SECRET
    assert take(store) is None
    assert store.finish(job, "failed", 101.0, error=pack_error(EngineError("broke", fix="mend it")))
    assert store.status(job_id) == "failed"
    outcome = store.outcome(job_id)
    assert isinstance(outcome, EngineError)
    assert (outcome.problem, outcome.fix) == ("broke", "mend it")


def test_an_answer_counts_once(store):
    add(store)
    job = take(store)
    assert finish(store, job)
    assert not finish(store, job)
    assert not store.release(job, 0.0, counts=True)


def test_an_answer_of_an_earlier_claim_counts_not_at_all(store):
    job_id = add(store)
    first = take(store)
    store.recover(100.0, max_lost=10)
    second = take(store)
    assert (first.id, first.request_id) == (second.id, second.request_id)
    assert first.claim != second.claim
    assert not finish(store, first)
    assert store.status(job_id) == "running"
    assert finish(store, second)


def test_an_answer_of_a_cancelled_job_is_thrown_away(store):
    job_id = add(store)
    job = take(store)
    assert store.is_mine(job)
    assert store.cancel(job_id, 100.5)
    assert not store.is_mine(job)
    assert not finish(store, job)
    assert store.status(job_id) == "cancelled"
    assert store.outcome(job_id) is None
    assert not store.cancel(job_id, 101.0)


def test_ids_of_requests_are_their_own(store):
    add(store)
    add(store)
    first, second = take(store), take(store)
    assert first.request_id != second.request_id
    assert len(first.request_id) == 16


def test_the_urgent_come_first_and_then_the_oldest(store):
    ids = [add(store, priority=priority) for priority in (5, 1, 9, 5)]
    order = [take(store).id for _ in range(4)]
    assert order == [ids[2], ids[0], ids[3], ids[1]]


def test_a_job_that_was_put_back_waits_for_its_time(store):
    add(store)
    assert store.release(take(store), 130.0, counts=True)
    assert store.next_due_s() == 130.0
    assert take(store, 129.0) is None
    job = take(store, 130.0)
    assert job.attempts == 1


def test_a_clock_that_was_set_back_does_not_hold_jobs(store):
    add(store)
    store.release(take(store), 5000.0, counts=False)
    assert take(store, 100.0) is not None


def test_a_job_that_is_too_old_is_given_up(tmp_path):
    store = JobStore(JobsConfig(file=tmp_path / "q", max_age_s=10.0))
    job_id = add(store, now_s=100.0)
    assert take(store, 110.5) is None
    assert store.status(job_id) == "expired"
    store.close()


def test_a_job_of_before_the_clock_was_set_is_not_taken_to_be_old(store):
    waits, ends = add(store, now_s=100.0), add(store, now_s=100.0, priority=9)
    finish(store, take(store, 100.0), 101.0)
    job = take(store, 1.8e9)
    assert (job.id, store.status(ends)) == (waits, "failed")
    store.release(job, 1.8e9, counts=False)
    assert take(store, 1.8e9 + 8 * 86400) is None
    assert store.status(waits) == "expired"


def test_an_ended_job_is_kept_for_a_while_and_then_deleted(tmp_path):
    store = JobStore(JobsConfig(file=tmp_path / "q", keep_s=10.0))
    job_id = add(store)
    finish(store, take(store), 100.0)
    take(store, 110.0)
    assert store.status(job_id) == "failed"
    take(store, 110.5)
    assert store.status(job_id) is None
    assert store.outcome(job_id) is None
    store.close()


def test_only_ended_jobs_can_be_forgotten(store):
    job_id = add(store)
    assert not store.forget(job_id)
    job = take(store)
    assert not store.forget(job_id)
    finish(store, job)
    assert store.forget(job_id)
    assert store.status(job_id) is None


def test_the_number_of_jobs_is_bounded(tmp_path):
    store = JobStore(JobsConfig(file=tmp_path / "q", max_jobs=2))
    first = add(store)
    add(store)
    with pytest.raises(Overloaded, match="2 jobs"):
        add(store)
    store.cancel(first, 100.0)
    with pytest.raises(Overloaded):
        add(store)
    store.forget(first)
    add(store)
    store.close()


def test_the_bytes_are_bounded_and_given_back(tmp_path):
    store = JobStore(JobsConfig(file=tmp_path / "q", max_bytes=20_000))
    big = add(store, text="x" * 12_000)
    with pytest.raises(Overloaded, match="full"):
        add(store, text="x" * 12_000)
    store.cancel(big, 100.0)
    add(store, text="x" * 12_000)
    store.close()


def test_a_job_that_took_its_process_with_it_too_often_fails(store):
    job_id = add(store)
    for _ in range(2):
        assert take(store).id == job_id
        store.recover(100.0, max_lost=3)
    assert take(store).id == job_id
    assert store.recover(100.0, max_lost=3) == 0
    assert store.status(job_id) == "failed"
    assert "3 times" in store.outcome(job_id).problem


def test_nothing_of_a_request_can_be_read_in_the_files(config):
    store = JobStore(config)
    job_id = add(store)
    for path in config.file.parent.iterdir():
        data = path.read_bytes()
        for word in (b"patient", b"4711", b"assistant", b"personal"):
            assert word not in data, path.name
        if path.suffix != ".lock":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name
    store.finish(take(store), "failed", 101.0, error=pack_error(InvalidInput(SECRET)))
    store.close()
    assert all(b"4711" not in path.read_bytes() for path in config.file.parent.iterdir())
    again = JobStore(config)
    assert again.outcome(job_id).problem == SECRET
    again.close()


def test_a_request_is_deleted_when_its_job_ends(store, config):
    job_id = add(store)
    finish(store, take(store))
    database = sqlite3.connect(config.file)
    (left,) = database.execute("SELECT request FROM jobs WHERE id = ?", (job_id,)).fetchone()
    database.close()
    assert left is None


def test_values_that_were_swapped_between_jobs_are_noticed(store, config):
    first, second = add(store, text="one"), add(store, text="two")
    database = sqlite3.connect(config.file)
    database.execute(
        "UPDATE jobs SET request = (SELECT request FROM jobs WHERE id = ?) WHERE id = ?",
        (second, first),
    )
    database.commit()
    database.close()
    assert take(store) is None
    assert isinstance(store.outcome(first), SecurityError)
    assert take(store).id == second


def test_another_key_opens_nothing(config):
    store = JobStore(config)
    add(store)
    store.close()
    key = config.file.with_name("jobs.db.key")
    key.write_bytes(bytes(32))
    with pytest.raises(SecurityError):
        JobStore(config)
    key.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        JobStore(config)
    assert not key.exists()


def test_a_key_from_the_app_leaves_none_on_disk(tmp_path):
    config = JobsConfig(file=tmp_path / "q", key=lambda: b"k" * 32)
    store = JobStore(config)
    job_id = add(store)
    store.close()
    assert not any(path.name.endswith(".key") for path in tmp_path.iterdir())
    store = JobStore(config)
    assert store.status(job_id) == "waiting"
    store.close()
    assert "k" * 32 not in repr(config)


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "q").write_bytes(b"not a database, and long enough to be taken for one" * 40)
    with pytest.raises(ConfigError, match="not a queue of jobs"):
        JobStore(JobsConfig(file=tmp_path / "q"))


def test_a_queue_of_a_later_version_is_named(tmp_path):
    JobStore(JobsConfig(file=tmp_path / "q")).close()
    database = sqlite3.connect(tmp_path / "q")
    database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(ConfigError, match="format 9"):
        JobStore(JobsConfig(file=tmp_path / "q"))


def test_a_closed_queue_says_so(config):
    store = JobStore(config)
    store.close()
    with pytest.raises(ConfigError, match="closed"):
        store.infos()


def test_only_one_has_the_turn(store):
    first, second = Turn(store), Turn(store)
    assert first.take()
    assert first.take()
    assert not second.take()
    first.give_back()
    assert second.take()
    second.give_back()


def test_many_threads_and_two_connections_claim_each_job_once(config):
    stores = [JobStore(config), JobStore(config)]
    ids = {add(stores[0]) for _ in range(24)}
    claimed: list[str] = []

    def work(store: JobStore) -> None:
        while (job := take(store)) is not None:
            claimed.append(job.id)

    threads = [threading.Thread(target=work, args=(stores[n % 2],)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in stores:
        store.close()
    assert sorted(claimed) == sorted(ids)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float16).reshape(2, 3),
        np.zeros((0, 4), np.int64),
        np.array(1.5, np.float64),
        np.array([b"a", b"\0b"], object),
        np.array([True, False]),
    ],
    ids=["half", "empty", "scalar", "bytes", "bool"],
)
def test_tensors_come_back_as_they_were(array):
    made = Request(method="infer", model="m", deadline=Deadline(), feeds={"x": array})
    back = unpack_request(pack_request(made, "public", 50.0))
    assert back.deadline_ms == 50.0
    found = back.request(b"i" * 16).feeds["x"]
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert np.array_equal(found, array)
    assert found.flags.writeable


@pytest.mark.parametrize(
    "error",
    [
        PolicyDenied("no", rule="clinic-2", fix="ask"),
        InvalidInput("wrong", field="x"),
        DeadlineExceeded("late", tried=("edge", "cloud")),
        NearfarError("other"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_come_back_as_they_were(error):
    back = unpack_error(pack_error(error))
    assert type(back) is type(error)
    assert back.__dict__ == error.__dict__


@pytest.mark.parametrize("data", [b"", b"\x00", msgspec.msgpack.encode([9, 9]), b"\xc1"])
@pytest.mark.parametrize("unpack", [unpack_request, unpack_result, unpack_error])
def test_what_another_version_wrote_is_named(unpack, data):
    with pytest.raises(BundleError, match="version"):
        unpack(data)
