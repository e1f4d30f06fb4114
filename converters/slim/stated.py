"""What a person says about slicing on the command line."""

from __future__ import annotations

import msgspec

from converters.settings import Settings, SlimSettings
from nearfar.errors import ConfigError


def sliced(settings: Settings, **stated: int | float | None) -> Settings:
    """Settings with those of `SlimSettings` that were stated.

    Raises:
        ConfigError: One cannot be; names it.
    """
    found = settings.slim
    for name, value in stated.items():
        if value is None:
            continue
        raw = {**msgspec.to_builtins(found), name: value}
        try:
            found = msgspec.convert(raw, SlimSettings)
        except msgspec.ValidationError as exc:
            problem = str(exc).partition(" - at ")[0]
            raise ConfigError(
                f"--{name.replace('_', '-')} {value}: {problem}",
                field=f"slim.{name}",
                fix="See docs/reference/recipe.md",
            ) from exc
    return msgspec.structs.replace(settings, slim=found)
