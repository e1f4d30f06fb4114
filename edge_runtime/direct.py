"""Calls of one loaded model that can begin at once, without what leads to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

# By its name: looking it up in its module is measurable here.
from threading import get_ident

import numpy as np

from edge_runtime.stalls import Polled, Stall, StallWatch
from nearfar.engines.base import CancelToken
from nearfar.engines.model import LoadedModel, RawForm
from nearfar.engines.slots import Slot, SlotGate
from nearfar.errors import Cancelled
from nearfar.patience import Patience


class DirectCall:
    """Runs batches of one loaded model that can begin at once, and no others. Thread-safe.

    Made by `EdgeRuntime.direct`; good until the runtime is closed or the model stalls. `infer`
    returns the outputs and the seconds they took (preprocessing and engine), or `None` when the
    batch would have to wait for a slot, or there is none any more.

    The engine is called in the caller's thread. One that stalls is told to end, and the caller has
    its error when it does; a call that does not heed that keeps its caller, and nobody else.

    Args:
        model: Its name.
        loaded: Runs the batches.
        gate: Of its slots.
        watch: Looks for calls that take too long.
        on_stall: Told of a stall, and what ends the calls.
    """

    __slots__ = ("_cancel", "_engine", "_gate", "_loaded", "_polled", "_stall", "_tell", "_watch")

    def __init__(
        self,
        model: str,
        loaded: LoadedModel,
        gate: SlotGate,
        watch: StallWatch,
        on_stall: Callable[[Stall, CancelToken], None],
    ) -> None:
        self._loaded = loaded
        self._engine = loaded.tensor_engine
        self._gate = gate
        self._watch = watch
        self._tell = on_stall
        self._stall: Stall | None = None
        # One for all calls: they are ended together, and this makes no more of them.
        self._cancel = CancelToken()
        self._polled = Polled(model, gate, self._stalled)
        watch.poll(self._polled)

    def is_of(self, loaded: LoadedModel) -> bool:
        """Whether it calls that session, which has not stalled."""
        return self._loaded is loaded and self._stall is None

    def infer(
        self,
        feeds: Mapping[str, np.ndarray] | None,
        expected_s: float | None = None,
        patience: Patience | None = None,
        form: RawForm = "bytes",
        items: Sequence[str] | Sequence[bytes] | Sequence[str | bytes] = (),
    ) -> tuple[dict[str, np.ndarray], float] | None:
        """Run one batch now.

        Args:
            feeds: The model's inputs; `None` makes them of `items`.
            expected_s: As for `EdgeRuntime.infer`.
            patience: How long the engine may be silent; `None` does not watch it.
            form: What the items are: ``text`` or ``bytes``.
            items: One per row of the batch, to be preprocessed.

        Raises:
            EngineError: The engine failed, or stalled.
            InvalidInput: A tensor or an item does not fit.
        """
        slot = None if self._stall is not None else self._gate.try_acquire(expected_s)
        if slot is None:
            return None
        try:
            if patience is not None:
                self._announce(slot, patience)
            if feeds is not None:
                outputs = self._engine.infer(feeds, self._cancel)
            else:
                outputs = self._loaded.infer_raw(form, items, self._cancel)
        except Cancelled:
            raise self._why() from None
        finally:
            slot.release()
        return outputs, slot.held_s

    def _announce(self, slot: Slot, patience: Patience) -> None:
        slot.thread = get_ident()
        slot.patience = patience
        watch = self._watch
        watch.was_touched = True
        if not watch.is_polling:
            watch.rouse()

    def _stalled(self, slot: Slot, stall: Stall) -> None:
        self._stall = stall
        self._tell(stall, self._cancel)

    def _why(self) -> Exception:
        """Only a stall cancels."""
        assert self._stall is not None
        return self._stall.error()
