"""Read TOML tables strictly: every mistake is a `ConfigError` naming file, key and fix."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from nearfar.errors import ConfigError

MAX_FILE_BYTES = 1 << 20  # far above any hand-written file; a wrong path may name a model
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")

_Choice = TypeVar("_Choice", bound=str)


def suggestion(word: str, known: Iterable[str]) -> str:
    """A fix for an unknown word: "Did you mean 'x'?", or the list of known words."""
    import difflib  # here: `from sdk import Client` should not pay for a mistake

    words = sorted(known)
    close = difflib.get_close_matches(word[:64], words, n=1, cutoff=0.6)
    if close:
        return f"Did you mean '{close[0]}'? Known here: {', '.join(words)}"
    return f"Use one of: {', '.join(words)}"


def read_text(path: Path) -> str:
    """Text of a configuration file.

    Raises:
        ConfigError: It is not there, not readable, too large or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: there is no such file", fix="Check the path, or create the file"
        ) from None
    except OSError as exc:
        raise ConfigError(
            f"{path}: it cannot be read ({exc.strerror or exc})",
            fix="Check the path and its permissions",
        ) from exc
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: it is larger than 1 MiB", fix="Check that the path is right")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ConfigError(
            f"{path}: byte {exc.start} is not UTF-8", fix="Save the file as UTF-8"
        ) from exc


def parse_toml(text: str, *, source: str) -> dict[str, object]:
    """Parse TOML text.

    Raises:
        ConfigError: It is not TOML.
    """
    # Here: a client made from arguments needs no parser.
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

    try:
        text.encode("utf-8")
        parsed: dict[str, object] = tomllib.loads(text)
    except UnicodeEncodeError as exc:
        raise ConfigError(
            f"{source}: character {exc.start} is not valid Unicode", fix="Save the file as UTF-8"
        ) from exc
    except (ValueError, RecursionError) as exc:
        # TOMLDecodeError is a ValueError; so is an integer of thousands of digits.
        what = "it is nested too deeply" if isinstance(exc, RecursionError) else str(exc)
        raise ConfigError(
            f"{source}: it is not valid TOML: {what}", fix="Correct the line that is named"
        ) from exc
    return parsed


class Table:
    """One TOML table, read key by key with the types that are meant.

    Args:
        values: The parsed table.
        where: What messages start with: the file, and the rule if there is one.
        name: Dotted name of the table, ``""`` for the top of the file.
        known: Keys that may stand in it; any other key is refused at once.
    """

    def __init__(
        self, values: Mapping[str, object], *, where: str, known: Iterable[str], name: str = ""
    ) -> None:
        self._values = values
        self.where = where
        self._name = name
        known = tuple(known)
        for key in values:
            if key not in known:
                raise self.error(key, "is not a known key", fix=suggestion(key, known))

    def error(self, key: str, problem: str, *, fix: str) -> ConfigError:
        """A `ConfigError` about one key of this table."""
        path = f"{self._name}.{key}" if self._name else key
        return ConfigError(f"{self.where}: {path!r} {problem}", field=path, fix=fix)

    def has(self, key: str) -> bool:
        """Whether the key is there."""
        return key in self._values

    def raw(self, key: str) -> object:
        """The value as parsed; `None` when absent."""
        return self._values.get(key)

    def required(self, key: str, *, fix: str) -> object:
        """The value as parsed; an error when absent."""
        if key not in self._values:
            raise self.error(key, "is missing", fix=fix)
        return self._values[key]

    def text(self, key: str, *, fix: str) -> str | None:
        """A non-empty string, or `None` when absent."""
        if key not in self._values:
            return None
        value = self._values[key]
        if not isinstance(value, str) or not value.strip():
            # The value is not shown: somebody may have pasted a key here.
            raise self.error(key, "must be a non-empty string", fix=fix)
        return value

    def name(self, key: str, *, max_length: int, fix: str) -> str | None:
        """A short name of plain characters, or `None` when absent."""
        value = self.text(key, fix=fix)
        if value is not None:
            self.check_name(key, value, max_length=max_length)
        return value

    def names(self, key: str, *, max_length: int, fix: str) -> tuple[str, ...] | None:
        """One value or a list of values, sorted and without repetition; `None` when absent."""
        if key not in self._values:
            return None
        value = self._values[key]
        items: list[object] = value if isinstance(value, list) else [value]
        if not items:
            raise self.error(key, "is an empty list, so nothing would ever match", fix=fix)
        found: set[str] = set()
        for item in items:
            if not isinstance(item, str):
                raise self.error(key, "must be a string or a list of strings", fix=fix)
            if "*" in item or "?" in item:
                raise self.error(
                    key,
                    f"holds {_clip(item)}, and there are no wildcards: values are compared exactly",
                    fix="List the values, or leave the key out to match all",
                )
            if not 0 < len(item) <= max_length or item != item.strip() or not item.isprintable():
                raise self.error(
                    key,
                    f"holds {_clip(item)}",
                    fix=f"Use 1 to {max_length} printable characters, no space at either end",
                )
            found.add(item)
        return tuple(sorted(found))

    def check_name(self, key: str, value: str, *, max_length: int) -> None:
        """Refuse a name that is too long or has other than plain ASCII characters."""
        if len(value) > max_length or not _NAME.match(value):
            raise self.error(
                key,
                f"holds {_clip(value)}, which is not a name",
                fix=f"Use 1 to {max_length} letters, digits, dots, underscores and hyphens, "
                "beginning with a letter or digit",
            )

    def choice(self, key: str, choices: tuple[_Choice, ...]) -> _Choice | None:
        """One of a few words, or `None` when absent."""
        if key not in self._values:
            return None
        value = self._values[key]
        for choice in choices:
            if value == choice:
                return choice
        if isinstance(value, str):
            problem, fix = f"is {_clip(value)}", suggestion(value, choices)
        else:
            problem, fix = "must be a string", f"Use one of: {', '.join(choices)}"
        raise self.error(key, problem, fix=fix)

    def boolean(self, key: str, *, default: bool) -> bool:
        """`true` or `false`."""
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false", fix="Write it without quotes")
        return value

    def table(self, key: str, *, known: Iterable[str]) -> Table:
        """A table inside this one; empty when absent."""
        value = self._values.get(key, {})
        path = f"{self._name}.{key}" if self._name else key
        if not isinstance(value, dict):
            raise self.error(
                key, "must be a table", fix=f"Write {key} = {{ … }} or a [{path}] section"
            )
        return Table(value, where=self.where, known=known, name=path)


def _clip(value: str) -> str:
    return repr(value if len(value) <= 40 else value[:40] + "…")
