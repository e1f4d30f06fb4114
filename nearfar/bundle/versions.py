"""Semantic versions: what is one, and which is newer. Source: semver.org 2.0.0, section 11."""

from __future__ import annotations

import re

_NUMBER = r"(?:0|[1-9][0-9]{0,17})"
_PART = rf"(?:{_NUMBER}|[0-9]*[a-zA-Z-][0-9a-zA-Z-]*)"
_VERSION = re.compile(
    rf"({_NUMBER})\.({_NUMBER})\.({_NUMBER})(?:-({_PART}(?:\.{_PART})*))?"
    r"(?:\+[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?",
    re.ASCII,
)

VersionKey = tuple[int, int, int, int, tuple[tuple[int, int, str], ...]]


def is_version(text: str) -> bool:
    """Whether `text` is a semantic version such as ``1.4.0`` or ``2.0.0-rc.1``."""
    return len(text) <= 64 and _VERSION.fullmatch(text) is not None


def version_key(text: str) -> VersionKey:
    """Sort key: a newer version has a larger key; a pre-release comes before its release.

    Raises:
        ValueError: `text` is not a semantic version.
    """
    match = _VERSION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a semantic version")
    major, minor, patch, pre = match.groups()
    parts = tuple(
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in (pre.split(".") if pre else ())
    )
    return (int(major), int(minor), int(patch), 0 if pre else 1, parts)
