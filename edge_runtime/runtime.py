"""Run the bundles of a store in this process: load once, queue, compute, measure."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edge_runtime.generation import EdgeGeneration
from nearfar.bundle import BundleStore
from nearfar.bundle.manifest import Manifest, Variant
from nearfar.engines.base import CancelToken, SessionOptions, TokenWatch
from nearfar.engines.devices import Device, probe
from nearfar.engines.model import LoadedModel, RawForm
from nearfar.engines.selection import candidates
from nearfar.engines.slots import Slot, SlotGate, SlotState
from nearfar.errors import EngineError, InvalidInput
from nearfar.generation import GenerationOptions, Prompt
from nearfar.units import Deadline
from nearfar.waiting import within

if TYPE_CHECKING:
    from nearfar.bundle import Bundle
    from nearfar.wire.messages import InputForm

#: How long `close` waits for the calls that run. A token takes well below a second.
_CLOSE_TIMEOUT_S = 10.0

_NO_DEADLINE = Deadline()


class EdgeModel(msgspec.Struct, frozen=True):
    """What would answer on this device.

    Attributes:
        manifest: The model's manifest.
        variant: The variant this device would run.
    """

    manifest: Manifest
    variant: Variant


class EdgeResult(msgspec.Struct, frozen=True, eq=False):
    """Outputs of one `EdgeRuntime.infer`.

    Attributes:
        outputs: Output name to array, in model order; the arrays belong to the caller.
        variant: Id of the variant that computed them.
        execution_provider: What it ran on, as the engine reports it.
        queue_s: Seconds spent waiting for a slot.
        compute_s: Seconds of preprocessing and engine.
    """

    outputs: dict[str, np.ndarray]
    variant: str
    execution_provider: str
    queue_s: float
    compute_s: float


class DirectCall:
    """Runs batches of one loaded model that can begin at once, and no others. Thread-safe.

    Made by `EdgeRuntime.direct`; good until the runtime is closed. Its methods return the outputs
    and the seconds they took (preprocessing and engine), or `None` when the batch would have to
    wait for a slot, or the runtime was closed.
    """

    __slots__ = ("_engine", "_gate", "_loaded")

    def __init__(self, loaded: LoadedModel, gate: SlotGate) -> None:
        self._loaded = loaded
        self._engine = loaded.tensor_engine
        self._gate = gate

    def infer(
        self, feeds: Mapping[str, np.ndarray], expected_s: float | None = None
    ) -> tuple[dict[str, np.ndarray], float] | None:
        """Run one batch of tensors now.

        Args:
            feeds: The model's inputs.
            expected_s: As for `EdgeRuntime.infer`.

        Raises:
            EngineError: The engine failed.
            InvalidInput: A tensor does not fit.
        """
        slot = self._gate.try_acquire(expected_s)
        if slot is None:
            return None
        try:
            outputs = self._engine.infer(feeds)
        finally:
            slot.release()
        return outputs, slot.held_s

    def infer_raw(
        self,
        form: RawForm,
        items: Sequence[str] | Sequence[bytes] | Sequence[str | bytes],
        expected_s: float | None = None,
    ) -> tuple[dict[str, np.ndarray], float] | None:
        """Preprocess one batch and run it now.

        Args:
            form: What the items are: ``text`` or ``bytes``.
            items: One per row of the batch.
            expected_s: As for `EdgeRuntime.infer`.

        Raises:
            EngineError: The engine failed.
            InvalidInput: An item does not fit.
        """
        slot = self._gate.try_acquire(expected_s)
        if slot is None:
            return None
        try:
            outputs = self._loaded.infer_raw(form, items)
        finally:
            slot.release()
        return outputs, slot.held_s


class _Hosted:
    """One model of the runtime: chosen when first asked about, loaded when first used."""

    def __init__(self, bundle: Bundle, variant: Variant, gate: SlotGate) -> None:
        self.bundle = bundle
        self.described = EdgeModel(bundle.manifest, variant)
        self.gate = gate
        self.load_lock = threading.Lock()
        self.loaded: LoadedModel | None = None


class EdgeRuntime:
    """Models of one store, run here. Synchronous and thread-safe.

    Which version of a model runs is settled when it is first asked for, and stays until the
    runtime is closed.

    Args:
        store: The bundles.
        options: Engine settings for all models.
        slots_per_model: Calls of one model that compute at once; further ones wait.
        max_waiting_per_model: Calls that may wait; more are refused with `Overloaded`.
        device: What the machine has; `None` looks.
    """

    def __init__(
        self,
        store: BundleStore,
        *,
        options: SessionOptions | None = None,
        slots_per_model: int = 1,
        max_waiting_per_model: int = 64,
        device: Device | None = None,
    ) -> None:
        self._store = store
        self._options = options or SessionOptions()
        self._slots = slots_per_model
        self._max_waiting = max_waiting_per_model
        self._device = device
        self._hosted: dict[tuple[str, str | None], _Hosted] = {}
        self._lock = threading.Lock()
        self._generations: weakref.WeakSet[EdgeGeneration] = weakref.WeakSet()
        self._is_closed = False

    def models(self) -> list[Manifest]:
        """Manifests of the store, newest version of each name."""
        return self._store.models()

    def describe(self, model: str, version: str | None = None) -> EdgeModel:
        """Which variant would run here; loads no engine.

        Raises:
            ModelNotFound: The store does not hold the model.
            BundleError: Its bundle is broken.
            EngineError: None of its variants can run here; the error says why for each.
        """
        return self._host(model, version).described

    def infer(
        self,
        model: str,
        feeds: Mapping[str, np.ndarray] | None = None,
        *,
        form: InputForm = "tensors",
        items: Sequence[str] | Sequence[bytes] | Sequence[str | bytes] | None = None,
        version: str | None = None,
        deadline: Deadline = _NO_DEADLINE,
        expected_s: float | None = None,
        cancel: CancelToken | None = None,
    ) -> EdgeResult:
        """Run one batch.

        Args:
            model: Name of the model.
            feeds: The model's inputs, for the form ``tensors``.
            form: What is given: ``tensors``, or ``text`` / ``bytes`` to be preprocessed.
            items: One per row of the batch, for the forms ``text`` and ``bytes``.
            version: Exact version; `None` takes the newest.
            deadline: When waiting for a slot makes no sense any more.
            expected_s: How long it will take, for the estimates of others.
            cancel: Ends waiting at once, and computing as soon as the engine can.

        Raises:
            ModelNotFound, BundleError, EngineError: See `describe`; or the engine failed.
            InvalidInput: A tensor or item does not fit.
            Overloaded: Too many wait already.
            DeadlineExceeded: The deadline passed before it began.
            Cancelled: `cancel` was set.
        """
        hosted = self._hosted.get((model, version)) or self._host(model, version)
        loaded = hosted.loaded or self._load(hosted, deadline)
        slot = hosted.gate.acquire(deadline, expected_s, cancel=cancel)
        return _compute(slot, loaded, feeds, form, items, cancel)

    def direct(self, model: str, version: str | None = None) -> DirectCall | None:
        """A model that is loaded, without what leads to it; `None` when it is not.

        For callers who ask one model again and again, and count microseconds.
        """
        hosted = self._hosted.get((model, version))
        if hosted is None or hosted.loaded is None:
            return None
        return DirectCall(hosted.loaded, hosted.gate)

    def generate(
        self,
        model: str,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        version: str | None = None,
        deadline: Deadline = _NO_DEADLINE,
        cancel: CancelToken | None = None,
        expected_s: float | None = None,
        watch: TokenWatch | None = None,
    ) -> EdgeGeneration:
        """Begin an answer: load, check, wait for a slot. The caller's iteration computes it.

        Close the result (or use it in a ``with`` block) when you stop before its end.

        Args:
            model: Name of the model.
            prompt: What to continue.
            options: How; `None` takes the defaults.
            version: Exact version; `None` takes the newest.
            deadline: Looked at while waiting and between tokens.
            cancel: Ends waiting with `Cancelled`, and an answer with that finish reason.
            expected_s: How long it will take, for the estimates of others.
            watch: Told each token and the logits it was chosen by.

        Raises:
            ModelNotFound, BundleError, EngineError: See `describe`.
            InvalidInput: The prompt or an option does not fit.
            Overloaded: Too many wait already.
            DeadlineExceeded: The deadline passed while waiting.
            Cancelled: `cancel` was set while waiting.
        """
        hosted = self._host(model, version)
        loaded = hosted.loaded or self._load(hosted, deadline)
        cancel = cancel or CancelToken()
        # Checked before the queue: a prompt that is too long should not wait to hear it.
        chunks = loaded.generate(prompt, options or GenerationOptions(), cancel, watch)
        slot = hosted.gate.acquire(deadline, expected_s, cancel=cancel)
        generation = EdgeGeneration(
            chunks,
            slot=slot,
            deadline=deadline,
            cancel=cancel,
            variant=hosted.described.variant.id,
            execution_provider=loaded.engine.execution_provider,
        )
        with self._lock:
            self._generations.add(generation)
            is_closed = self._is_closed
        if is_closed:  # `close` ran between the slot and the line above
            generation.close()
            raise _closed()
        return generation

    def state(self, model: str, version: str | None = None) -> SlotState:
        """How busy a model is here; cheap enough for every routing decision.

        Raises:
            ModelNotFound, BundleError, EngineError: See `describe`.
        """
        return self._host(model, version).gate.state()

    def is_loaded(self, model: str, version: str | None = None) -> bool:
        """Whether the next call runs without loading first; `False` for an unknown model too."""
        hosted = self._hosted.get((model, version))
        return hosted is not None and hosted.loaded is not None

    def warm_up(self, model: str, version: str | None = None) -> None:
        """Load a model now rather than at its first request.

        Raises:
            ModelNotFound, BundleError, EngineError: See `describe`; or it cannot be loaded.
        """
        hosted = self._host(model, version)
        if hosted.loaded is None:
            self._load(hosted, _NO_DEADLINE)

    def close(self) -> None:
        """Send waiting calls away, end running answers, free the models; idempotent."""
        with self._lock:
            self._is_closed = True
            hosted = list(dict.fromkeys(self._hosted.values()))
            generations = list(self._generations)
        for one in hosted:
            one.gate.close()
        for generation in generations:
            generation.close()
        give_up_s = time.monotonic() + _CLOSE_TIMEOUT_S
        for one in hosted:
            one.gate.join(max(0.0, give_up_s - time.monotonic()))
            with one.load_lock:
                loaded, one.loaded = one.loaded, None
            if loaded is not None:
                loaded.close()

    def __enter__(self) -> EdgeRuntime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _host(self, model: str, version: str | None) -> _Hosted:
        hosted = self._hosted.get((model, version))
        if hosted is not None:
            return hosted
        with self._lock:
            if self._is_closed:
                raise _closed()
            hosted = self._hosted.get((model, version))
            if hosted is None:
                bundle = self._store.open(model, version)
                # The newest version and the same one asked for by number are one model.
                exact = (model, bundle.manifest.version)
                hosted = self._hosted.get(exact) or self._choose(bundle)
                self._hosted[exact] = self._hosted[model, version] = hosted
            return hosted

    def _choose(self, bundle: Bundle) -> _Hosted:
        manifest = bundle.manifest
        found = candidates(manifest, self._device or probe(), "edge")
        best = found[0]
        if best.excluded is not None:
            reasons = "; ".join(f"{item.variant.id}: {item.excluded}" for item in found)
            raise EngineError(
                f"No variant of {manifest.name!r} {manifest.version} can run on this device "
                f"({reasons})",
                fix="Install what is missing, or convert the model for this device",
            )
        gate = SlotGate(self._slots, self._max_waiting, name=manifest.name)
        return _Hosted(bundle, best.variant, gate)

    def _load(self, hosted: _Hosted, deadline: Deadline) -> LoadedModel:
        return within(
            deadline,
            lambda: self._load_now(hosted),
            name="nearfar-load",
            tried="edge",
            while_=f"while {hosted.bundle.manifest.name!r} was loaded on this device",
        )

    def _load_now(self, hosted: _Hosted) -> LoadedModel:
        with hosted.load_lock:
            if self._is_closed:
                raise _closed()
            if hosted.loaded is None:
                hosted.loaded = LoadedModel(
                    hosted.bundle, hosted.described.variant.id, self._options
                )
            return hosted.loaded


def _compute(
    slot: Slot,
    loaded: LoadedModel,
    feeds: Mapping[str, np.ndarray] | None,
    form: InputForm,
    items: Sequence[str] | Sequence[bytes] | Sequence[str | bytes] | None,
    cancel: CancelToken | None,
) -> EdgeResult:
    """Use a slot for one batch, and give it back."""
    try:
        if form != "tensors":
            outputs = loaded.infer_raw(form, items or (), cancel)
        elif feeds is not None:
            outputs = loaded.infer(feeds, cancel)
        else:
            raise InvalidInput(
                "There are no inputs", field="feeds", fix="Give a dict of name to array"
            )
    finally:
        slot.release()
    engine = loaded.engine
    return EdgeResult(
        outputs, engine.variant_id, engine.execution_provider, slot.queue_s, slot.held_s
    )


def _closed() -> EngineError:
    return EngineError("The edge runtime has been closed", fix="Make a new one, or a new client")
