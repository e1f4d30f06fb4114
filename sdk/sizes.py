"""Requests of which only the size is known, for `Client.explain`: no content is at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nearfar.errors import InvalidInput
from sdk.requests import Method, Request
from sdk.routing.types import RequestSize

if TYPE_CHECKING:
    from nearfar.bundle.manifest import Manifest
    from nearfar.generation import GenerationOptions

_METHOD_OF_TASK: dict[str, Method] = {
    "text-generation": "generate",
    "embedding": "embed",
    "classification": "classify",
    "tensor": "infer",
}
#: As in `sdk.requests`: English runs at 4 to 5 bytes per token.
_BYTES_PER_TOKEN = 4
#: No request is larger; beyond that somebody mistyped.
_MOST = 2**40


def method_of(manifest: Manifest | None, input_tokens: int | None) -> Method:
    """The method that such a request would come from; a guess while nobody knows the model."""
    if manifest is not None:
        return _METHOD_OF_TASK[manifest.task]
    return "infer" if input_tokens is None else "generate"


def sized_request(
    model: str,
    method: Method,
    manifest: Manifest | None,
    *,
    input_tokens: int | None,
    upload_bytes: int | None,
    options: GenerationOptions | None,
    common: dict[str, Any],
) -> Request:
    """A request without content, with the size that one with content would have.

    Args:
        model: Name of the model.
        method: See `method_of`.
        manifest: Of the model, where it is known.
        input_tokens: Tokens of the prompt or of the texts; guessed from the bytes without it.
        upload_bytes: What would be sent; guessed from the tokens without it.
        options: For ``generate``.
        common: Settings that all requests have.

    Raises:
        InvalidInput: A size is negative or absurd.
    """
    for name, value in (("input_tokens", input_tokens), ("upload_bytes", upload_bytes)):
        if value is not None and not 0 <= value <= _MOST:
            raise InvalidInput(f"{name} is {value}", field=name, fix="Give a size, 0 or more")
    tokens = input_tokens
    if tokens is None:
        tokens = 1 + (upload_bytes or 0) // _BYTES_PER_TOKEN
    size_bytes = tokens * _BYTES_PER_TOKEN if upload_bytes is None else upload_bytes
    if method == "generate":
        assert options is not None
        size = RequestSize(
            input_tokens=tokens, max_new_tokens=options.max_new_tokens, upload_bytes=size_bytes
        )
        return Request(method=method, model=model, options=options, size=size, **common)
    if method == "infer":
        elements = size_bytes // _item_bytes(manifest) if upload_bytes is not None else tokens
    elif method == "embed":
        elements = tokens
    else:
        elements = 0  # of byte strings `Knowledge.size` knows better than the number of bytes
    size = RequestSize(upload_bytes=size_bytes, input_elements=elements)
    return Request(method=method, model=model, size=size, **common)


def _item_bytes(manifest: Manifest | None) -> int:
    """Bytes of an element of the model's first input."""
    from nearfar.tensors import NUMPY_OF

    spec = manifest.inputs[0] if manifest is not None and manifest.inputs else None
    dtype = None if spec is None else NUMPY_OF.get(spec.datatype)
    return max(1, dtype.itemsize) if dtype is not None else 4
