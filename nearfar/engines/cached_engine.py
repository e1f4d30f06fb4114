"""Generate text with plain ONNX Runtime, of a graph whose KV cache is inputs and outputs.

For devices that onnxruntime-genai has no package for, and for graphs of plain operators, which
TensorRT and CUDA take through ONNX Runtime. What one call gives as ``present`` goes into the next
as ``past`` without being copied: it stays an `OrtValue`, on the GPU where the model runs there.
The graph itself writes a longer cache in every call, which costs a copy of the cache a token.

The CUDA and TensorRT paths follow ONNX Runtime's documentation ("I/O Binding"); they have not been
run on that hardware yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort

from nearfar.bundle.manifest import Manifest, Variant
from nearfar.engines.base import SessionOptions
from nearfar.engines.cached_graph import (
    IDS,
    INPUTS,
    LOGITS,
    MASK,
    PAST,
    POSITIONS,
    PRESENT,
    GenerationConfig,
    cache_names,
    read_config,
)
from nearfar.engines.onnxruntime_engine import ORT_EXCEPTIONS, open_session
from nearfar.engines.sampling import Sampler
from nearfar.engines.text_engine import TextEngine
from nearfar.errors import BundleError
from nearfar.generation import GenerationOptions

_ON_GPU = ("TensorrtExecutionProvider", "CUDAExecutionProvider")
#: TensorRT runs when it is wished for: building its engine can take minutes, in the first answer.
_BY_DEVICE = ("CUDAExecutionProvider", "CPUExecutionProvider")
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class CachedTextEngine(TextEngine["CachedModel"]):
    """One language model as a plain ONNX graph. Thread-safe.

    Args:
        path: The graph, with ``generation.json`` and ``tokenizer.json`` beside it; verified by the
            caller.
        variant: What the manifest says about it.
        options: Session settings.
        manifest: Its `context_length_tokens` bounds the model's own.

    Raises:
        BundleError: A file is missing or does not parse, or the graph has other inputs or outputs.
        EngineError: ONNX Runtime cannot run it here, or a required provider is missing.
    """

    failures = ORT_EXCEPTIONS
    library = "ONNX Runtime"

    def __init__(
        self, path: Path, variant: Variant, options: SessionOptions, *, manifest: Manifest
    ) -> None:
        self.variant_id = variant.id
        label = f"{manifest.name}/{variant.id}"
        config = _read_config(path.parent, label)
        stated = manifest.context_length_tokens or config.context_length_tokens
        super().__init__(
            path.parent,
            label=label,
            context_length_tokens=min(stated, config.context_length_tokens),
            end_tokens=frozenset(config.end_tokens),
        )
        if variant.tensorrt is not None and not options.shape_ranges:
            options = replace(options, shape_ranges=variant.tensorrt.profile)
        session, self.execution_provider = open_session(
            path, variant, options, label, by_device=_BY_DEVICE
        )
        self._model = CachedModel(
            session, device="cuda" if self.execution_provider in _ON_GPU else "cpu", label=label
        )

    def _begin(
        self, model: CachedModel, prompt_tokens: int, options: GenerationOptions
    ) -> CachedDecoding:
        return CachedDecoding(model, Sampler(options))


class CachedModel:
    """A session with its cache's names and sizes. Calls may run side by side.

    Args:
        session: An `onnxruntime.InferenceSession`.
        device: Where the cache stays: ``cpu`` or ``cuda``.
        label: Names the variant in errors.

    Raises:
        BundleError: The graph's inputs and outputs are not those of a language model with a cache.
    """

    def __init__(self, session: Any, *, device: str = "cpu", label: str) -> None:
        inputs = {item.name: item for item in session.get_inputs()}
        layers = sum(name.startswith(f"{PAST}.") for name in inputs) // 2
        self.past = cache_names(PAST, layers)
        self.present = cache_names(PRESENT, layers)
        outputs = {item.name for item in session.get_outputs()}
        wrong = {*INPUTS, *self.past} ^ inputs.keys() or {LOGITS, *self.present} ^ outputs
        kinds = {inputs[name].type for name in self.past if name in inputs}
        if wrong or not layers or len(kinds) != 1 or not kinds <= _DTYPES.keys():
            raise BundleError(
                f"{label} is no language model with its KV cache as inputs and outputs "
                f"({', '.join(sorted(wrong)) or 'its cache has no tensors of FP32 or FP16'})",
                fix="Convert the model again",
            )
        self.session = session
        self._device = device
        dtype = _DTYPES[kinds.pop()]
        # Heads and width of a layer are constants of the graph; models may have several.
        self._empty = [
            ort.OrtValue.ortvalue_from_numpy(
                np.zeros((1, inputs[name].shape[1], 0, inputs[name].shape[3]), dtype), "cpu"
            )
            for name in self.past
        ]

    def run(
        self, tokens: Sequence[int], cache: Sequence[Any], seen: int, options: Any = None
    ) -> tuple[np.ndarray, list[Any]]:
        """Process tokens that follow others.

        Args:
            tokens: At least one.
            cache: What the call before returned; empty at the beginning.
            seen: How many tokens are in it.
            options: `onnxruntime.RunOptions`.

        Returns:
            Logits, float32 of shape (len(tokens), vocabulary), and the longer cache.
        """
        count = len(tokens)
        binding = self.session.io_binding()
        binding.bind_cpu_input(IDS, np.array([tokens], np.int64))
        binding.bind_cpu_input(MASK, np.ones((1, seen + count), np.int64))
        binding.bind_cpu_input(POSITIONS, np.arange(seen, seen + count, dtype=np.int64)[None, :])
        for name, value in zip(self.past, cache or self._empty):  # noqa: B905  (60 and more)
            binding.bind_ortvalue_input(name, value)
        binding.bind_output(LOGITS, "cpu")
        for name in self.present:
            binding.bind_output(name, self._device)
        self.session.run_with_iobinding(binding, options)
        logits, *longer = binding.get_outputs()
        return logits.numpy()[0], longer


class CachedDecoding:
    """One answer; see `nearfar.engines.text_engine.Decoding`.

    Args:
        model: Computes it.
        sampler: Chooses its tokens.
    """

    def __init__(self, model: CachedModel, sampler: Sampler) -> None:
        self._model = model
        self._sampler = sampler
        self._options = ort.RunOptions()
        self._cache: list[Any] = []
        self._seen = 0
        #: Chosen, but not processed: the last token of an answer never is.
        self._pending: list[int] = []
        self._logits: np.ndarray | None = None

    def append_tokens(self, tokens: Sequence[int]) -> None:
        """Process tokens of the prompt."""
        self._sampler.saw(tokens)
        self._process([*self._pending, *tokens])

    def generate_next_token(self) -> None:
        """Compute and choose one token."""
        self._pending = [self._sampler.choose(self.get_logits())]
        self._logits = None

    def get_next_tokens(self) -> list[int]:
        """The token that was chosen last."""
        return self._pending

    def get_logits(self) -> np.ndarray:
        """Logits of the next token, float32 of shape (vocabulary,)."""
        if self._logits is None:
            self._process(self._pending)
        assert self._logits is not None
        return self._logits

    def terminate(self) -> None:
        """End the computation that another thread is in: ONNX Runtime looks between two nodes."""
        self._options.terminate = True

    def close(self) -> None:
        """Free the KV cache; idempotent."""
        self._cache = []

    def _process(self, tokens: list[int]) -> None:
        logits, self._cache = self._model.run(tokens, self._cache, self._seen, self._options)
        self._seen += len(tokens)
        self._pending = []
        self._logits = logits[-1]


def _read_config(folder: Path, label: str) -> GenerationConfig:
    try:
        return read_config(folder)
    except (OSError, msgspec.MsgspecError) as exc:
        raise BundleError(
            f"generation.json of {label} is missing or incomplete ({type(exc).__name__}: {exc})",
            fix="Convert the model again",
        ) from exc
