"""Real English text for measuring quality: Python's own language documentation.

It is part of every Python, so a conversion needs no download; it is licensed under the PSF licence
and is only read, never copied into a bundle. Searches and calibration read other texts than
verification does, documentation strings of the standard library, and training others again, those
of the packages in it.
"""

from __future__ import annotations

import ast
import functools
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path

#: Chapters that are mostly prose. Fixed, so that figures of two conversions can be compared.
_CHAPTERS = ("objects", "import", "exceptions", "with", "class", "function", "lambda", "try")
#: Folders beside the library's packages that differ between two installations of one Python.
_NOT_THE_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "idlelib", "lib2to3", "ensurepip", "pydoc_data"}
)
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
    """Distinct paragraphs of 120 to 900 characters, spread over all chapters, always the same.

    When there are not enough, documentation strings of every second module follow.
    """
    found = _paragraphs(_topics()[name] for name in sorted(_topics()))
    if count > len(found):
        more = _documentation(0)
        return list(dict.fromkeys(found + more))[:count]
    return _spread(found, count)


def calibration_passages(count: int) -> list[str]:
    """At most `count` documentation strings; none of them is among `passages`."""
    judged = set(_paragraphs(_topics().values())) | set(_documentation(0))
    return _spread([text for text in _documentation(1) if text not in judged], count)


def training_passages(count: int) -> list[str]:
    """At most `count` documentation strings of the library's packages; none is among the others."""
    folder = Path(sysconfig.get_path("stdlib"))
    others = set(_paragraphs(_topics().values())) | set(_documentation(0)) | set(_documentation(1))
    found: dict[str, None] = {}
    for package in sorted(folder.glob("*/__init__.py")):
        if package.parent.name in _NOT_THE_LIBRARY:
            continue
        for file in sorted(package.parent.glob("*.py")):
            new = _paragraphs(_strings(file))
            found.update((text, None) for text in new if text not in others)
            if len(found) >= count:
                return list(found)[:count]
    return list(found)


@functools.lru_cache(maxsize=2)
def _documentation(parity: int) -> list[str]:
    """Paragraphs of documentation strings of every second module of the standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(folder.glob("*.py")) if file.name != "__future__.py"]
    return _paragraphs(string for file in files[parity::2] for string in _strings(file))


def _strings(file: Path) -> list[str]:
    tree = ast.parse(file.read_bytes())
    return [
        ast.get_docstring(node) or ""
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
    ]


def _paragraphs(documents: Iterable[str]) -> list[str]:
    found: dict[str, None] = {}
    for document in documents:
        for paragraph in document.split("\n\n"):
            text = re.sub(r"\s+", " ", paragraph).strip()
            if _MIN_CHARACTERS <= len(text) <= _MAX_CHARACTERS:
                found[text] = None
    return list(found)


def _spread(found: list[str], count: int) -> list[str]:
    step = max(1, len(found) // count)
    return found[::step][:count]
