"""One model of a runtime: its variant, its session, its slots, and whether it hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec

from edge_runtime.direct import DirectCall
from edge_runtime.stalls import END_S, MOST_LOST, Stall
from nearfar.bundle import Bundle
from nearfar.bundle.manifest import Manifest, Variant
from nearfar.engines.model import LoadedModel
from nearfar.engines.slots import SlotGate
from nearfar.errors import EngineError


class EdgeModel(msgspec.Struct, frozen=True):
    """What would answer on this device.

    Attributes:
        manifest: The model's manifest.
        variant: The variant this device would run.
    """

    manifest: Manifest
    variant: Variant


class Hosted:
    """A model: chosen when first asked about, loaded when first used.

    Args:
        bundle: Where it comes from.
        variant: Which of its variants runs here.
        make_gate: Makes the gate of its slots, and another one when a session is given up.

    Attributes:
        gate: Of the present session.
        loaded: The present session; `None` before it is needed.
        load_lock: Held while loading.
        direct: Calls of a session without what leads to it; made when it is wanted.
    """

    def __init__(self, bundle: Bundle, variant: Variant, make_gate: Callable[[], SlotGate]) -> None:
        self.bundle = bundle
        self.described = EdgeModel(bundle.manifest, variant)
        self.load_lock = threading.Lock()
        self.loaded: LoadedModel | None = None
        self._make_gate = make_gate
        self.gate = make_gate()
        self.direct: DirectCall | None = None
        self._lock = threading.Lock()
        self._hung: tuple[float, Stall] | None = None  # since when
        self._lost: list[tuple[SlotGate, LoadedModel | None]] = []

    @property
    def lost(self) -> int:
        """Sessions that were given up and still hang."""
        with self._lock:
            self._forget_ended()
            return len(self._lost)

    def hang(self, stall: Stall) -> None:
        """A call of the present session has stalled, and was told to end."""
        with self._lock:
            if self._hung is None:
                self._hung = time.monotonic(), stall
        self.gate.hang(stall.error())

    def refuse_if_hung(self) -> None:
        """Let a call through only to a session that does not hang; may make way for a fresh one.

        Raises:
            EngineError: It hangs, and has not had its time to end; or too many do.
        """
        if self._hung is None:
            return
        with self._lock:
            if self._hung is None:
                return
            since_s, stall = self._hung
            if not self.gate.running():  # it ended, late or because it was told to
                self._hung = None
                self.gate.recover()
                return
            if time.monotonic() - since_s < END_S:
                raise stall.error()
            self._forget_ended()
            if len(self._lost) >= MOST_LOST:
                raise EngineError(
                    f"{len(self._lost) + 1} sessions of {stall.model!r} hang on this device, and "
                    "no more are loaded beside them",
                    fix="Restart the process; if it happens again, look at the device with "
                    "`nearfar doctor`, or convert the model for another execution provider",
                )
            self.gate.close()
            self._lost.append((self.gate, self.loaded))
            self.gate, self.loaded, self.direct = self._make_gate(), None, None
            self._hung = None

    def close(self, give_up_s: float) -> None:
        """Free the model once its calls are done, but wait for none that hangs.

        Args:
            give_up_s: Monotonic time until which to wait for the others.
        """
        self.gate.join(max(0.0, give_up_s - time.monotonic()))
        with self.load_lock:
            loaded, self.loaded = self.loaded, None
        with self._lock:
            lost, self._lost = self._lost, []
        for one in (loaded, *(model for _, model in lost)):
            if one is not None:
                one.close()  # a call that is inside keeps what it needs

    def _forget_ended(self) -> None:
        for gate, loaded in self._lost:
            if not gate.running() and loaded is not None:
                loaded.close()
        self._lost = [(gate, loaded) for gate, loaded in self._lost if gate.running()]
