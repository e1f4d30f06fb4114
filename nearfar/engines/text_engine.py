"""What engines for text share: prompts, chat templates, lengths, options, streaming, stop strings.

An engine gives the model and its decoding; everything that a caller sees is done here once, so that
answers look the same whichever library makes them.

Prompts are processed in pieces, between which other answers of the model get their turn and a
cancellation is seen. A cancellation also ends what is being computed.
"""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
from tokenizers import Tokenizer

from nearfar.engines.base import CancelToken, TokenWatch
from nearfar.engines.chat_template import ChatTemplate
from nearfar.engines.stop_strings import StopStrings
from nearfar.engines.token_text import Seam, TextStream
from nearfar.errors import BundleError, EngineError, InvalidInput
from nearfar.generation import (
    FinishReason,
    GenerationChunk,
    GenerationOptions,
    Prompt,
    Usage,
)

#: How long a piece of a prompt should take: so long does everything else in this process wait, a
#: cancellation too.
PREFILL_PIECE_S = 0.04
#: Tokens of a piece. Fewer make a prompt slower (16 by a quarter on two CPU cores), more than 32 do
#: not make it faster there.
PREFILL_LEAST_TOKENS, PREFILL_MOST_TOKENS = 32, 512

_MAX_SEED = 2**31 - 1


class Decoding(Protocol):
    """One answer while it is computed. One thread at a time; `terminate` may come from any."""

    def append_tokens(self, tokens: Sequence[int]) -> None:
        """Process tokens of the prompt."""
        ...

    def generate_next_token(self) -> None:
        """Compute and choose one token."""
        ...

    def get_next_tokens(self) -> list[int]:
        """The token that was chosen last."""
        ...

    def get_logits(self) -> np.ndarray:
        """Logits of the next token, FP32; the last axis is the vocabulary's."""
        ...

    def terminate(self) -> None:
        """End the computation that another thread is in, which then fails."""
        ...

    def close(self) -> None:
        """Free the KV cache; idempotent."""
        ...


_Model = TypeVar("_Model")


class TextEngine(abc.ABC, Generic[_Model]):
    """Generates text with a model of some library. Thread-safe.

    Subclasses set `_model` and `execution_provider`, and begin an answer in `_begin`.

    Args:
        folder: With ``tokenizer.json`` and a chat template.
        label: Names the variant in errors.
        context_length_tokens: Prompt and answer together.
        end_tokens: Tokens that end an answer.

    Raises:
        BundleError: The tokenizer or the template cannot be read.
    """

    #: What the library raises, and what it is called.
    failures: tuple[type[Exception], ...] = ()
    library = ""

    def __init__(
        self, folder: Path, *, label: str, context_length_tokens: int, end_tokens: frozenset[int]
    ) -> None:
        self._label = label
        self.context_length_tokens = context_length_tokens
        self._end_tokens = end_tokens
        self._tokenizer = _load_tokenizer(folder / "tokenizer.json", label)
        self._template = ChatTemplate(folder, label=label)
        self._piece_tokens = PREFILL_LEAST_TOKENS
        self._model: _Model | None = None

    @abc.abstractmethod
    def _begin(self, model: _Model, prompt_tokens: int, options: GenerationOptions) -> Decoding:
        """Start an answer; `prompt_tokens` are to follow."""

    def count_prompt_tokens(self, prompt: Prompt) -> int:
        """Number of tokens the prompt becomes, chat template included.

        Raises:
            InvalidInput: The prompt is empty, or the chat template refuses it.
        """
        return len(self._encode(prompt))

    def generate(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        *,
        cancel: CancelToken | None = None,
        watch: TokenWatch | None = None,
    ) -> Generator[GenerationChunk, None, None]:
        """Stream an answer; see `GenerationEngine.generate`."""
        if self._model is None:
            raise EngineError(f"{self._label} has been closed", fix="Load it again")
        _check_options(options)
        tokens = self._encode(prompt)
        self._check_length(len(tokens), options.max_new_tokens)
        seam = Seam(self._tokenizer, tokens, prompt.answer_so_far)
        # A fresh chat turn begins a text of its own; everything else continues one.
        text = TextStream(self._tokenizer, tokens if prompt.text or prompt.answer_so_far else [])
        cancel = cancel or CancelToken()
        return self._stream(self._model, tokens, seam, text, options, cancel, watch)

    def close(self) -> None:
        """Free the model once the answers that run are done; idempotent."""
        self._model = None

    def _stream(
        self,
        model: _Model,
        tokens: list[int],
        seam: Seam,
        text: TextStream,
        options: GenerationOptions,
        cancel: CancelToken,
        watch: TokenWatch | None,
    ) -> Generator[GenerationChunk, None, None]:
        stops = StopStrings(options.stop)
        finish_reason: FinishReason = "length"
        count = 0
        is_stopped = False
        generator: Decoding | None = None
        try:
            generator = self._begin(model, len(tokens) + seam.spare_tokens, options)
            cancel.on_cancel(generator.terminate)
            self._prefill(generator, seam.before, cancel)
            chosen: list[int] = []
            rest = ""
            while len(chosen) < len(seam.tail) and not rest and not cancel.is_cancelled:
                token, rest = seam.choose(len(chosen), generator.get_logits())
                generator.append_tokens([token])
                chosen.append(token)
            if chosen:
                text = seam.stream(chosen)
            if rest:
                piece, is_stopped = stops.feed(rest)
                yield GenerationChunk(index=0, text=piece)
                count = 1
            while count < options.max_new_tokens and not is_stopped:
                if cancel.is_cancelled:
                    finish_reason = "cancelled"
                    break
                # Asked for before the token: the library computes them then, and only once.
                logits = None if watch is None else generator.get_logits()
                generator.generate_next_token()
                token = int(generator.get_next_tokens()[0])
                if watch is not None and logits is not None:
                    watch(logits.reshape(-1, logits.shape[-1])[-1], token)
                if token in self._end_tokens:
                    finish_reason = "stop"
                    break
                piece, is_stopped = stops.feed(text.step(token))
                yield GenerationChunk(index=count, text=piece)
                count += 1
            if is_stopped:
                finish_reason = "stop_string"
        except self.failures as exc:
            if not cancel.is_cancelled:
                raise self._run_error(exc) from exc
            finish_reason = "cancelled"
        finally:
            if generator is not None:
                generator.close()  # the KV cache goes here, also when the caller closes us early
        yield GenerationChunk(
            index=count,
            text=stops.flush(),
            finish_reason=finish_reason,
            usage=Usage(prompt_tokens=len(tokens), completion_tokens=count),
        )

    def _prefill(self, generator: Decoding, tokens: list[int], cancel: CancelToken) -> None:
        """Process a prompt piece by piece, or until cancelled."""
        start = 0
        while start < len(tokens) and not cancel.is_cancelled:
            piece = tokens[start : start + self._piece_tokens]
            began_s = time.perf_counter()
            generator.append_tokens(piece)
            took_s = time.perf_counter() - began_s
            start += len(piece)
            if len(piece) >= PREFILL_LEAST_TOKENS:  # what is shorter says little about more
                wished = int(len(piece) * PREFILL_PIECE_S / max(took_s, 1e-6)) // 8 * 8
                self._piece_tokens = min(max(wished, PREFILL_LEAST_TOKENS), PREFILL_MOST_TOKENS)

    def _run_error(self, exc: Exception) -> EngineError:
        return EngineError(
            f"{self.library} failed while running {self._label}: {first_line(exc)}",
            fix="Ask for a shorter answer or use a smaller variant if memory is short",
        )

    def _encode(self, prompt: Prompt) -> list[int]:
        if bool(prompt.messages) == bool(prompt.text):
            problem = "is both text and messages" if prompt.messages else "is empty"
            raise InvalidInput(
                f"The prompt {problem}", field="prompt", fix="Give either text or messages"
            )
        if prompt.text:
            encoding = self._tokenizer.encode(prompt.text + prompt.answer_so_far)
        else:
            rendered = self._template.render(prompt.messages)
            # The template writes the special tokens itself.
            encoding = self._tokenizer.encode(
                rendered + prompt.answer_so_far, add_special_tokens=False
            )
        tokens: list[int] = encoding.ids
        return tokens

    def _check_length(self, prompt_tokens: int, max_new_tokens: int) -> None:
        context = self.context_length_tokens
        if prompt_tokens >= context:
            raise InvalidInput(
                f"The prompt has {prompt_tokens} tokens, and the context of {self._label} holds "
                f"{context}",
                field="prompt",
                fix="Shorten the prompt, or leave out older messages",
            )
        if prompt_tokens + max_new_tokens > context:
            raise InvalidInput(
                f"The prompt has {prompt_tokens} tokens and max_new_tokens is {max_new_tokens}; "
                f"the context of {self._label} holds {context}",
                field="max_new_tokens",
                fix=f"Ask for at most {context - prompt_tokens} new tokens, or shorten the prompt",
            )


def _load_tokenizer(path: Path, label: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as exc:
        raise BundleError(
            f"{path.name} of {label} is not a tokenizer that the installed `tokenizers` can read "
            f"({exc})",
            fix="Convert the model again, or update the package `tokenizers`",
        ) from exc
    # Files saved after training may pad or cut, which a prompt must not be.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _check_options(options: GenerationOptions) -> None:
    for name, is_good, allowed in (
        ("max_new_tokens", options.max_new_tokens >= 1, "at least 1"),
        (
            "temperature",
            options.temperature >= 0 and math.isfinite(options.temperature),
            "0 (greedy) or a positive number",
        ),
        ("top_p", 0 < options.top_p <= 1, "above 0 and at most 1"),
        ("top_k", options.top_k >= 0, "0 (off) or a positive number"),
        (
            "repetition_penalty",
            options.repetition_penalty > 0 and math.isfinite(options.repetition_penalty),
            "a positive number; 1 turns it off",
        ),
        ("seed", options.seed is None or 0 <= options.seed <= _MAX_SEED, f"in 0..{_MAX_SEED}"),
        ("stop", all(options.stop), "strings that are not empty"),
    ):
        if not is_good:
            raise InvalidInput(
                f"{name} is {getattr(options, name)!r}", field=name, fix=f"It must be {allowed}"
            )


def first_line(exc: Exception) -> str:
    """The library's message without its stack trace."""
    return str(exc).strip().partition("\n")[0][:500].rstrip(". ") or type(exc).__name__
