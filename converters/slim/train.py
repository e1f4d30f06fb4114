"""Training steps of sliced models: the same for transformers and for modules of a person's own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from converters.libraries import load
from converters.settings import SlimSettings
from nearfar.errors import ConversionError

Batch = TypeVar("Batch")
#: Told the number of steps that are done and the loss of the last one.
OnStep = Callable[[int, float], None]
#: The learning rate rises over that share of the steps.
_WARM_UP = 0.05


def train(
    parameters: Sequence[Any],
    loss_of: Callable[[Batch], Any],
    shuffled: Callable[[Any], list[Batch]],
    settings: SlimSettings,
    seed: int,
    *,
    name: str,
    on_step: OnStep | None = None,
) -> int:
    """Make a loss small with AdamW, until the steps are done or the time is over.

    Args:
        parameters: What changes.
        loss_of: Loss of a batch.
        shuffled: Makes the batches of one round with torch's generator; the last one comes first.
        settings: Steps, time and learning rate.
        seed: Of that generator.
        name: Of what is trained, for the error.
        on_step: Told about every step.

    Returns:
        How many steps were done.

    Raises:
        ConversionError: Training diverges.
    """
    torch = load("torch")
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    started_s, done = time.monotonic(), 0
    order: list[Batch] = []
    while settings.recovery_steps and (progress := _progress(settings, done, started_s)) < 1:
        order = order or shuffled(generator)
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * _schedule(progress, done, settings)
        loss = loss_of(order.pop())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        done += 1
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ConversionError(f"Training {name} diverges", fix="Lower slim.learning_rate")
        if on_step is not None:
            on_step(done, value)
    return done


def _progress(settings: SlimSettings, done: int, started_s: float) -> float:
    """Share of the training that is over, by steps or by time."""
    share = done / settings.recovery_steps
    if settings.recovery_limit_s is not None:
        share = max(share, (time.monotonic() - started_s) / settings.recovery_limit_s)
    return share


def _schedule(progress: float, done: int, settings: SlimSettings) -> float:
    """Factor of the learning rate: up in a line, down to nothing along a cosine."""
    rising = max(1, round(_WARM_UP * settings.recovery_steps))
    return min(1.0, (done + 1) / rising) * 0.5 * (1 + math.cos(math.pi * progress))
