"""Train a sliced transformer to say what the whole one says (knowledge distillation).

Sentence encoders learn the whole model's vectors and last hidden states, language models its
distribution over the next token (Hinton et al. 2015, arXiv:1503.02531; Minitron,
arXiv:2407.14679, section 3). Embedding tables stay as they are: a few hundred steps see a
fraction of the vocabulary, and would move its words away from the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from converters.libraries import load
from converters.settings import SlimSettings
from converters.slim.importance import Feeds
from converters.slim.train import OnStep, train
from nearfar.errors import ConversionError


@dataclass(frozen=True, slots=True)
class Recovery:
    """What training did, judged on texts that it has not seen.

    Attributes:
        steps: How many were done: fewer than asked for where the time was over.
        before, after: Mean loss.
    """

    steps: int
    before: float
    after: float


class EncoderLoss:
    """Distance of a sentence encoder's vectors and last hidden states from the whole model's.

    Args:
        pool: (hidden states, attention mask) to vectors, as the finished model pools.
    """

    def __init__(self, pool: Callable[[Any, Any], Any]) -> None:
        self._pool = pool

    def __call__(self, student: Any, teacher: Any, feeds: dict[str, Any]) -> Any:
        torch = load("torch")
        mask = feeds["attention_mask"]
        ours = student(**feeds).last_hidden_state
        with torch.no_grad():
            theirs = teacher(**feeds).last_hidden_state
        is_text = mask.bool()
        wanted = theirs[is_text]
        # In units of the whole model's own spread, so that models of any size count alike.
        spread = wanted.var(unbiased=False).clamp(min=1e-6)
        hidden = torch.nn.functional.mse_loss(ours[is_text], wanted) / spread
        vectors = self._pool(ours, mask), self._pool(theirs, mask)
        cosine = torch.nn.functional.cosine_similarity(*vectors, dim=-1).mean()
        return hidden + (1 - cosine)


class GeneratorLoss:
    """Kullback-Leibler divergence of the next token's distribution, in nats, mean over tokens."""

    def __call__(self, student: Any, teacher: Any, feeds: dict[str, Any]) -> Any:
        torch = load("torch")
        with torch.no_grad():
            theirs = teacher(**feeds, use_cache=False).logits.log_softmax(-1)
        ours = student(**feeds, use_cache=False).logits.log_softmax(-1)
        return torch.nn.functional.kl_div(
            ours.flatten(0, 1), theirs.flatten(0, 1), reduction="batchmean", log_target=True
        )


def recover(
    student: Any,
    teacher: Any,
    loss_of: EncoderLoss | GeneratorLoss,
    settings: SlimSettings,
    seed: int,
    batches: Sequence[Feeds],
    unseen: Sequence[Feeds],
    on_step: OnStep | None = None,
) -> Recovery:
    """Train `student` in place.

    Args:
        student, teacher: The sliced and the whole model, both in evaluation mode (no dropout: there
            is little text, and the teacher's word is exact).
        loss_of: What is to become small.
        settings: Steps, time and learning rate.
        seed: Of the order of the batches.
        batches: Inputs to train on, gone through again when they are used up.
        unseen: Inputs that the loss is told on.
        on_step: Told about every step.

    Raises:
        ConversionError: There is no text, or training diverges.
    """
    before = _mean_loss(student, teacher, loss_of, unseen)
    if not settings.recovery_steps:
        return Recovery(0, before, before)
    if not batches:
        raise ConversionError(
            "There is no text to train on", fix="Give one with --train, or slim.recovery_steps = 0"
        )
    torch = load("torch")

    def shuffled(generator: Any) -> list[int]:
        order: list[int] = torch.randperm(len(batches), generator=generator).tolist()
        return order

    try:
        done = train(
            _trained(student),
            lambda number: loss_of(student, teacher, _tensors(batches[number])),
            shuffled,
            settings,
            seed,
            name="the sliced model",
            on_step=on_step,
        )
    finally:
        for parameter in student.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
    return Recovery(done, before, _mean_loss(student, teacher, loss_of, unseen))


def _trained(student: Any) -> list[Any]:
    """All weights but the tables of words."""
    for table in (student.get_input_embeddings(), student.get_output_embeddings()):
        if table is not None:
            for parameter in table.parameters():
                parameter.requires_grad_(False)
    return [parameter for parameter in student.parameters() if parameter.requires_grad]


def _mean_loss(
    student: Any, teacher: Any, loss_of: EncoderLoss | GeneratorLoss, batches: Sequence[Feeds]
) -> float:
    torch = load("torch")
    with torch.no_grad():
        losses = [float(loss_of(student, teacher, _tensors(batch))) for batch in batches]
    return float(np.mean(losses)) if losses else 0.0


def _tensors(batch: Feeds) -> dict[str, Any]:
    torch = load("torch")
    return {name: torch.from_numpy(array) for name, array in batch.items()}
