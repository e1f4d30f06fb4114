"""Which event loop moves the bytes: asyncio's own, or uvloop where it is installed.

uvloop is a drop-in replacement on libuv; what it saves is measured by `nearfar bench wire`.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

from nearfar.errors import ConfigError

#: ``auto`` takes uvloop where it is installed.
LoopName = Literal["auto", "asyncio", "uvloop"]

T = TypeVar("T")


def has_uvloop() -> bool:
    """Whether uvloop can be imported."""
    return importlib.util.find_spec("uvloop") is not None


def choose(name: LoopName) -> Literal["asyncio", "uvloop"]:
    """Settle ``auto``.

    Raises:
        ConfigError: uvloop is asked for by name and not installed.
    """
    if name == "auto":
        return "uvloop" if has_uvloop() else "asyncio"
    if name == "uvloop" and not has_uvloop():
        raise ConfigError(
            "The event loop uvloop is not installed",
            field="loop",
            fix="pip install 'nearfar[uvloop]' (not on Windows), or choose asyncio",
        )
    return name


def new_event_loop(name: LoopName = "auto") -> asyncio.AbstractEventLoop:
    """A loop that the caller runs and closes.

    Raises:
        ConfigError: As `choose`.
    """
    if choose(name) == "uvloop":
        import uvloop

        loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        return loop
    return asyncio.new_event_loop()


def run(coroutine: Coroutine[Any, Any, T], name: LoopName = "auto") -> T:
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
