"""The near route: a thin adapter over `edge_runtime`, imported when it is first needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nearfar.errors import BundleError, EngineError, NearfarError

if TYPE_CHECKING:
    from edge_runtime import EdgeModel, EdgeRuntime
    from edge_runtime.sensing import SpeedSensor
    from nearfar.bundle.manifest import Manifest
    from nearfar.engines.base import CancelToken, SessionOptions
    from nearfar.units import Deadline
    from sdk.due import DeadlineWatch, Watched


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
        return EdgeRuntime(store, options=self._options or SessionOptions())

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
