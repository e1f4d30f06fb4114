"""What several targets use: how an input is split, the harness's keys and clock, a folder."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nearfar.secure.identity import ServerIdentity

NOW_S = 1_800_000_000.0
IDENTITY = ServerIdentity(bytes(range(32)))
NEXT_IDENTITY = ServerIdentity(bytes(range(32, 64)))


def pieces(data: bytes) -> Iterator[bytes]:
    """Splits one input into messages: each a little-endian u16 length and so many bytes."""
    position = 0
    while position + 2 <= len(data):
        size = int.from_bytes(data[position : position + 2], "little")
        yield data[position + 2 : position + 2 + size]
        position += 2 + size


def joined(*messages: bytes) -> bytes:
    """The input that `pieces` splits into these messages."""
    return b"".join(len(message).to_bytes(2, "little") + message for message in messages)


@functools.cache
def directory() -> Path:
    """For targets that read files; removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="nearfar-fuzz-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def file(name: str, data: bytes, mode: int = 0o600) -> Path:
    """A file with these contents, in place of the one before."""
    path = directory() / name
    path.write_bytes(data)
    path.chmod(mode)
    return path
