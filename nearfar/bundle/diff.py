"""What differs between two bundles, by what their manifests say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from nearfar.bundle.manifest import Manifest

#: Lists whose entries have a name: they are compared by it, so that order and gaps do not matter.
_KEYS = {
    "variants": ("id",),
    "files": ("path",),
    "quality": ("metric", "reference"),
    "latency": ("machine", "execution_provider", "input_tokens"),
    "inputs": ("name",),
    "outputs": ("name",),
}


class Difference(msgspec.Struct, frozen=True):
    """One field that is not the same.

    Attributes:
        field: Dotted path, with names in brackets: ``variants[int8].quality[cosine_mean …].value``.
        before: What the first bundle says; `None` when it says nothing.
        after: What the second one says.
    """

    field: str
    before: str | int | float | bool | None
    after: str | int | float | bool | None


def differences(before: Manifest, after: Manifest, *, files_only: bool = False) -> list[Difference]:
    """All fields that differ, in the order of their names.

    Args:
        before: One manifest.
        after: The other one.
        files_only: Look at paths, sizes and hashes of files, and at nothing else. *Two conversions
            of one model time it differently, and write the same files.*
    """
    one, other = dict(_flat("", before)), dict(_flat("", after))
    fields = sorted(one.keys() | other.keys())
    return [
        Difference(field, one.get(field), other.get(field))
        for field in fields
        if one.get(field) != other.get(field) and (not files_only or "files[" in field)
    ]


def _flat(field: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, msgspec.Struct):
        value = msgspec.to_builtins(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{field}.{key}" if field else key, inner)
    elif isinstance(value, (list, tuple)):
        yield from _flat_list(field, value)
    else:
        yield field, value


def _flat_list(field: str, values: list[Any] | tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    keys = _KEYS.get(field.rpartition(".")[2])
    if keys is None:
        if values:
            yield field, ", ".join(str(value) for value in values)
        return
    for value in values:
        name = " ".join(str(value[key]) for key in keys if value.get(key) is not None)
        rest = {key: inner for key, inner in value.items() if key not in keys}
        yield from _flat(f"{field}[{name}]", rest)
