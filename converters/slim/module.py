"""Slice the transformer layers of a person's own module: `nn.TransformerEncoderLayer`, in a stack
(`nn.TransformerEncoder`, a `ModuleList` or a `Sequential` of them) or alone.

Whole layers go by block influence, feed-forward channels by their activations, as in
`converters.slim.importance`; then what is left is trained to say what the whole module says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from converters.libraries import load
from converters.settings import SlimSettings
from converters.slim.train import OnStep, train
from converters.sources.torch_module import TorchSource, TrainingData, run_module
from converters.steps.prune import check_outputs, distance, floats_of
from converters.steps.training import SMALL, seeded
from nearfar.errors import ConfigError, ConversionError

#: Layers of fewer than four times `SlimSettings.round_to` channels are cut to multiples of this.
_FINE = 8
#: Of this many rows on, the last eighth is not trained on but judged on.
_LEAST_TO_SPLIT = 16


@dataclass(frozen=True, slots=True)
class SlimModule:
    """What came out.

    Attributes:
        module: The sliced module, in evaluation mode.
        said: What was done, in words.
    """

    module: Any
    said: str


@dataclass(frozen=True, slots=True)
class _Layers:
    """Transformer layers of a module, in their order.

    Attributes:
        paths: Where each is.
        stacks: Paths of the lists that they stand in, with their numbers.
        inner: Feed-forward channels of each.
    """

    paths: tuple[str, ...]
    stacks: Mapping[str, tuple[int, ...]]
    inner: tuple[int, ...]


def check_module(source: TorchSource, settings: SlimSettings) -> None:
    """Refuse slicing that cannot be, before anything is done.

    Raises:
        ConfigError: The module has no such layers, or a setting does not fit them.
    """
    layers = _layers(source)
    _stated_drops(layers, settings)
    _widths(layers, settings)


def slim_module(
    source: TorchSource,
    settings: SlimSettings,
    seed: int,
    data: TrainingData | None,
    on_step: OnStep | None = None,
) -> SlimModule:
    """Slice a copy of a module and train it.

    Args:
        source: The module with example inputs.
        settings: What goes, and how long it is trained.
        seed: Of the order of training.
        data: What importance is measured on and what is trained on; `None` takes the example
            inputs.
        on_step: Told about every step.

    Raises:
        ConfigError: See `check_module`.
        ConversionError: The module does not run without its layers, or training diverges.
    """
    torch = load("torch")
    layers = _layers(source)
    rows = data or TrainingData(source.inputs)
    before = _count(source.module)
    with seeded(torch, seed, is_small=before <= SMALL), _plain(torch):
        influence, channels = _importance(source, layers, rows, settings)
        dropped = _dropped(layers, settings, influence)
        module = _cut(source.module, layers, dropped, channels, _widths(layers, settings))
        try:
            outputs = run_module(module, source.inputs)
        except Exception as exc:  # whatever the person's code raises
            raise ConversionError(
                f"{source.spec} does not run without its layers "
                f"{', '.join(layers.paths[index] for index in sorted(dropped))} "
                f"({type(exc).__name__}: {exc})",
                fix="Make forward go over the layers that there are, or use --keep-mlp alone",
            ) from exc
        check_outputs(source, outputs, "slicing")
        steps, first, last = _recover(module, source, rows, settings, seed, on_step)
    after = _count(module)
    said = (
        f"{len(dropped)} of {len(layers.paths)} layers dropped"
        + (f" ({', '.join(map(str, sorted(dropped)))}, counted from 0)" if dropped else "")
        + f"; {before} weights become {after}; {steps} steps of training, loss {first:.3g} becomes "
        f"{last:.3g}"
    )
    return SlimModule(module.eval(), said)


def _layers(source: TorchSource) -> _Layers:
    torch = load("torch")
    kind = torch.nn.TransformerEncoderLayer
    paths, inner = [], []
    stacks: dict[str, tuple[int, ...]] = {}
    for path, part in source.module.named_modules():
        if isinstance(part, kind):
            paths.append(path)
            inner.append(int(part.linear1.out_features))
    for path, part in source.module.named_modules():
        children = list(part.named_children())
        is_list = isinstance(part, (torch.nn.ModuleList, torch.nn.Sequential))
        if is_list and children and all(isinstance(child, kind) for _, child in children):
            prefix = f"{path}." if path else ""
            stacks[path] = tuple(paths.index(prefix + name) for name, _ in children)
    if not paths:
        raise ConfigError(
            f"{source.spec} has no nn.TransformerEncoderLayer, so it cannot be sliced",
            field="slim",
            fix="Leave slim out; other modules are made narrower with --prune",
        )
    return _Layers(tuple(paths), stacks, tuple(inner))


def _stated_drops(layers: _Layers, settings: SlimSettings) -> tuple[int, frozenset[int]]:
    """(how many layers go, which of them are stated)."""
    stated = settings.drop_layers
    named = frozenset(() if isinstance(stated, int) else stated)
    count = stated if isinstance(stated, int) else len(named)
    can_go = {index for stack in layers.stacks.values() for index in stack}
    most = sum(len(stack) - 1 for stack in layers.stacks.values())
    emptied = any(named >= set(stack) for stack in layers.stacks.values())
    if settings.keep_heads is not None:
        raise ConfigError(
            "Heads of nn.MultiheadAttention cannot go: they share the width evenly",
            field="slim.keep_heads",
            fix="Leave it out; drop layers (slim.drop_layers) or channels (slim.keep_mlp)",
        )
    if count > most or not named <= can_go or emptied:
        raise ConfigError(
            f"Layers {sorted(named) or count} cannot go: the module has {len(layers.paths)}, "
            f"{len(can_go)} of them in stacks, and one of each stack must stay",
            field="slim.drop_layers",
            fix=f"Drop at most {most}; they are counted from 0",
        )
    return count, named


def _widths(layers: _Layers, settings: SlimSettings) -> tuple[int, ...]:
    """Channels that each layer keeps."""
    found = []
    for inner in layers.inner:
        step = settings.round_to if inner >= 4 * settings.round_to else _FINE
        kept = inner if settings.keep_mlp == 1 else round(inner * settings.keep_mlp / step) * step
        if not 0 < kept <= inner:
            raise ConfigError(
                f"{settings.keep_mlp:.0%} of {inner} feed-forward channels is no multiple of "
                f"{step} between {step} and {inner}",
                field="slim.keep_mlp",
                fix="Raise it, or lower slim.round_to",
            )
        found.append(kept)
    return tuple(found)


def _dropped(layers: _Layers, settings: SlimSettings, influence: Sequence[float]) -> frozenset[int]:
    count, named = _stated_drops(layers, settings)
    if named:
        return named
    left = {path: len(stack) for path, stack in layers.stacks.items()}
    places = {index: path for path, stack in layers.stacks.items() for index in stack}
    dropped: set[int] = set()
    for index in np.argsort(influence, kind="stable").tolist():
        if len(dropped) < count and left.get(places.get(index, ""), 0) > 1 and index in places:
            dropped.add(index)
            left[places[index]] -= 1
    return frozenset(dropped)


def _importance(
    source: TorchSource, layers: _Layers, data: TrainingData, settings: SlimSettings
) -> tuple[list[float], list[np.ndarray]]:
    """(block influence of each layer, importance of its channels)."""
    torch = load("torch")
    influence = [0.0] * len(layers.paths)
    squares = [np.zeros(inner) for inner in layers.inner]
    rows = min(settings.texts, len(next(iter(data.inputs.values()))))

    def watch_layer(index: int) -> Callable[..., None]:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs["src"]
            cosine = torch.nn.functional.cosine_similarity(given, output, dim=-1)
            influence[index] += float((1 - cosine).mean())

        return hook

    def watch_channels(index: int) -> Callable[..., None]:
        def hook(_: Any, args: Any) -> None:
            values = args[0].abs().flatten(0, -2).mean(0)  # over rows and tokens
            squares[index] += values.square().double().numpy()

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for index, path in enumerate(layers.paths):
            layer = source.module.get_submodule(path)
            watched = [
                layer.register_forward_hook(watch_layer(index), with_kwargs=True),
                layer.linear2.register_forward_pre_hook(watch_channels(index)),
            ]
            for hook in watched:
                hooks.callback(hook.remove)
        for start in range(0, rows, settings.batch):
            stop = min(rows, start + settings.batch)
            source.module(**{name: rows_[start:stop] for name, rows_ in data.inputs.items()})
    if not np.isfinite(influence).all():
        raise ConversionError(
            f"Activations of {source.spec} are NaN or infinite", fix="Check weights and inputs"
        )
    return influence, squares


def _cut(
    whole: Any,
    layers: _Layers,
    dropped: frozenset[int],
    channels: Sequence[np.ndarray],
    widths: Sequence[int],
) -> Any:
    torch = load("torch")
    module = copy.deepcopy(whole)
    for index, path in enumerate(layers.paths):
        if index in dropped or widths[index] == layers.inner[index]:
            continue
        order = np.argsort(-channels[index], kind="stable")[: widths[index]]
        kept = torch.from_numpy(np.sort(order))
        layer = module.get_submodule(path)
        layer.linear1 = _linear(layer.linear1, torch, rows=kept)
        layer.linear2 = _linear(layer.linear2, torch, columns=kept)
    for path, stack in layers.stacks.items():
        if dropped.isdisjoint(stack):
            continue
        container = module.get_submodule(path)
        stay = [part for index, part in zip(stack, container, strict=True) if index not in dropped]
        container._modules.clear()
        for number, part in enumerate(stay):
            container.add_module(str(number), part)
        parent = module.get_submodule(path.rpartition(".")[0])
        if isinstance(parent, torch.nn.TransformerEncoder):
            parent.num_layers = len(stay)
    return module.eval()


def _linear(whole: Any, torch: Any, *, rows: Any = None, columns: Any = None) -> Any:
    weight = whole.weight.detach()
    weight = weight[rows] if rows is not None else weight[:, columns]
    bias = whole.bias.detach() if whole.bias is not None else None
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias[rows] if rows is not None else bias)
    return made


def _recover(
    module: Any,
    source: TorchSource,
    data: TrainingData,
    settings: SlimSettings,
    seed: int,
    on_step: OnStep | None,
) -> tuple[int, float, float]:
    """(steps that were done, loss before and after), on rows that are not trained on."""
    torch = load("torch")
    total = len(next(iter(data.inputs.values())))
    train_rows = total - total // 8 if total >= _LEAST_TO_SPLIT else total
    unseen = torch.arange(train_rows, total) if train_rows < total else torch.arange(total)

    def loss_on(picked: Any) -> Any:
        given = {name: tensor[picked] for name, tensor in data.inputs.items()}
        with torch.no_grad():
            wanted = floats_of(source.module(**given))
        labels = None if data.labels is None else data.labels[picked]
        return distance(floats_of(module(**given)), wanted, labels)

    def judged() -> float:
        with torch.no_grad():
            return float(loss_on(unseen))

    first = judged()
    done = train(
        list(module.parameters()),
        loss_on,
        lambda shuffle: list(torch.randperm(train_rows, generator=shuffle).split(settings.batch)),
        settings,
        seed,
        name=f"the sliced {source.spec}",
        on_step=on_step,
    )
    return done, first, judged() if done else first


@contextmanager
def _plain(torch: Any) -> Iterator[None]:
    """Layers computed as they are written: torch's fused ones call no hooks, and drop padding."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _count(module: Any) -> int:
    return int(sum(parameter.numel() for parameter in module.parameters()))
