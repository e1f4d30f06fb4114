"""Read `nearfar.toml`.

Reference: docs/reference/configuration.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nearfar.errors import ConfigError
from nearfar.secure.shaping import check_shaping
from sdk.config import (
    ATTESTATION_FIX,
    CREDENTIALS_FIX,
    PIN_PREFIXES,
    CloudConfig,
    Config,
    RoutingConfig,
    check_mode,
    check_objective,
)
from sdk.routing.budget import RETRY_SHARE
from sdk.routing.types import CONFIDENCE, HEDGE_BUDGET, OBJECTIVES
from sdk.toml_table import Table, parse_toml, read_text

if TYPE_CHECKING:
    from sdk.cascade.settings import CascadeConfig
    from sdk.jobs.config import JobsConfig
    from sdk.routing.objectives import Price
    from sdk.sharing.config import CacheConfig

_TOP_KEYS = (
    "models",
    "edge",
    "cloud",
    "routing",
    "policy",
    "cascade",
    "jobs",
    "cache",
    "telemetry",
)
_ROUTING_KEYS = (
    "mode", "objective", "weights", "deadline_ms", "confidence", "hedge_budget", "retry_budget",
    "state", "record",
)  # fmt: skip
# `sdk.routing.objectives.PRICE_KEYS`, which is imported where there is a price only.
_PRICE_KEYS = (
    "cost_per_request", "cost_per_1k_input_tokens", "cost_per_1k_output_tokens", "power_w",
    "energy_per_request_j", "energy_per_mb_j",
)  # fmt: skip
_CLOUD_KEYS = (
    "url", "identity", "credentials", "token_file", "key_file", "trust_file", "ca_file", "region",
    "shaping", "attestation", *_PRICE_KEYS,
)  # fmt: skip
_SHAPING_FIX = 'Write a word in quotes, as in shaping = "balanced"'


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
    config = Config(
        models_store=_path(models, "store", base, must_exist=False),
        trusted_keys=_trusted_keys(models, base),
        clouds=_clouds(top, base),
        edge_price=_price(top.table("edge", known=_PRICE_KEYS)) if top.has("edge") else None,
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
    if config.routing.objective in ("cost", "energy"):
        _check_prices(config, top)
    return config


def _check_prices(config: Config, top: Table) -> None:
    """Refuse an objective that no price says anything about."""
    from sdk.routing.objectives import check_figures

    prices = [config.edge_price, *(cloud.price for cloud in config.clouds.values())]
    found = tuple(price for price in prices if price is not None)
    try:
        check_figures(config.routing.objective, found, is_config=True)
    except ConfigError as exc:
        raise _in_table(exc, top.table("routing", known=_ROUTING_KEYS)) from exc


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
    credentials = table.text("credentials", fix=CREDENTIALS_FIX) or ""
    if credentials.startswith("keyring:"):
        raise table.error(
            "credentials", "names a keyring, which this version does not read", fix=CREDENTIALS_FIX
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
            price=_price(table),
            attestation=table.text("attestation", fix=ATTESTATION_FIX),
        )
        if not config.identity.startswith(PIN_PREFIXES):
            config.pins(0.0)  # a name that is not known should be noticed now
    except ConfigError as exc:
        raise _in_table(exc, table) from exc
    return config


def _price(table: Table) -> Price | None:
    values = {}
    for key in _PRICE_KEYS:
        value = _number(table, key, "must be a number, 0 or more")
        if value is not None:
            values[key] = float(value)
    if not values:
        return None
    from sdk.routing.objectives import Price

    try:
        return Price(**values)
    except ConfigError as exc:
        raise _in_table(exc, table) from exc


def _weights(table: Table) -> dict[str, float]:
    if not table.has("weights"):
        return {}
    weights = table.table("weights", known=OBJECTIVES)
    found: dict[str, float] = {}
    for name in OBJECTIVES:
        weight = _number(weights, name, "must be a number, 0 or more")
        if weight is not None:
            found[name] = float(weight)
    return found


def _routing(table: Table, base: Path) -> RoutingConfig:
    for key in ("mode", "objective"):
        table.text(key, fix='Write a word in quotes, as in mode = "auto"')
    deadline_ms = _number(table, "deadline_ms", "must be a number of milliseconds")
    confidence = _number(table, "confidence", "must be a number between 0 and 1")
    budget = _number(table, "hedge_budget", "must be a number from 0 to 1")
    retries = _number(table, "retry_budget", "must be a number from 0 to 1")
    try:
        return RoutingConfig(
            mode=check_mode(str(table.raw("mode") or "auto")),
            objective=check_objective(str(table.raw("objective") or "latency")),
            deadline_ms=None if deadline_ms is None else float(deadline_ms),
            confidence=CONFIDENCE if confidence is None else float(confidence),
            weights=_weights(table),
            hedge_budget=HEDGE_BUDGET if budget is None else float(budget),
            retry_budget=RETRY_SHARE if retries is None else float(retries),
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
