from __future__ import annotations

import asyncio
import sys
from asyncio import sslproto

import pytest

from nearfar import eventloop
from nearfar.errors import ConfigError


async def module_of_the_running_loop() -> str:
    return type(asyncio.get_running_loop()).__module__


def test_auto_takes_asyncio_where_uvloop_is_missing(monkeypatch):
    monkeypatch.setattr(eventloop, "has_uvloop", lambda: False)
    assert eventloop.run(module_of_the_running_loop()).startswith("asyncio.")
    with pytest.raises(ConfigError, match="uvloop is not installed"):
        eventloop.run(module_of_the_running_loop(), "uvloop")
    with pytest.raises(ConfigError, match="uvloop is not installed"):
        eventloop.new_event_loop("uvloop")


def test_auto_takes_uvloop_where_it_is_installed():
    pytest.importorskip("uvloop")
    assert eventloop.run(module_of_the_running_loop()).startswith("uvloop")
    assert eventloop.run(module_of_the_running_loop(), "asyncio").startswith("asyncio.")
    loop = eventloop.new_event_loop()
    try:
        assert loop.run_until_complete(module_of_the_running_loop()).startswith("uvloop")
    finally:
        loop.close()


def test_an_unknown_loop_is_refused():
    with pytest.raises(ConfigError, match="no event loop 'trio'"):
        eventloop.choose("trio")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio kept no such buffers before 3.11")
def test_tls_buffers_are_asyncios_own_setting(monkeypatch):
    # Fails when asyncio renames it: then idle connections would silently grow by 229 kB.
    monkeypatch.setattr(sslproto.SSLProtocol, "max_size", sslproto.SSLProtocol.max_size)
    eventloop.limit_tls_buffers(4096)
    assert sslproto.SSLProtocol.max_size == 4096
