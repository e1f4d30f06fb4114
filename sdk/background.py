"""An event loop in a thread of its own, for a client without one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from nearfar.errors import Cancelled, InvalidInput
from nearfar.eventloop import new_event_loop
from nearfar.units import Deadline, exceeded

T = TypeVar("T")

_NONE = Deadline()

#: How long closing waits for the loop's last tasks; each of them has a shorter limit of its own.
_JOIN_TIMEOUT_S = 10.0


class BackgroundLoop:
    """Runs coroutines for callers in other threads. Thread-safe; starts at once."""

    def __init__(self) -> None:
        self._loop = new_event_loop()  # uvloop where it is installed
        # A daemon: a program that forgets to close its client still ends.
        self._thread = threading.Thread(target=self._run, name="nearfar-cloud", daemon=True)
        self._is_closed = False
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, T], deadline: Deadline = _NONE) -> T:
        """Run a coroutine and wait for it; interrupting the wait cancels it.

        Args:
            coroutine: What to run.
            deadline: Until when to wait.

        Raises:
            DeadlineExceeded: The deadline passed.
            Cancelled: The loop was closed meanwhile.
            InvalidInput: The loop was closed before.
        """
        return result_of(self.submit(coroutine), deadline)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine and do not wait; cancelling the future cancels it.

        Raises:
            InvalidInput: The loop was closed before.
        """
        if self._is_closed:
            coroutine.close()
            raise InvalidInput("This client is closed", field="client", fix="Make a new one")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def post(self, function: Callable[[], Any]) -> None:
        """Run a function on the loop, later, without waiting; does nothing once closed."""
        if not self._is_closed:
            with contextlib.suppress(RuntimeError):  # closed between the two lines
                self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """Cancel what runs, end the thread. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_JOIN_TIMEOUT_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            # Host names are looked up in the loop's executor; its threads must not outlive us.
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()


def result_of(future: concurrent.futures.Future[T], deadline: Deadline) -> T:
    """Wait for what a loop gives, in another thread than the loop's, and cancel it unless it came.

    The caller keeps the time itself. The loop has a timer, too, but must get a processor and the
    interpreter's lock before it can say anything, and after that the caller must: twice the delay.

    Raises:
        DeadlineExceeded: The deadline passed.
        Cancelled: The loop was closed meanwhile.
    """
    try:
        return future.result(deadline.timeout_s())
    except concurrent.futures.CancelledError:
        raise Cancelled("The client was closed before the answer was complete") from None
    except concurrent.futures.TimeoutError:
        if future.done():  # it came just now, or the error is its own
            return future.result()
        future.cancel()
        raise exceeded("cloud", while_="while the cloud was working") from None
    except BaseException:
        future.cancel()
        raise
