"""Where models, cloud and policy are, and how to route: what `nearfar.toml` says, as values.

Reference: docs/reference/configuration.md. The file is read in `sdk.config_file`.
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
from sdk.routing.budget import RETRY_SHARE, check_share
from sdk.routing.types import CONFIDENCE, HEDGE_BUDGET, MODES, OBJECTIVES, Mode, Objective
from sdk.toml_table import suggestion

if TYPE_CHECKING:
    from nearfar.secure.attestation import Verifier
    from nearfar.secure.identity import Pin
    from sdk.cascade.settings import CascadeConfig
    from sdk.jobs.config import JobsConfig
    from sdk.routing.objectives import Price
    from sdk.sharing.config import CacheConfig

logger = logging.getLogger(__name__)

# RFC 7518 tokens and API keys are far shorter; a larger file is not a key.
MAX_CREDENTIAL_BYTES = 16 * 1024

#: `nearfar.secure.identity.Pin.PREFIXES`, without importing cryptography.
PIN_PREFIXES = ("nf1:", "nf2:")
_TRUST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")
_PLUG_IN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
ATTESTATION_FIX = 'Write MODULE:NAME, as in attestation = "package.module:Verifier"'
CREDENTIALS_FIX = 'Write credentials = "file:PATH" or "env:NAME"; never the key itself'


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
        ConfigError: There is no such objective.
    """
    for known in OBJECTIVES:
        if objective == known:
            return known
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
        price: What requests to it cost, for the objectives ``cost`` and ``energy``.
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
    price: Price | None = None
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
        is_pin = self.identity.startswith(PIN_PREFIXES) and len(self.identity) >= 8
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
                fix=CREDENTIALS_FIX,
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
                    f"{where}: 'attestation' {problem}", field="attestation", fix=ATTESTATION_FIX
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
        weights: How much latency, quality, cost and energy count beside the objective, by name; the
            objective itself counts 1.
        hedge_budget: Extra requests that starting the other route beside a late one may cause, as a
            part of all requests; 0 never starts it before the first has failed.
        retry_budget: Requests that may go to the clouds once more after one failed there, as a part
            of all requests; 0 never asks again.
        state: File in which the client keeps what routes took, across restarts; `None` for none.
        record: File in which the client writes down its last decisions; `None` for none.

    Raises:
        ConfigError: A field does not fit; `ConfigError.field` names it.
    """

    mode: Mode = "auto"
    objective: Objective = "latency"
    deadline_ms: float | None = None
    confidence: float = CONFIDENCE
    weights: dict[str, float] = {}
    hedge_budget: float = HEDGE_BUDGET
    retry_budget: float = RETRY_SHARE
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
        check_share(self.retry_budget)
        if self.weights:
            from sdk.routing.objectives import checked_weights

            checked_weights(self.weights)


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed `nearfar.toml`.

    Attributes:
        models_store: Directory of bundles; `None` when the app runs no local models.
        trusted_keys: Public keys, as text (``ed25519:…``) or paths; when there are any, only
            bundles that one of them signed run on this device.
        clouds: Cloud runtimes by name.
        edge_price: What requests on this device cost, for the objectives ``cost`` and ``energy``.
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
    edge_price: Price | None = None
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
        """The first cloud runtime, if any is configured."""
        return next(iter(self.clouds.values()), None)


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
