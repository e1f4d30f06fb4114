"""Which requests are equal: a keyed hash of all that their answer depends on.

BLAKE2b under a random key of this process (RFC 7693, section 2.9): it says nothing to whoever
sees it, and nobody can look for two contents with one hash.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdk.policy import Policy
    from sdk.requests import Request

_KEY = os.urandom(64)


def may_share(policy: Policy, sensitivity: str) -> bool:
    """Whether content of that class may be shared and kept at all.

    Never the policy's strictest class, nor ``secret`` or anything above it.
    """
    classes = policy.classes
    if sensitivity not in classes:
        return False
    limit = classes.index("secret") if "secret" in classes else len(classes) - 1
    return classes.index(sensitivity) < min(limit, len(classes) - 1)


def key_of(request: Request, sensitivity: str, variant: str | None) -> bytes:
    """32 bytes, equal for requests that have the same answer.

    Args:
        request: One batch; how many labels are wanted of it does not matter.
        sensitivity: Its class, settled.
        variant: Variant that it is bound to; `None` for any.
    """
    digest = hashlib.blake2b(key=_KEY, digest_size=32)
    facts = (
        request.method, request.model, request.version, sensitivity, request.purpose,
        request.tenant, request.mode, request.objective, request.form, variant,
    )  # fmt: skip
    for fact in facts:
        _add(digest, None if fact is None else fact.encode("utf-8", "surrogatepass"))
    for item in request.items:
        if isinstance(item, str):
            item = item.encode("utf-8", "surrogatepass")
        _add(digest, item)
    feeds = request.feeds or {}
    for name in sorted(feeds):
        array = feeds[name]
        _add(digest, name.encode("utf-8", "surrogatepass"))
        _add(digest, f"{array.dtype.str} {array.dtype.name} {array.shape}".encode())
        if array.dtype.kind == "O":
            for element in array.reshape(-1):
                if isinstance(element, str):
                    _add(digest, b"s" + element.encode("utf-8", "surrogatepass"))
                else:
                    _add(digest, b"b" + bytes(element))
        else:
            _add(digest, array.tobytes())
    return digest.digest()


def _add(digest: Any, value: bytes | None) -> None:
    """Each part with its length, so that no two requests give the same bytes."""
    if value is None:
        digest.update(b"\xff" * 8)
    else:
        digest.update(len(value).to_bytes(8, "little"))
        digest.update(value)
