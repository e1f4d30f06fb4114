"""Who was let in, and the one way in which everybody else is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from nearfar.errors import SecurityError

if TYPE_CHECKING:
    from cloud_runtime.auth import ApiKey
    from cloud_runtime.tokens import Issuer


class NotAdmitted(Exception):
    """Why a client is refused, without anything that it sent; for the server's log only."""


def refusal() -> SecurityError:
    """What a client is told, whatever was wrong."""
    return SecurityError(
        "The API key or token is missing or not accepted here",
        fix="Set `credentials` of this cloud to a key made with `nearfar cloud key add`, or "
        "`token_file` and `key_file` to a token that has not expired and the key it was issued for",
    )


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """A client that was let in.

    Attributes:
        name: Who it is; appears in the access log.
        scope: Whose request ids its own are; empty for clients that share nothing.
        api_key: The key that it gave.
        issuer: Who issued its token.
        expires_s: Unix time from which its token is no longer accepted.
    """

    name: str
    scope: str
    api_key: ApiKey | None = None
    issuer: Issuer | None = None
    expires_s: float | None = None


#: Stands for clients that gave no key, where that is allowed.
ANONYMOUS = Caller(name="anonymous", scope="")


def stamp_of(path: Path | None) -> tuple[int, int, int] | None:
    """Changes whenever the file is replaced, even within one tick of the clock."""
    if path is None:
        return None
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
