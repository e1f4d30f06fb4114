"""The tokenizer of a Hugging Face folder as the one file that a bundle carries."""

from __future__ import annotations

from pathlib import Path

from converters.sources.huggingface import load_tokenizer
from nearfar.errors import ConversionError


def write_tokenizer(folder: Path, target: Path) -> Path:
    """``tokenizer.json`` without its own lengths: the manifest says where texts are cut.

    Raises:
        ConversionError: There is no tokenizer, or none that the library `tokenizers` runs.
    """
    loaded = load_tokenizer(folder)
    tokenizer = getattr(loaded, "backend_tokenizer", None)
    if tokenizer is None:
        raise ConversionError(
            f"The tokenizer in {folder} ({type(loaded).__name__}) runs in Python only",
            fix="Copy tokenizer.json into the folder, or write it with save_pretrained of a fast "
            "tokenizer",
        )
    padding = tokenizer.padding or {}
    tokenizer.no_truncation()
    tokenizer.no_padding()
    kept = {key: padding[key] for key in ("pad_id", "pad_token", "pad_type_id") if key in padding}
    if not kept and loaded.pad_token is not None:
        kept = {"pad_id": loaded.pad_token_id, "pad_token": loaded.pad_token}
    if kept:
        tokenizer.enable_padding(**kept)
    tokenizer.save(str(target), pretty=False)
    return target
