"""Choose a token by logits: greedily, or at random among the likely ones.

For engines whose library has no sampler; `onnxruntime-genai` brings its own. The order is that of
transformers: repetition penalty (Keskar et al., "CTRL", 2019), temperature, the `top_k` best, then
the smallest set that holds `top_p` of the probability (Holtzman et al., "The Curious Case of Neural
Text Degeneration", 2019).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nearfar.generation import GenerationOptions


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        options: How. With a seed, equal logits give equal tokens.
    """

    def __init__(self, options: GenerationOptions) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)
        self._seen: set[int] = set()

    def saw(self, tokens: Iterable[int]) -> None:
        """Note tokens of the prompt, which the repetition penalty counts too."""
        if self._options.repetition_penalty != 1.0:
            self._seen.update(tokens)

    def choose(self, logits: np.ndarray) -> int:
        """The next token.

        Args:
            logits: float32 of shape (vocabulary,); not changed.
        """
        options = self._options
        if options.repetition_penalty != 1.0 and self._seen:
            logits = logits.copy()
            seen = np.fromiter(self._seen, np.int64)
            scores = logits[seen]
            logits[seen] = np.where(
                scores < 0, scores * options.repetition_penalty, scores / options.repetition_penalty
            )
        token = int(logits.argmax()) if options.temperature == 0 else self._drawn(logits)
        self.saw((token,))
        return token

    def _drawn(self, logits: np.ndarray) -> int:
        options = self._options
        tokens = np.arange(logits.size)
        if 0 < options.top_k < logits.size:
            tokens = np.argpartition(-logits, options.top_k - 1)[: options.top_k]
        # Best first: that is how the nucleus is counted, and ties are broken by the token's number.
        tokens = tokens[np.lexsort((tokens, -logits[tokens]))]
        scores = logits[tokens].astype(np.float64)
        shares = np.exp((scores - scores[0]) / options.temperature)
        shares /= shares.sum()
        if options.top_p < 1.0:
            kept = int(np.searchsorted(np.cumsum(shares), options.top_p)) + 1
            tokens, shares = tokens[:kept], shares[:kept] / shares[:kept].sum()
        at = np.searchsorted(np.cumsum(shares), self._random.random(), side="right")
        return int(tokens[min(int(at), len(tokens) - 1)])
