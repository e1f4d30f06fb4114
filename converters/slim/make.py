"""From a transformer to a smaller one: measure, cut, train, and write a Hugging Face folder.

What comes out has a configuration with fewer layers, heads and MLP channels and nothing else
special, so that every later step takes it as it takes any model.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from converters.libraries import load
from converters.settings import SlimSettings
from converters.slim.corpus import Corpus
from converters.slim.cut import slice_model
from converters.slim.importance import measure_importance
from converters.slim.recover import EncoderLoss, GeneratorLoss, recover
from converters.slim.shape import cut_of, layout_of, shape_of
from converters.slim.train import OnStep
from converters.sources.base import Source
from converters.sources.huggingface import HuggingFaceSource, load_huggingface
from converters.steps.export_encoder import Pooling, pooled
from converters.steps.training import SMALL, seeded
from converters.steps.verify_generation import source_perplexity
from nearfar.errors import ConversionError

#: In the folder: what was done, for the report and for people.
_FACTS = "slim.json"
#: Files beside the weights that stay as they are: tokenizer, pooling, licence.
_BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "generation_config.json", "modules.json",
    "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
    "LICENSE", "NOTICE",
)  # fmt: skip


class SlimFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was done, as ``slim.json`` beside the weights.

    Attributes:
        layers_before, kept_layers: How many there were, and the numbers of those that are left.
        influence: Block influence of every layer of the whole model.
        heads_before, heads: Attention heads of each layer.
        inner_before, inner: MLP channels of each layer.
        parameters_before, parameters: Weights.
        steps: Of training.
        loss_before, loss: On texts that were not trained on, before and after training.
        whole_perplexity: Language models: of the whole model, on the texts of verification.
    """

    layers_before: int
    kept_layers: tuple[int, ...]
    influence: tuple[float, ...]
    heads_before: int
    heads: int
    inner_before: int
    inner: int
    parameters_before: int
    parameters: int
    steps: int
    loss_before: float
    loss: float
    whole_perplexity: float | None = None

    def __str__(self) -> str:
        dropped = sorted(set(range(self.layers_before)) - set(self.kept_layers))
        parts = []
        if dropped:
            numbers = ", ".join(map(str, dropped))
            parts.append(f"{len(dropped)} of {self.layers_before} layers dropped ({numbers}, "
                         "counted from 0)")  # fmt: skip
        if self.heads != self.heads_before:
            parts.append(f"{self.heads} of {self.heads_before} attention heads kept")
        if self.inner != self.inner_before:
            parts.append(f"{self.inner} of {self.inner_before} MLP channels kept")
        parts.append(f"trained for {self.steps} steps to say what the whole model says"
                     if self.steps else "not trained again")  # fmt: skip
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What slicing one model needs.

    Attributes:
        source: The whole model; its dequantized folder where it is a GGUF file.
        origin: What the person gave, for the model card.
        settings: What goes, and how long the rest is trained.
        seed: Of the order of training.
        corpus: Texts.
        pooling: Of a sentence encoder; `None` for language models.
        windows: Language models: the tokens they are verified on, to tell how good the whole is.
    """

    source: HuggingFaceSource
    origin: Source
    settings: SlimSettings
    seed: int
    corpus: Corpus
    pooling: Pooling | None = None
    windows: np.ndarray | None = None


def make_slim(job: Job, target: Path, on_step: OnStep | None = None) -> None:
    """Slice, train and write; `target` becomes a Hugging Face folder with ``slim.json``.

    Memory: the whole model, the sliced one, its gradients and twice its size for AdamW.

    Raises:
        ConfigError: A setting does not fit the model.
        ConversionError: The model cannot be loaded, cut or trained.
    """
    torch = load("torch")
    whole = load_huggingface(job.source)
    layout = layout_of(str(whole.config.model_type))
    cut = cut_of(shape_of(whole.config.to_dict(), layout), layout, job.settings)
    before = _count(whole)
    with seeded(torch, job.seed, is_small=before <= SMALL):
        importance = measure_importance(whole, layout, cut.before, job.corpus.watched)
        sliced = slice_model(whole, layout, cut, importance)
        done = recover(
            sliced.model, whole, _loss(job.pooling), job.settings, job.seed,
            job.corpus.trained, job.corpus.unseen, on_step,
        )  # fmt: skip
        perplexity = None if job.windows is None else source_perplexity(whole, job.windows)
    facts = SlimFacts(
        layers_before=cut.before.layers,
        kept_layers=sliced.kept,
        influence=tuple(round(value, 6) for value in importance.layers),
        heads_before=cut.before.heads,
        heads=cut.after.heads,
        inner_before=cut.before.inner,
        inner=cut.after.inner,
        parameters_before=before,
        parameters=_count(sliced.model),
        steps=done.steps,
        loss_before=done.before,
        loss=done.after,
        whole_perplexity=perplexity,
    )
    sliced.model.save_pretrained(str(target))
    _write_beside(job, facts, target)


def read_facts(folder: Path) -> SlimFacts:
    """What was done to a folder that `make_slim` wrote.

    Raises:
        ConversionError: It does not say.
    """
    try:
        return msgspec.json.decode((folder / _FACTS).read_bytes(), type=SlimFacts)
    except (OSError, msgspec.DecodeError) as exc:
        raise ConversionError(
            f"{folder} does not say how it was sliced ({exc})", fix="Slice the model again"
        ) from exc


def _loss(pooling: Pooling | None) -> EncoderLoss | GeneratorLoss:
    if pooling is None:
        return GeneratorLoss()
    return EncoderLoss(lambda hidden, mask: pooled(hidden, mask, pooling))


def _write_beside(job: Job, facts: SlimFacts, target: Path) -> None:
    for name in _BESIDE:
        file = job.source.path / name
        if file.is_file() and not (target / name).exists():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target / name)
    encoded = msgspec.json.format(msgspec.json.encode(facts), indent=2)
    (target / _FACTS).write_bytes(encoded + b"\n")
    head = f"---\nlicense: {job.origin.license}\n---\n" if job.origin.license else ""
    digest = job.origin.sha256()
    (target / "README.md").write_text(
        f"{head}# {job.origin.title}, sliced\n\nMade of {job.origin.label}"
        + (f" (SHA-256 `{digest}`)" if digest else "")
        + f": {facts}.\n",
        encoding="utf-8",
    )


def _count(model: Any) -> int:
    return int(sum(parameter.numel() for parameter in model.parameters()))
