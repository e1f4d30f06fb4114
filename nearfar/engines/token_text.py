"""Token ids to text, piece by piece; and the seam where another engine continues an answer."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

#: Tokens shown to the decode stream when it continues a text: enough for any one character, and for
#: the space that some tokenizers put into the following token.
_CONTEXT_TOKENS = 8

#: Longest word end that is asked about: one forward pass of the model for each token.
_MAX_TAIL_TOKENS = 4

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
    """The last word of an answer that another engine began.

    An answer may have been cut inside what would be one token: "The capi", or "The capital of "
    (the space belongs to the next word's token). After such an end models derail. So the engine
    takes the last word's tokens one by one, and each time asks the model what it would put there;
    if that is the rest of the answer and more, it takes the place of that rest. White space may
    also have been written in shorter tokens than those that it is read as (an empty line as two
    line breaks): where the model would do so, it does so here.

    Args:
        tokenizer: The model's tokenizer.
        tokens: Prompt and answer so far, as tokens.
        answer: The answer so far, as text.

    Attributes:
        before: Tokens before the seam.
        tail: The last word's tokens; empty when there is nothing to ask about.
        spare_tokens: By how many it may become longer.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: list[int], answer: str) -> None:
        self._tokenizer = tokenizer
        self._pieces: list[str] = []
        for count in range(1, min(_MAX_TAIL_TOKENS, len(tokens) - 1) + 1):
            stream = TextStream(tokenizer, tokens[:-count])
            pieces = [stream.step(token) for token in tokens[-count:]]
            text = "".join(pieces)
            # Whole characters only, and none of the prompt's.
            if not all(pieces) or _INCOMPLETE in text or not answer.endswith(text):
                break
            self._pieces = pieces
            if text[0].isspace():
                break
        cut = len(tokens) - len(self._pieces)
        self.before, self.tail = tokens[:cut], tokens[cut:]
        self.spare_tokens = sum(map(len, self._pieces)) - len(self._pieces)

    def choose(self, position: int, logits: np.ndarray) -> tuple[int, str]:
        """What stands at a position of the tail.

        Args:
            position: Index into `tail`; everything before it stands as it was.
            logits: The model's for this position; any shape that ends in the vocabulary's axis.

        Returns:
            The token, and what it adds to the answer. When that is not empty, the token stands for
            the whole rest of the tail.
        """
        token = int(np.argmax(logits.reshape(-1, logits.shape[-1])[-1]))
        text = self.stream(self.tail[:position]).step(token)
        rest = "".join(self._pieces[position:])
        if len(text) > len(rest) and text.startswith(rest) and _INCOMPLETE not in text:
            return token, text[len(rest) :]
        if rest.isspace() and text and len(text) < len(rest) and rest.startswith(text):
            self._split(position, token, text, rest[len(text) :])
        return self.tail[position], ""

    def _split(self, position: int, token: int, text: str, left: str) -> None:
        """Put a shorter token where the tail has a longer one, if the rest can stand behind it."""
        tokens = self._tokenizer.encode(left, add_special_tokens=False).ids
        stream = self.stream([*self.tail[:position], token])
        pieces = [stream.step(other) for other in tokens]
        if "".join(pieces) == left and all(pieces):
            self.tail = [*self.tail[:position], token, *tokens]
            self._pieces = [*self._pieces[:position], text, *pieces]

    def stream(self, chosen: list[int]) -> TextStream:
        """Stream for what follows the chosen tokens."""
        return TextStream(self._tokenizer, [*self.before[-_CONTEXT_TOKENS:], *chosen])
