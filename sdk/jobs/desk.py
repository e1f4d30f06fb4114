"""What both clients' runners share: submitting, choosing what runs next, recording what came of it.

Blocking (SQLite), thread-safe, and free of any knowledge of how a request is performed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nearfar.errors import CloudUnavailable, InvalidInput, NearfarError
from sdk.jobs.content import Label, pack_error, pack_request, pack_result
from sdk.jobs.pace import MAX_LOST, MAX_PAUSE_S, End, Pace, after
from sdk.jobs.store import Claimed, JobStatus, JobStore, Turn
from sdk.routing.types import exclusion

if TYPE_CHECKING:
    from sdk.core import Core
    from sdk.jobs.config import JobsConfig
    from sdk.requests import Request

#: How often the queue is looked at for what other processes put into it, or for the turn.
_LOOK_EVERY_S = 2.0


class Desk:
    """One client's way to its queue.

    Args:
        config: Which queue.
        core: Policy and router of the client.

    Attributes:
        store: The queue.
        on_change: Called, from any thread, when something ended.

    Raises:
        ConfigError, SecurityError: As `JobStore`.
    """

    def __init__(self, config: JobsConfig, core: Core) -> None:
        self.store = JobStore(config)
        self.on_change: Callable[[], None] | None = None
        self._core = core
        self._turn = Turn(self.store)
        self._has_recovered = False
        self._pace = Pace()
        self._changed = threading.Condition()

    def submit(self, request: Request, *, deferrable: bool, deadline_ms: float | None) -> str:
        """Check a request and put it into the queue; it is on disk when this returns.

        Raises:
            InvalidInput: It does not fit its model.
            PolicyDenied, ModelNotFound, ConfigError: There is no route, and none will come.
            CloudUnavailable: The only route cannot be taken now, and the job is not deferrable.
            Overloaded: The queue is full.
        """
        error = self._core.explain(request).error()
        if error is not None and not (deferrable and isinstance(error, CloudUnavailable)):
            raise error
        sensitivity = request.sensitivity or self._core.default_sensitivity
        return self.store.add(
            pack_request(request, sensitivity, deadline_ms),
            Label(method=request.method, model=request.model, sensitivity=sensitivity),
            priority=request.priority,
            deferrable=deferrable,
            now_s=time.time(),
        )

    def take(self) -> tuple[Claimed, Request] | None:
        """The job to run now, if this client has the turn and there is one."""
        if not self._turn.take():
            return None
        if not self._has_recovered:
            self.store.recover(time.time(), max_lost=MAX_LOST)
            self._has_recovered = True
        while True:
            now_s = time.time()
            job = self.store.claim(now_s, max_wait_s=2 * MAX_PAUSE_S)
            if job is None:
                return None
            try:
                request = job.request.request(job.request_id)
                if job.deferrable and self._pace.holds_back(now_s) and self._needs_cloud(request):
                    self.store.release(job, self._pace.until_s, counts=False)
                    continue
            except NearfarError as error:
                self.failed(job, error)
                continue
            return job, request

    def done(self, job: Claimed, result: Any) -> None:
        """The job has its answer."""
        if result.route.name == "cloud":
            self._pace.worked()
        self._finish(job, "done", result=pack_result(job.request.method, result))

    def failed(self, job: Claimed, error: NearfarError) -> None:
        """A try of the job failed."""
        now_s = time.time()
        next_step = after(error, deferrable=job.deferrable, tries=job.attempts)
        if isinstance(next_step, End):
            self._finish(job, next_step.status, error=pack_error(error))
            return
        due_s = now_s + next_step.pause_s
        if isinstance(error, CloudUnavailable):
            self._pace.failed(now_s)
            due_s = max(due_s, self._pace.until_s)
        self.store.release(job, due_s, counts=next_step.counts)

    def broke(self, job: Claimed, exc: Exception) -> None:
        """A try of the job met a defect: an exception that is none of nearfar's own."""
        error = NearfarError(
            f"The job met an unexpected {type(exc).__name__}",  # its text may hold content
            fix="Run the same request directly to see it, and report it",
        )
        self._finish(job, "failed", error=pack_error(error))

    def put_back(self, job: Claimed) -> None:
        """The client is being closed under the job."""
        self.store.release(job, time.time(), counts=False)

    def idle_s(self) -> float:
        """For how long nothing is due, as far as is known; for whoever waits in between."""
        due_s = self.store.next_due_s()
        if due_s is None or not self._turn.take():
            return _LOOK_EVERY_S
        return min(_LOOK_EVERY_S, max(0.01, due_s - time.time()))

    def close(self) -> None:
        """Give back the turn and close the queue; idempotent."""
        self._turn.give_back()
        self.store.close()

    def announce(self) -> None:
        """Wake whoever waits for a result."""
        with self._changed:
            self._changed.notify_all()
        if self.on_change is not None:
            self.on_change()

    def wait(self, timeout_s: float) -> None:
        """Wait until something ended, or that long."""
        with self._changed:
            self._changed.wait(timeout_s)

    def _finish(
        self,
        job: Claimed,
        status: JobStatus,
        *,
        result: bytes | None = None,
        error: bytes | None = None,
    ) -> None:
        try:
            self.store.finish(job, status, time.time(), result=result, error=error)
        finally:
            self.announce()

    def _needs_cloud(self, request: Request) -> bool:
        inputs = self._core.decide(request).inputs
        return bool(exclusion("edge", inputs)) and inputs.verdict.cloud


def no_such_job(job_id: str) -> InvalidInput:
    """The error for an id that is not in the queue."""
    return InvalidInput(
        f"There is no job {job_id[:40]!r} in the queue",
        field="job_id",
        fix="It may have been forgotten, or ended longer ago than [jobs] keep_s",
    )
