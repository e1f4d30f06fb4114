"""Someone between client and server: sees, keeps, changes, holds back and repeats messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from nearfar.errors import SecurityError
from nearfar.secure.handshake import TYPE_HELLO, TYPE_WELCOME
from nearfar.secure.identity import ServerIdentity
from nearfar.secure.keys import TYPE_KEY_CONFIGURATION, KeyRing
from nearfar.session import ClientSession, ServerSession
from tests.support.wire import IDENTITY, LIMITS, NOW_S, Pair, ready

#: One message in, the messages that are delivered instead of it.
Change = Callable[[bytes], Iterable[bytes]]

CONFIGURATION, HELLO, WELCOME = TYPE_KEY_CONFIGURATION, TYPE_HELLO, TYPE_WELCOME


def untouched(message: bytes) -> Iterable[bytes]:
    return (message,)


def flipped(message: bytes, position: int, mask: int = 1) -> bytes:
    """The message with bits of one byte turned over."""
    damaged = bytearray(message)
    damaged[position] ^= mask
    return bytes(damaged)


@dataclass
class Middle:
    """Wraps what both ends receive; otherwise the pair works as always.

    Attributes:
        to_server: What becomes of a message on its way to the server.
        to_client: The same, to the client.
        sent_to_server: What the client sent, in order, as it was sent.
        sent_to_client: The same of the server.
    """

    pair: Pair
    to_server: Change = untouched
    to_client: Change = untouched
    sent_to_server: list[bytes] = field(default_factory=list)
    sent_to_client: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._deliver_to_server = self._wrap(self.pair.server, self.sent_to_server, "to_server")
        self._deliver_to_client = self._wrap(self.pair.client, self.sent_to_client, "to_client")

    def _wrap(self, session: Any, seen: list[bytes], change: str) -> Callable[..., list[Any]]:
        receive = session.receive

        def tapped(data: bytes, **options: Any) -> list[Any]:
            seen.append(bytes(data))
            received: list[Any] = []
            for message in getattr(self, change)(data):
                received += receive(message, **options)
            return received

        session.receive = tapped
        return receive  # type: ignore[no-any-return]

    @classmethod
    def new(cls) -> Middle:
        """Nothing was said yet."""
        return cls(Pair.new())

    @classmethod
    def connected(cls) -> Middle:
        """The handshake is over and requests flow; it was seen."""
        middle = cls.new()
        pair = middle.pair
        pair.exchange()
        pair.server.send(ready())
        pair.exchange()
        assert pair.client.is_ready
        assert pair.server.is_ready
        pair.at_client.clear()
        pair.at_server.clear()
        return middle

    def say(self, message: Any) -> bytes:
        """The client sends a message; nothing reaches the server. Returns the record."""
        self.to_server, before = lambda _: (), self.to_server
        self.pair.client.send(message)
        self.pair.to_server()
        self.to_server = before
        return self.sent_to_server[-1]

    def answer(self, message: Any) -> bytes:
        """The server sends a message; nothing reaches the client. Returns the record."""
        self.to_client, before = lambda _: (), self.to_client
        self.pair.server.send(message)
        self.pair.to_client()
        self.to_client = before
        return self.sent_to_client[-1]

    def inject_to_server(self, message: bytes) -> list[Any]:
        return self._deliver_to_server(message, now_s=NOW_S)

    def inject_to_client(self, message: bytes) -> list[Any]:
        return self._deliver_to_client(message, now_s=NOW_S)

    def assert_server_refuses(self, *messages: bytes) -> None:
        """All but the last are taken; the last ends the session, and nothing more is taken."""
        for message in messages[:-1]:
            self.inject_to_server(message)
        self.pair.server.data_to_send()  # honest answers to the honest ones
        assert not self.pair.server.is_closed
        with pytest.raises(SecurityError):
            self.inject_to_server(messages[-1])
        assert_dead(self.pair.server)

    def assert_client_refuses(self, *messages: bytes) -> None:
        for message in messages[:-1]:
            self.inject_to_client(message)
        self.pair.client.data_to_send()  # honest answers to the honest ones
        assert not self.pair.client.is_closed
        with pytest.raises(SecurityError):
            self.inject_to_client(messages[-1])
        assert_dead(self.pair.client)


def assert_dead(session: ClientSession | ServerSession) -> None:
    """The session is closed and tells the attacker nothing."""
    assert session.is_closed
    assert session.data_to_send() == []


def only(kind: int, change: Callable[[bytes], bytes]) -> Change:
    """Changes the messages of one type and lets the others pass."""
    return lambda message: (change(message) if message[0] == kind else message,)


def refusal(*, to_server: Change = untouched, to_client: Change = untouched) -> SecurityError:
    """The error in which a handshake ends with someone in between."""
    middle = Middle.new()
    middle.to_server, middle.to_client = to_server, to_client
    with pytest.raises(SecurityError) as caught:
        middle.pair.exchange()
    assert not middle.pair.client.is_ready
    assert not middle.pair.server.is_ready
    assert middle.pair.at_server == []  # nothing of the client, above all not its token
    return caught.value


def new_server(identity: ServerIdentity = IDENTITY, *, now_s: float = NOW_S) -> ServerSession:
    return ServerSession(keys=KeyRing(identity, now_s=now_s), limits=LIMITS, now_s=now_s)


def new_client(identity: ServerIdentity = IDENTITY, *, now_s: float = NOW_S) -> ClientSession:
    return ClientSession(pin=identity.pin, token="t", limits=LIMITS, now_s=now_s)
