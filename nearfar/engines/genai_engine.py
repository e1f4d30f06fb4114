"""Generate text with onnxruntime-genai: KV cache, sampling and decoding loop are its own.

Tokens are made and read by the `tokenizers` library rather than by onnxruntime-genai: it is the
reference for ``tokenizer.json``, reads every file (onnxruntime-genai 0.11, the last version for
Python 3.10, refuses those of transformers 5), and its decode stream can continue a text.

Prompts are processed in pieces, between which other answers of the model get their turn and a
cancellation is seen; the result is the same. A cancellation also ends what is being computed.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import onnxruntime_genai as og
from tokenizers import Tokenizer

from nearfar.bundle.manifest import Manifest, Variant
from nearfar.engines import genai_native as native
from nearfar.engines.base import CancelToken, SessionOptions, TokenWatch
from nearfar.engines.chat_template import ChatTemplate
from nearfar.engines.devices import physical_cores
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

logger = logging.getLogger(__name__)

#: What pybind11 makes of the library's C++ exceptions.
_OG_EXCEPTIONS = (RuntimeError, ValueError, TypeError, MemoryError)

#: onnxruntime-genai's device name -> ONNX Runtime's provider name.
_PROVIDER_OF_DEVICE = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

#: How long a piece of a prompt should take: so long does everything else in this process wait, a
#: cancellation too.
PREFILL_PIECE_S = 0.04
#: Tokens of a piece. Fewer make a prompt slower (16 by a quarter on two CPU cores), more than 32 do
#: not make it faster there. The logits are the same, bit for bit, however a prompt is cut.
PREFILL_LEAST_TOKENS, PREFILL_MOST_TOKENS = 32, 512

_MAX_SEED = 2**31 - 1


class GenaiEngine:
    """One model folder of onnxruntime-genai. Thread-safe.

    Args:
        path: Folder with ``genai_config.json``, the model and ``tokenizer.json``; verified by the
            caller.
        variant: What the manifest says about it.
        options: Session settings.
        manifest: Its `context_length_tokens` bounds the model's own.

    Raises:
        BundleError: A file is missing or does not parse.
        EngineError: The library cannot run the model here, or a required provider is missing.
    """

    def __init__(
        self, path: Path, variant: Variant, options: SessionOptions, *, manifest: Manifest
    ) -> None:
        self.variant_id = variant.id
        self._label = f"{manifest.name}/{variant.id}"
        config = _read_genai_config(path, self._label)
        stated = manifest.context_length_tokens or config.context_length
        self.context_length_tokens = min(stated, config.context_length)
        self._vocabulary_size = config.vocabulary_size
        self._end_tokens = config.end_tokens
        self._tokenizer = _load_tokenizer(path / "tokenizer.json", self._label)
        self._template = ChatTemplate(path, label=self._label)
        self._piece_tokens = PREFILL_LEAST_TOKENS
        self._model: native.Model | None = self._load(path, options, variant)
        device = str(self._model.device_type)
        self.execution_provider = _PROVIDER_OF_DEVICE.get(device.lower(), device)

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
        model: native.Model,
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
        generator: native.Generator | None = None
        try:
            generator = native.Generator(
                model, self._parameters(len(tokens) + seam.spare_tokens, options)
            )
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
                logits: Any = None if watch is None else generator.get_logits()
                generator.generate_next_token()
                token = int(generator.get_next_tokens()[0])
                if watch is not None:
                    watch(logits.reshape(-1, logits.shape[-1])[-1], token)
                if token in self._end_tokens:
                    finish_reason = "stop"
                    break
                piece, is_stopped = stops.feed(text.step(token))
                yield GenerationChunk(index=count, text=piece)
                count += 1
            if is_stopped:
                finish_reason = "stop_string"
        except _OG_EXCEPTIONS as exc:
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

    def _prefill(self, generator: native.Generator, tokens: list[int], cancel: CancelToken) -> None:
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

    def _parameters(self, prompt_tokens: int, options: GenerationOptions) -> dict[str, float]:
        is_sampled = options.temperature > 0
        settings: dict[str, float] = {
            # The KV cache is allocated for this length, so it is no longer than can be needed.
            "max_length": min(prompt_tokens + options.max_new_tokens, self.context_length_tokens),
            "do_sample": is_sampled,
            "num_beams": 1,
            "repetition_penalty": options.repetition_penalty,
        }
        if is_sampled:
            settings |= {
                "temperature": options.temperature,
                "top_p": options.top_p,
                "top_k": min(options.top_k, self._vocabulary_size),
                "random_seed": -1 if options.seed is None else options.seed,
            }
        return settings

    def _run_error(self, exc: Exception) -> EngineError:
        return EngineError(
            f"onnxruntime-genai failed while running {self._label}: {_first_line(exc)}",
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

    def _load(self, path: Path, options: SessionOptions, variant: Variant) -> native.Model:
        wished = options.execution_providers or (
            ("CUDAExecutionProvider", "CPUExecutionProvider")
            if og.is_cuda_available()
            else ("CPUExecutionProvider",)
        )
        failures: list[str] = []
        for provider in wished:
            device = next((d for d, name in _PROVIDER_OF_DEVICE.items() if name == provider), None)
            if device is None or (device == "cuda" and not og.is_cuda_available()):
                failures.append(f"{provider} is not in the installed onnxruntime-genai")
            else:
                try:
                    return native.Model(path, device, _overlay(options.threads or physical_cores()))
                except _OG_EXCEPTIONS as exc:
                    failures.append(f"{provider}: {_first_line(exc)}")
            if options.require_execution_provider:
                break
            logger.warning("%s does not run on %s", self._label, provider)
        raise EngineError(
            f"onnxruntime-genai {og.__version__} cannot load {self._label}: {'; '.join(failures)}",
            fix="Check `nearfar edge check`; update onnxruntime-genai, or convert the model again",
        )


class _GenaiConfig:
    """What this engine needs of ``genai_config.json``."""

    def __init__(self, model: dict[str, Any]) -> None:
        self.context_length = int(model["context_length"])
        self.vocabulary_size = int(model["vocab_size"])
        ends = model["eos_token_id"]
        self.end_tokens = frozenset(ends if isinstance(ends, list) else [ends])


def _read_genai_config(folder: Path, label: str) -> _GenaiConfig:
    path = folder / "genai_config.json"
    try:
        return _GenaiConfig(json.loads(path.read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise BundleError(
            f"{path.name} of {label} is missing or incomplete ({type(exc).__name__}: {exc})",
            fix="Convert the model again",
        ) from exc


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


def _overlay(threads: int) -> str:
    session_options = {"intra_op_num_threads": threads}
    return json.dumps({"model": {"decoder": {"session_options": session_options}}})


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


def _first_line(exc: Exception) -> str:
    """The library's message without its stack trace."""
    return str(exc).strip().partition("\n")[0][:500].rstrip(". ") or type(exc).__name__
