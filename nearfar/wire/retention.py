"""What a server keeps of its answers for clients that lose their connection; no socket, no clock.

An answer is kept from its first token until its client has acknowledged it, and once nobody reads
it (the connection was lost, or the end was sent and may have got lost with it) for `keep_s` more.
Memory is bounded per answer, per client and in total, whatever clients do: a bound takes from the
client that reached it before it takes from others. What nobody reads and is given up appears in
`Retention.given_up`, so that the shell can stop the work behind it.

Tickets prove that a client held the stream it wants back. They are derived on both ends from a key
that travels in `Ready`, inside the channel, so that they cost no message::

    ticket = HMAC-SHA-256(resume_key, "nearfar resume 1" ‖ request_id)

An answer knows one ticket: that of the connection which read it last. To resume it is to exchange
that ticket for the new connection's, so each is good once; and it is looked up under the client's
identity, so one that was stolen is worth nothing without the client's credentials.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from nearfar.errors import ResumeMissed
from nearfar.wire.limits import MIB

_LABEL = b"nearfar resume 1"

#: What a kept token costs beside its text, and an answer with the server's part of it beside its
#: tokens: 57 and 5,700 bytes in CPython 3.11 (tracemalloc), rounded up. Without them a flood of
#: empty tokens would count as nothing.
TOKEN_OVERHEAD_BYTES = 64
ANSWER_OVERHEAD_BYTES = 6144

#: Who asked, and the request's id.
Key = tuple[str, bytes]


def ticket_for(resume_key: bytes, request_id: bytes) -> bytes:
    """The ticket with which a stream can be taken up again.

    Args:
        resume_key: `Ready.resume_key` of the connection that carried the stream last.
        request_id: That of the stream's `Generate`.

    Returns:
        32 bytes.
    """
    return hmac.digest(resume_key, _LABEL + request_id, "sha256")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionLimits:
    """How much is kept, and how long.

    Attributes:
        keep_s: For how long once nobody reads; 0 keeps nothing. 60 s bears a change of network
            or a train tunnel; a longer absence is better answered elsewhere.
        answer_bytes: Per answer. While its client reads, the oldest tokens are forgotten beyond
            it; while nobody reads, the answer pauses there. 1 MiB is some 10,000 tokens.
        client_bytes: Of all answers of one client.
        total_bytes: Of all answers.
        client_running: Answers of one client that nobody reads while they are computed, and with
            it the slots that an absent client can hold. The oldest is given up first.
        client_answers: Answers of one client that nobody reads, finished or not; likewise.
        total_answers: Of all clients.
    """

    keep_s: float = 60.0
    answer_bytes: int = MIB
    client_bytes: int = 8 * MIB
    total_bytes: int = 64 * MIB
    client_running: int = 4
    client_answers: int = 32
    total_answers: int = 1024


class _Client:
    """What the answers of one client count together."""

    __slots__ = ("answers", "size_bytes", "unread")

    def __init__(self) -> None:
        self.answers = 0
        self.unread = 0
        self.size_bytes = 0


class Kept:
    """What is kept of one answer. Changed by `Retention` only.

    Attributes:
        key: Who asked, and the request's id.
        fingerprint: What was asked for; tells a repetition from a reused id.
        first: Index of the oldest token that is kept.
        size_bytes: What it counts against the limits.
        until_s: When it is given up; `None` while a client reads it.
        is_running: Whether it was still computed when its client left.
    """

    __slots__ = (
        "_client", "_digest", "_is_kept", "_texts", "_ticket", "fingerprint", "first",
        "is_running", "key", "size_bytes", "until_s",
    )  # fmt: skip

    def __init__(self, key: Key, fingerprint: object, ticket: bytes, client: _Client) -> None:
        self.key = key
        self.fingerprint = fingerprint
        self.first = 0
        self.size_bytes = ANSWER_OVERHEAD_BYTES
        self.until_s: float | None = None
        self.is_running = False
        self._client = client
        self._is_kept = True  # otherwise it was dropped, and is only read to its end
        self._ticket = ticket
        self._texts: deque[str] = deque()
        self._digest = hashlib.sha256()  # of the tokens before `first`

    @property
    def next_index(self) -> int:
        """Index of the token that is to come next."""
        return self.first + len(self._texts)

    def since(self, index: int, at_most: int) -> Sequence[str]:
        """Texts of the tokens from `index` on, which must not be below `first`."""
        texts, first = self._texts, self.first
        assert index >= first
        return [texts[at - first] for at in range(index, min(index + at_most, self.next_index))]

    def digest_at(self, index: int) -> hashlib._Hash:
        """Running SHA-256 of the texts before `index`."""
        digest = self._digest.copy()
        for text in self.since(self.first, index - self.first):
            digest.update(text.encode())
        return digest


class Retention:
    """The answers of a server that may be resumed. Time is an argument, in seconds.

    Args:
        limits: Bounds.

    Attributes:
        size_bytes: What all answers count together.
        given_up: Answers that nobody read and that were dropped to keep a bound; the shell stops
            their work and clears the list.
    """

    def __init__(self, limits: RetentionLimits = RetentionLimits()) -> None:
        self.limits = limits
        self.size_bytes = 0
        self.given_up: list[Kept] = []
        self._answers: dict[Key, Kept] = {}
        self._unread: OrderedDict[Key, Kept] = OrderedDict()  # whoever is given up first, first
        self._clients: dict[str, _Client] = {}

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def next_expiry_s(self) -> float | None:
        """When `expire` has something to do next; `None` when nothing waits for its client."""
        oldest = next(iter(self._unread.values()), None)
        return None if oldest is None else oldest.until_s

    def find(self, key: Key, now_s: float) -> Kept | None:
        """What is kept under that key."""
        kept = self._answers.get(key)
        if kept is None or (kept.until_s is not None and kept.until_s <= now_s):
            return None
        return kept

    def begin(self, key: Key, fingerprint: object, ticket: bytes) -> Kept:
        """Keep a new answer, which a client reads; one of the same key is dropped."""
        self.drop(key)
        client = self._clients.setdefault(key[0], _Client())
        client.answers += 1
        kept = self._answers[key] = Kept(key, fingerprint, ticket, client)
        self._charge(kept, kept.size_bytes)
        self._make_room(kept)
        return kept

    def resume(
        self, key: Key, ticket: bytes, next_index: int, *, new_ticket: bytes, now_s: float
    ) -> Kept:
        """Exchange the ticket of an answer; the caller reads it from now on.

        Raises:
            ResumeMissed: It is not kept, the ticket is not its present one, or what is wanted of
                it is kept no longer. Nothing has changed then.
        """
        kept = self.find(key, now_s)
        if kept is None:
            raise ResumeMissed(
                "Nothing is kept of this answer: its time has passed, or it never began here",
                fix="Send the request again",
            )
        if not hmac.compare_digest(kept._ticket, ticket):
            raise ResumeMissed(
                "The ticket was used before, or belongs to another request",
                fix="Send the request again",
            )
        if not kept.first <= next_index <= kept.next_index:
            raise ResumeMissed(
                f"Token {next_index} is not kept; {kept.first} to {kept.next_index} are",
                fix="Send the request again",
            )
        self.read(kept, new_ticket)
        return kept

    def read(self, kept: Kept, ticket: bytes) -> None:
        """Somebody reads the answer, or somebody else than before."""
        kept._ticket = ticket
        kept.until_s = None
        self._remove_unread(kept)

    def add(self, kept: Kept, text: str) -> None:
        """Keep the next token."""
        kept._texts.append(text)
        self._grow(kept, len(text.encode()) + TOKEN_OVERHEAD_BYTES)
        if self._is_over(kept):
            self._make_room(kept)

    def is_full(self, kept: Kept) -> bool:
        """Whether an answer that nobody reads must pause."""
        return self._is_over(kept)

    def acknowledge(self, kept: Kept, index: int) -> None:
        """Forget the tokens before `index`; the client has them."""
        while kept.first < index and kept._texts:
            self._forget_oldest(kept)

    def leave(self, kept: Kept, now_s: float, *, is_running: bool) -> None:
        """Nobody reads the answer any more, or it has ended: keep it for its client for a while."""
        if not kept._is_kept:
            return
        kept.is_running = is_running
        kept.until_s = now_s + self.limits.keep_s
        self._remove_unread(kept)
        self._unread[kept.key] = kept
        client = kept._client
        client.unread += 1
        if is_running:
            running = [k for k in self._unread.values() if k.is_running and k._client is client]
            if len(running) > self.limits.client_running:
                self._give_up(running[0])
        if client.unread > self.limits.client_answers:
            self._give_up(next(k for k in self._unread.values() if k._client is client))
        if len(self._unread) > self.limits.total_answers:
            self._give_up(next(iter(self._unread.values())))

    def drop(self, key: Key) -> Kept | None:
        """Keep an answer no longer; says what it was."""
        kept = self._answers.pop(key, None)
        if kept is not None:
            self._remove_unread(kept)
            self._charge(kept, -kept.size_bytes)
            kept._is_kept = False
            kept._client.answers -= 1
            if not kept._client.answers:
                del self._clients[key[0]]
        return kept

    def expire(self, now_s: float) -> list[Kept]:
        """Drop what was kept long enough; says what."""
        expired = []
        while self._unread:
            oldest = next(iter(self._unread.values()))
            assert oldest.until_s is not None
            if oldest.until_s > now_s:
                break
            self.drop(oldest.key)
            expired.append(oldest)
        return expired

    def _is_over(self, kept: Kept) -> bool:
        limits = self.limits
        return (
            kept.size_bytes > limits.answer_bytes
            or kept._client.size_bytes > limits.client_bytes
            or self.size_bytes > limits.total_bytes
        )

    def _make_room(self, kept: Kept) -> None:
        """Bring the sizes back within the limits after `kept` grew."""
        limits, client = self.limits, kept._client
        while client.size_bytes > limits.client_bytes and self._give_up_other(kept, client):
            pass
        while self.size_bytes > limits.total_bytes and self._give_up_other(kept, None):
            pass
        if kept.until_s is None:  # whoever reads has most of it; whoever is away needs all of it
            while kept._texts and self._is_over(kept):
                self._forget_oldest(kept)

    def _give_up_other(self, kept: Kept, client: _Client | None) -> bool:
        for found in self._unread.values():
            if found is not kept and client in (None, found._client):
                self._give_up(found)
                return True
        return False

    def _give_up(self, kept: Kept) -> None:
        self.drop(kept.key)
        self.given_up.append(kept)

    def _forget_oldest(self, kept: Kept) -> None:
        data = kept._texts.popleft().encode()
        kept._digest.update(data)
        kept.first += 1
        self._grow(kept, -(len(data) + TOKEN_OVERHEAD_BYTES))

    def _remove_unread(self, kept: Kept) -> None:
        if self._unread.get(kept.key) is kept:
            del self._unread[kept.key]
            kept._client.unread -= 1

    def _grow(self, kept: Kept, change_bytes: int) -> None:
        kept.size_bytes += change_bytes
        if kept._is_kept:
            self._charge(kept, change_bytes)

    def _charge(self, kept: Kept, change_bytes: int) -> None:
        self.size_bytes += change_bytes
        kept._client.size_bytes += change_bytes
