"""Token ids to text, piece by piece; and the seam where another engine continues an answer."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

#: Tokens shown to the decode stream when it continues a text: enough for any one character, and for
#: the space that some tokenizers put into the following token.
_CONTEXT_TOKENS = 8

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Text of tokens as far as it is certain: incomplete characters wait for their rest.

    Args:
        tokenizer: The model's tokenizer.
        continues: Tokens of the text that is continued; empty begins a text.
    """

    def __init__(self, tokenizer: Tokenizer, continues: list[int]) -> None:
        self._tokenizer = tokenizer
        context = continues[-_CONTEXT_TOKENS:]
        self._stream = (
            DecodeStream(ids=context, skip_special_tokens=True)
            if context
            else DecodeStream(skip_special_tokens=True)
        )

    def step(self, token: int) -> str:
        """Text that the token completes; often empty within a character of several tokens."""
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception as exc:
            # Some tokenizers decode a sequence of bytes to another text once more bytes follow,
            # which the stream gives up on. A new stream loses at most the character in question.
            if "prefix" not in str(exc):
                raise
            self._stream = DecodeStream(skip_special_tokens=True)
            text = self._stream.step(self._tokenizer, token)
        return text or ""


class Seam:
    """The last token of an answer that another engine began.

    An answer may have been cut inside what would be one token: "The cap" or "The capital of " (the
    space belongs to the next word's token). After such a token models derail. So the engine first
    asks the model what it would put there; if that begins with the same text, it takes the place.

    Args:
        tokenizer: The model's tokenizer.
        tokens: Prompt and answer so far, as tokens.
        answer: The answer so far, as text.

    Attributes:
        token: The last token.
        can_heal: Whether its text is whole and lies within the answer.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: list[int], answer: str) -> None:
        self._tokenizer = tokenizer
        self._before = tokens[:-1]
        self.token = tokens[-1]
        self._text = TextStream(tokenizer, self._before).step(self.token)
        self.can_heal = (
            bool(self._before)
            and bool(self._text)
            and _INCOMPLETE not in self._text
            and answer.endswith(self._text)
        )

    def heal(self, logits: np.ndarray) -> tuple[int, str]:
        """Choose what stands in place of the last token.

        Args:
            logits: The model's, after everything before the last token; any shape that ends in the
                vocabulary's axis.

        Returns:
            The token, and the text by which it is longer than what was there.
        """
        token = int(np.argmax(logits.reshape(-1, logits.shape[-1])[-1]))
        text = TextStream(self._tokenizer, self._before).step(token)
        if token != self.token and text.startswith(self._text) and _INCOMPLETE not in text:
            return token, text[len(self._text) :]
        return self.token, ""

    def stream(self, token: int) -> TextStream:
        """Stream for what follows, given the chosen token."""
        return TextStream(self._tokenizer, [*self._before, token])
