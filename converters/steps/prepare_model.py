"""Load a language model, run it on real text, and write it as plain float32 safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters.sources.base import Source
from converters.sources.detect import open_source
from converters.sources.gguf import (
    GgufSource,
    forget_pages,
    forget_vocabulary,
    load_gguf_model,
    load_gguf_tokenizer,
)
from converters.sources.huggingface import (
    HuggingFaceSource,
    load_huggingface,
    load_tokenizer,
    open_huggingface,
)
from converters.steps.apart import give_back, run_apart
from converters.steps.verify_generation import SourceLogits, source_logits, windows

#: Larger sources are loaded in a process of their own; for smaller ones its start costs more.
_APART_FROM_BYTES = 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedModel:
    """A model that was written.

    Attributes:
        kind: The class that transformers has for it.
        parameters: How many numbers it has.
        vocabulary_size: How many tokens it knows.
        logits: File with what it says about the first windows of `verify_generation.windows`.
        is_large: Whether its steps run in processes of their own.
    """

    kind: str
    parameters: int
    vocabulary_size: int
    logits: Path
    is_large: bool

    def truth(self, name: str) -> SourceLogits:
        """What the model says, read from the file only where it is needed."""
        return SourceLogits(name=name, logits=np.load(self.logits, mmap_mode="r"))


def prepare_model(source: Source, folder: Path) -> PreparedModel:
    """Write weights and tokenizer into `folder`, and the logits beside it.

    Raises:
        ConversionError: The source cannot be loaded, or its tokenizer is another model's.
    """
    assert isinstance(source, (GgufSource, HuggingFaceSource))
    weights = [source.path] if isinstance(source, GgufSource) else source.weights
    if sum(file.stat().st_size for file in weights) < _APART_FROM_BYTES:
        return _prepare(source, folder, is_large=False)
    if isinstance(source, GgufSource):
        forget_vocabulary(source)
    allow_pickle = isinstance(source, HuggingFaceSource) and source.is_pickled
    return run_apart(open_and_prepare, source.path, folder, allow_pickle=allow_pickle)


def prepare_sliced(source: HuggingFaceSource, token_windows: np.ndarray, path: Path) -> None:
    """Write what a sliced model says about the first windows into `path`."""
    size_bytes = sum(file.stat().st_size for file in source.weights)
    if size_bytes < _APART_FROM_BYTES:
        open_and_say(source.path, token_windows, path)
    else:
        run_apart(open_and_say, source.path, token_windows, path)


def open_and_say(folder: Path, token_windows: np.ndarray, path: Path) -> None:
    """As `prepare_sliced`, of a folder that is not open yet."""
    source = open_huggingface(folder)
    np.save(path, source_logits(load_huggingface(source), token_windows, "slim").logits)


def open_and_prepare(path: Path, folder: Path, *, allow_pickle: bool) -> PreparedModel:
    """As `prepare_model`, of a source that is not open yet."""
    return _prepare(open_source(path, allow_pickle=allow_pickle), folder, is_large=True)


def _prepare(source: Source, folder: Path, *, is_large: bool) -> PreparedModel:
    _write_tokenizer(source, folder)
    if isinstance(source, GgufSource):
        if is_large:
            forget_vocabulary(source)
        model = load_gguf_model(source)
        forget_pages(source)
        give_back()
    else:
        assert isinstance(source, HuggingFaceSource)
        model = load_huggingface(source)
    vocabulary_size = int(model.config.vocab_size)
    token_windows = windows(folder / "tokenizer.json", vocabulary_size)
    logits = folder.parent / f"{folder.name}-logits.npy"
    np.save(logits, source_logits(model, token_windows, source.label).logits)
    model.save_pretrained(str(folder))
    return PreparedModel(
        kind=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary_size=vocabulary_size,
        logits=logits,
        is_large=is_large,
    )


def _write_tokenizer(source: Source, folder: Path) -> None:
    if isinstance(source, GgufSource):
        tokenizer = load_gguf_tokenizer(source)
    else:
        tokenizer = load_tokenizer(source.path)
    tokenizer.save_pretrained(str(folder))
