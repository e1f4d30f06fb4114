"""The models that a cloud runtime serves: chosen, verified, loaded and warmed up at its start.

Loading happens before the server listens, so that "ready" means ready: the first client does not
wait for a gigabyte to be hashed and parsed, and a damaged bundle stops the start, not a request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from cloud_runtime.executor import InferOutcome, InferWork, ModelExecutor, Ticket
from cloud_runtime.relay import TokenRelay
from nearfar.bundle import BundleStore
from nearfar.bundle.manifest import (
    AudioPreprocessing,
    HeadTailPreprocessing,
    ImagePreprocessing,
    Manifest,
    StreamPreprocessing,
    TensorSpec,
    TextPreprocessing,
    Variant,
)
from nearfar.engines import devices, selection
from nearfar.engines.base import SessionOptions
from nearfar.engines.model import LoadedModel
from nearfar.errors import EngineError, InvalidInput, ModelNotFound
from nearfar.generation import GenerationOptions, Prompt
from nearfar.processing.windows import SignalWindows
from nearfar.tensors import numpy_of
from nearfar.units import Deadline, format_bytes
from nearfar.wire.messages import ModelOffer

#: Told what is going on while models load: one line each.
Progress = Callable[[str], None]

#: A PNG of one grey pixel, to find out whether there is something here that decodes images.
_DOT = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000"
    "000a4944415478da6368000000820081da45083b0000000049454e44ae426082"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """How each model is served.

    Attributes:
        session: Engine settings; its `threads` are per running request.
        slots: Requests of one model that compute at once.
        max_waiting: Requests of one model that may wait for a slot.
    """

    session: SessionOptions = field(default_factory=SessionOptions)
    slots: int = 1
    max_waiting: int = 32


class ServedModel:
    """One model, loaded, with its queue.

    Args:
        model: The loaded variant.
        executor: Runs it.

    Attributes:
        manifest: As in the bundle, but with only the variant that runs here.
        variant: The variant that answers.
        executor: Runs it; `infer` goes there directly.
    """

    def __init__(self, model: LoadedModel, executor: ModelExecutor) -> None:
        self.variant: Variant = model.variant
        self.manifest: Manifest = msgspec.structs.replace(model.manifest, variants=(model.variant,))
        self.executor = executor
        self._model = model

    @property
    def execution_provider(self) -> str:
        """Where it really runs, as the engine reports it."""
        return self._model.engine.execution_provider

    @property
    def generates(self) -> bool:
        """Whether it answers with text rather than tensors."""
        return self.manifest.task == "text-generation"

    def offer(self) -> ModelOffer:
        """What clients are told about it, with the present queue."""
        return ModelOffer(
            manifest=self.manifest,
            variant=self.variant.id,
            queue_ms=self.executor.expected_wait_ms,
        )

    def infer(
        self, work: InferWork, *, deadline: Deadline, ticket: Ticket, priority: int = 5
    ) -> asyncio.Future[InferOutcome]:
        """As `ModelExecutor.infer`.

        Raises:
            InvalidInput: The model generates text.
            Overloaded: Too many requests wait already.
        """
        if self.generates:
            raise InvalidInput(
                f"The model {self.manifest.name!r} generates text and takes no tensors",
                field="model",
                fix="Use generate or chat",
            )
        return self.executor.infer(work, deadline=deadline, ticket=ticket, priority=priority)

    def generate(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        *,
        deadline: Deadline,
        priority: int = 5,
    ) -> TokenRelay:
        """As `ModelExecutor.generate`.

        Raises:
            InvalidInput: The model does not generate text.
            Overloaded: Too many requests wait already.
        """
        if not self.generates:
            raise InvalidInput(
                f"The model {self.manifest.name!r} is for {self.manifest.task}, not for text",
                field="model",
                fix="Use infer, embed or classify",
            )
        return self.executor.generate(prompt, options, deadline=deadline, priority=priority)

    def warm_up(self) -> None:
        """Run once, blocking: the first call of an engine allocates and compiles."""
        manifest = self.manifest
        if self.generates:
            prompt, options = Prompt(text="Hello"), GenerationOptions(max_new_tokens=2)
            for _ in self._model.generate(prompt, options):
                pass
        elif isinstance(manifest.preprocessing, TextPreprocessing):
            self._model.infer_raw("text", ["Hello"])
        elif isinstance(manifest.preprocessing, HeadTailPreprocessing):
            shortest = max(manifest.preprocessing.min_bytes, 1)
            self._model.infer_raw("bytes", [b"x" * shortest])
        elif isinstance(manifest.preprocessing, StreamPreprocessing):
            rate = manifest.preprocessing.rates[0]
            windows = SignalWindows(manifest, rate.sample_rate_hz)
            windows.add(np.zeros(rate.window_samples, np.float32))
            self._model.infer(windows.feeds() or {})
        elif isinstance(manifest.preprocessing, ImagePreprocessing):
            self._model.infer_raw("bytes", [_DOT])
        elif isinstance(manifest.preprocessing, AudioPreprocessing):
            silence = np.zeros((1, manifest.preprocessing.min_samples), np.float32)
            self._model.infer({manifest.preprocessing.input: silence})
        else:
            self._model.infer({spec.name: _zeros(spec) for spec in manifest.inputs})


def _choose(manifest: Manifest, device: devices.Device) -> tuple[Variant | None, str]:
    """The best variant for a cloud on this machine; if none, why each one cannot run."""
    candidates = selection.candidates(manifest, device, "cloud")
    best = next((found.variant for found in candidates if found.excluded is None), None)
    reasons = "; ".join(f"{found.variant.id}: {found.excluded}" for found in candidates)
    return best, reasons


def _zeros(spec: TensorSpec) -> np.ndarray:
    """The smallest input of that form."""
    return np.zeros([max(size, 1) for size in spec.shape], numpy_of(spec.datatype))


class ServedModels:
    """All models of a server, by name."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {model.manifest.name: model for model in models}

    @classmethod
    def load(
        cls,
        store: BundleStore,
        options: ServingOptions = ServingOptions(),
        *,
        names: Sequence[str] = (),
        progress: Progress = lambda _: None,
    ) -> ServedModels:
        """Choose, verify, load and warm up; blocking, seconds to minutes.

        Args:
            store: Where the bundles are.
            options: How they are served.
            names: Models to serve; none means all that can run here.
            progress: Told each step.

        Raises:
            ModelNotFound: A named model is not there, or nothing in the store can run here.
            BundleError: A bundle is damaged.
            EngineError: A named model has no variant that can run here, or loading failed.
        """
        if not store.root.is_dir():
            raise ModelNotFound(
                f"The folder of models {store.root} does not exist",
                fix="Point --models to the folder that `nearfar convert` wrote to",
            )
        device = devices.probe()
        served = []
        for name in names or [manifest.name for manifest in store.models()]:
            bundle = store.open(name)
            variant, reasons = _choose(bundle.manifest, device)
            if variant is None:
                if names:
                    raise EngineError(
                        f"{name!r} cannot be served on this machine: {reasons}",
                        fix="Convert it for this machine with `nearfar convert`",
                    )
                progress(f"{name}: left out, because {reasons}")
                continue
            started_s = time.monotonic()
            progress(f"{name}: loading {variant.id} ({format_bytes(variant.size_bytes)})")
            model = LoadedModel(bundle, variant.id, options.session)
            executor = ModelExecutor(model, slots=options.slots, max_waiting=options.max_waiting)
            entry = ServedModel(model, executor)
            entry.warm_up()
            served.append(entry)
            progress(
                f"{name}: {variant.id} on {entry.execution_provider}, "
                f"ready after {time.monotonic() - started_s:.1f} s"
            )
        if not served:
            raise ModelNotFound(
                f"There is no model to serve in {store.root}",
                fix="Put bundles there with `nearfar convert MODEL -o DIR`",
            )
        return cls(served)

    @property
    def names(self) -> tuple[str, ...]:
        """Served models, by name."""
        return tuple(self._models)

    def get(self, name: str, version: str | None = None, variant: str | None = None) -> ServedModel:
        """The model that answers a request.

        Raises:
            ModelNotFound: It is not served here in that version or variant; the error says what is.
        """
        found = self._models.get(name)
        if found is None:
            raise ModelNotFound(
                f"This cloud does not serve a model named {name!r}",
                fix="Served here: " + ", ".join(self._models),
            )
        if version not in (None, found.manifest.version):
            raise ModelNotFound(
                f"This cloud does not serve {name!r} in version {version!r}",
                fix=f"Ask for {found.manifest.version}, or for no version",
            )
        if variant not in (None, found.variant.id):
            raise ModelNotFound(
                f"This cloud does not serve {name!r} as variant {variant!r}",
                fix=f"Ask for {found.variant.id}, or for no variant",
            )
        return found

    def offers(self) -> tuple[ModelOffer, ...]:
        """What `ListModels` is answered with."""
        return tuple(model.offer() for model in self._models.values())

    def close(self) -> None:
        """Start no more work on any model."""
        for model in self._models.values():
            model.executor.close()
