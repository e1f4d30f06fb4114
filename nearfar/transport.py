"""Between one session and one websocket: the part of an asyncio shell that both ends share.

It moves bytes and keeps time: writes what the session has as fast as the other end reads, comes
back when shaped traffic is due, and gives up on a peer that begins what it does not end. What
messages mean is its owner's business.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from nearfar.secure.frames import MAX_WHOLE_BYTES
from nearfar.watchdog import Watchdog

if TYPE_CHECKING:
    import numpy as np
    from websockets.exceptions import ConnectionClosed

    from nearfar.session import ClientSession, Received, ServerSession
    from nearfar.websocket import Buffer, DirectConnection
    from nearfar.wire.messages import Message

#: Sealed at once and given to the socket together.
_BATCH_BYTES = 256 * 1024
#: Batches written without letting the event loop do something else: some 2 ms.
_TURN_BATCHES = 4
#: Requests in flight from which on messages leave together: a turn of the loop costs each of them
#: less than a record, a frame and a system call of its own.
_CROWD = 4
_SHARE = 8
#: A message in pieces may take that much longer than the limit: half of what a 2G modem does.
_SLOWEST_BYTES_PER_S = 8 * 1024


def _are_long(tensors: Sequence[np.ndarray]) -> bool:
    if len(tensors) == 1:
        return tensors[0].nbytes > MAX_WHOLE_BYTES
    return sum([tensor.nbytes for tensor in tensors]) > MAX_WHOLE_BYTES


class Owner(Protocol):
    """Whose connection it is."""

    def on_received(self, received: Received) -> None:
        """A message came. What is sent now leaves together with the answers to others."""
        ...

    def on_failed(self, error: Exception) -> None:
        """The session refused what came, or `on_received` raised. Nothing more is received."""
        ...

    def on_late(self, reason: str) -> None:
        """The peer takes too long over something; the connection should be cut."""
        ...

    def on_ended(self, problem: ConnectionClosed) -> None:
        """The websocket has ended."""
        ...


class TextReceived(Exception):
    """The peer sent a text message; given to `Owner.on_failed`."""


class Transport:
    """One session on one websocket. Used from one event loop.

    Args:
        websocket: Open.
        session: Of either end.
        owner: Told what comes.
        message_timeout_s: From the first fragment, or piece, of a message to its last.
        write_timeout_s: For how long the peer may not read; `None` for a client, whose requests
            have deadlines.
    """

    def __init__(
        self,
        websocket: DirectConnection,
        session: ClientSession | ServerSession,
        owner: Owner,
        *,
        message_timeout_s: float,
        write_timeout_s: float | None = None,
    ) -> None:
        self._websocket = websocket
        self._session = session
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._has_failed = False
        self._is_closed = False
        self._in_batch = False
        self._due_s: float | None = None
        self._soon: asyncio.Handle | None = None
        self._waiting = 0  # sent and not flushed
        self._timer: asyncio.Handle | None = None
        self._oldest: tuple[int, int] | None = None
        self._fragments = Watchdog(message_timeout_s, self._say_late)
        self._pieces = Watchdog(message_timeout_s, self._say_late)
        self._writing: Watchdog | None = None
        if write_timeout_s is not None:
            self._writing = Watchdog(
                write_timeout_s, lambda: owner.on_late("the other end reads too slowly")
            )

    def start(self) -> None:
        """Send what the session has to say first, and listen."""
        self.flush()
        self._websocket.listen(self)

    def close(self) -> None:
        """Listen, write and watch no more; the websocket stays as it is. Idempotent."""
        self._is_closed = True
        for handle in (self._timer, self._soon):
            if handle is not None:
                handle.cancel()
        for watchdog in (self._fragments, self._pieces, self._writing):
            if watchdog is not None:
                watchdog.close()

    # Sending

    def send(
        self, message: Message, tensors: Sequence[np.ndarray] = (), *, flush: bool = True
    ) -> int:
        """As `send` of the session; what may leave now is written before it returns.

        With many requests in flight it is written when the event loop turns, with the others.

        Args:
            message: As there.
            tensors: As there.
            flush: `False` if `flush`, or another message, follows at once.
        """
        session = self._session
        if flush and not self._in_batch and session.in_flight >= _CROWD and self._soon is None:
            # More will follow before the event loop turns: they leave together.
            self._soon = self._loop.call_soon(self._flush_soon)
        self._waiting += 1
        # The other end must not wait for the last of them before it begins with the first.
        waits = (not flush or self._in_batch or self._soon is not None) and self._waiting < _SHARE
        if waits and tensors and _are_long(tensors):
            waits = False  # it shares a record with nobody, and would be copied to wait
        size_bytes = session.send(message, tensors, borrow=not waits)
        if not waits:
            self.flush()
        return size_bytes

    def _flush_soon(self) -> None:
        self._soon = None
        self.flush()

    def flush(self) -> None:
        """Write what the session has for now, and come back when it says so."""
        session = self._session
        if self._is_closed or (self._due_s is None and session.is_quiet):
            return
        self._waiting = 0
        has_more = self._write(time.monotonic())
        if has_more is None and self._due_s is None:
            return  # the usual case
        session.own_borrowed()
        due_s = 0.0 if has_more else session.next_flush_s()
        if due_s != self._due_s:
            self._due_s = due_s
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if due_s is not None:
                wait_s = max(0.0, due_s - time.monotonic())
                self._timer = self._loop.call_later(wait_s, self._flush_when_due)

    def _flush_when_due(self) -> None:
        self._due_s = self._timer = None
        self.flush()

    async def flush_all(self) -> None:
        """Write everything, also what waits for a tick, as fast as the other end reads."""
        websocket = self._websocket
        while not self._is_closed and websocket.is_open:
            if not self._write(None) and websocket.is_writable:
                return
            await asyncio.sleep(0)
            await websocket.until_writable()

    @property
    def is_writable(self) -> bool:
        """Whether the other end keeps up.

        Reading goes on when it does not, so that its pings are answered and it can cancel; what it
        asks for must then wait, or answers would pile up.
        """
        return self._websocket.is_writable

    async def until_writable(self) -> None:
        """Wait until the other end has read most of what was written, or the connection ended.

        What is queued behind that may have filled it up again; see `until_idle`.
        """
        await self._websocket.until_writable()

    async def until_idle(self) -> None:
        """Wait until nothing waits for the other end any more, or the connection ended."""
        while self._websocket.is_open and not self._websocket.is_writable:
            await self._websocket.until_writable()

    def _write(self, now_s: float | None) -> bool | None:
        """Write while the other end reads.

        Returns:
            `True` when it was stopped to let others have a turn, `False` when the other end or a
            tick must be waited for, `None` when everything has left.
        """
        session, websocket = self._session, self._websocket
        room = websocket.room
        for _ in range(_TURN_BATCHES):
            if not websocket.is_writable:
                return False
            left_bytes = _BATCH_BYTES
            while left_bytes > 0:
                record = session.next_to_send(now_s, room)
                if record is not None:
                    websocket.put(record)
                    left_bytes -= len(record)
                is_quiet = session.is_quiet
                if is_quiet or record is None:
                    websocket.push()
                    return None if is_quiet else False
            websocket.push()
        return True

    # Called by the websocket (`nearfar.websocket.Listener`)

    def message_received(self, data: Buffer) -> None:
        if self._has_failed or self._is_closed:
            return
        self._in_batch = True
        try:
            for received in self._session.receive(data, now_s=time.time()):
                self._owner.on_received(received)
        except Exception as error:  # noqa: BLE001 (the owner decides what each kind means)
            self._fail(error)

    def text_received(self) -> None:
        if not self._has_failed:
            self._fail(TextReceived())

    def _fail(self, error: Exception) -> None:
        self._has_failed = True
        self._owner.on_failed(error)

    def message_began(self) -> None:
        self._fragments.begin()

    def message_ended(self) -> None:
        self._fragments.end()

    def batch_ended(self) -> None:
        if not self._in_batch:
            return  # no message has ended
        self._in_batch = False
        oldest = self._session.oldest_unfinished
        if oldest != self._oldest:
            self._oldest = oldest
            if oldest is None:
                self._pieces.end()
            else:
                self._pieces.begin(oldest[1] / _SLOWEST_BYTES_PER_S)
        self.flush()

    def _say_late(self) -> None:
        self._owner.on_late("message took too long")

    def writing_paused(self) -> None:
        if self._writing is not None:
            self._writing.begin()

    def writing_resumed(self) -> None:
        if self._writing is not None:
            self._writing.end()
        self.flush()

    def connection_ended(self, problem: ConnectionClosed) -> None:
        self.close()
        self._owner.on_ended(problem)
