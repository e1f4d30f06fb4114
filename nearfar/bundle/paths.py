"""Paths inside a bundle: relative, POSIX, and never leaving the bundle's folder.

A manifest is input from outside. Its paths are checked as text first, and on disk second, because
a harmless name can still be a symbolic link to somewhere else.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from nearfar.errors import BundleError

MANIFEST_NAME = "manifest.json"

#: Longest path, in UTF-8 bytes, and longest part of one: what ext4, XFS and APFS can all store.
MAX_PATH_BYTES = 1024
MAX_PART_BYTES = 255


def path_problem(path: str) -> str | None:
    """Why `path` may not appear in a manifest, or `None` when it may."""
    if not path:
        return "is empty"
    if path.startswith("/"):
        return "is absolute"
    if "\\" in path:
        return "contains a backslash"
    if any(ord(char) < 32 or ord(char) == 127 for char in path):
        return "contains a control character"
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "is not valid Unicode"
    parts = encoded.split(b"/")
    if len(encoded) > MAX_PATH_BYTES or max(map(len, parts)) > MAX_PART_BYTES:
        return "is too long"
    if b"" in parts or b"." in parts:
        return "has an empty part or a '.' part"
    if b".." in parts:
        return "has a '..' part"
    if len(parts[0]) >= 2 and parts[0][1:2] == b":":
        return "has a drive letter"
    return None


def confined_file(root: Path, path: str) -> Path:
    """The regular file that `path` names inside `root`; no part of it is a symbolic link.

    Args:
        root: The bundle's folder.
        path: Path from the manifest.

    Raises:
        BundleError: The path leaves the bundle, is a link, is missing, or is not a regular file.
    """
    problem = path_problem(path)
    if problem is not None:
        raise BundleError(
            f"Path {path!r} in {root / MANIFEST_NAME} {problem}",
            fix="A bundle names its files by relative paths with '/' between the parts",
        )
    current = root
    parts = path.split("/")
    for position, part in enumerate(parts):
        current = current / part
        try:
            mode = os.lstat(current).st_mode
        except OSError as exc:
            raise BundleError(
                f"File {path!r} of bundle {root} cannot be found ({exc.strerror})",
                fix="Copy the bundle again or convert the model again",
            ) from exc
        if stat.S_ISLNK(mode):
            raise BundleError(
                f"File {path!r} of bundle {root} is or lies behind a symbolic link",
                fix="Replace the link by the file itself",
            )
        is_last = position == len(parts) - 1
        if not (stat.S_ISREG(mode) if is_last else stat.S_ISDIR(mode)):
            raise BundleError(
                f"{path!r} of bundle {root} is not a regular file",
                fix="Copy the bundle again or convert the model again",
            )
    return current


def walk_files(folder: Path, prefix: str = "") -> Iterator[str]:
    """Relative POSIX paths of everything below `folder` that is not a folder, sorted.

    Links are yielded like files and never followed.
    """
    for entry in sorted(os.scandir(folder), key=lambda item: item.name):
        path = f"{prefix}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from walk_files(folder / entry.name, f"{path}/")
        else:
            yield path
