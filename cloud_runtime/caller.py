"""Who was let in and what for, and the one way in which everybody else is refused."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from nearfar.errors import SecurityError

if TYPE_CHECKING:
    from cloud_runtime.auth import ApiKey
    from cloud_runtime.tokens import Issuer
    from nearfar.wire.messages import Generate, Infer, ModelOffer, Resume


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
        models: Names and patterns of the models that its token allows; `None` allows all.
        max_priority: Highest priority that its token allows; `None` allows all.
    """

    name: str
    scope: str
    api_key: ApiKey | None = None
    issuer: Issuer | None = None
    expires_s: float | None = None
    models: tuple[str, ...] | None = None
    max_priority: int | None = None

    def may_use(self, model: str) -> bool:
        """Whether its token allows a model of that name, be there one or not."""
        return self.models is None or any(fnmatchcase(model, name) for name in self.models)


#: Stands for clients that gave no key, where that is allowed.
ANONYMOUS = Caller(name="anonymous", scope="")


def permit(caller: Caller | None, request: Infer | Generate | Resume) -> None:
    """Hold a request against the limits of the token; asked before anything is looked up.

    What a `Resume` is about, only the server knows: see `permit_model`.

    Raises:
        SecurityError: The token does not allow it; names the claim.
    """
    if caller is None:
        raise refusal()
    model: str | None = getattr(request, "model", None)
    if model is not None:
        permit_model(caller, model)
    priority = getattr(request, "priority", 0)
    if caller.max_priority is not None and priority > caller.max_priority:
        raise SecurityError(
            f"The token's claim max_priority allows priorities up to {caller.max_priority}, "
            f"and this request has {priority}",
            fix=f"Ask with priority={caller.max_priority} or lower, or ask the issuer of the token "
            "for another",
        )


def permit_model(caller: Caller | None, model: str) -> None:
    """Hold the name of a model against the limits of the token.

    Raises:
        SecurityError: The token does not allow it. It reads the same whether there is such a model.
    """
    if caller is None:
        raise refusal()
    if not caller.may_use(model):
        raise SecurityError(
            f"The token's claim models does not allow the model {model!r}",
            fix="Ask for a model that the cloud lists for this token, or ask its issuer for one "
            "that allows it",
        )


def visible(caller: Caller | None, offers: Iterable[ModelOffer]) -> tuple[ModelOffer, ...]:
    """Of the models that are served, those that the caller may use."""
    if caller is None:
        raise refusal()
    return tuple(offer for offer in offers if caller.may_use(offer.manifest.name))


def stamp_of(path: Path | None) -> tuple[int, int, int] | None:
    """Changes whenever the file is replaced, even within one tick of the clock."""
    if path is None:
        return None
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
