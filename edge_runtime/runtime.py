"""Run the bundles of a store in this process: load once, queue, compute, measure."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edge_runtime.direct import DirectCall
from edge_runtime.generation import EdgeGeneration, Watching
from edge_runtime.hands import Hands
from edge_runtime.hosted import EdgeModel, Hosted
from edge_runtime.stalls import Followed, Stall, StallWatch
from nearfar.bundle import BundleStore
from nearfar.bundle.manifest import Manifest
from nearfar.engines.base import CancelToken, SessionOptions, TokenWatch
from nearfar.engines.devices import Device, probe
from nearfar.engines.model import LoadedModel
from nearfar.engines.selection import candidates
from nearfar.engines.slots import Slot, SlotGate, SlotState
from nearfar.errors import EngineError, InvalidInput
from nearfar.generation import GenerationOptions, Prompt
from nearfar.patience import Patience
from nearfar.units import Deadline
from nearfar.waiting import within

if TYPE_CHECKING:
    from nearfar.bundle import Bundle
    from nearfar.wire.messages import InputForm

logger = logging.getLogger(__name__)

#: How long `close` waits for the calls that run. A token takes well below a second.
_CLOSE_TIMEOUT_S = 10.0

_NO_DEADLINE = Deadline()


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
        on_stall: Told of every engine that stalled, in a thread of the runtime; must not wait.
    """

    def __init__(
        self,
        store: BundleStore,
        *,
        options: SessionOptions | None = None,
        slots_per_model: int = 1,
        max_waiting_per_model: int = 64,
        device: Device | None = None,
        on_stall: Callable[[Stall], None] | None = None,
    ) -> None:
        self._store = store
        self._options = options or SessionOptions()
        self._slots = slots_per_model
        self._max_waiting = max_waiting_per_model
        self._device = device
        self._hosted: dict[tuple[str, str | None], Hosted] = {}
        self._lock = threading.Lock()
        self._generations: weakref.WeakSet[EdgeGeneration] = weakref.WeakSet()
        self._on_stall = on_stall
        self._watch = StallWatch()
        self._hands = Hands()
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
        patience: Patience | None = None,
    ) -> EdgeResult:
        """Run one batch.

        With `patience` the engine is called in a thread of its own, so that an engine that stalls,
        or does not look up at the deadline, does not keep the caller.

        Args:
            model: Name of the model.
            feeds: The model's inputs, for the form ``tensors``.
            form: What is given: ``tensors``, or ``text`` / ``bytes`` to be preprocessed.
            items: One per row of the batch, for the forms ``text`` and ``bytes``.
            version: Exact version; `None` takes the newest.
            deadline: When waiting for a slot makes no sense any more.
            expected_s: How long it will take, for the estimates of others.
            cancel: Ends waiting at once, and computing as soon as the engine can.
            patience: How long the engine may be silent; `None` does not watch it.

        Raises:
            ModelNotFound, BundleError, EngineError: See `describe`; or the engine failed, or
                stalled.
            InvalidInput: A tensor or item does not fit.
            Overloaded: Too many wait already.
            DeadlineExceeded: The deadline passed before it began; with `patience`, at any time.
            Cancelled: `cancel` was set.
        """
        hosted = self._hosted.get((model, version)) or self._host(model, version)
        hosted.refuse_if_hung()
        gate, loaded = hosted.gate, hosted.loaded or self._load(hosted, deadline)
        slot = gate.acquire(deadline, expected_s, cancel=cancel)
        if patience is None:
            return _compute(slot, loaded, feeds, form, items, cancel)
        token = cancel or CancelToken()
        work = self._hands.do(lambda: _compute(slot, loaded, feeds, form, items, token))

        def stalled(stall: Stall) -> None:
            work.give_up(stall.error(), lambda: self._stalled(hosted, stall, token))

        followed = Followed(
            model, "batch", patience.first_s, is_cold=patience.is_cold,
            began_s=time.monotonic(), thread=lambda: work.native_id, on_stall=stalled,
        )  # fmt: skip
        self._watch.follow(followed)
        try:
            result: EdgeResult = work.wait(deadline)
        except BaseException:
            token.cancel()  # it is not waited for any more, but watched until it ends
            raise
        finally:
            if work.has_returned:
                followed.end()
        return result

    def direct(self, model: str, version: str | None = None) -> DirectCall | None:
        """A model that is loaded, without what leads to it; `None` when it is not.

        For callers who ask one model again and again, and count microseconds.
        """
        hosted = self._hosted.get((model, version))
        loaded = None if hosted is None else hosted.loaded
        if hosted is None or loaded is None:
            return None
        known = hosted.direct
        if known is None or not known.is_of(loaded):  # one for each session: it has one brake
            known = hosted.direct = DirectCall(
                model,
                loaded,
                hosted.gate,
                self._watch,
                lambda stall, cancel: self._stalled(hosted, stall, cancel),
            )
        return known

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
        patience: Patience | None = None,
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
            patience: As for `infer`; holds for the prompt and for each token.

        Raises:
            ModelNotFound, BundleError, EngineError: See `describe`.
            InvalidInput: The prompt or an option does not fit.
            Overloaded: Too many wait already.
            DeadlineExceeded: The deadline passed while waiting.
            Cancelled: `cancel` was set while waiting.
        """
        hosted = self._host(model, version)
        hosted.refuse_if_hung()
        gate, loaded = hosted.gate, hosted.loaded or self._load(hosted, deadline)
        cancel = cancel or CancelToken()
        # Checked before the queue: a prompt that is too long should not wait to hear it.
        chunks = loaded.generate(prompt, options or GenerationOptions(), cancel, watch)
        slot = gate.acquire(deadline, expected_s, cancel=cancel)
        watched = None
        if patience is not None:
            watched = Watching(
                model, patience, self._hands, self._watch,
                lambda stall: self._stalled(hosted, stall, cancel),
            )  # fmt: skip
        generation = EdgeGeneration(
            chunks,
            slot=slot,
            deadline=deadline,
            cancel=cancel,
            variant=hosted.described.variant.id,
            execution_provider=loaded.engine.execution_provider,
            watching=watched,
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
        """Send waiting calls away, end running answers, free the models; idempotent.

        What has stalled is not waited for.
        """
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
            one.close(give_up_s)
        self._watch.close()
        self._hands.close()

    def lost_sessions(self, model: str, version: str | None = None) -> int:
        """Sessions of a model that were given up because they hang, and still do."""
        hosted = self._hosted.get((model, version))
        return 0 if hosted is None else hosted.lost

    def __enter__(self) -> EdgeRuntime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _host(self, model: str, version: str | None) -> Hosted:
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

    def _choose(self, bundle: Bundle) -> Hosted:
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
        return Hosted(
            bundle,
            best.variant,
            lambda: SlotGate(self._slots, self._max_waiting, name=manifest.name),
        )

    def _stalled(self, hosted: Hosted, stall: Stall, cancel: CancelToken) -> None:
        """A call has stalled: it is told to end, and everybody but its caller of it."""
        logger.warning("%s (threads: %s)", stall.error().problem, stall.life)
        hosted.hang(stall)
        if self._on_stall is not None:
            self._on_stall(stall)
        cancel.cancel()

    def _load(self, hosted: Hosted, deadline: Deadline) -> LoadedModel:
        return within(
            deadline,
            lambda: self._load_now(hosted),
            name="nearfar-load",
            tried="edge",
            while_=f"while {hosted.bundle.manifest.name!r} was loaded on this device",
        )

    def _load_now(self, hosted: Hosted) -> LoadedModel:
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
