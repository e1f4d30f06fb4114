"""GGUF files (llama.cpp): checked, then read into a transformers model.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.libraries import load, quiet
from converters.sources.base import Source, find_wheel, spdx
from converters.sources.weights import check_weights
from converters.steps.apart import give_back
from nearfar.errors import ConversionError

#: How file names end by convention, such as ``.Q4_K_M`` or ``-F16``.
_QUANTIZATION = re.compile(r"[.-](?:I?Q\d\w*|B?F16|F32|MXFP4)$", re.IGNORECASE)

_VOCABULARY = tuple(
    f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "scores", "token_type")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufSource(Source):
    """A GGUF file with a language model.

    Attributes:
        architecture: ``general.architecture``, such as ``llama``.
        reader: The opened file, a `gguf.GGUFReader`; reading the header again takes seconds.
    """

    architecture: str
    reader: Any


def open_gguf(path: Path) -> GgufSource:
    """Read the header of a GGUF file and check that all tensors are inside the file.

    Raises:
        ConversionError: The file is cut, damaged, or holds no language model.
    """
    gguf = load("gguf")
    try:
        reader = gguf.GGUFReader(path)
        architecture = _text(reader, "general.architecture")
        ends = [int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors]
    except Exception as exc:  # the reader raises whatever numpy raises at the place of damage
        raise ConversionError(
            f"{path} is damaged or cut: its header cannot be read ({exc})",
            fix="Fetch the file again and compare its SHA-256",
        ) from exc
    if not ends or max(ends) > path.stat().st_size:
        raise ConversionError(
            f"{path} is cut: its tensors end at byte {max(ends, default=0)}, the file at "
            f"{path.stat().st_size}",
            fix="Fetch the file again and compare its SHA-256",
        )
    if not architecture or "tokenizer.ggml.tokens" not in reader.fields:
        raise ConversionError(
            f"{path} holds no language model: it has no architecture or no tokenizer",
            fix="Give the GGUF file of the language model itself",
        )
    wheel = find_wheel(path)
    return GgufSource(
        path=path,
        # `general.name` is often a training run's; the file's name is what people call the model.
        title=_QUANTIZATION.sub("", path.stem),
        license=spdx(_text(reader, "general.license")) or (wheel.license if wheel else ""),
        architecture=architecture,
        reader=reader,
    )


def load_gguf(source: GgufSource) -> tuple[Any, Any]:
    """Dequantize into a float32 transformers model.

    Returns:
        (model, tokenizer), as from `AutoModelForCausalLM` and `AutoTokenizer`.

    Raises:
        ConversionError: transformers does not know the architecture, or cannot read the file.
    """
    tokenizer = load_gguf_tokenizer(source)
    return load_gguf_model(source), tokenizer


def load_gguf_tokenizer(source: GgufSource) -> Any:
    """The tokenizer alone; see `load_gguf`."""
    return _loaded(source, "AutoTokenizer")


def load_gguf_model(source: GgufSource) -> Any:
    """The model alone; see `load_gguf`."""
    torch = load("torch")
    model = _loaded(source, "AutoModelForCausalLM", dtype=torch.float32)
    # The weights are plain float32 now; saving must not write that they are quantized.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    check_weights(model, source.path.name)
    return model.eval()


def forget_vocabulary(source: GgufSource) -> None:
    """Let go of the tokenizer's part of the header; the model can still be loaded.

    Each token and each merge is an array of its own: 150 MB for a vocabulary of 49,152.
    """
    fields = source.reader.fields
    # Where the size is not stated it is found by counting.
    kept = () if f"{source.architecture}.vocab_size" in fields else ("tokenizer.ggml.tokens",)
    for name in _VOCABULARY:
        if name not in kept:
            fields.pop(name, None)
    give_back()


def forget_pages(source: GgufSource) -> None:
    """Let go of the pages of the file that were read; they are read again where that is needed."""
    mapped = getattr(source.reader.data, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _loaded(source: GgufSource, kind: str, **options: Any) -> Any:
    transformers = load("transformers")
    try:
        with quiet(), _shared_reader(source):
            return getattr(transformers, kind).from_pretrained(
                str(source.path.parent),
                gguf_file=source.path.name,
                local_files_only=True,
                **options,
            )
    except Exception as exc:  # the library's own errors have no common base
        raise ConversionError(
            f"transformers cannot load {source.path} with architecture {source.architecture!r} "
            f"({exc})",
            fix="Use the model's safetensors folder, or a newer transformers",
        ) from exc


@contextmanager
def _shared_reader(source: GgufSource) -> Iterator[None]:
    """Let transformers use the reader that is open already.

    It opens the file three times and computes the same table of names once for each module of the
    network, which is half of the loading time. Both are pure, so they are computed once.
    """
    gguf = load("gguf")
    reader_class, name_map = gguf.GGUFReader, gguf.get_tensor_name_map

    def reader(path: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs and Path(path).resolve() == source.path.resolve():
            return source.reader
        return reader_class(path, *args, **kwargs)

    gguf.GGUFReader, gguf.get_tensor_name_map = reader, functools.lru_cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader_class, name_map


def _text(reader: Any, key: str) -> str:
    field = reader.fields.get(key)
    if field is None:
        return ""
    return bytes(field.parts[field.data[0]]).decode("utf-8", errors="replace")
