"""Real English text for measuring quality: Python's own language documentation.

It is part of every Python, so a conversion needs no download; it is licensed under the PSF licence
and is only read, never copied into a bundle.
"""

from __future__ import annotations

import functools
import re

#: Chapters that are mostly prose. Fixed, so that figures of two conversions can be compared.
_CHAPTERS = ("objects", "import", "exceptions", "with", "class", "function", "lambda", "try")
_MIN_CHARACTERS, _MAX_CHARACTERS = 120, 900

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "A neural network is compressed so that",
    "To cook rice, first",
)


@functools.lru_cache(maxsize=1)
def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return dict(topics)


def prose() -> str:
    """One long text, some ten thousand words."""
    topics = _topics()
    return "\n\n".join(topics[name] for name in _CHAPTERS if name in topics)


def passages(count: int) -> list[str]:
    """Distinct paragraphs of 120 to 900 characters, spread over all chapters, always the same."""
    found: dict[str, None] = {}
    for name in sorted(_topics()):
        for paragraph in _topics()[name].split("\n\n"):
            text = re.sub(r"\s+", " ", paragraph).strip()
            if _MIN_CHARACTERS <= len(text) <= _MAX_CHARACTERS:
                found[text] = None
    texts = list(found)
    step = max(1, len(texts) // count)
    return texts[::step][:count]
