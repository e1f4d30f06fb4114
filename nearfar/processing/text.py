"""Text to token ids for encoder models, with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from nearfar.bundle.manifest import TextPreprocessing
from nearfar.errors import BundleError, InvalidInput

#: Names under which padding tokens go, tried where the tokenizer does not state its own.
_USUAL_PADDING = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>")


class TextEncoder:
    """Tokenizes batches: padded to the longest text, cut to the model's length. Thread-safe.

    Args:
        tokenizer_path: A ``tokenizer.json``, verified by the caller.
        spec: Length and whether to cut.

    Attributes:
        names: The arrays a call returns.

    Raises:
        BundleError: The file is not a tokenizer.
    """

    names = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self, tokenizer_path: Path, spec: TextPreprocessing) -> None:
        self._spec = spec
        try:
            tokenizer = Tokenizer.from_file(str(tokenizer_path))
        except Exception as exc:
            raise BundleError(
                f"{tokenizer_path} is not a tokenizer that the installed `tokenizers` can read "
                f"({exc})",
                fix="Convert the model again, or update the package `tokenizers`",
            ) from exc
        padding = _padding(tokenizer)
        tokenizer.no_padding()
        tokenizer.enable_padding(**padding)
        tokenizer.no_truncation()
        if spec.truncate:
            tokenizer.enable_truncation(spec.max_length_tokens)
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Encode one batch.

        Args:
            texts: At least one text; the empty text is allowed where the tokenizer adds tokens.

        Returns:
            int64 arrays of shape (len(texts), longest): ``input_ids``, ``attention_mask``,
            ``token_type_ids``.

        Raises:
            InvalidInput: A text is longer than the model takes, and is not to be cut; it has no
                tokens, or is not Unicode.
        """
        if not texts:
            raise InvalidInput("The batch is empty", field="input", fix="Give at least one text")
        try:
            encodings = self._tokenizer.encode_batch(list(texts))
        except TypeError as exc:  # what `tokenizers` says of lone surrogates
            raise InvalidInput(
                "A text holds characters that are not Unicode (lone surrogates)",
                field="input",
                fix="Decode it with errors='replace'",
            ) from exc
        limit = self._spec.max_length_tokens
        masks = [encoding.attention_mask for encoding in encodings]
        for row, ones in enumerate(masks):
            if not (ones and (ones[0] or ones[-1])):  # padding is at one end
                raise InvalidInput(
                    f"Text {row} has no tokens, so there is nothing to say about it",
                    field="input",
                    fix="Leave it out",
                )
        mask = np.array(masks, dtype=np.int64)
        if mask.shape[1] > limit:
            row = int(mask.sum(axis=1).argmax())
            raise InvalidInput(
                f"Text {row} has {int(mask[row].sum())} tokens; the model takes {limit}",
                field="input",
                fix="Shorten it, or split it and ask for each part",
            )
        return {
            "input_ids": np.array([encoding.ids for encoding in encodings], dtype=np.int64),
            "attention_mask": mask,
            "token_type_ids": np.array([item.type_ids for item in encodings], dtype=np.int64),
        }


def _padding(tokenizer: Tokenizer) -> dict[str, object]:
    """Keyword arguments for `enable_padding`: to the longest of the batch, on the right side."""
    own = tokenizer.padding or {}
    kept = {
        name: own[name]
        for name in ("pad_id", "pad_token", "pad_type_id", "direction")
        if name in own
    }
    if kept:
        return kept
    for token in _USUAL_PADDING:
        pad_id = tokenizer.token_to_id(token)
        if pad_id is not None:
            return {"pad_id": pad_id, "pad_token": token}
    return {}
