"""`nearfar.toml`: where models, cloud, policy are, and how to route. See docs/reference/configuration.md."""

from __future__ import annotations

from pathlib import Path

import msgspec

from sdk.routing.types import Mode, Objective


class CloudConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One cloud runtime.

    Attributes:
        url: ``wss://host[:port]/v1/nearfar``.
        identity: The server's pinned identity, ``nf1:…``.
        credentials: Where the API key is: ``file:PATH`` or ``env:NAME``; ``""`` for none. Never
            the key itself. Not shown by `repr`.
        ca_file: PEM file of certificate authorities to trust; `None` uses the system's.
        region: Where it stands, for policy; `None` when not stated.
        name: Name in the configuration file.
    """

    url: str
    identity: str
    credentials: str = ""
    ca_file: Path | None = None
    region: str | None = None
    name: str = "main"

    def token(self) -> str:
        """Read the API key from where `credentials` says, at the moment it is needed.

        Raises:
            ConfigError: It is not there; the message never holds the key.
        """
        raise NotImplementedError


class RoutingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults for every request.

    Attributes:
        mode: Which routes the app asks for, within policy.
        objective: What to prefer among routes that meet the deadline.
        deadline_ms: Time an answer may take; `None` for as long as it takes.
    """

    mode: Mode = "auto"
    objective: Objective = "latency"
    deadline_ms: float | None = None


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
    raise NotImplementedError


def parse_config(text: str, *, source: str = "nearfar.toml", base: Path | None = None) -> Config:
    """Parse the text of a configuration file.

    Args:
        text: TOML.
        source: File name for messages.
        base: Directory that relative paths are relative to; the current one by default.

    Raises:
        ConfigError: Names the file, the key, what is wrong and the fix.
    """
    raise NotImplementedError
