"""How long silence of an engine is honest work, and from when on it is a stall. Sans-IO.

What an answer usually takes is known as a distribution; `Patience` is what follows from it. When
that time has passed, an engine that shows no sign of life (its threads neither compute nor wait
for a processor) has stalled. One that is at work may be throttled, or share its processor with
others: it is given several times as long. The rule and its false alarms are explained in
docs/explanation/how-a-request-is-routed.md.
"""

from __future__ import annotations

import enum

import msgspec

#: How long signs of life are looked for, up to the moment at which silence is suspicious, and then
#: again and again.
WINDOW_S = 0.1
#: What is alive is given so many times as long (busy phones are slowed down as much as that), and
#: at least so long: after answers were measured, and before, when a first run may have to compile.
ALIVE_FACTOR, ALIVE_LEAST_S, ALIVE_COLD_S = 8.0, 2.0, 30.0
#: Who looks so much too late did not get to run, and perhaps nobody did: that time is no silence.
LATE_S = 0.02


class Life(enum.Enum):
    """What the threads of an engine did for a while."""

    ALIVE = "alive"
    STILL = "still"
    UNSEEN = "unseen"  # its thread has yet to get to it, or was not looked at twice
    UNKNOWN = "unknown"  # nothing here tells: another system, or a kernel that does not count


class Patience(msgspec.Struct, frozen=True, gc=False):
    """How long one piece of work may be silent.

    Attributes:
        first_s: From its start: a whole batch, or a prompt until the first token.
        token_s: From one token to the next.
        is_cold: Whether it rests on seeds rather than on answers measured here.
    """

    first_s: float
    token_s: float
    is_cold: bool = True


class Silence:
    """One piece of work that has not answered yet.

    Args:
        limit_s: Silence that is suspicious.
        is_cold: See `Patience`.
        began_s: Monotonic time at which it began.

    Attributes:
        due_s: When `look` is to be called.
        counted_s: Silence at the last look, without the time in which nobody got to run.
    """

    __slots__ = ("_began_s", "_bound_s", "_is_cold", "_limit_s", "counted_s", "due_s")

    def __init__(self, limit_s: float, *, is_cold: bool, began_s: float) -> None:
        self._limit_s = limit_s
        self._is_cold = is_cold
        self._began_s = began_s
        least_s = ALIVE_COLD_S if is_cold else ALIVE_LEAST_S
        self._bound_s = max(ALIVE_FACTOR * limit_s, least_s)
        self.counted_s = 0.0
        self.due_s = began_s + max(0.5 * limit_s, limit_s - WINDOW_S)

    def look(self, now_s: float, life: Life) -> bool:
        """Whether it has stalled; otherwise `due_s` is the next time to look.

        Args:
            now_s: Monotonic time.
            life: What its threads did since the last look; `Life.UNSEEN` at the first.
        """
        late_s = now_s - self.due_s
        if late_s > LATE_S:
            self._began_s += late_s
        silent_s = self.counted_s = now_s - self._began_s
        if silent_s < self._limit_s:
            self.due_s = self._began_s + self._limit_s
            return False
        if silent_s >= self._bound_s or life is Life.STILL:
            return True
        if life is Life.UNKNOWN and not self._is_cold:
            return True
        self.due_s = now_s + min(WINDOW_S, self._bound_s - silent_s)
        return False
