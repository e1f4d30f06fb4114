"""Tells the person at the terminal, or the log, what a conversion is doing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

_LOGGED_EVERY_S = 30.0


class Step:
    """One running step; `note` sets what its line says at the end, `tell` what it says now.

    Args:
        show: Told what is being done, as the step goes on.
    """

    def __init__(self, show: Callable[[str], None] | None = None) -> None:
        self.detail = ""
        self._show = show
        self._started_s = time.monotonic()

    def note(self, detail: str) -> None:
        self.detail = detail

    def tell(self, doing: str) -> None:
        """Say what is being done now, to somebody who watches."""
        if self._show is not None:
            self._show(doing)

    def progress(self, share: float) -> None:
        """Tell how far a long step is, and how long the rest takes at that pace."""
        if share > 0:
            left_s = (time.monotonic() - self._started_s) * (1 - share) / share
            self.tell(f"{share:.0%}{_left(left_s)}")


class Reporter:
    """Prints one line a step: a spinner while it runs on a terminal, its time when it is done.

    Args:
        console: Where to print; `None` says nothing.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._due_s: float | None = None
        self._is_busy = False

    @property
    def is_live(self) -> bool:
        """Whether somebody watches, so that the time that is left is worth telling."""
        return self._console is not None and self._console.is_terminal

    def expect(self, seconds: float) -> None:
        """From now on running steps tell what is left of that time."""
        self._due_s = time.monotonic() + seconds

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Run a block under a title."""
        started_s = time.monotonic()
        if self._console is None:
            yield Step()
            return
        if self._console.is_terminal and self._is_busy:
            step = Step()  # a part of a step whose line is moving already
            yield step
        elif self._console.is_terminal:
            self._is_busy = True
            try:
                with self._console.status(Text(title + self._left())) as status:
                    step = Step(lambda told: status.update(Text(f"{title}: {told}")))
                    yield step
            finally:
                self._is_busy = False
        else:
            # Logs and parent processes see at once what is being done.
            self._print(f"{title} …")
            step = Step(self._now_and_then(title))
            yield step
        elapsed_s = time.monotonic() - started_s
        detail = f": {step.detail}" if step.detail else ""
        self._print(f"✓ {title}{detail} ({elapsed_s:.1f} s)")

    def _left(self) -> str:
        return _left((self._due_s or 0.0) - time.monotonic())

    def _now_and_then(self, title: str) -> Callable[[str], None]:
        """Prints progress, but no line for every little step of a long one."""
        printed_s = time.monotonic()

        def show(told: str) -> None:
            nonlocal printed_s
            if time.monotonic() - printed_s >= _LOGGED_EVERY_S:
                printed_s = time.monotonic()
                self._print(f"{title}: {told}")

        return show

    def say(self, text: str) -> None:
        """Print a line."""
        self._print(text)

    def _print(self, text: str) -> None:
        if self._console is not None:
            # `Text`, because names of models and files may look like console markup.
            self._console.print(Text(text), soft_wrap=True)


def _left(left_s: float) -> str:
    if left_s <= 1:
        return ""
    return f", about {left_s / 60:.0f} min left" if left_s > 90 else f", {left_s:.0f} s left"
