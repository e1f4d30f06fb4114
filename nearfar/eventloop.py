"""Which event loop moves the bytes: asyncio's own, or uvloop where it is installed.

uvloop is a drop-in replacement on libuv; what it saves is measured by `nearfar bench wire`.
"""

from __future__ import annotations

import asyncio
import importlib.util
from asyncio import sslproto
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

from nearfar.errors import ConfigError

#: What a server's process reads of a TLS connection at once, as long as asyncio's layer does it:
#: see `nearfar.tls`. Its 256 KiB are allocated and zeroed for each connection, idle or not (299 kB
#: each instead of about 70); smaller ones cost large messages more turns of the loop (1 MiB: a
#: fifth more processor time at 32 KiB, two thirds at 16).
TLS_BUFFER_BYTES = 32 * 1024

#: ``auto`` takes uvloop where it is installed.
LoopName = Literal["auto", "asyncio", "uvloop"]

T = TypeVar("T")


def limit_tls_buffers(size_bytes: int = TLS_BUFFER_BYTES) -> None:
    """Let asyncio keep less memory for each TLS connection of this process.

    For a process that is all ours, such as a server's: it changes asyncio's setting for all
    connections made from now on. uvloop has buffers of its own, which take memory only when used.
    """
    # In 3.11 to 3.14; typeshed does not know it. Before, reading took memory only while it read.
    if hasattr(sslproto.SSLProtocol, "max_size"):
        sslproto.SSLProtocol.max_size = size_bytes


def has_uvloop() -> bool:
    """Whether uvloop can be imported."""
    return importlib.util.find_spec("uvloop") is not None


def choose(name: str) -> Literal["asyncio", "uvloop"]:
    """Settle ``auto``.

    Args:
        name: A `LoopName`.

    Raises:
        ConfigError: It is none, or uvloop is asked for by name and not installed.
    """
    if name == "auto":
        return "uvloop" if has_uvloop() else "asyncio"
    if name == "asyncio":
        return "asyncio"
    if name != "uvloop":
        raise ConfigError(
            f"There is no event loop {name!r}", field="loop", fix="Choose auto, asyncio or uvloop"
        )
    if not has_uvloop():
        raise ConfigError(
            "The event loop uvloop is not installed",
            field="loop",
            fix="pip install 'nearfar[uvloop]' (not on Windows), or choose asyncio",
        )
    return "uvloop"


def new_event_loop(name: str = "auto") -> asyncio.AbstractEventLoop:
    """A loop that the caller runs and closes.

    Raises:
        ConfigError: As `choose`.
    """
    if choose(name) == "uvloop":
        import uvloop

        loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        return loop
    return asyncio.new_event_loop()


def run(coroutine: Coroutine[Any, Any, T], name: str = "auto") -> T:
    """As `asyncio.run`, on the named loop.

    Raises:
        ConfigError: As `choose`.
    """
    try:
        chosen = choose(name)
    except ConfigError:
        coroutine.close()
        raise
    if chosen == "uvloop":
        import uvloop

        result: T = uvloop.run(coroutine)
        return result
    return asyncio.run(coroutine)


def mark_seen(future: asyncio.Future[Any]) -> None:
    """Read a future's error, so that asyncio does not report it when nobody waits any more.

    For `asyncio.Future.add_done_callback`.
    """
    if not future.cancelled():
        future.exception()
