"""Tells the person at the terminal, or the log, what a conversion is doing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text


class Step:
    """One running step; `note` sets what its line says at the end, `tell` what it says now."""

    def __init__(self) -> None:
        self.detail = ""
        self.show: Callable[[str], None] | None = None

    def note(self, detail: str) -> None:
        self.detail = detail

    def tell(self, doing: str) -> None:
        """Say what it is doing now, to somebody who watches."""
        if self.show is not None:
            self.show(doing)


class Reporter:
    """Prints one line a step: a spinner while it runs on a terminal, its time when it is done.

    Args:
        console: Where to print; `None` says nothing.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._due_s: float | None = None

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
        step = Step()
        started_s = time.monotonic()
        if self._console is None:
            yield step
            return
        if self._console.is_terminal:
            with self._console.status(Text(title + self._left())) as status:
                step.show = lambda doing: status.update(Text(f"{title}: {doing}{self._left()}"))
                yield step
        else:
            # Logs and parent processes see at once what is being done.
            self._print(f"{title} …")
            yield step
        elapsed_s = time.monotonic() - started_s
        detail = f": {step.detail}" if step.detail else ""
        self._print(f"✓ {title}{detail} ({elapsed_s:.1f} s)")

    def _left(self) -> str:
        left_s = (self._due_s or 0.0) - time.monotonic()
        if left_s <= 1:
            return ""
        return f", about {left_s / 60:.0f} min left" if left_s > 90 else f", {left_s:.0f} s left"

    def say(self, text: str) -> None:
        """Print a line."""
        self._print(text)

    def _print(self, text: str) -> None:
        if self._console is not None:
            # `Text`, because names of models and files may look like console markup.
            self._console.print(Text(text), soft_wrap=True)
