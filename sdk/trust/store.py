"""The trust file: names of clouds, and the identities that they must have.

JSON, by default ``~/.config/nearfar/trust.json``. It holds nothing secret, but whoever can write it
decides which servers are trusted, so a file that others can write is refused.
Reference: docs/reference/configuration.md, "Trusted identities".
"""

from __future__ import annotations

import os
import stat
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from nearfar.errors import ConfigError, SecurityError
from nearfar.files import write_atomically
from nearfar.secure.identity import Pin, RotationStatement

#: A thousand entries; a larger file is another kind of file.
_MAX_FILE_BYTES = 1 << 20
#: How far ahead of this clock a statement may be.
_CLOCK_TOLERANCE_S = 3600.0


class PreviousPin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The identity before the last rotation.

    Attributes:
        pin: What it was.
        until_s: Unix time from which it is no longer trusted.
    """

    pin: str
    until_s: int


class TrustEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One trusted server.

    Attributes:
        name: What ``identity = "…"`` may say.
        pin: Its identity.
        added: UTC date and time at which `pin` was added, ISO 8601.
        source: Where `pin` came from, in words.
        previous: Its identity before, still trusted for a while.
    """

    name: str
    pin: str
    added: str
    source: str
    previous: PreviousPin | None = None

    def pins(self, now_s: float) -> tuple[Pin, ...]:
        """The identities to accept now, the newest first."""
        pins = [Pin.parse(self.pin)]
        if self.previous is not None and now_s < self.previous.until_s:
            pins.append(Pin.parse(self.previous.pin))
        return tuple(pins)


class _TrustFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int = 1
    entries: tuple[TrustEntry, ...] = ()


def default_path() -> Path:
    """``~/.config/nearfar/trust.json``."""
    return Path("~/.config/nearfar/trust.json").expanduser()


def read_trust(path: Path) -> tuple[TrustEntry, ...]:
    """All entries; none when there is no such file.

    Raises:
        ConfigError: The file is unreadable or malformed.
        SecurityError: Others can write it.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as exc:  # ValueError: a NUL character in the path
        raise ConfigError(
            f"The trust file {path} cannot be read: {getattr(exc, 'strerror', None) or exc}",
            field="trust_file",
            fix="Check the path and its permissions",
        ) from exc
    if status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
        raise SecurityError(
            f"The trust file {path} can be changed by other users "
            f"(mode {stat.S_IMODE(status.st_mode):04o}, owner {status.st_uid})",
            fix=f"Check its pins with `nearfar cloud identity show`, then `chmod 644 {path}` and "
            "make it your own",
        )
    try:
        trust = msgspec.json.decode(data, type=_TrustFile)
        for entry in trust.entries:
            entry.pins(0.0)
        if trust.version != 1 or len({entry.name for entry in trust.entries}) != len(trust.entries):
            raise ValueError("wrong version, or a name stands in it twice")
    except (ValueError, ConfigError) as exc:  # msgspec's errors are ValueErrors
        raise ConfigError(
            f"The trust file {path} is damaged: {exc}",
            field="trust_file",
            fix="Repair it, or move it away and add the pins again with `nearfar trust add`",
        ) from exc
    return trust.entries


def pins_of(identity: str, path: Path | None, *, now_s: float) -> tuple[Pin, ...]:
    """What ``identity = …`` means: the pin that it is, or those of the entry that it names.

    Raises:
        ConfigError: It is neither.
        SecurityError: Others can write the trust file.
    """
    if identity.startswith(Pin.PREFIXES):
        return (Pin.parse(identity),)
    path = path or default_path()
    return _entry(read_trust(path), identity, path).pins(now_s)


def add_pin(
    path: Path, name: str, pin: Pin, *, source: str, now_s: float, replace: bool = False
) -> None:
    """Trust an identity under a name.

    Raises:
        ConfigError: The name is taken by another identity and `replace` is not given.
    """
    entries = read_trust(path)
    taken = next((entry for entry in entries if entry.name == name), None)
    if taken is not None and taken.pin != str(pin) and not replace:
        raise ConfigError(
            f"{name!r} is trusted already, with the identity {taken.pin}",
            field="name",
            fix="Give the operator's rotation statement with --statement; give --replace only "
            "after the operator confirmed the new pin over another channel",
        )
    entry = TrustEntry(name=name, pin=str(pin), added=_utc(now_s), source=source)
    _write(path, (*(other for other in entries if other.name != name), entry))


def adopt(path: Path, name: str, statement: RotationStatement, *, now_s: float) -> TrustEntry:
    """Trust the identity that follows the present one, and the present one for a while.

    Returns:
        The entry as it is now.

    Raises:
        ConfigError: There is no such entry.
        SecurityError: The statement is not by the identity that is trusted, is not from this time,
            or comes after the old identity's end.
    """
    entries = read_trust(path)
    entry = _entry(entries, name, path)
    if entry.pin == str(statement.new):
        return entry
    if entry.pin != str(statement.old):
        raise SecurityError(
            f"The statement is by {statement.old}, and {name!r} is trusted as {entry.pin}",
            fix="Ask the operator for the statement that follows the identity you trust",
        )
    if not statement.issued_s - _CLOCK_TOLERANCE_S <= now_s < statement.until_s:
        raise SecurityError(
            f"The statement holds from {_utc(statement.issued_s)} until {_utc(statement.until_s)}, "
            f"and this machine's clock says {_utc(now_s)}",
            fix="Check the clock; if it is right, ask the operator for the new pin over another "
            "channel, and add it with --replace",
        )
    adopted = TrustEntry(
        name=name,
        pin=str(statement.new),
        added=_utc(now_s),
        source=f"rotation statement of {_utc(statement.issued_s)}",
        previous=PreviousPin(pin=str(statement.old), until_s=statement.until_s),
    )
    _write(path, tuple(adopted if other is entry else other for other in entries))
    return adopted


def remove(path: Path, name: str) -> None:
    """Trust an identity no longer.

    Raises:
        ConfigError: There is no such entry.
    """
    entries = read_trust(path)
    entry = _entry(entries, name, path)
    _write(path, tuple(other for other in entries if other is not entry))


def _entry(entries: tuple[TrustEntry, ...], name: str, path: Path) -> TrustEntry:
    for entry in entries:
        if entry.name == name:
            return entry
    known = ", ".join(entry.name for entry in entries) or "none"
    raise ConfigError(
        f"{name!r} is neither a pin nor a name in {path}",
        field="identity",
        fix="Copy the line that `nearfar cloud identity show` prints (it begins with nf1:), or add "
        f"it by name with `nearfar trust add`. Known names: {known}",
    )


def _write(path: Path, entries: tuple[TrustEntry, ...]) -> None:
    data = msgspec.json.format(msgspec.json.encode(_TrustFile(entries=entries)), indent=2) + b"\n"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, data, mode=0o600)
    except OSError as exc:
        raise ConfigError(
            f"The trust file {path} cannot be written: {exc.strerror}",
            field="trust_file",
            fix="Choose a path that you may write to with --file",
        ) from exc


def _utc(time_s: float) -> str:
    try:
        return datetime.fromtimestamp(time_s, timezone.utc).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return f"{time_s!r} s"
