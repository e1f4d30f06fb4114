"""Which of two routes is better for quality, cost or energy, or for a weighted sum of them.

Asked only when both routes are allowed, can be taken and are expected in time, and when something
else than speed counts. A pure function of `DecisionInputs`, like the rest of the decision.

The sum is simple additive weighting (Hwang and Yoon, "Multiple Attribute Decision Making", Springer
1981, chapter 3): each measure is divided by the larger one of the two routes, so that a difference
counts as the part that is saved, and units do not matter.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import msgspec

from nearfar.errors import ConfigError, InvalidInput
from sdk.routing.types import (
    OBJECTIVES,
    DecisionInputs,
    Objective,
    Prediction,
    RequestSize,
    Route,
    RouteState,
)

if TYPE_CHECKING:
    from nearfar.bundle.manifest import Variant

#: How much each of `OBJECTIVES` counts beside the one that was asked for, in that order, in
#: hundredths: a decision record has room for small integers, not for four floats.
Weights = tuple[int, int, int, int]

#: A weight beyond this is a mistake: the objective itself counts 1.
MAX_WEIGHT = 100.0

_LATENCY, _QUALITY, _COST, _ENERGY = range(4)


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """What one route costs; everything that is not stated costs nothing.

    Attributes:
        cost_per_request: Money for a request of any size, in whatever currency all prices are in.
        cost_per_1k_input_tokens: Money for a thousand tokens of a prompt.
        cost_per_1k_output_tokens: Money for a thousand tokens of an answer.
        power_w: What the device draws in watts, beyond being idle, while the route is at work: on
            the edge while the model runs, on the cloud while the answer is awaited.
        energy_per_request_j: Energy of the device in joules for a request of any size.
        energy_per_mb_j: Energy of the device in joules for a megabyte sent or received (radio).

    Raises:
        ConfigError: A figure is negative or not a number; `ConfigError.field` names it.
    """

    cost_per_request: float = 0.0
    cost_per_1k_input_tokens: float = 0.0
    cost_per_1k_output_tokens: float = 0.0
    power_w: float = 0.0
    energy_per_request_j: float = 0.0
    energy_per_mb_j: float = 0.0

    def __post_init__(self) -> None:
        for name in PRICE_KEYS:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(
                    f"'{name}' is {value!r}", field=name, fix="Give a number, 0 or more"
                )

    @property
    def has_cost(self) -> bool:
        """Whether any figure says what the route costs in money."""
        return any(getattr(self, name) for name in PRICE_KEYS[:3])

    @property
    def has_energy(self) -> bool:
        """Whether any figure says what the route costs in energy."""
        return any(getattr(self, name) for name in PRICE_KEYS[3:])

    def cost(self, size: RequestSize, prediction: Prediction) -> float:
        """Money for one request."""
        tokens = expected_tokens(size, prediction)
        return (
            self.cost_per_request
            + self.cost_per_1k_input_tokens * size.input_tokens / 1000.0
            + self.cost_per_1k_output_tokens * tokens / 1000.0
        )

    def energy_j(self, route: Route, size: RequestSize, prediction: Prediction) -> float | None:
        """Energy for one request in joules; `None` when it hangs on a time that is not known."""
        energy_j = self.energy_per_request_j
        if route == "cloud":
            energy_j += self.energy_per_mb_j * (size.upload_bytes + size.download_bytes) / 1e6
        if self.power_w:
            if prediction.p50_ms is None:
                return None
            # While a request waits for its slot, the device works for another one.
            idle_ms = prediction.queue_ms if route == "edge" else 0.0
            energy_j += self.power_w * max(0.0, prediction.p50_ms - idle_ms) / 1000.0
        return energy_j


PRICE_KEYS = Price.__struct_fields__
FREE = Price()


def expected_tokens(size: RequestSize, prediction: Prediction) -> float:
    """Tokens of the answer that the prediction reckons with (median); the limit when unknown."""
    p50_ms, first_ms, per_token_ms = prediction.p50_ms, prediction.ttft_ms, prediction.ms_per_token
    if not size.max_new_tokens or p50_ms is None or first_ms is None or not per_token_ms:
        return float(size.max_new_tokens)
    return min(float(size.max_new_tokens), 1.0 + max(0.0, p50_ms - first_ms) / per_token_ms)


def quality_of(variant: Variant) -> float | None:
    """How much of the reference's quality a variant keeps, 0 to 1, as the bundle measured it.

    Of the figures that are parts of one (agreement, cosine) the lowest, so that no flattering one
    is picked; errors and perplexities have no scale to compare them on. `None` without any.
    """
    values = [
        figure.value
        for figure in variant.quality
        if figure.higher_is_better and 0.0 <= figure.value <= 1.0
    ]
    return min(values) if values else None


def priced(
    state: RouteState, route: Route, size: RequestSize, price: Price, variant: Variant | None
) -> RouteState:
    """A route's state with what it costs and how good it is; for objectives other than latency."""
    if state.obstacle:
        return state
    prediction = state.prediction
    return msgspec.structs.replace(
        state,
        cost=price.cost(size, prediction),
        energy_j=price.energy_j(route, size, prediction),
        quality=None if variant is None else quality_of(variant),
    )


def choose(inputs: DecisionInputs) -> tuple[Route, str] | None:
    """The better route for the objective, and why; `None` when neither is, and speed decides."""
    if inputs.weights is not None:
        return _by_weights(inputs, inputs.weights)
    objective, edge, cloud = inputs.objective, inputs.edge, inputs.cloud
    if objective == "quality":
        return _by_quality(inputs)
    if objective == "cost":
        here, there = edge.cost, cloud.cost
        words = "costs less"
        unit = ""
    else:
        here, there = edge.energy_j, cloud.energy_j
        words = "takes less of this device's energy"
        unit = " J"
    if here is None or there is None or here == there:
        return None
    less, more = (here, there) if here < there else (there, here)
    return (
        "edge" if here < there else "cloud",
        f"it {words} ({less:.3g}{unit} instead of {more:.3g}{unit}){_in_time(inputs)}",
    )


def _by_quality(inputs: DecisionInputs) -> tuple[Route, str] | None:
    edge, cloud = inputs.edge, inputs.cloud
    here, there, figures = edge.quality, cloud.quality, ""
    if here is not None and there is not None and here != there:
        figures = f" ({max(here, there):.4g} against {min(here, there):.4g})"
        is_edge = here > there
    elif (
        edge.quality_rank is None
        or cloud.quality_rank is None
        or edge.quality_rank == cloud.quality_rank
    ):
        return None
    else:
        is_edge = edge.quality_rank < cloud.quality_rank
    return (
        "edge" if is_edge else "cloud",
        f"its variant of the model has the better quality{figures}{_in_time(inputs)}",
    )


def _by_weights(inputs: DecisionInputs, beside: Weights) -> tuple[Route, str] | None:
    """The route with the smaller weighted sum; measures that one side lacks are left out."""
    edge, cloud = inputs.edge, inputs.cloud
    objective = OBJECTIVES.index(inputs.objective)
    here = there = 0.0
    counted = 0
    for index, a, b in (
        (_LATENCY, edge.prediction.p50_ms, cloud.prediction.p50_ms),
        (_QUALITY, _lost(edge), _lost(cloud)),
        (_COST, edge.cost, cloud.cost),
        (_ENERGY, edge.energy_j, cloud.energy_j),
    ):
        weight = 100 if index == objective else beside[index]
        if not weight or a is None or b is None:
            continue
        counted |= 1 << index
        # Of quality the loss is a part already: 3 % worse counts 0.03.
        largest = 100.0 if index == _QUALITY else 100.0 * (a if a > b else b)
        if largest > 0.0:
            here += weight * a / largest
            there += weight * b / largest
    if here == there:
        return None
    less, more = (here, there) if here < there else (there, here)
    return (
        "edge" if here < there else "cloud",
        f"the better balance of {_words(objective, beside, counted)} ({less:.2f} against "
        f"{more:.2f}){_in_time(inputs)}",
    )


@functools.lru_cache(maxsize=64)
def _words(objective: int, beside: Weights, counted: int) -> str:
    """What was weighed, in words; the same for all decisions of a configuration."""
    return ", ".join(
        f"{name} {(100 if index == objective else beside[index]) / 100:g}"
        for index, name in enumerate(OBJECTIVES)
        if counted >> index & 1
    )


def _lost(state: RouteState) -> float | None:
    return None if state.quality is None else 1.0 - state.quality


def _in_time(inputs: DecisionInputs) -> str:
    return "" if inputs.remaining_ms is None else ", and it is expected in time"


def check_figures(objective: Objective, prices: tuple[Price, ...], *, is_config: bool) -> None:
    """Refuse an objective that nothing says anything about.

    Args:
        objective: What is asked for.
        prices: Of all routes that there are.
        is_config: Whether the configuration asks for it, and not one request.

    Raises:
        ConfigError: (from the configuration) There is no figure to go by.
        InvalidInput: (from a request) The same.
    """
    keys = {"cost": PRICE_KEYS[:3], "energy": PRICE_KEYS[3:]}.get(objective, ())
    if not keys or any(getattr(price, key) for price in prices for key in keys):
        return
    error = ConfigError if is_config else InvalidInput
    raise error(
        f"The objective is '{objective}', and nothing says what {objective} a route has",
        field="objective",
        fix=f"State {', '.join(keys)} in [edge] or [cloud.NAME] of nearfar.toml",
    )


def checked_weights(weights: dict[str, float]) -> Weights | None:
    """Weights by name as a tuple in the order of `OBJECTIVES`; `None` when none counts.

    Raises:
        ConfigError: A name or a number is wrong.
    """
    for name, weight in weights.items():
        if name not in OBJECTIVES:
            raise ConfigError(
                f"'weights' names {name[:40]!r}",
                field="weights",
                fix=f"Use {', '.join(OBJECTIVES)}",
            )
        if isinstance(weight, bool) or not 0 <= weight <= MAX_WEIGHT:
            raise ConfigError(
                f"'weights' gives {name} {weight!r}",
                field="weights",
                fix=f"Give a number from 0 to {MAX_WEIGHT:g}; the objective itself counts 1",
            )
    latency, quality, cost, energy = (round(100 * weights.get(name, 0.0)) for name in OBJECTIVES)
    return (latency, quality, cost, energy) if latency or quality or cost or energy else None
