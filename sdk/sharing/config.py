"""How much of one model's answers is kept, and how long."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec

from nearfar.errors import ConfigError
from nearfar.wire.limits import MIB

if TYPE_CHECKING:
    from sdk.toml_table import Table

KEYS = ("max_entries", "max_bytes", "ttl_s")


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Equal requests to one model share their computation.

    Attributes:
        max_entries: Answers that are kept; the one that was not used for longest makes room.
        max_bytes: What their outputs may take in memory.
        ttl_s: How long an answer counts, in seconds; 0 keeps none, so that only requests that are
            under way at the same time are shared.

    Raises:
        ConfigError: A field does not fit; `ConfigError.field` names it.
    """

    max_entries: int = 256
    max_bytes: int = 16 * MIB
    ttl_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("max_entries", "max_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"'{name}' is {value!r}", field=name, fix="Give a whole number, 1 or more"
                )
        ttl_s = self.ttl_s
        if isinstance(ttl_s, bool) or not isinstance(ttl_s, (int, float)):
            raise ConfigError("'ttl_s' is not a number", field="ttl_s", fix="Give seconds")
        if not 0 <= ttl_s < math.inf:
            raise ConfigError(
                f"'ttl_s' is {ttl_s!r}", field="ttl_s", fix="Give seconds, or 0 to keep nothing"
            )


def parse_caches(section: Table, models: tuple[str, ...]) -> dict[str, CacheConfig]:
    """The section ``[cache]`` of a configuration file: one table for each model.

    Raises:
        ConfigError: Names the file, the key, what is wrong and the fix.
    """
    found: dict[str, CacheConfig] = {}
    for model in models:
        table = section.table(model, known=KEYS)
        fields: dict[str, Any] = {name: table.raw(name) for name in KEYS if table.has(name)}
        try:
            found[model] = CacheConfig(**fields)
        except ConfigError as exc:
            clause = exc.problem.partition(f"'{exc.field}' ")[2]
            raise table.error(exc.field, clause, fix=exc.fix) from exc
    return found
