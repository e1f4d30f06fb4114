"""What steps of earlier conversions made, found again by what went into them.

A step's key is the SHA-256 of its name, its inputs' hashes, its settings, the versions of the
packages that it uses and the converters' own code. An entry appears by a rename, whole or not at
all, and its hashes are checked when it is used, so a killed conversion leaves nothing harmful.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from converters.libraries import tool_versions
from nearfar.bundle.hashing import sha256_of
from nearfar.bundle.paths import path_problem, walk_files
from nearfar.errors import BundleError, ConfigError

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_ENTRY = "entry.json"
_OUTPUT = "output"
#: Folders that begin so are not whole yet.
TEMPORARY = ".writing-"
#: No step takes a day; what is older was left by a killed process.
_STALE_AFTER_S = 86_400.0


class _Entry(msgspec.Struct, frozen=True):
    """``entry.json``.

    Attributes:
        is_made: Whether the step made an output.
        is_folder: Whether the output is a folder.
        files: Path in the output to SHA-256; the path of a single file is "".
        value: What the step found, as JSON.
    """

    is_made: bool = False
    is_folder: bool = False
    files: dict[str, str] = {}
    value: msgspec.Raw = msgspec.Raw(b"null")


class StepCache:
    """A folder of results. Several processes may use one at the same time.

    Args:
        root: The folder; made when something is stored. `None` caches nothing.

    Attributes:
        hits: How many results were found.
    """

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self.hits = 0

    def output(
        self,
        step: str,
        parts: Mapping[str, object],
        target: Path,
        make: Callable[[Path], bool | None],
        *,
        tools: Sequence[str],
    ) -> bool:
        """Have `target`, a file or folder, made by `make` or copied from an earlier time.

        Args:
            step: Name of the step.
            parts: Everything that `make` depends on, as JSON can hold it; files by their hashes.
            target: Where the result shall be.
            make: Writes its argument; returns `False` if it made none, and is believed later too.
            tools: Packages that `make` uses.

        Returns:
            Whether there is a result.
        """
        folder = self._folder(step, parts, tools)
        entry = self._find(folder)
        if entry is not None and folder is not None:
            if not entry.is_made:
                self.hits += 1
                return False
            if self._copy_out(folder, entry, target):
                self.hits += 1
                return True
        is_made = make(target) is not False
        if folder is not None:
            self._store(folder, target if is_made else None, b"null")
        return is_made

    def value(
        self,
        step: str,
        parts: Mapping[str, object],
        kind: type[_T],
        make: Callable[[], _T],
        *,
        tools: Sequence[str],
    ) -> _T:
        """What `make` finds, or found earlier; `kind` is a type that msgspec can decode."""
        folder = self._folder(step, parts, tools)
        entry = self._find(folder)
        if entry is not None:
            try:
                found = msgspec.json.decode(entry.value, type=kind)
            except (msgspec.DecodeError, UnicodeDecodeError):
                logger.warning("cache entry %s cannot be read and is made anew", folder)
            else:
                self.hits += 1
                return found
        made = make()
        if folder is not None:
            self._store(folder, None, msgspec.json.encode(made))
        return made

    def has(self, step: str, parts: Mapping[str, object], *, tools: Sequence[str]) -> bool:
        """Whether there is a result, though it may turn out to be damaged."""
        return self._find(self._folder(step, parts, tools)) is not None

    def _folder(self, step: str, parts: Mapping[str, object], tools: Sequence[str]) -> Path | None:
        if self.root is None:
            return None
        key = {
            "step": step,
            "parts": dict(parts),
            "tools": tool_versions(*tools),
            "code": _code_digest(),
        }
        return self.root / step / _sha256(msgspec.json.encode(key, order="sorted"))

    def _find(self, folder: Path | None) -> _Entry | None:
        if folder is None:
            return None
        try:
            return msgspec.json.decode((folder / _ENTRY).read_bytes(), type=_Entry)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError):
            logger.warning("cache entry %s cannot be read and is made anew", folder)
            shutil.rmtree(folder, ignore_errors=True)
            return None

    def _copy_out(self, folder: Path, entry: _Entry, target: Path) -> bool:
        source = folder / _OUTPUT
        try:
            if entry.is_folder:
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, target)
            for path, digest in entry.files.items():
                if path and path_problem(path) is not None:
                    raise ValueError(path)
                if sha256_of(target / path if path else target) != digest:
                    raise ValueError(path)
            if entry.is_folder and set(walk_files(target)) != set(entry.files):
                raise ValueError(str(target))
        except (OSError, BundleError, ValueError):
            logger.warning("cache entry %s is damaged and is made anew", folder)
            _remove(target)
            shutil.rmtree(folder, ignore_errors=True)
            return False
        return True

    def _store(self, folder: Path, made: Path | None, value: bytes) -> None:
        assert self.root is not None
        temporary = self.root / (TEMPORARY + secrets.token_hex(6))
        try:
            temporary.mkdir(parents=True)
            files: dict[str, str] = {}
            if made is not None and made.is_dir():
                shutil.copytree(made, temporary / _OUTPUT)
                files = {path: sha256_of(made / path) for path in walk_files(made)}
            elif made is not None:
                shutil.copyfile(made, temporary / _OUTPUT)
                files = {"": sha256_of(made)}
            entry = _Entry(
                is_made=made is not None,
                is_folder=made is not None and made.is_dir(),
                files=files,
                value=msgspec.Raw(value),
            )
            (temporary / _ENTRY).write_bytes(msgspec.json.encode(entry))
            folder.parent.mkdir(exist_ok=True)
            os.rename(temporary, folder)
        except OSError as exc:
            # Another process stored the same, or the disk is full: the conversion goes on.
            if not folder.exists():
                logger.warning("a result could not be cached (%s)", exc.strerror)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            _remove_stale(self.root)


def mark_entry(folder: Path) -> None:
    """Make a folder below a cache's step one of its entries, so that it is shown and cleared."""
    (folder / _ENTRY).write_bytes(msgspec.json.encode(_Entry()))


def default_root() -> Path:
    """``nearfar/convert`` in the user's cache folder (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "nearfar" / "convert"


def contents(root: Path) -> dict[str, tuple[int, int]]:
    """Step to how many results there are, and how many bytes they take."""
    found: dict[str, tuple[int, int]] = {}
    for step in sorted(path for path in root.glob("*") if not path.name.startswith(".")):
        entries = [path for path in step.iterdir() if (path / _ENTRY).is_file()]
        size = sum((entry / file).stat().st_size for entry in entries for file in walk_files(entry))
        if entries:
            found[step.name] = (len(entries), size)
    return found


def clear(root: Path) -> int:
    """Remove all results; returns how many bytes that frees.

    Raises:
        ConfigError: The folder holds something that is no result of a step.
    """
    size = sum(bytes_ for _, bytes_ in contents(root).values())
    for path in sorted(root.glob("*")):
        is_ours = path.name.startswith(TEMPORARY) or (
            path.is_dir() and all((entry / _ENTRY).is_file() for entry in path.iterdir())
        )
        if not is_ours:
            raise ConfigError(
                f"{path} is not a result of a conversion",
                field="cache",
                fix="Name the cache folder with --cache, or remove that yourself",
            )
        shutil.rmtree(path)
    return size


def digest_of_arrays(feeds: Sequence[Mapping[str, np.ndarray]]) -> str:
    """SHA-256 of inputs: names, types, shapes and numbers."""
    digest = hashlib.sha256()
    for feed in feeds:
        for name in sorted(feed):
            array = np.ascontiguousarray(feed[name])
            digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
            digest.update(array.tobytes() if array.dtype.kind != "O" else repr(array).encode())
    return digest.hexdigest()


def digest_of_path(path: Path) -> str:
    """SHA-256 of a file; of a folder that of its files' names and hashes."""
    if path.is_file():
        return sha256_of(path)
    return _sha256("".join(f"{sha256_of(path / f)}  {f}\n" for f in walk_files(path)).encode())


@lru_cache(maxsize=1)
def _code_digest() -> str:
    """Of the converters' own code: a step that was rewritten makes other results."""
    root = Path(__file__).parent
    return _sha256(b"".join(path.read_bytes() for path in sorted(root.rglob("*.py"))))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_stale(root: Path) -> None:
    for path in root.glob(TEMPORARY + "*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_AFTER_S:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue
