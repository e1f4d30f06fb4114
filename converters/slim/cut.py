"""Cut layers, heads and MLP channels out of a transformers model: a plain smaller model comes out.

The smaller model is built from a smaller configuration and given the weights that are left, so
that nothing in it remembers the larger one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from converters.libraries import load, quiet
from converters.slim.importance import Importance
from converters.slim.shape import Cut, Layout
from nearfar.errors import ConversionError

#: Entries of a configuration that have one item for each layer.
_BY_LAYER = ("layer_types", "no_rope_layers")


@dataclass(frozen=True, slots=True)
class Sliced:
    """A smaller model.

    Attributes:
        model: Of the same class, in evaluation mode.
        kept: Which layers it has, by their numbers in the whole model.
    """

    model: Any
    kept: tuple[int, ...]


def slice_model(model: Any, layout: Layout, cut: Cut, importance: Importance) -> Sliced:
    """Make the smaller model; the whole one stays as it is.

    Args:
        model: Of transformers.
        layout: Names of its parts.
        cut: What shall be left.
        importance: What goes first: the least important.

    Raises:
        ConversionError: The model does not take the smaller configuration.
    """
    torch = load("torch")
    kept = kept_layers(cut, importance)
    state = _sliced_state(model.state_dict(), layout, cut, importance, kept)
    state_of_rng = torch.random.get_rng_state()
    try:
        with quiet():
            smaller = type(model)(_sliced_config(model.config, layout, cut, kept))
            smaller.load_state_dict(state, strict=True)
    except (RuntimeError, ValueError, TypeError, AttributeError) as exc:
        raise ConversionError(
            f"{type(model).__name__} does not take the sliced weights ({exc})",
            fix="Leave out one of slim.drop_layers, slim.keep_heads and slim.keep_mlp",
        ) from exc
    finally:
        torch.random.set_rng_state(state_of_rng)
    smaller.tie_weights()
    return Sliced(smaller.eval(), kept)


def kept_layers(cut: Cut, importance: Importance) -> tuple[int, ...]:
    """Numbers of the layers that stay, in their order."""
    dropped = set(cut.dropped)
    if not dropped:
        order = np.argsort(importance.layers, kind="stable")
        dropped = {int(index) for index in order[: cut.before.layers - cut.after.layers]}
    return tuple(index for index in range(cut.before.layers) if index not in dropped)


def _sliced_config(config: Any, layout: Layout, cut: Cut, kept: tuple[int, ...]) -> Any:
    smaller = copy.deepcopy(config)
    for key in _BY_LAYER:
        stated = getattr(config, key, None)
        if isinstance(stated, list) and len(stated) == cut.before.layers:
            setattr(smaller, key, [stated[index] for index in kept])
    smaller.num_hidden_layers = cut.after.layers
    setattr(smaller, layout.inner_key, cut.after.inner)
    if cut.after.heads != cut.before.heads:
        # Left to itself a configuration would make the remaining heads wider.
        stated = getattr(config, "head_dim", None)
        smaller.head_dim = stated or config.hidden_size // cut.before.heads
        smaller.num_attention_heads = cut.after.heads
        smaller.num_key_value_heads = cut.after.groups
    return smaller


def _sliced_state(
    state: Mapping[str, Any],
    layout: Layout,
    cut: Cut,
    importance: Importance,
    kept: tuple[int, ...],
) -> dict[str, Any]:
    prefix = f"{layout.layers}."
    places = {old: new for new, old in enumerate(kept)}
    found = {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            found[name] = tensor
            continue
        number, _, rest = name[len(prefix) :].partition(".")
        old = int(number)
        if old in places:
            found[f"{prefix}{places[old]}.{rest}"] = _part(
                tensor, rest, layout, cut, importance, old
            )
    return found


def _part(
    tensor: Any, name: str, layout: Layout, cut: Cut, importance: Importance, layer: int
) -> Any:
    """What is left of one tensor of a layer."""
    torch = load("torch")
    matrix, _, kind = name.rpartition(".")
    if cut.after.inner != cut.before.inner:
        channels = torch.from_numpy(_greatest(importance.channels[layer], cut.after.inner))
        if matrix in layout.inner_in:
            return tensor[channels]
        if matrix == layout.inner_out and kind == "weight":
            return tensor[:, channels]
    if cut.after.groups != cut.before.groups:
        groups = torch.from_numpy(_greatest(importance.groups[layer], cut.after.groups))
        if matrix == layout.queries or matrix in layout.keys:
            return tensor.unflatten(0, (cut.before.groups, -1))[groups].flatten(0, 1)
        if matrix == layout.heads_out and kind == "weight":
            return tensor.unflatten(1, (cut.before.groups, -1))[:, groups].flatten(1, 2)
    return tensor


def _greatest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the greatest values, in their order."""
    return np.sort(np.argsort(-values, kind="stable")[:count])
