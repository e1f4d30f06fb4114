"""Where jobs wait, and how many, how large and how long."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from nearfar.errors import ConfigError
from nearfar.wire.limits import MIB

if TYPE_CHECKING:
    from sdk.toml_table import Table

_NUMBERS = ("max_jobs", "max_bytes", "max_age_s", "keep_s")
KEYS = ("file", "key_file", "run", *_NUMBERS)


class JobsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One queue of jobs.

    Attributes:
        file: The SQLite database; made when the first job is submitted.
        key_file: Holds the 32-byte key of the database, mode 0600; ``FILE.key`` when `None`. Made
            together with the database.
        key: In code only, instead of a key file: the 32 bytes, or a function that gives them (from
            a keyring or a TPM). Not shown by `repr`.
        max_jobs: Jobs that the queue holds, ended ones included; more are `Overloaded`.
        max_bytes: What they may take together, checked when a job is submitted.
        max_age_s: A job that has not ended this many seconds after it was submitted is given up.
        keep_s: For how many seconds an ended job and its result are kept.
        run: Whether this client runs the jobs of the queue, once it uses the queue at all;
            `False` leaves that to another process, such as ``nearfar jobs run``.

    Raises:
        ConfigError: A field does not fit; `ConfigError.field` names it.
    """

    file: Path
    key_file: Path | None = None
    key: bytes | Callable[[], bytes] | None = None
    max_jobs: int = 1000
    max_bytes: int = 64 * MIB
    max_age_s: float = 7 * 86400.0
    keep_s: float = 86400.0
    run: bool = True

    def __post_init__(self) -> None:
        for name in ("max_jobs", "max_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"'{name}' is {value!r}", field=name, fix="Give a whole number, 1 or more"
                )
        for name in ("max_age_s", "keep_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"'{name}' is not a number", field=name, fix="Give seconds")
            if not 0 < value < math.inf:
                raise ConfigError(
                    f"'{name}' is {value!r}", field=name, fix="Give a positive number of seconds"
                )
        if self.key is not None and self.key_file is not None:
            raise ConfigError(
                "'key' stands beside 'key_file'", field="key", fix="Keep one of the two"
            )

    def __repr__(self) -> str:
        return f"JobsConfig(file={str(self.file)!r}, max_jobs={self.max_jobs}, run={self.run})"


def parse_jobs(table: Table, path: Callable[[str], Path | None]) -> JobsConfig:
    """The section ``[jobs]`` of a configuration file.

    Args:
        table: The section.
        path: Reads one of its keys as a path.

    Raises:
        ConfigError: Names the file, the key, what is wrong and the fix.
    """
    table.required("file", fix='Add file = "~/.local/state/nearfar/jobs.db"')
    file = path("file")
    assert file is not None
    numbers: dict[str, Any] = {name: table.raw(name) for name in _NUMBERS if table.has(name)}
    run = table.boolean("run", default=True)
    try:
        return JobsConfig(file=file, key_file=path("key_file"), run=run, **numbers)
    except ConfigError as exc:
        clause = exc.problem.partition(f"'{exc.field}' ")[2]
        raise table.error(exc.field, clause, fix=exc.fix) from exc
