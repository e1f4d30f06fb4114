"""`nearfar.toml`: where models, cloud and policy are, and how to route.

Reference: docs/reference/configuration.md.
"""

from __future__ import annotations

import logging
import math
import os
import re
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from nearfar.errors import ConfigError
from nearfar.secure.shaping import Shaping, check_shaping
from sdk.routing.types import CONFIDENCE, HEDGE_BUDGET, MODES, OBJECTIVES, Mode, Objective
from sdk.toml_table import Table, parse_toml, read_text, suggestion

if TYPE_CHECKING:
    from nearfar.secure.attestation import Verifier
    from nearfar.secure.identity import Pin
    from sdk.cascade.settings import CascadeConfig
    from sdk.jobs.config import JobsConfig
    from sdk.sharing.config import CacheConfig

logger = logging.getLogger(__name__)

# RFC 7518 tokens and API keys are far shorter; a larger file is not a key.
MAX_CREDENTIAL_BYTES = 16 * 1024

_TOP_KEYS = ("models", "cloud", "routing", "policy", "cascade", "jobs", "cache", "telemetry")
_ROUTING_KEYS = (
    "mode", "objective", "deadline_ms", "confidence", "hedge_budget", "state", "record",
)  # fmt: skip
_CLOUD_KEYS = (
    "url", "identity", "credentials", "token_file", "key_file", "trust_file", "ca_file", "region",
    "shaping", "attestation",
)  # fmt: skip
#: `nearfar.secure.identity.Pin.PREFIXES`, without importing cryptography.
_PIN_PREFIXES = ("nf1:", "nf2:")
_TRUST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")
_PLUG_IN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_ATTESTATION_FIX = 'Write MODULE:NAME, as in attestation = "package.module:Verifier"'
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
        identity: The server's pinned identity, ``nf1:…``, or the name of an entry of the trust
            file.
        credentials: Where the API key is: ``file:PATH`` or ``env:NAME``; ``""`` for none. Never
            the key itself. Not shown by `repr`.
        token_file: Instead of `credentials`: file with a short-lived token; read for every new
            connection, so whatever renews it may replace it at any time. Needs `key_file`.
        key_file: The client's key that the token names, made by ``nearfar client-key new``.
        token_provider: Instead of `token_file` or `credentials`, in code only: gives a fresh token
            (with `key_file`) or an API key (without) for every new connection. A plain function,
            which runs in a thread, or a coroutine function.
        trust_file: Where `identity` is looked up by name; ``~/.config/nearfar/trust.json`` when
            `None`.
        attestation: ``package.module:name`` of a plug-in that must accept the server's evidence;
            imported when the first connection is made.
        verifier: Instead of `attestation`, in code only: the plug-in itself.
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
    token_file: Path | None = None
    key_file: Path | None = None
    token_provider: Callable[[], str | Awaitable[str]] | None = None
    trust_file: Path | None = None
    attestation: str | None = None
    verifier: Verifier | None = None
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
        is_pin = self.identity.startswith(_PIN_PREFIXES) and len(self.identity) >= 8
        if not is_pin and not _TRUST_NAME.fullmatch(self.identity):
            raise ConfigError(
                f"{where}: 'identity' is not a pinned identity",
                field="identity",
                fix="Copy the line that `nearfar cloud identity show` prints; it begins with nf1:",
            )
        given = [
            bool(self.credentials),
            self.token_file is not None,
            self.token_provider is not None,
        ]
        if sum(given) > 1:
            raise ConfigError(
                f"{where}: 'token_file' stands beside another way to authenticate",
                field="token_file",
                fix="Keep one of credentials, token_file and token_provider",
            )
        if self.token_file is not None and self.key_file is None:
            raise ConfigError(
                f"{where}: 'token_file' needs 'key_file'",
                field="token_file",
                fix='Name the key that the token was issued for: key_file = "client.key"',
            )
        if self.key_file is not None and self.token_file is None and self.token_provider is None:
            raise ConfigError(
                f"{where}: 'key_file' needs 'token_file'",
                field="key_file",
                fix='Name the file with the token: token_file = "token.txt"',
            )
        # The value is never shown: it may be a key that somebody pasted here.
        if self.credentials and not _is_reference(self.credentials):
            raise ConfigError(
                f"{where}: 'credentials' does not say where the key is",
                field="credentials",
                fix=_CREDENTIALS_FIX,
            )
        if self.attestation is not None:
            # Never skipped because it cannot be understood: an empty one is refused, too.
            problem = ""
            if not _PLUG_IN.fullmatch(self.attestation):
                problem = "does not name a plug-in"
            elif self.verifier is not None:
                problem = "stands beside 'verifier'"
            if problem:
                raise ConfigError(
                    f"{where}: 'attestation' {problem}", field="attestation", fix=_ATTESTATION_FIX
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
        """Read the API key or the token from where it is, at the moment it is needed.

        Returns:
            The key or token, ``""`` when no credentials are configured.

        Raises:
            ConfigError: It is not there; the message never holds the key.
        """
        if self.token_file is not None:
            return self._read(self.token_file, field="token_file", noun="token")
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
            return self.checked_token(value)
        return self._read(Path(reference).expanduser(), field="credentials", noun="credentials")

    def pins(self, now_s: float) -> tuple[Pin, ...]:
        """The identities that the server may have now: one, or two during a rotation.

        Raises:
            ConfigError: `identity` is neither a pin nor in the trust file.
            SecurityError: Others can write the trust file.
        """
        from sdk.trust.store import pins_of

        return pins_of(self.identity, self.trust_file, now_s=now_s)

    def checked_token(self, token: str) -> str:
        """The token or key, if it can be one.

        Raises:
            ConfigError: It cannot; the message never holds it.
        """
        return _checked_token(token, self.name, self._token_field)

    @property
    def _token_field(self) -> str:
        if self.token_provider is not None:
            return "token_provider"
        return "credentials" if self.token_file is None else "token_file"

    def _read(self, path: Path, *, field: str, noun: str) -> str:
        try:
            with path.open("rb") as file:
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                    logger.warning("%s file %s can be read by others: chmod 600", noun, path)
                data = file.read(MAX_CREDENTIAL_BYTES + 1)
        except (OSError, ValueError) as exc:  # ValueError: a NUL character in the path
            raise ConfigError(
                f"cloud '{self.name}': the {noun} file {path} cannot be read "
                f"({getattr(exc, 'strerror', None) or exc})",
                field=field,
                fix="Write the key or token into it, readable for you only (chmod 600)",
            ) from exc
        return self.checked_token(data.decode("ascii", "replace").strip())


class RoutingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults for every request.

    Attributes:
        mode: Which routes the app asks for, within policy.
        objective: What to prefer among routes that meet the deadline.
        deadline_ms: Time an answer may take; `None` for as long as it takes.
        confidence: Probability with which a route must be expected within the deadline to count as
            being in time; above 0 and below 1.
        hedge_budget: Extra requests that starting the other route beside a late one may cause, as a
            part of all requests; 0 never starts it before the first has failed.
        state: File in which the client keeps what routes took, across restarts; `None` for none.
        record: File in which the client writes down its last decisions; `None` for none.

    Raises:
        ConfigError: A field does not fit; `ConfigError.field` names it.
    """

    mode: Mode = "auto"
    objective: Objective = "latency"
    deadline_ms: float | None = None
    confidence: float = CONFIDENCE
    hedge_budget: float = HEDGE_BUDGET
    state: Path | None = None
    record: Path | None = None

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
        if not 0 < self.confidence < 1:
            raise ConfigError(
                f"'confidence' is {self.confidence!r}",
                field="confidence",
                fix="Give a probability, as in confidence = 0.95",
            )
        if not 0 <= self.hedge_budget <= 1:
            raise ConfigError(
                f"'hedge_budget' is {self.hedge_budget!r}",
                field="hedge_budget",
                fix="Give a part of all requests, as in hedge_budget = 0.05, or 0 for no hedges",
            )


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed `nearfar.toml`.

    Attributes:
        models_store: Directory of bundles; `None` when the app runs no local models.
        trusted_keys: Public keys, as text (``ed25519:…``) or paths; when there are any, only
            bundles that one of them signed run on this device.
        clouds: Cloud runtimes by name; at most one in this version, see `cloud`.
        routing: Defaults for every request.
        policy_file: Policy; `None` keeps everything on the device.
        default_sensitivity: Class of requests that state none; `None` takes the policy's strictest.
        cascade: Agreements with the cloud model; `None` when there is no such section.
        source: File it came from, for messages.
        jobs: Where jobs wait; `None` for no queue.
        telemetry: Whether requests are told to OpenTelemetry.
        caches: Models whose equal requests share their computation.
    """

    models_store: Path | None = None
    trusted_keys: tuple[str, ...] = ()
    clouds: dict[str, CloudConfig] = {}
    routing: RoutingConfig = RoutingConfig()
    policy_file: Path | None = None
    default_sensitivity: str | None = None
    cascade: CascadeConfig | None = None
    source: str = "configuration"
    jobs: JobsConfig | None = None
    telemetry: bool = False
    caches: dict[str, CacheConfig] = {}

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
    models = top.table("models", known=("store", "trusted_keys"))
    policy = top.table("policy", known=("file", "default_sensitivity"))
    return Config(
        models_store=_path(models, "store", base, must_exist=False),
        trusted_keys=_trusted_keys(models, base),
        clouds=_clouds(top, base),
        routing=_routing(top.table("routing", known=_ROUTING_KEYS), base),
        policy_file=_path(policy, "file", base, must_exist=True),
        default_sensitivity=policy.name(
            "default_sensitivity", max_length=24, fix="Name one of the policy's classes"
        ),
        cascade=_cascade(top, base) if top.has("cascade") else None,
        source=source,
        jobs=_jobs(top, base),
        telemetry=top.table("telemetry", known=("enabled",)).boolean("enabled", default=False),
        caches=_caches(top),
    )


def _caches(top: Table) -> dict[str, CacheConfig]:
    if not top.has("cache"):
        return {}
    from sdk.sharing.config import parse_caches

    value = top.raw("cache")
    models = tuple(value) if isinstance(value, dict) else ()
    return parse_caches(top.table("cache", known=models), models)


def _jobs(top: Table, base: Path) -> JobsConfig | None:
    if not top.has("jobs"):
        return None
    from sdk.jobs.config import KEYS, parse_jobs

    table = top.table("jobs", known=KEYS)
    return parse_jobs(table, lambda key: _path(table, key, base, must_exist=False))


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
        config = CloudConfig(
            name=name,
            url=table.text("url", fix=url_fix) or "",
            identity=table.text("identity", fix=identity_fix) or "",
            credentials=credentials,
            token_file=_path(table, "token_file", base, must_exist=False),
            key_file=_path(table, "key_file", base, must_exist=True),
            trust_file=_path(table, "trust_file", base, must_exist=True),
            ca_file=_path(table, "ca_file", base, must_exist=True),
            region=table.name("region", max_length=32, fix='Write a name, as in region = "eu"'),
            shaping=check_shaping("balanced" if shaping is None else shaping),
            attestation=table.text("attestation", fix=_ATTESTATION_FIX),
        )
        if not config.identity.startswith(_PIN_PREFIXES):
            config.pins(0.0)  # a name that is not known should be noticed now
    except ConfigError as exc:
        raise _in_table(exc, table) from exc
    return config


def _routing(table: Table, base: Path) -> RoutingConfig:
    for key in ("mode", "objective"):
        table.text(key, fix='Write a word in quotes, as in mode = "auto"')
    deadline_ms = _number(table, "deadline_ms", "must be a number of milliseconds")
    confidence = _number(table, "confidence", "must be a number between 0 and 1")
    budget = _number(table, "hedge_budget", "must be a number from 0 to 1")
    try:
        return RoutingConfig(
            mode=check_mode(str(table.raw("mode") or "auto")),
            objective=check_objective(str(table.raw("objective") or "latency")),
            deadline_ms=None if deadline_ms is None else float(deadline_ms),
            confidence=CONFIDENCE if confidence is None else float(confidence),
            hedge_budget=HEDGE_BUDGET if budget is None else float(budget),
            state=_path(table, "state", base, must_exist=False),
            record=_path(table, "record", base, must_exist=False),
        )
    except OverflowError:
        raise table.error(
            "deadline_ms", "is too large", fix="Leave it out for no deadline"
        ) from None
    except ConfigError as exc:
        raise _in_table(exc, table) from exc


def _cascade(top: Table, base: Path) -> CascadeConfig:
    from sdk.cascade.settings import AUDIT_SHARE, CascadeConfig, ModelCascade

    table = top.table("cascade", known=("calibrations", "audit", "model"))
    folder = table.text("calibrations", fix='Write a path in quotes: calibrations = "calibrations"')
    audit = _number(table, "audit", "must be a number from 0 to 1")
    share = AUDIT_SHARE if audit is None else float(audit)
    value = table.raw("model") or {}
    section = table.table("model", known=tuple(value) if isinstance(value, dict) else ())
    models = {}
    for name in value if isinstance(value, dict) else ():
        own = section.table(name, known=("min_agreement", "audit", "require"))
        own.required("min_agreement", fix="Add min_agreement = 0.98")
        target = _number(own, "min_agreement", "must be a number between 0 and 1")
        audit = _number(own, "audit", "must be a number from 0 to 1")
        try:
            models[name] = ModelCascade(
                min_agreement=float(target or 0.0),
                audit=share if audit is None else float(audit),
                require=own.boolean("require", default=False),
            )
        except ConfigError as exc:
            raise _in_table(exc, own) from exc
    try:
        ModelCascade(min_agreement=0.5, audit=share)  # its own check of `audit`
    except ConfigError as exc:
        raise _in_table(exc, table) from exc
    return CascadeConfig(
        calibrations=None if folder is None else _resolve(folder, base),
        audit=share,
        models=models,
    )


def _number(table: Table, key: str, problem: str) -> int | float | None:
    value = table.raw(key)
    if not table.has(key):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise table.error(key, problem, fix="Write it without quotes")
    return value


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


def _trusted_keys(table: Table, base: Path) -> tuple[str, ...]:
    if not table.has("trusted_keys"):
        return ()
    fix = 'Write a list of keys, as in trusted_keys = ["release.pub"]; without it, all bundles run'
    value = table.raw("trusted_keys")
    # An empty list could be meant as "nobody", and would be read as "everybody".
    if not isinstance(value, list) or not value:
        raise table.error("trusted_keys", "must be a list with at least one key", fix=fix)
    keys = []
    for key in value:
        if not isinstance(key, str) or not key.strip() or "\0" in key:
            raise table.error("trusted_keys", "holds something that is not a key", fix=fix)
        if not key.startswith("ed25519:"):
            path = _resolve(key, base)
            if not path.is_file():
                raise table.error(
                    "trusted_keys", f"names {path}, and there is no such file", fix=fix
                )
            key = str(path)
        keys.append(key)
    return tuple(keys)


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


def _checked_token(token: str, cloud: str, field: str) -> str:
    if not token or len(token) > MAX_CREDENTIAL_BYTES or not token.isascii() or " " in token:
        raise ConfigError(
            f"cloud '{cloud}': what '{field}' names does not hold "
            + ("an API key" if field == "credentials" else "a token"),
            field=field,
            fix="It must hold what `nearfar cloud key add` or `nearfar cloud token issue` printed, "
            "and nothing else",
        )
    return token
