"""Limits as people write them: ``1%``, ``20MiB``, ``0.3x``, ``5ms``."""

from __future__ import annotations

import math
import re

import msgspec

from converters.settings import Gates
from nearfar.errors import ConfigError

_UNITS = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip


def with_limits(
    gates: Gates, *, quality: str | None = None, size: str | None = None, latency: str | None = None
) -> Gates:
    """Gates with those limits that were stated.

    Raises:
        ConfigError: One cannot be read; names the option.
    """
    changes: dict[str, object] = {}
    if quality is not None:
        changes["max_quality_drop"] = share(quality)
    if size is not None:
        # Said beside a recipe, a limit takes the place of both forms.
        changes.update(max_size_bytes=None, max_size_share=None)
        changes.update(_size(size))
    if latency is not None:
        changes["max_latency_ms"] = _milliseconds(latency)
    return msgspec.structs.replace(gates, **changes)


def share(stated: str) -> float:
    """``1%`` or ``0.01`` as a share.

    Raises:
        ConfigError: It is neither.
    """
    text = stated.strip()
    value = _number(text[:-1]) / 100 if text.endswith("%") else _number(text)
    if not 0 <= value <= 1:
        raise ConfigError(
            f"{stated!r} is not a share between 0 and 1",
            field="max_quality_drop",
            fix="Write it as 1% or as 0.01",
        )
    return value


def _size(stated: str) -> dict[str, object]:
    text = stated.strip().lower().replace("×", "x")
    if text.endswith("x") and 0 < _number(text[:-1]) < math.inf:
        return {"max_size_share": _number(text[:-1])}
    found = re.fullmatch(r"([0-9.]+)\s*([a-z]*)", text)
    # A bare number is in the unit that sizes of models are told in.
    unit = (found.group(2) or "mib") if found else ""
    value = _number(found.group(1)) * _UNITS.get(unit, math.nan) if found else math.nan
    if not 1 <= value < math.inf:
        raise ConfigError(
            f"{stated!r} is not a size",
            field="max_size",
            fix="Write it as 20MiB, or as 0.3x for a share of the size in 32 bits",
        )
    return {"max_size_bytes": int(value)}


def _milliseconds(stated: str) -> float:
    text = stated.strip().lower()
    value = _number(text[:-2] if text.endswith("ms") else text)
    if not 0 < value < math.inf:
        raise ConfigError(
            f"{stated!r} is not a time in milliseconds",
            field="max_latency",
            fix="Write it as 5 or as 5ms",
        )
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
