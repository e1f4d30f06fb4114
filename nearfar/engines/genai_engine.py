"""Generate text with onnxruntime-genai: KV cache, sampling and decoding loop are its own.

Tokens are made and read by the `tokenizers` library rather than by onnxruntime-genai: it is the
reference for ``tokenizer.json``, reads every file (onnxruntime-genai 0.11, the last version for
Python 3.10, refuses those of transformers 5), and its decode stream can continue a text.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import onnxruntime_genai as og

from nearfar.bundle.manifest import Manifest, Variant
from nearfar.engines import genai_native as native
from nearfar.engines.base import SessionOptions
from nearfar.engines.devices import physical_cores
from nearfar.engines.text_engine import TextEngine, first_line
from nearfar.errors import BundleError, EngineError
from nearfar.generation import GenerationOptions

logger = logging.getLogger(__name__)

#: onnxruntime-genai's device name -> ONNX Runtime's provider name.
_PROVIDER_OF_DEVICE = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class GenaiEngine(TextEngine[native.Model]):
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

    failures = (RuntimeError, ValueError, TypeError, MemoryError)  # pybind11's of C++ exceptions
    library = "onnxruntime-genai"

    def __init__(
        self, path: Path, variant: Variant, options: SessionOptions, *, manifest: Manifest
    ) -> None:
        self.variant_id = variant.id
        label = f"{manifest.name}/{variant.id}"
        config = _read_genai_config(path, label)
        stated = manifest.context_length_tokens or config.context_length
        super().__init__(
            path,
            label=label,
            context_length_tokens=min(stated, config.context_length),
            end_tokens=config.end_tokens,
        )
        self._vocabulary_size = config.vocabulary_size
        self._model = self._load(path, options, variant)
        device = str(self._model.device_type)
        self.execution_provider = _PROVIDER_OF_DEVICE.get(device.lower(), device)

    def _begin(
        self, model: native.Model, prompt_tokens: int, options: GenerationOptions
    ) -> native.Generator:
        return native.Generator(model, self._parameters(prompt_tokens, options))

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
                except self.failures as exc:
                    failures.append(f"{provider}: {first_line(exc)}")
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


def _overlay(threads: int) -> str:
    session_options = {"intra_op_num_threads": threads}
    return json.dumps({"model": {"decoder": {"session_options": session_options}}})
