"""The texts that slicing looks at, and those that it trains on, as inputs of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters import texts
from converters.libraries import load
from converters.settings import SlimSettings
from converters.slim.importance import Feeds
from converters.text_file import read_text_file
from nearfar.bundle.manifest import TextPreprocessing
from nearfar.errors import ConversionError

#: Of the texts that importance is measured on, as many tell how training goes.
_UNSEEN_BATCHES = 4


@dataclass(frozen=True, slots=True)
class Corpus:
    """Inputs, a few texts to a call.

    Attributes:
        watched: What importance is measured on.
        trained: What is trained on; nothing is ever judged on it.
    """

    watched: list[Feeds]
    trained: list[Feeds]

    @property
    def unseen(self) -> list[Feeds]:
        """A few inputs that training does not see, spread over short and long ones."""
        step = max(1, len(self.watched) // _UNSEEN_BATCHES)
        return self.watched[::step][:_UNSEEN_BATCHES]


def read_texts(path: Path | None, settings: SlimSettings) -> list[str]:
    """Texts to train on.

    Args:
        path: UTF-8 with an empty line between two texts; `None` takes documentation strings of
            Python's library.
        settings: How many are needed at most.

    Raises:
        ConversionError: The file cannot be read, or holds no text.
    """
    if path is None:
        return texts.training_passages(settings.recovery_steps * settings.batch)
    found = read_text_file(
        path,
        "text to train on",
        less="a short training reads a few thousand texts",
        form="Give a UTF-8 file with an empty line between two texts (--train)",
    ).split("\n\n")
    stripped = [text.strip() for text in found if text.strip()]
    if not stripped:
        raise ConversionError(f"{path} holds no text", fix="Give another file with --train")
    return stripped


def encoder_corpus(
    tokenizer: Path, spec: TextPreprocessing, trained: list[str], settings: SlimSettings
) -> Corpus:
    """Inputs of a sentence encoder; texts of like length share a batch."""
    from msgspec import structs

    from nearfar.processing.text import TextEncoder

    length = min(settings.tokens, spec.max_length_tokens)
    encode = TextEncoder(tokenizer, structs.replace(spec, max_length_tokens=length))

    def batched(passages: list[str]) -> list[Feeds]:
        ordered = sorted(passages, key=len)
        size = settings.batch
        return [encode(ordered[at : at + size]) for at in range(0, len(ordered), size)]

    return Corpus(batched(texts.calibration_passages(settings.texts)), batched(trained))


def generator_corpus(tokenizer: Path, trained: list[str], settings: SlimSettings) -> Corpus:
    """Inputs of a language model: running text cut into windows of `settings.tokens`."""
    tokenizers = load("tokenizers")
    encoder: Any = tokenizers.Tokenizer.from_file(str(tokenizer))
    encoder.no_truncation()

    def batched(passages: list[str]) -> list[Feeds]:
        ids = encoder.encode("\n\n".join(passages), add_special_tokens=False).ids
        count = len(ids) // settings.tokens
        windows = np.array(ids[: count * settings.tokens]).reshape(count, settings.tokens)
        size = settings.batch
        return [
            {"input_ids": windows[at : at + size],
             "attention_mask": np.ones_like(windows[at : at + size])}
            for at in range(0, count, size)
        ]  # fmt: skip

    return Corpus(batched(texts.calibration_passages(settings.texts)), batched(trained))
