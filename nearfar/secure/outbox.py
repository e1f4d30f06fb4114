"""The queue between messages and records: what leaves next, how long it is, and when.

Short messages overtake long ones, which leave in pieces; messages of one stream keep their order,
and so do those that open streams. Time is an argument, so nothing here waits: `next_flush_s`
tells when to ask again. Rules: docs/reference/secure-channel.md, "Pieces" and "Shaping".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nearfar.secure.frames import (
    FIRST_PIECE_BYTES,
    HEADER_BYTES,
    MAX_UNFINISHED,
    MAX_WHOLE_BYTES,
    PIECE_RECORD_BYTES,
    Pieces,
    frame,
    only_piece,
)
from nearfar.secure.pace import MAX_BATCH_BYTES, CreditPace, TokenPace
from nearfar.secure.records import OVERHEAD_BYTES, Buffer
from nearfar.secure.shaping import Shaping, padded_bytes

#: `balanced`: plaintext of the record that ends an answer. Holds `Fin` and some last tokens.
END_BYTES = 512
#: `balanced`: a token with its headers is 24 or 32 bytes long, rarely more.
_TOKEN_BYTES = 32
#: `balanced`: ticks in a row with a backlog of more than one record before records get longer.
_PATIENCE_TICKS = 3
#: `balanced`: empty records in a row (3 s and more) while an answer pauses.
_MAX_IDLE_TICKS = 30

#: `strict`: one record of this plaintext every tick, 82 KB/s in each direction.
STRICT_RECORD_BYTES = 4096
STRICT_TICK_S = 0.05
#: `strict`: the stream of records stops after a multiple of so many only (1.6 s).
STRICT_RUN_TICKS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What the queue must know about a kind of message.

    Attributes:
        opens: It opens the stream: the receiver wants these in order.
        is_paced: `Token` or `Credit`: its size and time tell about an answer's text.
        ends: It is the last one of the stream.
        is_barrier: Must not overtake anything.
    """

    opens: bool = False
    is_paced: bool = False
    ends: bool = False
    is_barrier: bool = False


PLAIN = Traits()


@dataclass(eq=False, slots=True)
class _Queued:
    """A message in the queue: one plaintext, or the pieces of a long message."""

    size_bytes: int
    stream: int
    traits: Traits
    plaintext: bytes = b""
    pieces: Pieces | None = None


class Outbox:
    """One direction's sending queue.

    Attributes:
        shaping: The level in force; change it only while nothing is queued.
        max_unfinished_bytes: Length of all messages together of which pieces are under way.
    """

    def __init__(self, shaping: Shaping = "off") -> None:
        self.shaping: Shaping = shaping
        self.max_unfinished_bytes = 0
        self._number = 0
        # in order, before all pieces but first ones; what nothing can stop is a mere plaintext
        self._ready: deque[bytes | _Queued] = deque()
        self._large: deque[_Queued] = deque()  # first piece gone; take turns
        self._under_way: list[_Queued] = []  # large, in _ready or _large
        self._held: deque[_Queued] = deque()  # must wait for something before them
        self._borrowed: list[Pieces] = []
        self._next_tick_s: float | None = None
        # balanced
        self._answering: set[int] = set()  # streams whose first token was sent, or has come
        self._backlog: deque[tuple[int, bytes]] = deque()  # stream, frame
        self._has_end = False
        self._pace: TokenPace | CreditPace = TokenPace()
        self._crowded_ticks = 0
        self._idle_ticks = 0
        # strict
        self._run_ticks = 0
        self._is_larges_turn = False

    # Putting in

    def put(
        self,
        parts: Sequence[Buffer],
        size_bytes: int,
        stream: int = 0,
        traits: Traits = PLAIN,
        *,
        borrow: bool = False,
    ) -> int:
        """Queue one message; returns the bytes that it will take on the wire.

        Args:
            parts: Its bytes.
            size_bytes: Their length together.
            stream: Stream it belongs to; 0 for the connection.
            traits: What kind it is.
            borrow: Do not copy the parts of a long message yet: they must not change until it
                has left, or until `own` was called.
        """
        shaping = self.shaping
        padded = 0
        longest_bytes = MAX_WHOLE_BYTES
        if shaping == "balanced":
            if self._is_paced(size_bytes, stream, traits):
                self._backlog.append((stream, frame(parts, size_bytes)))
                if traits.ends:
                    self._has_end = True
                    self._end_answer(stream)
                else:
                    self._pace.put()
                return HEADER_BYTES + size_bytes
            padded = padded_bytes(HEADER_BYTES + size_bytes)
        elif shaping == "strict":  # padded when its record is put together
            longest_bytes = STRICT_RECORD_BYTES - HEADER_BYTES
        if size_bytes <= longest_bytes:
            plaintext = frame(parts, size_bytes, padded)
            if self._under_way or self._held:
                self._enqueue(_Queued(size_bytes, stream, traits, plaintext=plaintext))
            else:
                self._ready.append(plaintext)
            return len(plaintext) + OVERHEAD_BYTES
        pad = _PADS[shaping]
        whole_bytes = FIRST_PIECE_BYTES + size_bytes
        if whole_bytes <= PIECE_RECORD_BYTES and not self._is_crowded and shaping != "strict":
            # It leaves next, at once and in one record: no state of it needs to be kept.
            self._number += 1
            padded = 0 if pad is None else pad(whole_bytes)
            plaintext = only_piece(parts, size_bytes, stream, self._number, padded)
            self._ready.append(plaintext)
            return len(plaintext) + OVERHEAD_BYTES
        pieces = self._cut(parts, size_bytes, stream)
        sealed_bytes = pieces.left_bytes + pieces.count * OVERHEAD_BYTES
        # Keeps nothing of the caller's arrays for long, which may change once a message was
        # queued: a request that was cancelled must not take what its app writes there later.
        if borrow:
            self._borrowed.append(pieces)
        else:
            pieces.own()
        self._enqueue(_Queued(size_bytes, stream, traits, pieces=pieces))
        return sealed_bytes

    def own(self) -> None:
        """Copy what is still borrowed."""
        for pieces in self._borrowed:
            pieces.own()
        self._borrowed.clear()

    def answer_began(self, stream: int) -> None:
        """The first token of an answer came: what is said about it leaves on ticks from now on."""
        if self.shaping == "balanced" and stream not in self._answering:
            if not isinstance(self._pace, CreditPace):
                self._pace = CreditPace()
            self._begin_answer(stream)

    def answer_ended(self, stream: int) -> None:
        """Its end came: nothing more needs to be said."""
        if stream in self._answering:
            self._end_answer(stream)
            self._backlog = deque(entry for entry in self._backlog if entry[0] != stream)

    def expect_speed(self, tokens_per_s: float) -> None:
        """The next answers will come at about that speed, all together; ahead of their first token.

        `balanced` chooses ticks and records for it. It must come from other answers than these.
        """
        if isinstance(self._pace, TokenPace):
            self._pace.expect(tokens_per_s)

    def _is_paced(self, size_bytes: int, stream: int, traits: Traits) -> bool:
        if traits.is_barrier:
            self._release_backlog()
        elif stream in self._answering:
            can_wait = traits.is_paced or traits.ends
            if can_wait and size_bytes <= MAX_WHOLE_BYTES and not self._is_blocked(stream):
                return True
            self._release_backlog()
            if traits.ends:
                self._end_answer(stream)
        elif traits.is_paced:
            self._begin_answer(stream)  # the first leaves at once
        return False

    def _begin_answer(self, stream: int) -> None:
        self._answering.add(stream)
        self._idle_ticks = 0
        self._pace.begin()

    def _end_answer(self, stream: int) -> None:
        self._answering.discard(stream)
        if not self._answering:
            self._pace.end()

    def _is_blocked(self, stream: int) -> bool:
        return stream != 0 and any(
            stream == other.stream for queue in (self._under_way, self._held) for other in queue
        )

    @property
    def _is_crowded(self) -> bool:
        """Whether a long message put in now must wait for others, or let some pass."""
        return bool(self._ready or self._under_way or self._held)

    def _cut(self, parts: Sequence[Buffer], size_bytes: int, stream: int) -> Pieces:
        self._number += 1
        return Pieces(
            parts,
            size_bytes,
            stream=stream,
            number=self._number,
            record_bytes=STRICT_RECORD_BYTES if self.shaping == "strict" else PIECE_RECORD_BYTES,
            pad=_PADS[self.shaping],
        )

    def _enqueue(self, queued: _Queued) -> None:
        if self._must_wait(queued):
            self._held.append(queued)
            return
        if queued.pieces is not None:
            self._under_way.append(queued)
        self._ready.append(queued)

    def _must_wait(self, queued: _Queued) -> bool:
        if not self._under_way and not self._held:
            return False
        if queued.traits.is_barrier or self._is_blocked(queued.stream):
            return True
        if queued.traits.opens and any(held.traits.opens for held in self._held):
            return True
        return queued.pieces is not None and (
            len(self._under_way) >= MAX_UNFINISHED
            or sum(other.size_bytes for other in self._under_way) + queued.size_bytes
            > self.max_unfinished_bytes
        )

    # Taking out

    @property
    def is_idle(self) -> bool:
        """Whether `next` would give nothing, now and until the next `put`."""
        return not (self._ready or self._large or self.shaping != "off")

    @property
    def has_ready(self) -> bool:
        """Whether short messages wait, for whatever reason."""
        return bool(self._ready or self._backlog)

    def next_flush_s(self) -> float | None:
        """When `next` should be asked again, on its clock; `None`: after the next `put`."""
        return self._next_tick_s

    def next(
        self, now_s: float | None, *, is_busy: bool = False, bulk: bool = True
    ) -> Buffer | None:
        """Plaintext of the record that leaves now; `None` when none does.

        Args:
            now_s: Any steady clock; `None` releases what waits for a tick.
            is_busy: Whether a stream is open.
            bulk: Whether pieces of long messages may leave too, after their first.
        """
        if self.shaping == "strict":
            return self._next_strict(now_s, is_busy=is_busy)
        if self._ready:
            plaintext = self._pop(self._ready)
            if self._ready and self.shaping == "off":
                return self._join_ready(plaintext)
            return plaintext
        if self.shaping == "balanced" and (batch := self._next_batch(now_s)) is not None:
            return batch
        return self._pop(self._large) if bulk and self._large else None

    def _join_ready(self, first: bytes) -> bytes:
        """Short messages share a record: each record costs both ends more than its bytes do."""
        taken, size_bytes = [first], len(first)
        while self._ready:
            found = self._ready[0]
            if not isinstance(found, bytes) or size_bytes + len(found) > MAX_WHOLE_BYTES:
                break
            taken.append(found)
            size_bytes += len(found)
            self._ready.popleft()
        return b"".join(taken)

    def _pop(self, queue: deque[bytes | _Queued] | deque[_Queued]) -> bytes:
        queued = queue.popleft()
        if isinstance(queued, bytes):
            return queued
        pieces = queued.pieces
        if pieces is None:
            return queued.plaintext
        plaintext = pieces.take()
        if pieces.count:
            self._large.append(queued)
        else:
            self._under_way.remove(queued)
            if not self._under_way and not self._held:
                self._borrowed.clear()
            held, self._held = self._held, deque()
            for other in held:
                self._enqueue(other)
        return plaintext

    def _advance_tick(self, due_s: float, now_s: float, tick_s: float) -> None:
        """The next tick after now; missed ones are not made up for, that would show the delay."""
        self._next_tick_s = due_s + tick_s * (int((now_s - due_s) / tick_s) + 1)

    # balanced: the tokens of all answers leave in one record per tick

    def _next_batch(self, now_s: float | None) -> bytes | None:
        if now_s is None:
            return self._take_batch(MAX_BATCH_BYTES) if self._backlog else None
        if not self._backlog and (not self._answering or self._idle_ticks > _MAX_IDLE_TICKS):
            self._next_tick_s = None
            return None
        if self._next_tick_s is None:
            # After a pause the first token leaves at once, as the first of all does.
            is_resumed = self._idle_ticks > _MAX_IDLE_TICKS
            self._next_tick_s = now_s + (0.0 if is_resumed else self._pace.tick_s)
        if now_s < self._next_tick_s:
            return None
        self._pace.tick(self._next_tick_s, is_needed=bool(self._backlog))
        self._advance_tick(self._next_tick_s, now_s, self._pace.tick_s)
        self._idle_ticks = 0 if self._backlog else self._idle_ticks + 1
        if self._has_end and sum(len(framed) for _, framed in self._backlog) <= max(
            END_BYTES, self._pace.batch_bytes
        ):
            self._has_end = False
            return self._take_batch(max(END_BYTES, self._pace.batch_bytes))
        batch = self._take_batch(self._pace.batch_bytes)
        self._adapt()
        return batch

    def _take_batch(self, size_bytes: int) -> bytes:
        taken: list[bytes] = []
        left_bytes = size_bytes
        while self._backlog and (not taken or len(self._backlog[0][1]) <= left_bytes):
            taken.append(self._backlog.popleft()[1])
            left_bytes -= len(taken[-1])
        if not self._backlog:
            self._has_end = False
        if left_bytes < 0:  # one frame that is longer than a batch
            left_bytes = padded_bytes(len(taken[0])) - len(taken[0])
        return b"".join((*taken, bytes(left_bytes)))

    def _adapt(self) -> None:
        """Longer records when tokens keep piling up, judged by their number, not by their bytes."""
        per_batch = self._pace.batch_bytes // _TOKEN_BYTES
        self._crowded_ticks = self._crowded_ticks + 1 if len(self._backlog) > per_batch else 0
        if self._crowded_ticks >= _PATIENCE_TICKS:
            self._crowded_ticks = 0
            self._pace.hurry(len(self._backlog))

    def _release_backlog(self) -> None:
        while self._backlog:
            self._ready.append(self._take_batch(MAX_BATCH_BYTES))

    # strict: one record per tick, with or without something in it

    def _next_strict(self, now_s: float | None, *, is_busy: bool) -> Buffer | None:
        has_any = bool(self._ready or self._large)
        if now_s is None or (self._next_tick_s is None and not is_busy):
            return self._next_in_turn() if has_any else None
        if self._next_tick_s is None:
            self._next_tick_s, self._run_ticks = now_s, 0
        if not (is_busy or has_any) and self._run_ticks % STRICT_RUN_TICKS == 0:
            self._next_tick_s = None
            return None
        if now_s < self._next_tick_s:
            return None
        self._advance_tick(self._next_tick_s, now_s, STRICT_TICK_S)
        self._run_ticks += 1
        return self._next_in_turn() if has_any else bytes(STRICT_RECORD_BYTES)

    def _next_in_turn(self) -> Buffer:
        """Pieces and short messages take turns: neither may starve while there is one per tick."""
        self._is_larges_turn = not self._is_larges_turn
        if not self._ready or (self._is_larges_turn and self._large):
            return self._pop(self._large)
        plaintext = self._pop(self._ready)
        if len(plaintext) == STRICT_RECORD_BYTES:
            return plaintext
        taken, left_bytes = [plaintext], STRICT_RECORD_BYTES - len(plaintext)
        while self._ready:
            first = self._ready[0]
            short = first if isinstance(first, bytes) else first.plaintext
            if not short or len(short) > left_bytes:
                break
            taken.append(self._pop(self._ready))
            left_bytes -= len(short)
        return b"".join((*taken, bytes(left_bytes)))


def _whole_records(size_bytes: int) -> int:
    return size_bytes + -size_bytes % STRICT_RECORD_BYTES


#: Length of all pieces' records together to their padded length.
_PADS: dict[Shaping, Callable[[int], int] | None] = {
    "off": None,
    "balanced": padded_bytes,
    "strict": _whole_records,
}
