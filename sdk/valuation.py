"""What the routes of a request are worth beside being fast: prices from the configuration, quality
from the bundle. Imported only where an objective other than latency, or a weight, is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from msgspec.structs import replace

from sdk.routing.objectives import FREE, Price, Weights, check_figures, priced
from sdk.routing.types import UNKNOWN, Objective

if TYPE_CHECKING:
    from sdk.cloud.endpoints import Endpoint
    from sdk.knowledge import Knowledge
    from sdk.requests import Request
    from sdk.routing import RequestSize, RouteState


class Valuation:
    """Prices of all routes of a client, and the weights of its configuration.

    Args:
        edge: What the device costs.
        clouds: What each cloud costs, by `Endpoint.name`; one that is missing costs nothing.
        weights: How much each measure counts beside the objective; `None` for the objective alone.
    """

    def __init__(
        self,
        edge: Price = FREE,
        clouds: Mapping[str, Price] | None = None,
        weights: Weights | None = None,
    ) -> None:
        self._edge = edge
        self._clouds = dict(clouds or {})
        self.weights = weights

    def check(self, objective: Objective, *, is_config: bool = False) -> None:
        """Refuse an objective that no price says anything about; see `check_figures`.

        Raises:
            InvalidInput: (`ConfigError` for the configuration) There is no such price.
        """
        check_figures(objective, (self._edge, *self._clouds.values()), is_config=is_config)

    def of(
        self,
        request: Request,
        size: RequestSize,
        edge: RouteState,
        cloud: RouteState,
        known: Knowledge,
        endpoint: Endpoint | None,
    ) -> tuple[RouteState, RouteState, Weights | None]:
        """Both routes' states with what they are worth for this request, and the weights."""
        there = FREE if endpoint is None else self._clouds.get(endpoint.name, FREE)
        return (
            priced(edge, "edge", size, self._edge, known.variant(request, "edge", None)),
            priced(cloud, "cloud", size, there, known.variant(request, "cloud", endpoint)),
            self.weights,
        )

    def pricing(self, request: Request, known: Knowledge) -> Callable[[Endpoint], float] | None:
        """What tells apart clouds that are equally near, for the objectives cost and energy; `None`
        when they are only to be balanced."""
        objective = request.objective
        if objective not in ("cost", "energy"):
            return None
        size = known.size(request)

        def price(endpoint: Endpoint) -> float:
            own = self._clouds.get(endpoint.name, FREE)
            if objective == "cost":
                return own.cost(size, UNKNOWN)
            # Without the time, which the balancer looks at.
            return replace(own, power_w=0.0).energy_j("cloud", size, UNKNOWN) or 0.0

        return price


UNPRICED = Valuation()
