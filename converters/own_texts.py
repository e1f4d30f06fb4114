"""Texts of a person's own, to verify and to calibrate with in place of Python's documentation.

One text a line; or JSONL, of which each line is a string or an object with ``text`` and, for
classifiers, ``label``. They are only read: nothing of them goes into a bundle.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from converters import texts
from converters.text_file import read_text_file
from nearfar.errors import ConversionError

#: As many are read at most, as of rows in an ``.npz``.
_MAX_TEXTS = 2000
#: One in so many is calibrated with, and never judged on.
_CALIBRATED = 4
#: With fewer, ten nearest neighbours say nothing.
_LEAST_TO_JUDGE = 48


@dataclass(frozen=True, slots=True)
class OwnText:
    """A text, and the number of its right class where that is known."""

    text: str
    label: int | None = None


def judged_texts(path: Path | None, count: int) -> list[str]:
    """Texts that variants of a sentence encoder are compared on.

    Args:
        path: The person's; of these three in four, whatever `count` says. `None` takes `count`
            passages of Python's documentation.
        count: How many.

    Raises:
        ConversionError: The file cannot be read, or holds too few texts.
    """
    if path is None:
        return texts.passages(count)
    found = _distinct(path)
    return [text for number, text in enumerate(found) if number % _CALIBRATED]


def calibration_texts(path: Path | None, count: int) -> list[str]:
    """At most `count` texts that nothing is judged on; otherwise as `judged_texts`."""
    if path is None:
        return texts.calibration_passages(count)
    return _distinct(path)[::_CALIBRATED][:count]


def read_texts(path: Path, labels: Sequence[str] = ()) -> list[OwnText]:
    """The texts of a file, in their order.

    Args:
        path: UTF-8; a name that ends in ``.jsonl`` says JSONL.
        labels: Names of the classes, for ``label``: a name, or a number.

    Raises:
        ConversionError: It cannot be read, or a line does not fit; names the line.
    """
    text = read_text_file(
        path,
        "texts",
        less=f"{_MAX_TEXTS} texts are read at most",
        form="Give a UTF-8 file with one text a line, or JSONL (--samples)",
    )
    found: list[OwnText] = []
    # Not splitlines(), which also ends lines at characters that texts may have inside.
    for number, line in enumerate(text.split("\n"), 1):
        if len(found) == _MAX_TEXTS:
            break
        if not line.strip():
            continue
        is_json = path.suffix.lower() == ".jsonl"
        found.append(_of_json(path, number, line, labels) if is_json else OwnText(line.strip()))
    if not found:
        raise ConversionError(f"{path} holds no text", fix="Give a file with one text a line")
    return found


def _of_json(path: Path, number: int, line: str, labels: Sequence[str]) -> OwnText:
    try:
        stored = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise ConversionError(
            f"{path}, line {number} is no JSON ({exc})", fix="Write one JSON value a line"
        ) from exc
    text = stored.get("text") if isinstance(stored, dict) else stored
    label = stored.get("label") if isinstance(stored, dict) and labels else None
    if not isinstance(text, str) or not text.strip():
        raise ConversionError(
            f"{path}, line {number} has no text",
            fix='Write {"text": "…"} or {"text": "…", "label": "…"} on each line',
        )
    if label is None:
        return OwnText(text)
    if isinstance(label, str) and label in labels:
        return OwnText(text, labels.index(label))
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
        return OwnText(text, label)
    raise ConversionError(
        f"{path}, line {number} has a label that the model does not know",
        fix=f"Its labels are: {', '.join(labels[:20])}{', …' if len(labels) > 20 else ''}",
    )


def _distinct(path: Path) -> list[str]:
    found = list(dict.fromkeys(one.text for one in read_texts(path)))
    if len(found) < _LEAST_TO_JUDGE:
        raise ConversionError(
            f"{path} holds {len(found)} different texts, and at least {_LEAST_TO_JUDGE} are needed "
            "to compare neighbours",
            fix="Give more texts of the kind that the model will see",
        )
    return found
