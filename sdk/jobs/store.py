"""The queue of jobs on disk: one SQLite database, every value in it sealed or free of content.

A job's life is one column, and each of its steps is one transaction::

    waiting ─claim→ running ─finish→ done | failed | denied
       ↑            release │   └────→ cancelled                (from waiting too)
       ├────────────────────┘
       └→ expired

Only the process that holds `Turn` (a lock that the kernel takes away from a process that died)
claims jobs. So whoever has got the turn knows that a job that is still ``running`` belongs to
nobody, and puts it back. A claim has a number of its own, and `finish` asks for it in the
transaction that stores the result: an answer counts once, and an answer that comes after its job
was cancelled, or was begun by somebody else, counts not at all.

WAL with ``synchronous=FULL``: a transaction that was committed survives the loss of power
(https://www.sqlite.org/pragma.html#pragma_synchronous).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from nearfar.errors import ConfigError, NearfarError, Overloaded
from nearfar.units import format_bytes
from sdk.jobs.config import JobsConfig
from sdk.jobs.content import (
    JobResult,
    Label,
    StoredRequest,
    pack_error,
    pack_label,
    unpack_error,
    unpack_label,
    unpack_request,
    unpack_result,
)
from sdk.jobs.crypto import Vault, store_key

JobStatus = Literal["waiting", "running", "done", "failed", "denied", "cancelled", "expired"]
STATUSES: tuple[JobStatus, ...] = get_args(JobStatus)
ENDED: tuple[JobStatus, ...] = STATUSES[2:]

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE store (id BLOB NOT NULL, proof BLOB NOT NULL);
CREATE TABLE jobs (
    number     INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT NOT NULL UNIQUE,
    status     TEXT NOT NULL,
    may_wait   INTEGER NOT NULL,
    priority   INTEGER NOT NULL,
    created_s  REAL NOT NULL,
    due_s      REAL NOT NULL,
    ended_s    REAL,
    attempts   INTEGER NOT NULL DEFAULT 0,
    claim      INTEGER NOT NULL DEFAULT 0,
    lost       INTEGER NOT NULL DEFAULT 0,
    request_id BLOB NOT NULL,
    label      BLOB NOT NULL,
    request    BLOB,
    result     BLOB,
    error      BLOB,
    size_bytes INTEGER NOT NULL
);
CREATE INDEX jobs_by_status ON jobs (status, priority DESC, number);
"""
#: What a row costs beside its sealed values, so that many small jobs count as well.
_ROW_BYTES = 256
_BUSY_TIMEOUT_S = 10.0
#: 2025-01-01. A device without a battery for its clock starts in 1970, until it reaches a network.
_CLOCK_SET_S = 1_735_689_600.0


class JobInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One job as a list shows it; no content.

    Attributes:
        id: Of the job.
        status: Where it is in its life.
        label: Method, model and data class.
        created_s: Unix time at which it was submitted.
        due_s: Unix time before which it is not tried again.
        attempts: How often it was tried and the try counted.
        size_bytes: What it takes in the queue.
    """

    id: str
    status: JobStatus
    label: Label
    created_s: float
    due_s: float
    attempts: int
    size_bytes: int


class Claimed(msgspec.Struct, frozen=True, kw_only=True):
    """A job that this process runs.

    Attributes:
        claim: Number of this claim; the result is taken under it only.
        request: What to run.
        request_id: The same in every attempt.
        attempts: Earlier tries that counted.
        deferrable: Whether it waits when there is no route.
    """

    id: str
    claim: int
    request: StoredRequest
    request_id: bytes
    attempts: int
    deferrable: bool


class JobStore:
    """The queue of one file. Thread-safe, and several processes may use the file at once.

    Args:
        config: Where and how much.

    Raises:
        ConfigError: The file is no such queue, or its key is missing.
        SecurityError: Others can read the key, or it is another queue's.
    """

    def __init__(self, config: JobsConfig) -> None:
        self.config = config
        self.path = config.file.expanduser()
        self._lock = threading.RLock()
        with _translated(self.path):
            self._database = self._open()
        try:
            self._vault = self._unlock()
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        """Close the database; idempotent."""
        with self._lock:
            self._database.close()

    # -- submitting and looking --------------------------------------------------------------------

    def add(
        self, request: bytes, label: Label, *, priority: int, deferrable: bool, now_s: float
    ) -> str:
        """Keep a job; it is on disk when this returns.

        Returns:
            Its id.

        Raises:
            Overloaded: The queue is full.
        """
        job_id, request_id = os.urandom(16).hex(), os.urandom(16)
        sealed = self._vault.seal(request, job_id, "request")
        sealed_label = self._vault.seal(pack_label(label), job_id, "label")
        size_bytes = len(sealed) + len(sealed_label) + _ROW_BYTES
        limits = self.config
        with self._writing() as database:
            self._sweep(database, now_s)
            count, total = database.execute(
                "SELECT COUNT(*), COALESCE(SUM(size_bytes), 0) FROM jobs"
            ).fetchone()
            if count >= limits.max_jobs or total + size_bytes > limits.max_bytes:
                raise Overloaded(
                    f"The queue of jobs is full: {count} jobs, {format_bytes(total)} of "
                    f"{limits.max_jobs} and {format_bytes(limits.max_bytes)}; this job needs "
                    f"{format_bytes(size_bytes)}",
                    fix="Take results and forget() ended jobs, cancel some, or raise [jobs] "
                    "max_jobs and max_bytes",
                )
            database.execute(
                "INSERT INTO jobs (id, status, may_wait, priority, created_s, due_s, request_id,"
                " label, request, size_bytes) VALUES (?, 'waiting', ?, ?, ?, ?, ?, ?, ?, ?)",
                (job_id, deferrable, priority, now_s, now_s, request_id, sealed_label, sealed,
                 size_bytes),
            )  # fmt: skip
        return job_id

    def status(self, job_id: str) -> JobStatus | None:
        """Where the job is in its life; `None` when it is not in the queue."""
        row = self._row("SELECT status FROM jobs WHERE id = ?", job_id)
        if row is None:
            return None
        status: JobStatus = row[0]
        return status

    def info(self, job_id: str) -> JobInfo | None:
        """What a list shows of the job; `None` when it is not in the queue."""
        found = self._infos("WHERE id = ?", job_id)
        return found[0] if found else None

    def infos(self) -> list[JobInfo]:
        """All jobs, in the order they were submitted."""
        return self._infos("ORDER BY number")

    def outcome(self, job_id: str) -> JobResult | NearfarError | None:
        """What came of an ended job; `None` while there is nothing."""
        row = self._row("SELECT result, error FROM jobs WHERE id = ?", job_id)
        if row is None:
            return None
        result, error = row
        if result is not None:
            return unpack_result(self._vault.open(result, job_id, "result"))
        if error is not None:
            return unpack_error(self._vault.open(error, job_id, "error"))
        return None

    def cancel(self, job_id: str, now_s: float) -> bool:
        """End a job that has not ended; an answer that is still to come is thrown away."""
        with self._writing() as database:
            done = database.execute(
                "UPDATE jobs SET status = 'cancelled', ended_s = ?, request = NULL, size_bytes ="
                " ? + length(label) WHERE id = ? AND status IN ('waiting', 'running')",
                (now_s, _ROW_BYTES, job_id),
            )
            return done.rowcount == 1

    def forget(self, job_id: str) -> bool:
        """Delete a job that has ended, with what came of it."""
        with self._writing() as database:
            done = database.execute(
                "DELETE FROM jobs WHERE id = ? AND status NOT IN ('waiting', 'running')", (job_id,)
            )
            return done.rowcount == 1

    # -- running; only with the turn ---------------------------------------------------------------

    def recover(self, now_s: float, *, max_lost: int) -> int:
        """Put back what a process that died was running; only for whoever has just got the turn.

        Args:
            now_s: Unix time.
            max_lost: A job whose process died so often has probably killed it, and fails.

        Returns:
            How many were put back.
        """
        with self._writing() as database:
            database.execute("UPDATE jobs SET lost = lost + 1 WHERE status = 'running'")
            for (job_id,) in database.execute(
                "SELECT id FROM jobs WHERE status = 'running' AND lost >= ?", (max_lost,)
            ).fetchall():
                error = NearfarError(
                    f"The process that ran the job ended {max_lost} times before it was done",
                    fix="Run the same request directly to see what the model does to the process",
                )
                self._end(database, job_id, "failed", now_s, error=pack_error(error))
            return database.execute(
                "UPDATE jobs SET status = 'waiting', due_s = ? WHERE status = 'running'", (now_s,)
            ).rowcount

    def claim(self, now_s: float, *, max_wait_s: float) -> Claimed | None:
        """Take the next job that is due: the most urgent, the oldest of these.

        Args:
            now_s: Unix time.
            max_wait_s: No job waits longer for its next try; a later time means that the clock
                was set back.
        """
        with self._writing() as database:
            self._sweep(database, now_s)
            row = database.execute(
                "SELECT id, claim + 1, request_id, attempts, may_wait, request FROM jobs"
                " WHERE status = 'waiting' AND (due_s <= ? OR due_s > ?)"
                " ORDER BY priority DESC, number LIMIT 1",
                (now_s, now_s + max_wait_s),
            ).fetchone()
            if row is None:
                return None
            job_id, claim, request_id, attempts, deferrable, sealed = row
            try:
                request = unpack_request(self._vault.open(sealed, job_id, "request"))
            except NearfarError as error:
                self._end(database, job_id, "failed", now_s, error=pack_error(error))
                return None
            database.execute(
                "UPDATE jobs SET status = 'running', claim = ? WHERE id = ? AND status = 'waiting'",
                (claim, job_id),
            )
        return Claimed(
            id=job_id,
            claim=claim,
            request=request,
            request_id=request_id,
            attempts=attempts,
            deferrable=bool(deferrable),
        )

    def is_mine(self, job: Claimed) -> bool:
        """Whether the answer would still be taken."""
        row = self._row(
            "SELECT 1 FROM jobs WHERE id = ? AND status = 'running' AND claim = ?",
            job.id, job.claim,
        )  # fmt: skip
        return row is not None

    def release(self, job: Claimed, due_s: float, *, counts: bool) -> bool:
        """Put a job back; `counts` if the try counts as one."""
        with self._writing() as database:
            done = database.execute(
                "UPDATE jobs SET status = 'waiting', due_s = ?, attempts = attempts + ?"
                " WHERE id = ? AND status = 'running' AND claim = ?",
                (due_s, counts, job.id, job.claim),
            )
            return done.rowcount == 1

    def finish(
        self,
        job: Claimed,
        status: JobStatus,
        now_s: float,
        *,
        result: bytes | None = None,
        error: bytes | None = None,
    ) -> bool:
        """End a job and keep what came of it, in one transaction.

        Returns:
            Whether it was taken: not when the job was cancelled or given up meanwhile.
        """
        with self._writing() as database:
            row = database.execute(
                "SELECT 1 FROM jobs WHERE id = ? AND status = 'running' AND claim = ?",
                (job.id, job.claim),
            ).fetchone()
            if row is None:
                return False
            self._end(database, job.id, status, now_s, result=result, error=error)
            return True

    def next_due_s(self) -> float | None:
        """Unix time at which a waiting job is due next; `None` when none waits."""
        row = self._row("SELECT MIN(due_s) FROM jobs WHERE status = 'waiting'")
        return None if row is None else row[0]

    # -- inside ------------------------------------------------------------------------------------

    def _end(
        self,
        database: sqlite3.Connection,
        job_id: str,
        status: JobStatus,
        now_s: float,
        *,
        result: bytes | None = None,
        error: bytes | None = None,
    ) -> None:
        """The request is of no more use, and is deleted."""
        sealed = None if result is None else self._vault.seal(result, job_id, "result")
        failed = None if error is None else self._vault.seal(error, job_id, "error")
        size_bytes = _ROW_BYTES + len(sealed or b"") + len(failed or b"")
        database.execute(
            "UPDATE jobs SET status = ?, ended_s = ?, request = NULL, result = ?, error = ?,"
            " size_bytes = ? + length(label) WHERE id = ?",
            (status, now_s, sealed, failed, size_bytes, job_id),
        )

    def _sweep(self, database: sqlite3.Connection, now_s: float) -> None:
        """Give up what is too old, delete what ended long ago."""
        if now_s >= _CLOCK_SET_S:
            # What was noted before the clock was set would be half a century old now.
            for column in ("created_s", "ended_s", "due_s"):
                database.execute(
                    f"UPDATE jobs SET {column} = ? WHERE {column} < ?",  # noqa: S608 (our own names)
                    (now_s, _CLOCK_SET_S),
                )
        database.execute(
            "UPDATE jobs SET status = 'expired', ended_s = ?, request = NULL, size_bytes ="
            " ? + length(label) WHERE status = 'waiting' AND created_s < ?",
            (now_s, _ROW_BYTES, now_s - self.config.max_age_s),
        )
        database.execute("DELETE FROM jobs WHERE ended_s < ?", (now_s - self.config.keep_s,))

    def _infos(self, clause: str, *values: object) -> list[JobInfo]:
        rows = self._rows(
            "SELECT id, status, label, created_s, due_s, attempts, size_bytes FROM jobs "  # noqa: S608
            + clause,
            *values,
        )
        return [
            JobInfo(
                id=job_id,
                status=status,
                label=unpack_label(self._vault.open(label, job_id, "label")),
                created_s=created_s,
                due_s=due_s,
                attempts=attempts,
                size_bytes=size_bytes,
            )
            for job_id, status, label, created_s, due_s, attempts, size_bytes in rows
        ]

    def _rows(self, query: str, *values: object) -> list[Any]:
        with self._lock, _translated(self.path):
            return self._database.execute(query, values).fetchall()

    def _row(self, query: str, *values: object) -> Any:
        with self._lock, _translated(self.path):
            return self._database.execute(query, values).fetchone()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _translated(self.path):
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _open(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Before SQLite does: it would make it readable for others, as the umask says.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as exc:
            raise ConfigError(
                f"The queue of jobs {self.path} cannot be written ({exc.strerror})",
                field="jobs.file",
                fix="Check the path and its permissions",
            ) from exc
        database = sqlite3.connect(
            self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
                database.execute(f"PRAGMA {pragma}")
        except BaseException:
            database.close()
            raise
        return database

    def _unlock(self) -> Vault:
        """The vault with the store's key; makes schema and key of a new queue."""
        config = self.config
        key_file = (config.key_file or self.path.with_name(f"{self.path.name}.key")).expanduser()
        with self._writing() as database:
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _SCHEMA_VERSION):
                raise ConfigError(
                    f"{self.path} is a queue of format {version}, and this version knows "
                    f"{_SCHEMA_VERSION}",
                    field="jobs.file",
                    fix="Use the version of nearfar that wrote it, or name another file",
                )
            if version == 0:
                key = store_key(key_file, config.key, may_create=True)
                store_id = os.urandom(16)
                vault = Vault(key, store_id)
                for statement in _SCHEMA.split(";\n"):
                    database.execute(statement)
                database.execute(
                    "INSERT INTO store VALUES (?, ?)", (store_id, vault.seal(b"", "", "proof"))
                )
                database.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
                return vault
            store_id, proof = database.execute("SELECT id, proof FROM store").fetchone()
            vault = Vault(store_key(key_file, config.key, may_create=False), store_id)
            vault.open(proof, "", "proof")
            return vault


class Turn:
    """The right to run the jobs of a queue: one process at a time, and one client in it.

    A lock of the kernel (`flock`), so that it is free the moment its process has died.
    """

    def __init__(self, store: JobStore) -> None:
        self._path = store.path.with_name(f"{store.path.name}.lock")
        self._descriptor: int | None = None

    def take(self) -> bool:
        """Take the turn if nobody has it; says whether this is its holder."""
        if self._descriptor is not None:
            return True
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def give_back(self) -> None:
        """Let another process have it; idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as exc:
        raise Overloaded(
            f"The queue of jobs {path} cannot be read or written now ({exc})",
            fix="Check the disk and its free space, and what else uses the file",
        ) from exc
    except sqlite3.ProgrammingError as exc:
        raise ConfigError(
            f"The queue of jobs {path} is closed", field="client", fix="Make a new client"
        ) from exc
    except sqlite3.DatabaseError as exc:
        raise ConfigError(
            f"{path} is not a queue of jobs, or is damaged ({exc})",
            field="jobs.file",
            fix="Name another file, or remove it together with its key",
        ) from exc


__all__ = ["ENDED", "Claimed", "JobInfo", "JobStatus", "JobStore", "Turn"]
