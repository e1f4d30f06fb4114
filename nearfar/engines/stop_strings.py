"""End an answer at a stop string, even one in pieces, and hold back no more than needed."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches text for the first stop string.

    Args:
        stops: Strings that end the answer; none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Take the next piece.

        Returns:
            Text that may be shown now, and whether a stop string was found; after that there is
            nothing more to feed.
        """
        if not self._stops:
            return text, False
        text = self._held + text
        found = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            self._held = ""
            return text[:found], True
        keep = max(_longest_prefix_at_end(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, once nothing more comes."""
        held, self._held = self._held, ""
        return held


def _longest_prefix_at_end(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
