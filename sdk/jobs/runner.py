"""Runs the jobs of a client's queue one after the other, beside the app's own requests.

Both runners do the same; they differ in how they wait. A job is performed as the client performs
any request (policy, router, repair), under the request id that it was given when it was submitted.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from nearfar.errors import NearfarError
from sdk.jobs.content import generated
from sdk.jobs.desk import Desk

if TYPE_CHECKING:
    from sdk.aio import AsyncClient
    from sdk.client import Client
    from sdk.jobs.store import Claimed
    from sdk.requests import Request

logger = logging.getLogger(__name__)

#: After the queue itself could not be read or written.
_TROUBLE_PAUSE_S = 5.0
#: Between looks whether a job whose answer streams was cancelled.
_LOOK_EVERY_S = 0.1


class Runner:
    """Runs jobs in a thread of its own.

    Args:
        client: Whose way it performs requests.
        desk: Its queue.
    """

    def __init__(self, client: Client, desk: Desk) -> None:
        self.desk = desk
        self._client = client
        self._wake = threading.Event()
        self._is_stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, unless the queue's configuration leaves it to others; later calls wake it."""
        if self._thread is None and self.desk.store.config.run:
            # A daemon: what it was doing is in the queue, and is done again.
            self._thread = threading.Thread(target=self._work, name="nearfar-jobs", daemon=True)
            self._thread.start()
        self._wake.set()

    def stop(self) -> None:
        """Take no further job, and give up the one that streams."""
        self._is_stopping = True
        self._wake.set()

    def close(self) -> None:
        """Wait for what runs, and close the queue. Idempotent."""
        self.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self.desk.close()

    def run_due(self) -> int:
        """Run what is due now, in this thread; says how many jobs were tried."""
        tried = 0
        while not self._is_stopping and (taken := self.desk.take()) is not None:
            self._run(*taken)
            tried += 1
        return tried

    def _work(self) -> None:
        while not self._is_stopping:
            self._wake.clear()
            try:
                self.run_due()
                pause_s = self.desk.idle_s()
            except (NearfarError, OSError) as error:
                logger.warning("the queue of jobs waits: %s", error)
                pause_s = _TROUBLE_PAUSE_S
            self._wake.wait(pause_s)

    def _run(self, job: Claimed, request: Request) -> None:
        try:
            result = self._perform(job, request)
        except NearfarError as error:
            if self._is_stopping:
                self.desk.put_back(job)
            else:
                self.desk.failed(job, error)
        except Exception as exc:  # noqa: BLE001 (a defect ends its job, not the queue)
            logger.error("job %s met a defect: %s", job.id, type(exc).__name__)
            self.desk.broke(job, exc)
        else:
            if result is None:
                self.desk.put_back(job)
            else:
                self.desk.done(job, result)

    def _perform(self, job: Claimed, request: Request) -> Any:
        client = self._client
        if request.method == "generate":
            with client._answer(request) as stream:
                looked_s = time.monotonic()
                for _ in stream:
                    if self._is_stopping:
                        return None
                    if time.monotonic() - looked_s < _LOOK_EVERY_S:
                        continue
                    looked_s = time.monotonic()
                    if not self.desk.store.is_mine(job):
                        return None
                return generated(stream)
        done = client._drive(client._life(request))
        return client._result(done)


class AsyncRunner:
    """Runs jobs in a task on the client's event loop; the queue is used in worker threads."""

    def __init__(self, client: AsyncClient, desk: Desk) -> None:
        self.desk = desk
        self._client = client
        self._wake = asyncio.Event()
        self._is_stopping = False
        self._task: asyncio.Task[None] | None = None
        self._performing: asyncio.Task[Any] | None = None

    def start(self) -> None:
        """As `Runner.start`."""
        if self._task is None and self.desk.store.config.run:
            self._task = asyncio.ensure_future(self._work())
        self._wake.set()

    async def close(self) -> None:
        """As `Runner.close`; what runs is cancelled and put back."""
        self._is_stopping = True
        self._wake.set()
        if self._performing is not None:
            self._performing.cancel()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.to_thread(self.desk.close)

    async def run_due(self) -> int:
        """As `Runner.run_due`."""
        tried = 0
        while not self._is_stopping:
            taken = await asyncio.to_thread(self.desk.take)
            if taken is None:
                break
            await self._run(*taken)
            tried += 1
        return tried

    async def _work(self) -> None:
        while not self._is_stopping:
            self._wake.clear()
            try:
                await self.run_due()
                pause_s = await asyncio.to_thread(self.desk.idle_s)
            except (NearfarError, OSError) as error:
                logger.warning("the queue of jobs waits: %s", error)
                pause_s = _TROUBLE_PAUSE_S
            try:
                await asyncio.wait_for(self._wake.wait(), pause_s)
            except (TimeoutError, asyncio.TimeoutError):
                continue

    async def _run(self, job: Claimed, request: Request) -> None:
        desk = self.desk
        # A task of its own: closing cancels this and not the recording of what came of it.
        self._performing = asyncio.ensure_future(self._perform(job, request))
        try:
            result = await self._performing
        except NearfarError as error:
            if self._is_stopping:
                await asyncio.to_thread(desk.put_back, job)
            else:
                await asyncio.to_thread(desk.failed, job, error)
        except asyncio.CancelledError:
            desk.put_back(job)  # not in a thread: the loop may be ending
            if not self._is_stopping:
                self._performing.cancel()
                raise
        except Exception as exc:  # noqa: BLE001 (a defect ends its job, not the queue)
            logger.error("job %s met a defect: %s", job.id, type(exc).__name__)
            await asyncio.to_thread(desk.broke, job, exc)
        else:
            if result is None:
                await asyncio.to_thread(desk.put_back, job)
            else:
                await asyncio.to_thread(desk.done, job, result)

    async def _perform(self, job: Claimed, request: Request) -> Any:
        client = self._client
        if request.method == "generate":
            async with await client._answer(request) as stream:
                looked_s = time.monotonic()
                async for _ in stream:
                    if time.monotonic() - looked_s < _LOOK_EVERY_S:
                        continue
                    looked_s = time.monotonic()
                    if not await asyncio.to_thread(self.desk.store.is_mine, job):
                        return None
                return generated(stream)
        done = await client._drive(client._life(request))
        return client._result(done)
