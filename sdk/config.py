"""`nearfar.toml`: where models, cloud and policy are, and how to route.

Reference: docs/reference/configuration.md.
"""

from __future__ import annotations

import logging
import math
import os
import stat
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from nearfar.errors import ConfigError
from nearfar.secure.shaping import Shaping, check_shaping
from sdk.routing.types import MODES, OBJECTIVES, Mode, Objective
from sdk.toml_table import Table, parse_toml, read_text, suggestion

logger = logging.getLogger(__name__)

# RFC 7518 tokens and API keys are far shorter; a larger file is not a key.
MAX_CREDENTIAL_BYTES = 16 * 1024

_TOP_KEYS = ("models", "cloud", "routing", "policy")
_CLOUD_KEYS = ("url", "identity", "credentials", "ca_file", "region", "shaping")
_SHAPING_FIX = 'Write a word in quotes, as in shaping = "balanced"'
_CREDENTIALS_FIX = 'Write credentials = "file:PATH" or "env:NAME"; never the key itself'


def check_mode(mode: str) -> Mode:
    """The mode, checked.

    Raises:
        ConfigError: There is no such mode.
    """
    for known in MODES:
        if mode == known:
            return known
    raise ConfigError(f"'mode' is {str(mode)[:40]!r}", field="mode", fix=suggestion(mode, MODES))


def check_objective(objective: str) -> Objective:
    """The objective, checked.

    Raises:
        ConfigError: There is no such objective, or nothing measures it yet.
    """
    for known in OBJECTIVES:
        if objective == known:
            return known
    if objective in ("cost", "energy"):
        raise ConfigError(
            f"'objective' is '{objective}', and this version has no {objective} figures to go by",
            field="objective",
            fix="Use 'latency' or 'quality'",
        )
    raise ConfigError(
        f"'objective' is {str(objective)[:40]!r}",
        field="objective",
        fix=suggestion(objective, OBJECTIVES),
    )


class CloudConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One cloud runtime.

    Attributes:
        url: ``wss://host[:port]/v1/nearfar``.
        identity: The server's pinned identity, ``nf1:…``.
        credentials: Where the API key is: ``file:PATH`` or ``env:NAME``; ``""`` for none. Never
            the key itself. Not shown by `repr`.
        ca_file: PEM file of certificate authorities to trust; `None` uses the system's.
        region: Where it stands, for policy; `None` when not stated.
        shaping: How sizes and times of the traffic are hidden: ``off``, ``balanced``, ``strict``.
        name: Name in the configuration file.

    Raises:
        ConfigError: A field does not fit; `ConfigError.field` names it.
    """

    url: str
    identity: str
    credentials: str = ""
    ca_file: Path | None = None
    region: str | None = None
    shaping: Shaping = "balanced"
    name: str = "main"

    def __post_init__(self) -> None:
        where = f"cloud '{self.name}'"
        url_problem = _url_problem(self.url)
        if url_problem:
            raise ConfigError(
                f"{where}: 'url' {url_problem}",
                field="url",
                fix='Write it as in "wss://inference.example.com/v1/nearfar"',
            )
        # The checksum is verified where the pin is used; this catches a swapped or empty value.
        if not self.identity.startswith("nf1:") or len(self.identity) < 8:
            raise ConfigError(
                f"{where}: 'identity' is not a pinned identity",
                field="identity",
                fix="Copy the line that `nearfar cloud identity show` prints; it begins with nf1:",
            )
        # The value is never shown: it may be a key that somebody pasted here.
        if self.credentials and not _is_reference(self.credentials):
            raise ConfigError(
                f"{where}: 'credentials' does not say where the key is",
                field="credentials",
                fix=_CREDENTIALS_FIX,
            )
        try:
            check_shaping(self.shaping)
        except ConfigError as exc:
            raise ConfigError(f"{where}: {exc.problem}", field=exc.field, fix=exc.fix) from None

    def __repr__(self) -> str:
        return (
            f"CloudConfig(name={self.name!r}, url={self.url!r}, identity={self.identity!r}, "
            f"ca_file={self.ca_file!r}, region={self.region!r}, shaping={self.shaping!r})"
        )

    def token(self) -> str:
        """Read the API key from where `credentials` says, at the moment it is needed.

        Returns:
            The key, ``""`` when no credentials are configured.

        Raises:
            ConfigError: It is not there; the message never holds the key.
        """
        if not self.credentials:
            return ""
        scheme, _, reference = self.credentials.partition(":")
        if scheme == "env":
            value = os.environ.get(reference, "").strip()
            if not value:
                raise ConfigError(
                    f"cloud '{self.name}': the environment variable {reference} is not set",
                    field="credentials",
                    fix="Set it to the API key",
                )
            return _checked_token(value, self.name)
        path = Path(reference).expanduser()
        try:
            with path.open("rb") as file:
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                    logger.warning("credentials file %s can be read by others: chmod 600", path)
                data = file.read(MAX_CREDENTIAL_BYTES + 1)
        except (OSError, ValueError) as exc:  # ValueError: a NUL character in the path
            raise ConfigError(
                f"cloud '{self.name}': the credentials file {path} cannot be read "
                f"({getattr(exc, 'strerror', None) or exc})",
                field="credentials",
                fix="Write the API key into it, readable for you only (chmod 600)",
            ) from exc
        return _checked_token(data.decode("ascii", "replace").strip(), self.name)


class RoutingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults for every request.

    Attributes:
        mode: Which routes the app asks for, within policy.
        objective: What to prefer among routes that meet the deadline.
        deadline_ms: Time an answer may take; `None` for as long as it takes.

    Raises:
        ConfigError: A field does not fit; `ConfigError.field` names it.
    """

    mode: Mode = "auto"
    objective: Objective = "latency"
    deadline_ms: float | None = None

    def __post_init__(self) -> None:
        check_mode(self.mode)
        check_objective(self.objective)
        deadline_ms = self.deadline_ms
        if deadline_ms is not None and not 0 < deadline_ms < math.inf:
            raise ConfigError(
                f"'deadline_ms' is {deadline_ms!r}",
                field="deadline_ms",
                fix="Give a positive number of milliseconds, or leave it out",
            )


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed `nearfar.toml`.

    Attributes:
        models_store: Directory of bundles; `None` when the app runs no local models.
        clouds: Cloud runtimes by name; at most one in this version, see `cloud`.
        routing: Defaults for every request.
        policy_file: Policy; `None` keeps everything on the device.
        default_sensitivity: Class of requests that state none; `None` takes the policy's strictest.
        source: File it came from, for messages.
    """

    models_store: Path | None = None
    clouds: dict[str, CloudConfig] = {}
    routing: RoutingConfig = RoutingConfig()
    policy_file: Path | None = None
    default_sensitivity: str | None = None
    source: str = "configuration"

    @property
    def cloud(self) -> CloudConfig | None:
        """The cloud runtime, if one is configured."""
        return next(iter(self.clouds.values()), None)


def load_config(path: str | Path) -> Config:
    """Read a configuration file.

    ``~`` is expanded; relative paths are relative to the file.

    Raises:
        ConfigError: Names the file, the key, what is wrong and the fix.
    """
    path = Path(path).expanduser()
    return parse_config(read_text(path), source=str(path), base=path.absolute().parent)


def parse_config(text: str, *, source: str = "nearfar.toml", base: Path | None = None) -> Config:
    """Parse the text of a configuration file.

    Args:
        text: TOML.
        source: File name for messages.
        base: Directory that relative paths are relative to; the current one by default.

    Raises:
        ConfigError: Names the file, the key, what is wrong and the fix.
    """
    base = base or Path.cwd()
    top = Table(parse_toml(text, source=source), where=source, known=_TOP_KEYS)
    models = top.table("models", known=("store",))
    policy = top.table("policy", known=("file", "default_sensitivity"))
    return Config(
        models_store=_path(models, "store", base, must_exist=False),
        clouds=_clouds(top, base),
        routing=_routing(top.table("routing", known=("mode", "objective", "deadline_ms"))),
        policy_file=_path(policy, "file", base, must_exist=True),
        default_sensitivity=policy.name(
            "default_sensitivity", max_length=24, fix="Name one of the policy's classes"
        ),
        source=source,
    )


def _clouds(top: Table, base: Path) -> dict[str, CloudConfig]:
    value = top.raw("cloud") if top.has("cloud") else {}
    section_fix = 'Write a section with a name, as in [cloud.main], with url = "wss://…"'
    if not isinstance(value, dict):
        raise top.error("cloud", "must be a table", fix=section_fix)
    if any(key in value and not isinstance(value[key], dict) for key in _CLOUD_KEYS):
        raise top.error("cloud", "is a section without a name", fix=section_fix)
    if len(value) > 1:
        raise top.error(
            "cloud",
            f"holds {len(value)} clouds, and this version uses one",
            fix="Keep one [cloud.NAME] section",
        )
    section = top.table("cloud", known=tuple(value))
    return {
        name: _cloud(name, section.table(name, known=_CLOUD_KEYS), section, base) for name in value
    }


def _cloud(name: str, table: Table, section: Table, base: Path) -> CloudConfig:
    section.check_name(name, name, max_length=48)
    url_fix = 'Add url = "wss://inference.example.com/v1/nearfar"'
    identity_fix = "Add the line that `nearfar cloud identity show` prints on the server"
    table.required("url", fix=url_fix)
    table.required("identity", fix=identity_fix)
    credentials = table.text("credentials", fix=_CREDENTIALS_FIX) or ""
    if credentials.startswith("keyring:"):
        raise table.error(
            "credentials", "names a keyring, which this version does not read", fix=_CREDENTIALS_FIX
        )
    if credentials.startswith("file:"):
        credentials = f"file:{_resolve(credentials.removeprefix('file:'), base)}"
    shaping = table.text("shaping", fix=_SHAPING_FIX)
    try:
        return CloudConfig(
            name=name,
            url=table.text("url", fix=url_fix) or "",
            identity=table.text("identity", fix=identity_fix) or "",
            credentials=credentials,
            ca_file=_path(table, "ca_file", base, must_exist=True),
            region=table.name("region", max_length=32, fix='Write a name, as in region = "eu"'),
            shaping=check_shaping("balanced" if shaping is None else shaping),
        )
    except ConfigError as exc:
        raise _in_table(exc, table) from exc


def _routing(table: Table) -> RoutingConfig:
    for key in ("mode", "objective"):
        table.text(key, fix='Write a word in quotes, as in mode = "auto"')
    deadline_ms = table.raw("deadline_ms")
    if table.has("deadline_ms") and (
        isinstance(deadline_ms, bool) or not isinstance(deadline_ms, (int, float))
    ):
        raise table.error(
            "deadline_ms", "must be a number of milliseconds", fix="Write it without quotes"
        )
    try:
        return RoutingConfig(
            mode=check_mode(str(table.raw("mode") or "auto")),
            objective=check_objective(str(table.raw("objective") or "latency")),
            deadline_ms=float(deadline_ms) if isinstance(deadline_ms, (int, float)) else None,
        )
    except OverflowError:
        raise table.error(
            "deadline_ms", "is too large", fix="Leave it out for no deadline"
        ) from None
    except ConfigError as exc:
        raise _in_table(exc, table) from exc


def _in_table(error: ConfigError, table: Table) -> ConfigError:
    """The same error, named by file and dotted key."""
    if error.problem.startswith(table.where):
        return error
    clause = error.problem.rpartition(f"'{error.field}' ")[2]
    return table.error(error.field, clause, fix=error.fix)


def _path(table: Table, key: str, base: Path, *, must_exist: bool) -> Path | None:
    text = table.text(key, fix=f'Write a path in quotes, as in {key} = "~/nearfar/…"')
    if text is None:
        return None
    if "\0" in text:
        raise table.error(key, "holds a NUL character", fix="Remove it")
    path = _resolve(text, base)
    if must_exist and not path.is_file():
        raise table.error(
            key, f"names {path}, and there is no such file", fix="Check the path, or create it"
        )
    return path


def _resolve(text: str, base: Path) -> Path:
    try:
        return base / Path(text).expanduser()
    except RuntimeError:  # ~someone who does not exist
        return base / text


def _url_problem(url: str) -> str:
    """What is wrong with a cloud's URL; ``""`` when nothing is. Never repeats the URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "is not a URL"
    if parts.scheme != "wss":
        return f"begins with {parts.scheme[:16]!r}, and only wss (TLS) is allowed"
    if parts.username is not None or parts.password is not None:
        return "holds a user name or password, which belong into 'credentials'"
    if not parts.hostname or any(c.isspace() or not c.isprintable() for c in url):
        return "has no host"
    if port == 0 or parts.fragment:
        return "has a port or fragment that cannot be connected to"
    return ""


def _is_reference(credentials: str) -> bool:
    scheme, separator, reference = credentials.partition(":")
    return scheme in ("file", "env") and bool(separator) and bool(reference.strip())


def _checked_token(token: str, cloud: str) -> str:
    if not token or len(token) > MAX_CREDENTIAL_BYTES or not token.isascii() or " " in token:
        raise ConfigError(
            f"cloud '{cloud}': what 'credentials' names does not hold an API key",
            field="credentials",
            fix="It must hold the key that `nearfar cloud key add` printed, and nothing else",
        )
    return token
