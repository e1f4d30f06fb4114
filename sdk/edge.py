"""The near route: a thin adapter over `edge_runtime`, imported when it is first needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nearfar.errors import BundleError, EngineError, NearfarError

if TYPE_CHECKING:
    from edge_runtime import EdgeModel, EdgeRuntime, Stall
    from edge_runtime.sensing import SpeedSensor
    from nearfar.bundle.manifest import Manifest
    from nearfar.engines.base import CancelToken, SessionOptions
    from nearfar.units import Deadline
    from sdk.due import DeadlineWatch, Watched
    from sdk.routing import CircuitBreaker


class EdgeRoute:
    """Models of one store, run in this process.

    Args:
        store: Directory of bundles.
        options: Engine settings; `None` takes the defaults.
        trusted_keys: When there are any, only bundles that one of these keys signed are run.

    Raises:
        BundleError: There is no such directory.
    """

    def __init__(
        self,
        store: Path,
        *,
        options: SessionOptions | None = None,
        trusted_keys: Sequence[str] = (),
    ) -> None:
        self.store = store
        if not store.is_dir():
            raise BundleError(
                f"There is no model store {store}",
                fix="Convert a model into it (nearfar convert MODEL -o STORE/NAME), correct "
                "[models] store, or use edge=False",
            )
        self._options = options
        self._trusted_keys = tuple(trusted_keys) or None
        self._making = threading.Lock()
        self._runtime: EdgeRuntime | None = None
        self._found: dict[tuple[str, str | None], EdgeModel] = {}
        self._watch: DeadlineWatch | None = None
        self._sensor: SpeedSensor | None = None
        #: Of the models whose engine stalled at some time.
        self.breakers: dict[str, CircuitBreaker] = {}
        #: Told of each stall, in a thread of the runtime.
        self.on_stall: list[Callable[[Stall], None]] = []
        #: Root of the file system that says how fast the device may run.
        self.root = Path("/")

    def watch(self, deadline: Deadline, cancel: CancelToken) -> Watched:
        """Have a call cancelled at its deadline, unless it ends before; a context manager."""
        watch = self._watch
        if watch is None:
            from sdk.due import DeadlineWatch

            with self._making:
                watch = self._watch = self._watch or DeadlineWatch()
        return watch.watch(deadline.at_s, cancel)

    def sense(self, tell: Callable[[float | None], None], now_s: float) -> None:
        """Have somebody told how fast the device may run, now and whenever that changes.

        For decisions on which it has a bearing; what looks at the device is started with the first
        of them, and nothing here waits for it.

        Args:
            tell: Told the share of the full clock; see `DeviceCondition.speed`.
            now_s: Monotonic time.
        """
        sensor = self._sensor
        if sensor is None:
            from edge_runtime.sensing import SpeedSensor

            with self._making:
                if self._sensor is None:
                    self._sensor = SpeedSensor(tell, root=self.root)
                sensor = self._sensor
        sensor.asked(now_s)

    @property
    def is_ready(self) -> bool:
        """Whether the runtime was made."""
        return self._runtime is not None

    @property
    def runtime(self) -> EdgeRuntime:
        """The runtime; made on first use.

        Raises:
            EngineError: Its packages are not installed.
            ConfigError: A trusted key cannot be read.
        """
        runtime = self._runtime
        if runtime is not None:
            return runtime
        with self._making:  # two runtimes would hold every model twice
            if self._runtime is None:
                self._runtime = self._make()
            return self._runtime

    def make_ready(self, deadline: Deadline) -> None:
        """Make the runtime, but wait for it no longer than until a deadline.

        Importing an engine's library takes a good part of a second.

        Raises:
            DeadlineExceeded: It was not made in time; it will be, for the next request.
            EngineError, ConfigError: As `runtime`.
        """
        from nearfar.waiting import within

        within(
            deadline, lambda: self.runtime, name="nearfar-load", tried="edge",
            while_="while the engines of this device were made ready",
        )  # fmt: skip

    def _make(self) -> EdgeRuntime:
        try:
            from edge_runtime import EdgeRuntime
            from nearfar.bundle import BundleStore
            from nearfar.engines.base import SessionOptions
        except ImportError as exc:
            raise EngineError(
                f"Models cannot run on this device: {exc.name} is not installed",
                fix="pip install 'nearfar[edge]', or use the cloud only (edge=False)",
            ) from exc
        store = BundleStore(self.store, trusted_keys=self._trusted_keys)
        return EdgeRuntime(store, options=self._options or SessionOptions(), on_stall=self.stalled)

    # -- engines that stalled --------------------------------------------------------------------

    def stalled(self, stall: Stall) -> None:
        """An engine stalled: its model is not asked for a while, and then once, to see."""
        breaker = self.breakers.get(stall.model)
        if breaker is None:
            from sdk.routing import CircuitBreaker

            breaker = self.breakers[stall.model] = CircuitBreaker(failure_threshold=1)
        breaker.record_failure(time.monotonic())
        for tell in self.on_stall:
            tell(stall)

    def obstacle(self, model: str, now_s: float) -> str:
        """Why a model is not asked just now, in words; ``""`` when it may be."""
        breaker = self.breakers.get(model)
        wait_s = 0.0 if breaker is None else breaker.retry_in_s(now_s)
        return f"it stalled, next try in {wait_s:.1f} s" if wait_s else ""

    def asked(self, model: str) -> None:
        """A request is about to be computed."""
        breaker = self.breakers.get(model)
        if breaker is not None:
            breaker.acquire(time.monotonic())

    def ended(self, model: str, *, is_answered: bool) -> None:
        """It was answered, or ended in a way that says nothing about the engine's health."""
        breaker = self.breakers.get(model)
        if breaker is None:
            return
        if is_answered:
            breaker.record_success(time.monotonic())
        else:
            breaker.release(time.monotonic())

    def find(self, model: str, version: str | None) -> EdgeModel:
        """What would run here; reads the manifest once, loads nothing.

        Raises:
            ModelNotFound: The store does not hold it.
            EngineError, BundleError: It is here, but cannot run.
        """
        key = (model, version)
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self.runtime.describe(model, version)
        return found

    def models(self) -> list[Manifest]:
        """Manifests of the store, newest version of each name."""
        return self.runtime.models()

    def names(self) -> list[str]:
        """Names of the store's models, for messages; empty when it cannot be read."""
        try:
            return [manifest.name for manifest in self.models()]
        except NearfarError:
            return []

    def close(self) -> None:
        """Free all loaded models; idempotent."""
        if self._watch is not None:
            self._watch.close()
        if self._sensor is not None:
            self._sensor.close()
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None
