"""SHA-256 of files, remembered for as long as the file is visibly the same one."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from nearfar.errors import BundleError

#: Called with the number of bytes just hashed.
Progress = Callable[[int], None]

_CHUNK_BYTES = 1 << 20
_MEMO_ENTRIES = 4096

# The change time is part of the key because, unlike the modification time, no ordinary call can
# set it back after a file was altered. The path is not: a renamed file is the same file.
_Key = tuple[int, int, int, int, int]
_memo: OrderedDict[_Key, str] = OrderedDict()
_memo_lock = threading.Lock()


def _key(status: os.stat_result) -> _Key:
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def sha256_of(path: Path, progress: Progress | None = None) -> str:
    """Lower-case hex SHA-256 of one file. Thread-safe.

    Args:
        path: A regular file.
        progress: Told about every piece; a remembered file is reported as one piece.

    Raises:
        BundleError: The file cannot be read, or changed while it was read.
    """
    try:
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            key = _key(before)
            with _memo_lock:
                known = _memo.get(key)
                if known is not None:
                    _memo.move_to_end(key)
            if known is not None:
                if progress is not None:
                    progress(before.st_size)
                return known
            digest = hashlib.sha256()
            buffer = memoryview(bytearray(_CHUNK_BYTES))
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                if progress is not None:
                    progress(count)
            after = os.fstat(file.fileno())
    except OSError as exc:
        raise BundleError(
            f"File {path} cannot be read ({exc.strerror})",
            fix="Check its permissions and the disk",
        ) from exc
    if _key(after) != key:
        raise BundleError(
            f"File {path} changed while it was read",
            fix="Wait for the copy or conversion to finish, then try again",
        )
    result = digest.hexdigest()
    with _memo_lock:
        _memo[key] = result
        while len(_memo) > _MEMO_ENTRIES:
            _memo.popitem(last=False)
    return result
