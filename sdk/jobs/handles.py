"""What an app holds of a job. Handles hold an id and nothing else: a restart makes them anew."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from nearfar.errors import Cancelled, DeadlineExceeded, NearfarError
from sdk.jobs.content import JobResult
from sdk.jobs.desk import no_such_job
from sdk.jobs.store import ENDED, JobStatus

if TYPE_CHECKING:
    from sdk.jobs.content import Label
    from sdk.jobs.desk import Desk

#: Another process may run the job; its end shows when the queue is looked at again.
_LOOK_EVERY_S = 0.2


class _Handle:
    """What both handles know without waiting."""

    def __init__(self, desk: Desk, job_id: str) -> None:
        self._desk = desk
        self.id = job_id

    def __repr__(self) -> str:
        return f"{type(self).__name__}(id={self.id!r})"

    def _status(self) -> JobStatus:
        status = self._desk.store.status(self.id)
        if status is None:
            raise no_such_job(self.id)
        return status

    def _label(self) -> Label:
        info = self._desk.store.info(self.id)
        if info is None:
            raise no_such_job(self.id)
        return info.label

    def _outcome(self) -> JobResult | None:
        """The result; `None` while there is none yet.

        Raises:
            NearfarError: Why there will be none.
        """
        status = self._status()
        if status not in ENDED:
            return None
        if status == "cancelled":
            raise Cancelled("The job was cancelled")
        if status == "expired":
            raise DeadlineExceeded(
                "The job found no route in time, and was given up",
                fix="Submit it again, or allow more time with [jobs] max_age_s",
            )
        outcome = self._desk.store.outcome(self.id)
        if outcome is None:
            raise no_such_job(self.id)
        if isinstance(outcome, NearfarError):
            raise outcome
        return outcome

    def _cancel(self) -> bool:
        try:
            return self._desk.store.cancel(self.id, time.time())
        finally:
            self._desk.announce()


class Job(_Handle):
    """One job of a `Client`.

    Attributes:
        id: 32 hexadecimal digits; `Client.job` gives the handle for it, also after a restart.
    """

    @property
    def status(self) -> JobStatus:
        """``waiting``, ``running``, ``done``, ``failed``, ``denied``, ``cancelled``, ``expired``.

        Raises:
            InvalidInput: The job is no longer in the queue.
        """
        return self._status()

    @property
    def model(self) -> str:
        """Name of the model."""
        return self._label().model

    def result(self, timeout_s: float | None = None) -> JobResult:
        """Wait for the answer.

        Args:
            timeout_s: For how long at most; `None` waits until the job has ended.

        Returns:
            What `infer`, `embed` or `classify` would have returned; a `GenerateResult` for text.

        Raises:
            DeadlineExceeded: It has not ended within that time, and goes on; or it was given up
                for its age.
            PolicyDenied: Policy, asked when the job ran, left no route.
            Cancelled: It was cancelled.
            InvalidInput: It is no longer in the queue.
            NearfarError: Why it failed.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            result = self._outcome()
            if result is not None:
                return result
            left_s = _LOOK_EVERY_S if until_s is None else until_s - time.monotonic()
            if left_s <= 0:
                raise _not_yet(timeout_s)
            self._desk.wait(min(left_s, _LOOK_EVERY_S))

    def cancel(self) -> bool:
        """End the job if it has not ended; what is computed for it is thrown away.

        Returns:
            Whether it was ended by this; `False` when it had ended before.
        """
        return self._cancel()

    def forget(self) -> bool:
        """Delete the job and its result from the queue, if it has ended."""
        return self._desk.store.forget(self.id)


class AsyncJob(_Handle):
    """One job of an `AsyncClient`; as `Job`, with ``await``."""

    async def status(self) -> JobStatus:
        """As `Job.status`."""
        return await asyncio.to_thread(self._status)

    async def model(self) -> str:
        """As `Job.model`."""
        return (await asyncio.to_thread(self._label)).model

    async def result(self, timeout_s: float | None = None) -> JobResult:
        """As `Job.result`; cancelling the task that waits does not cancel the job."""
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        pause_s = 0.002
        while True:
            result = await asyncio.to_thread(self._outcome)
            if result is not None:
                return result
            left_s = pause_s if until_s is None else until_s - time.monotonic()
            if left_s <= 0:
                raise _not_yet(timeout_s)
            await asyncio.sleep(min(left_s, pause_s))
            pause_s = min(_LOOK_EVERY_S, 2 * pause_s)

    async def cancel(self) -> bool:
        """As `Job.cancel`."""
        return await asyncio.to_thread(self._cancel)

    async def forget(self) -> bool:
        """As `Job.forget`."""
        return await asyncio.to_thread(self._desk.store.forget, self.id)


def _not_yet(timeout_s: float | None) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"The job has not ended within {timeout_s} s, and goes on",
        fix="Ask again later: the job is kept under its id",
    )


__all__ = ["AsyncJob", "Job", "JobResult"]
