"""What of a transformer says least on real text: layers, groups of heads, MLP channels.

Layers by block influence (ShortGPT: Men et al. 2024, arXiv:2403.03853, equation 1): one minus the
cosine between what goes into a layer and what comes out, mean over tokens. Heads and channels by
their activations (Minitron: Muralidharan et al. 2024, arXiv:2407.14679, section 2.2): mean over a
text's tokens, root of the sum of squares over texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from converters.libraries import load
from converters.slim.shape import Layout, Shape
from nearfar.errors import ConversionError

#: Inputs of one call: name to INT64 array of shape (texts, tokens).
Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Importance:
    """More is more important.

    Attributes:
        layers: Block influence of each layer, 0 to 2.
        groups: Of attention heads that share a key-value head, float64 of shape (layers, groups);
            empty where heads cannot go.
        channels: Of MLP channels, float64 of shape (layers, channels).
    """

    layers: tuple[float, ...]
    groups: np.ndarray
    channels: np.ndarray


def measure_importance(
    model: Any, layout: Layout, shape: Shape, batches: Sequence[Feeds]
) -> Importance:
    """Run texts through a model and watch.

    Args:
        model: Of transformers, in evaluation mode.
        layout: Names of its parts.
        shape: Its sizes.
        batches: The texts; ``attention_mask`` says what is no padding.

    Raises:
        ConversionError: Activations are not finite.
    """
    torch = load("torch")
    layers = list(model.get_submodule(layout.layers))
    mask: list[Any] = [None]
    influence = np.zeros(shape.layers)
    tokens = 0
    squares = {"groups": np.zeros((shape.layers, shape.groups)),
               "channels": np.zeros((shape.layers, shape.inner))}  # fmt: skip

    def over_tokens(values: Any) -> Any:
        """Mean over the tokens that are no padding: (texts, tokens, n) to (texts, n)."""
        weights = mask[0].unsqueeze(-1)
        return (values * weights).sum(1) / weights.sum(1).clamp(min=1)

    def watch_layer(index: int) -> Callable[..., None]:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
            influence[index] += float(((1 - cosine) * mask[0]).sum())

        return hook

    def watch_input(kind: str, index: int) -> Callable[..., None]:
        def hook(_: Any, args: Any) -> None:
            if kind == "channels":
                values = args[0].abs()
            else:
                values = args[0].unflatten(-1, (shape.groups, -1)).norm(dim=-1)
            found = over_tokens(values).square().sum(0)
            squares[kind][index] += found.double().numpy()

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for index, layer in enumerate(layers):
            watched = [layer.register_forward_hook(watch_layer(index), with_kwargs=True)]
            inner = layer.get_submodule(layout.inner_out)
            watched.append(inner.register_forward_pre_hook(watch_input("channels", index)))
            if layout.heads_out:
                heads = layer.get_submodule(layout.heads_out)
                watched.append(heads.register_forward_pre_hook(watch_input("groups", index)))
            for hook in watched:
                hooks.callback(hook.remove)
        for batch in batches:
            feeds = {name: torch.from_numpy(array) for name, array in batch.items()}
            mask[0] = feeds["attention_mask"].to(torch.float32)
            tokens += int(mask[0].sum())
            model(**feeds)
    found = Importance(
        layers=tuple(float(value) / max(1, tokens) for value in influence),
        groups=np.sqrt(squares["groups"]) if layout.heads_out else np.zeros((shape.layers, 0)),
        channels=np.sqrt(squares["channels"]),
    )
    if not all(np.isfinite(array).all() for array in (found.layers, found.groups, found.channels)):
        raise ConversionError(
            "Activations of the model are NaN or infinite on real text",
            fix="Check the weights, or leave slim out",
        )
    return found
