"""What a client is put together from; parts are imported only where they are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdk.config import CloudConfig, Config
from sdk.policy import DEVICE_ONLY, Policy

if TYPE_CHECKING:
    from nearfar.engines.base import SessionOptions
    from sdk.cascade.settings import CascadeConfig
    from sdk.core import Core
    from sdk.edge import EdgeRoute
    from sdk.knowledge import Knowledge
    from sdk.records.ring import Recorder
    from sdk.sharing.config import CacheConfig
    from sdk.sharing.sharing import Sharing
    from sdk.steps import Link
    from sdk.telemetry import Telemetry
    from sdk.valuation import Valuation


def policy_of(policy: Policy | str | Path | None) -> Policy:
    """The rules, from wherever they were given; without any, nothing leaves the device."""
    if policy is None:
        return DEVICE_ONLY
    if isinstance(policy, Policy):
        return policy
    from sdk.policy import load_policy

    return load_policy(policy)


def edge_of(store: Path, options: SessionOptions | None, trusted_keys: Sequence[str]) -> EdgeRoute:
    """The way to the models on this device."""
    from sdk.edge import EdgeRoute

    return EdgeRoute(store, options=options, trusted_keys=trusted_keys)


def recorder_of(path: Path, known: Knowledge, core: Core) -> Recorder:
    """The ring on disk, told every decision and how each request ended."""
    from sdk.records.ring import Recorder

    recorder = Recorder(path, known)
    core.record, known.record = recorder.decided, recorder.finished
    if known.edge is not None:
        known.edge.on_stall.append(recorder.stalled)
    return recorder


def sharing_of(caches: Mapping[str, CacheConfig], core: Core) -> Sharing:
    """The cache, and requests that join one under way."""
    from sdk.sharing.sharing import Sharing

    return Sharing(caches, core)


def telemetry_of(edge: EdgeRoute | None) -> Telemetry:
    """Traces and metrics.

    Args:
        edge: The device, whose stalls are counted.

    Raises:
        ConfigError: opentelemetry is not installed.
    """
    from nearfar.telemetry import require

    require()
    from sdk.telemetry import Telemetry

    telemetry = Telemetry()
    if edge is not None:
        edge.on_stall.append(telemetry.stalled)
    return telemetry


def clouds_of(
    cloud: CloudConfig | Sequence[CloudConfig] | None, config: Config
) -> tuple[Link | None, Valuation | None]:
    """The way to the clouds, and what routes cost; `None` where nobody said."""
    if cloud is None and not (config.clouds or config.edge_price or config.routing.weights):
        return None, None
    from sdk import clouds as several

    clouds = several.clouds_of(cloud, config)
    return several.link_of(clouds), several.valuation_of(config, clouds)


def cascade_of(config: Config, calibrations: str | Path | None) -> CascadeConfig | None:
    """The configured cascade, with the folder that was given to the client."""
    if calibrations is None:
        return config.cascade
    from msgspec.structs import replace

    from sdk.cascade.settings import CascadeConfig

    folder = Path(calibrations).expanduser()
    return replace(config.cascade or CascadeConfig(), calibrations=folder)
