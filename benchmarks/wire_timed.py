"""Sessions that add up the processor time they take until requests may flow.

What a handshake costs in the process and the moment in which it happens, cold caches and all, apart
from the sockets, TLS and the event loop around it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from nearfar.session import ClientSession, Received, ServerSession

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from nearfar.secure.records import Buffer
    from nearfar.wire.messages import Message


class HandshakeClock:
    """Processor time of this thread in the handshakes of all sessions of this process.

    Attributes:
        spent_s: So far.
    """

    def __init__(self) -> None:
        self.spent_s = 0.0
        self._depth = 0
        self._began_s = 0.0

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._began_s = time.thread_time()

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.spent_s += time.thread_time() - self._began_s


CLOCK = HandshakeClock()


class _Timed:
    """Mixed in before a session, which is used for a handshake and nothing else."""

    def __init__(self, **options: Any) -> None:
        with CLOCK:
            super().__init__(**options)

    def receive(self, data: Buffer, *, now_s: float) -> list[Received]:
        with CLOCK:
            came: list[Received] = super().receive(data, now_s=now_s)  # type: ignore[misc]
        return came

    def send(
        self, message: Message, tensors: Sequence[np.ndarray] = (), *, borrow: bool = False
    ) -> int:
        with CLOCK:
            size_bytes: int = super().send(message, tensors, borrow=borrow)  # type: ignore[misc]
        return size_bytes

    def next_to_send(
        self, now_s: float | None = None, room: memoryview | None = None
    ) -> Buffer | None:
        with CLOCK:
            record: Buffer | None = super().next_to_send(now_s, room)  # type: ignore[misc]
        return record


class TimedClientSession(_Timed, ClientSession):
    """From its making to the arrival of `Ready`."""


class TimedServerSession(_Timed, ServerSession):
    """From its making to the departure of `Ready`."""
