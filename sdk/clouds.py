"""The clouds of a client as its configuration states them: the way to them, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdk.config import CloudConfig, Config

if TYPE_CHECKING:
    from sdk.steps import Link
    from sdk.valuation import Valuation


def clouds_of(
    cloud: CloudConfig | Sequence[CloudConfig] | None, config: Config
) -> tuple[CloudConfig, ...]:
    """All clouds, the arguments of the client before the configuration."""
    if cloud is None:
        return tuple(config.clouds.values())
    return (cloud,) if isinstance(cloud, CloudConfig) else tuple(cloud)


def link_of(clouds: Sequence[CloudConfig]) -> Link | None:
    """The way to them; `None` without any.

    Raises:
        ConfigError: Two have the same name.
    """
    if len(clouds) > 1:
        from sdk.cloud.pool import Pool

        return Pool(clouds)
    if not clouds:
        return None
    from sdk.cloud.link import CloudLink

    return CloudLink(clouds[0])


def valuation_of(config: Config, clouds: Sequence[CloudConfig]) -> Valuation | None:
    """Prices and weights; `None` where neither is configured."""
    weights, edge = config.routing.weights, config.edge_price
    priced = {cloud.name: cloud.price for cloud in clouds if cloud.price is not None}
    if not (weights or edge or priced):
        return None
    from sdk.cloud.endpoints import endpoint_name
    from sdk.routing.objectives import FREE, checked_weights
    from sdk.valuation import Valuation

    return Valuation(
        edge or FREE,
        {endpoint_name(name): price for name, price in priced.items()},
        checked_weights(weights),
    )
