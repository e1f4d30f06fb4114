"""How often batches leave while `balanced` shapes an answer, and how long they are.

Both follow from how fast *earlier* answers came on the connection, never from the answer at hand: a
schedule that followed the answer itself would show its rhythm (measured: area under the ROC curve
up to 0.97). Rules and measurements: docs/reference/secure-channel.md, "Shaping".
"""

from __future__ import annotations

import math

from nearfar.secure.shaping import BUCKET_BYTES

#: Tokens leave so often at least until a slow answer was seen: to a reader a tenth of a second is
#: instant.
TOKEN_TICK_S = 0.1
#: And never less often.
MAX_TOKEN_TICK_S = 0.8
#: Records of the first answer: hide texts up to about 50 tokens/s, at 1.5 times the bytes for 30.
FIRST_BATCH_BYTES = 192
#: Fewer tokens than that in a record of 128 bytes are mostly padding: then ticks get longer.
_MIN_PER_TICK = 2.1
#: More than that in 128 bytes, and what does not fit tells how long tokens are.
_MAX_PER_BUCKET = 3.0
#: Of longer records: room for each token, which has 24 or 32 bytes and rarely more.
_ROOM_BYTES = 42
_GRAIN_BYTES = 32
#: No batch is longer, unless a single token is.
MAX_BATCH_BYTES = 8192

#: How often the client grants credit; at any other time it would tell how many tokens have come.
CREDIT_TICK_S = 0.5
_LATER_CREDIT_TICK_S = 1.0
MAX_CREDIT_TICK_S = 4.0
#: After that much of a first answer without a need for credit, it is granted less often.
_EARLY_S = 2.0

#: Answers of fewer tokens, or shorter ones, say little about speed.
_MIN_TOKENS = 16
_MIN_ANSWER_S = 0.5
#: A speed that is so near to the one before changes nothing.
_NEAR = (1.0, 0.9, 1.1)
#: Floating point: a tick may be early by that.
_SLACK_S = 1e-6


class _Run:
    """From the first token of an answer until no answer is under way."""

    def __init__(self) -> None:
        self.is_under_way = False
        self.started_s: float | None = None
        self.ended_s = 0.0
        self.count = 0

    def begin(self) -> bool:
        """Whether it begins now, rather than having begun with another answer."""
        if self.is_under_way:
            return False
        self.is_under_way = True
        self.started_s = None
        self.count = 0
        return True

    def tick(self, due_s: float, tick_s: float) -> float:
        """Seconds since the first token."""
        if self.started_s is None:
            self.started_s = due_s - tick_s
        self.ended_s = due_s
        return due_s - self.started_s

    @property
    def seconds(self) -> float:
        return 0.0 if self.started_s is None else self.ended_s - self.started_s


class TokenPace:
    """The server's: fewer, fuller records after slow answers, longer ones after fast ones.

    Attributes:
        tick_s: Time from one batch to the next.
        batch_bytes: Plaintext of each.
    """

    def __init__(self) -> None:
        self.tick_s = TOKEN_TICK_S
        self.batch_bytes = FIRST_BATCH_BYTES
        self._next = (TOKEN_TICK_S, FIRST_BATCH_BYTES)
        self._shift: float | None = None
        self._run = _Run()

    def expect(self, tokens_per_s: float) -> None:
        """Serve the next answers at the pace for that speed, of all answers at once together."""
        shift = self._shift or 0.0
        fitting = [_pace_of(tokens_per_s * factor, shift) for factor in _NEAR]
        if self._next not in fitting:
            self._next = fitting[0]

    def begin(self) -> None:
        """The first token of an answer leaves."""
        if self._run.begin():
            self.tick_s, self.batch_bytes = self._next

    def put(self) -> None:
        """One more token waits."""
        self._run.count += 1

    def tick(self, due_s: float, *, is_needed: bool) -> None:
        """A batch leaves that was due at that time; `is_needed`: there is something in it."""
        self._run.tick(due_s, self.tick_s)

    def hurry(self, waiting: int) -> None:
        """So many tokens have been too many for several batches."""
        self.tick_s = TOKEN_TICK_S
        self.batch_bytes = _longer(self.batch_bytes, waiting)

    def end(self) -> None:
        """No answer is under way any more."""
        run = self._run
        if run.is_under_way and run.count >= _MIN_TOKENS and run.seconds >= _MIN_ANSWER_S:
            if self._shift is None:
                # On a grid that all know, answers near a step would show how evenly they came. The
                # low bits of a count that nobody sees put it elsewhere on each connection.
                self._shift = run.count % 8 / 8
            self.expect(run.count / run.seconds)
        run.is_under_way = False


def _pace_of(tokens_per_s: float, shift: float) -> tuple[float, int]:
    """Tick and length for a speed: on a grid of half octaves, or of 32 bytes, that is shifted.

    Args:
        tokens_per_s: Of all answers together.
        shift: By what part of a step, 0 to 1.
    """
    per_tick = tokens_per_s * TOKEN_TICK_S
    if per_tick > _MAX_PER_BUCKET:
        longer = math.ceil(per_tick * _ROOM_BYTES / _GRAIN_BYTES + shift) * _GRAIN_BYTES
        return TOKEN_TICK_S, min(longer, MAX_BATCH_BYTES)
    if per_tick >= _MIN_PER_TICK:
        return TOKEN_TICK_S, BUCKET_BYTES
    steps = math.ceil(2 * math.log2(_MIN_PER_TICK / max(per_tick, 0.01)) - shift) + shift
    return min(TOKEN_TICK_S * 2 ** (steps / 2), MAX_TOKEN_TICK_S), BUCKET_BYTES


def _longer(batch_bytes: int, waiting: int) -> int:
    """Doubled until at most two batches of messages wait."""
    while batch_bytes < MAX_BATCH_BYTES and 2 * batch_bytes < 32 * waiting:
        batch_bytes *= 2
    return batch_bytes


class CreditPace:
    """The client's: credit on ticks, as often as earlier answers needed it.

    Attributes:
        tick_s: Time from one batch to the next.
        batch_bytes: Plaintext of each.
    """

    def __init__(self) -> None:
        self.tick_s = CREDIT_TICK_S
        self.batch_bytes = BUCKET_BYTES
        self._learned_s: float | None = None
        self._run = _Run()
        self._was_needed = False

    def begin(self) -> None:
        """The first token of an answer came."""
        if self._run.begin():
            self.tick_s = self._learned_s or CREDIT_TICK_S
            self._was_needed = False

    def put(self) -> None:
        """Credit waits."""
        self._run.count += 1

    def tick(self, due_s: float, *, is_needed: bool) -> None:
        """As `TokenPace.tick`."""
        elapsed_s = self._run.tick(due_s, self.tick_s)
        if is_needed and self._was_needed:
            self.tick_s = CREDIT_TICK_S  # the server may have waited for it
        elif self._learned_s is None and elapsed_s > _EARLY_S - _SLACK_S and not self._run.count:
            self.tick_s = _LATER_CREDIT_TICK_S
        self._was_needed = is_needed

    def hurry(self, waiting: int) -> None:
        """Credit for so many streams has not fitted for several batches; kept from then on."""
        self.tick_s = CREDIT_TICK_S
        self.batch_bytes = _longer(self.batch_bytes, waiting)

    def end(self) -> None:
        """No answer is under way any more."""
        run = self._run
        if run.is_under_way and run.seconds >= _MIN_ANSWER_S:
            # Half the time between two: the server has as much left as it used in the meantime.
            # In powers of two, for the reason that `TokenPace` has a grid.
            between_s = run.seconds / max(1, run.count)
            learned_s = CREDIT_TICK_S
            while learned_s < MAX_CREDIT_TICK_S and learned_s * 4 <= between_s:
                learned_s *= 2
            self._learned_s = learned_s
        run.is_under_way = False
