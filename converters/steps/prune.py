"""Make a torch module narrower: whole channels and neurons go, and the rest learns to do without.

Which ones belong together is torch-pruning's job (DepGraph: Fang et al., CVPR 2023,
arXiv:2301.12900): a channel of a convolution cannot go without its batch norm and its column of
the next layer. Recovery trains the narrow module to say what the wide one says (knowledge
distillation: Hinton et al. 2015, arXiv:1503.02531), and the truth where labels are given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from converters.libraries import load, quiet
from converters.settings import PruneSettings
from converters.sources.torch_module import TorchSource, TrainingData, run_module
from converters.steps.training import SMALL, seeded
from nearfar.errors import ConversionError

#: What torch-pruning and torch raise where a layer cannot get narrower by itself.
_CANNOT_CUT = (
    RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError,
)  # fmt: skip
#: How much the teacher counts beside labels.
_TEACHER = 0.5


@dataclass(frozen=True, slots=True)
class Pruned:
    """What came out.

    Attributes:
        module: The narrow module.
        weights_before: How many numbers the module had.
        weights_after: How many it has.
        loss: Of recovery, mean over the last epoch; 0 without recovery.
    """

    module: Any
    weights_before: int
    weights_after: int
    loss: float


def prune_module(
    source: TorchSource,
    settings: PruneSettings,
    seed: int,
    data: TrainingData | None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> Pruned:
    """Prune a copy of a module and train it.

    Args:
        source: The module with example inputs.
        settings: How much goes, and how long it is trained.
        seed: Of the order of training and, for ``random``, of the choice.
        data: What to train on; `None` takes the example inputs.
        on_epoch: Told the number of each epoch and its mean loss.

    Raises:
        ConversionError: torch-pruning cannot follow the module, nothing of it can go, or training
            diverges.
    """
    torch = load("torch")
    before = _count(source.module)
    with seeded(torch, seed, is_small=before <= SMALL):
        module = copy.deepcopy(source.module)
        try:
            _cut(module, source, settings)
            outputs = run_module(module, source.inputs)
        except ConversionError:
            raise
        except Exception as exc:  # torch-pruning raises whatever its tracing meets
            raise ConversionError(
                f"torch-pruning cannot make {source.spec} narrower ({type(exc).__name__}: {exc})",
                fix="Name the layers that shall stay as they are (prune.keep), or leave --prune "
                "out",
            ) from exc
        check_outputs(source, outputs)
        after = _count(module)
        if after >= before:
            raise ConversionError(
                f"Nothing of {source.spec} can go at a ratio of {settings.ratio}",
                fix="Raise prune.ratio, or leave --prune out",
            )
        loss = _recover(module, source, settings, seed, data, on_epoch)
    return Pruned(module.eval(), before, after, loss)


def _cut(module: Any, source: TorchSource, settings: PruneSettings) -> None:
    tp = load("torch_pruning")
    inputs = dict(source.inputs)
    importance = {
        "magnitude": tp.importance.GroupMagnitudeImportance,
        "random": tp.importance.RandomImportance,
    }[settings.importance]()
    with quiet():
        pruner = tp.pruner.BasePruner(
            module,
            example_inputs=inputs,
            forward_fn=lambda model, feeds: model(**feeds),
            output_transform=_summed,
            importance=importance,
            pruning_ratio=settings.ratio,
            iterative_steps=1,
            ignored_layers=_kept_layers(tp, module, source, settings),
            round_to=settings.round_to,
        )
        pruner.step()


def _kept_layers(tp: Any, module: Any, source: TorchSource, settings: PruneSettings) -> list[Any]:
    """Layers whose width is not to change: those named, and those that an output's width is."""
    torch = load("torch")
    named = dict(module.named_modules())
    unknown = [name for name in settings.keep if name not in named]
    if unknown:
        raise ConversionError(
            f"{source.spec} has no layer {unknown[0]!r}, which the recipe keeps (prune.keep)",
            fix=f"Its layers are: {', '.join(name for name in named if name)}",
        )
    kept = [named[name] for name in settings.keep]
    kinds = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
    for name, layer in named.items():
        if isinstance(layer, kinds) and layer not in kept:
            width = layer.weight.shape[1 if getattr(layer, "transposed", False) else 0]
            if width < 2 or _is_an_output(tp, module, name, source):
                kept.append(layer)
    return kept


def _is_an_output(tp: Any, module: Any, name: str, source: TorchSource) -> bool:
    """Whether an output gets narrower, or the module stops working, without one of its channels."""
    trial = copy.deepcopy(module)
    layer = trial.get_submodule(name)
    try:
        graph = tp.DependencyGraph().build_dependency(
            trial,
            example_inputs=dict(source.inputs),
            forward_fn=lambda model, feeds: model(**feeds),
            output_transform=_summed,
        )
        prune = graph.get_pruner_of_module(layer).prune_out_channels
        graph.get_pruning_group(layer, prune, idxs=[0]).prune()
        outputs = run_module(trial, source.inputs)
    except _CANNOT_CUT:
        return True  # it is left as it is
    return any(outputs[key].shape != array.shape for key, array in source.outputs.items())


def _summed(made: Any) -> Any:
    """One number that depends on all outputs: torch-pruning follows the graph back from it."""
    if isinstance(made, Mapping):
        made = list(made.values())
    if isinstance(made, (tuple, list)):
        return sum(value.sum() for value in made if value is not None)
    return made


def _recover(
    module: Any,
    source: TorchSource,
    settings: PruneSettings,
    seed: int,
    data: TrainingData | None,
    on_epoch: Callable[[int, float], None] | None,
) -> float:
    torch = load("torch")
    inputs = data.inputs if data is not None else source.inputs
    labels = data.labels if data is not None else None
    if not settings.recovery_epochs:
        return 0.0
    rows = len(next(iter(inputs.values())))
    teacher = source.module
    optimiser = torch.optim.AdamW(module.parameters(), lr=settings.learning_rate)
    steps = settings.recovery_epochs * -(-rows // settings.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    generator = torch.Generator().manual_seed(seed)
    module.train()
    mean = 0.0
    for epoch in range(settings.recovery_epochs):
        total = 0.0
        for picked in torch.randperm(rows, generator=generator).split(settings.batch):
            if len(picked) == 1 and rows > 1:
                continue  # batch norm has no variance of one row
            given = {name: tensor[picked] for name, tensor in inputs.items()}
            with torch.no_grad():
                wanted = floats_of(teacher(**given))
            loss = distance(floats_of(module(**given)), wanted, None if labels is None
                         else labels[picked])  # fmt: skip
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(picked)
        mean = total / rows
        if mean != mean:
            raise ConversionError(
                f"Training the pruned {source.spec} diverges",
                fix="Lower prune.learning_rate",
            )
        if on_epoch is not None:
            on_epoch(epoch, mean)
    return mean


def distance(found: list[Any], wanted: list[Any], labels: Any) -> Any:
    """How far outputs are from the teacher's; the first output is also held against labels."""
    torch = load("torch")
    functional = torch.nn.functional
    losses = []
    for number, (ours, theirs) in enumerate(zip(found, wanted)):  # noqa: B905
        is_probability = _are_probabilities(theirs)
        if is_probability:
            logs = torch.log(ours.clamp(min=1e-9))
            loss = functional.kl_div(logs, theirs, reduction="batchmean")
        else:
            # In units of the teacher's own spread, so that outputs of any size count alike.
            loss = functional.mse_loss(ours, theirs) / theirs.var(unbiased=False).clamp(min=1e-6)
        if number == 0 and labels is not None:
            truth = (
                functional.nll_loss(logs, labels)
                if is_probability
                else functional.cross_entropy(ours, labels)
            )
            loss = _TEACHER * loss + (1 - _TEACHER) * truth
        losses.append(loss)
    return sum(losses)


def _are_probabilities(tensor: Any) -> bool:
    torch = load("torch")
    if tensor.ndim < 2 or tensor.shape[-1] < 2 or bool((tensor < 0).any()):
        return False
    return bool(torch.allclose(tensor.sum(-1), torch.ones(()), atol=1e-3))


def floats_of(made: Any) -> list[Any]:
    """Outputs of a module that are no whole numbers, in their order."""
    if isinstance(made, Mapping):
        made = [value for value in made.values() if value is not None]
    values = list(made) if isinstance(made, (tuple, list)) else [made]
    return [value for value in values if value.is_floating_point()]


def check_outputs(source: TorchSource, outputs: Mapping[str, Any], done: str = "pruning") -> None:
    """Refuse a module whose outputs got another shape.

    Raises:
        ConversionError: One did; names it.
    """
    for name, array in source.outputs.items():
        if outputs[name].shape != array.shape:
            raise ConversionError(
                f"Output {name!r} of {source.spec} became {list(outputs[name].shape)} from "
                f"{list(array.shape)} by {done}",
                fix="Name the layer that makes it in prune.keep",
            )


def _count(module: Any) -> int:
    return int(sum(parameter.numel() for parameter in module.parameters()))
