"""Deadlines, and numbers written for people."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from nearfar.errors import DeadlineExceeded, InvalidInput


@dataclass(frozen=True, slots=True)
class Deadline:
    """One absolute point in monotonic time that travels with a request.

    Attributes:
        at_s: `time.monotonic()` value by which the answer is due; ``math.inf`` when there is none.
    """

    at_s: float = math.inf

    @classmethod
    def after_ms(cls, milliseconds: float | None) -> Deadline:
        """Deadline that many milliseconds from now; `None` means no deadline.

        Raises:
            InvalidInput: `milliseconds` is not a positive number.
        """
        if milliseconds is None:
            return cls()
        if not milliseconds > 0:  # also catches NaN
            raise InvalidInput(
                f"deadline_ms is {milliseconds!r}",
                field="deadline_ms",
                fix="Give a positive number of milliseconds, or leave it out",
            )
        return cls(time.monotonic() + milliseconds / 1000.0)

    @property
    def is_set(self) -> bool:
        return self.at_s != math.inf

    def remaining_s(self) -> float:
        """Seconds left, never negative; ``math.inf`` when there is no deadline."""
        return max(0.0, self.at_s - time.monotonic()) if self.is_set else math.inf

    def remaining_ms(self) -> float | None:
        """Milliseconds left for the wire, or `None` when there is no deadline."""
        return self.remaining_s() * 1000.0 if self.is_set else None

    def timeout_s(self) -> float | None:
        """Seconds left in the form `threading` and `asyncio` take: `None` waits for ever."""
        return self.remaining_s() if self.is_set else None

    def check(self, *tried: str) -> None:
        """Raise `DeadlineExceeded` if the deadline has passed."""
        if self.is_set and time.monotonic() >= self.at_s:
            raise exceeded(*tried)


def exceeded(*tried: str, while_: str = "before an answer was complete") -> DeadlineExceeded:
    """The error of whoever has no time left.

    Args:
        tried: Routes that were tried.
        while_: When the deadline passed, in words.
    """
    return DeadlineExceeded(
        f"The deadline passed {while_}",
        tried=tried,
        fix="Allow more time with deadline_ms, or ask for a shorter answer",
    )


def format_bytes(count: float) -> str:
    """Size with a binary unit: ``format_bytes(90868376) == '86.7 MiB'``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def format_ms(milliseconds: float | None) -> str:
    """Duration for a table: ``0.42 ms``, ``12 ms``, ``3.1 s``; a dash for `None`."""
    if milliseconds is None:
        return "—"
    if milliseconds < 10:
        return f"{milliseconds:.2f} ms"
    if milliseconds < 1000:
        return f"{milliseconds:.0f} ms"
    return f"{milliseconds / 1000:.1f} s"
