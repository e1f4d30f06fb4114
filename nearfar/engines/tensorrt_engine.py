"""Run an engine that TensorRT built on this device.

Written after NVIDIA's documentation of TensorRT 10 and 11, and tested with stand-ins for the two
libraries; **not yet run on a GPU**.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nearfar.bundle.manifest import Manifest, TensorSpec, Variant
from nearfar.engines.base import CancelToken, ShapeRange
from nearfar.engines.cuda_memory import Cuda
from nearfar.engines.feeds import FeedCheck
from nearfar.errors import BundleError, Cancelled, EngineError, InvalidInput
from nearfar.tensors import numpy_of

logger = logging.getLogger(__name__)

#: TensorRT's names of types (`DataType`) to those of manifests.
_DATATYPES = {
    "FLOAT": "FP32", "HALF": "FP16", "BF16": "BF16", "INT8": "INT8", "INT32": "INT32",
    "INT64": "INT64", "BOOL": "BOOL", "UINT8": "UINT8",
}  # fmt: skip
_MAX_LINES = 20


class TensorrtEngine:
    """One engine with one execution context. Thread-safe: calls run one after the other.

    Args:
        data: The serialized engine.
        variant: What the manifest says about it.
        manifest: For the tensor specs, which the engine must match.
        trt: TensorRT's module; `None` imports it.
        cuda: Memory and stream; `None` makes one.

    Raises:
        EngineError: TensorRT cannot load the engine, or a library is missing.
        BundleError: Its inputs and outputs are not the manifest's.
    """

    execution_provider = "TensorRT"

    def __init__(
        self,
        data: bytes,
        variant: Variant,
        *,
        manifest: Manifest,
        trt: Any = None,
        cuda: Cuda | None = None,
    ) -> None:
        self.variant_id = variant.id
        self._label = f"{manifest.name}/{variant.id}"
        self._said: list[str] = []
        self._lock = threading.Lock()
        plan = variant.tensorrt
        assert plan is not None  # manifests of this engine have one
        self._fixed = plan.fixed
        self._ranges: dict[str, ShapeRange] = {one.name: one for one in plan.profile}
        trt = trt if trt is not None else importlib.import_module("tensorrt")
        self._cuda: Cuda | None = cuda or Cuda()
        try:
            self._runtime: Any = trt.Runtime(_logger(trt, self._said))
            self._engine: Any = self._runtime.deserialize_cuda_engine(data)
            self._context: Any = self._engine and self._engine.create_execution_context()
            if self._context is None or self._engine is None:
                raise self._error("cannot load the engine")
            names = [
                self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)
            ]
            inputs = {n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT}
            self.inputs: Sequence[TensorSpec] = manifest.inputs
            self.outputs: Sequence[TensorSpec] = manifest.outputs
            self._check_names(inputs, set(names) - inputs)
            self._dtypes = {name: self._dtype(name) for name in names}
        except BaseException:
            self.close()
            raise
        self._check = FeedCheck(self.inputs)

    def infer(
        self, feeds: Mapping[str, np.ndarray], cancel: CancelToken | None = None
    ) -> dict[str, np.ndarray]:
        """Run one call; see `TensorEngine.infer`. A call that has begun is not stopped.

        Raises:
            InvalidInput: A name, dtype or shape does not fit, a size is outside the optimization
                profile, or an input is not the value the engine was built for.
        """
        self._check(feeds)
        self._check_ranges(feeds)
        with self._lock:
            if self._cuda is None:
                raise EngineError(f"{self._label} has been closed", fix="Load it again")
            if cancel is not None and cancel.is_cancelled:
                raise Cancelled(f"The call of {self._label} was cancelled")
            return self._run(self._cuda, feeds)

    def close(self) -> None:
        """Free the engine once the call that runs is done; idempotent."""
        with self._lock:
            cuda, self._cuda = self._cuda, None
            self._context = self._engine = self._runtime = None
            if cuda is not None:
                cuda.close()

    def _run(self, cuda: Cuda, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        context = self._context
        self._said.clear()
        kept = []  # arrays that are being copied
        for spec in self.inputs:
            if spec.name in self._fixed:
                continue
            array = np.ascontiguousarray(feeds[spec.name], dtype=self._dtypes[spec.name])
            kept.append(array)
            address = cuda.reserve(spec.name, array.nbytes)
            if not context.set_input_shape(spec.name, tuple(array.shape)):
                raise self._error(f"refuses the shape {list(array.shape)} of {spec.name!r}")
            context.set_tensor_address(spec.name, address)
            cuda.upload(address, array)
        outputs: dict[str, np.ndarray] = {}
        for spec in self.outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            if any(size < 0 for size in shape):
                raise self._error(f"does not know the size of {spec.name!r} beforehand")
            array = np.empty(shape, self._dtypes[spec.name])
            context.set_tensor_address(spec.name, cuda.reserve(spec.name, array.nbytes))
            outputs[spec.name] = array
        if not context.execute_async_v3(cuda.stream):
            raise self._error("failed while running")
        for name, array in outputs.items():
            cuda.download(array, cuda.reserve(name, array.nbytes))
        cuda.wait()
        return {
            spec.name: outputs[spec.name].astype(numpy_of(spec.datatype), copy=False)
            for spec in self.outputs
        }

    def _check_ranges(self, feeds: Mapping[str, np.ndarray]) -> None:
        for name, sizes in self._ranges.items():
            shape = feeds[name].shape
            limits = zip(sizes.smallest, shape, sizes.largest, strict=True)
            if not all(low <= size <= high for low, size, high in limits):
                raise InvalidInput(
                    f"Input {name!r} has shape {list(shape)}; the engine covers "
                    f"{list(sizes.smallest)} to {list(sizes.largest)}",
                    field=name,
                    fix="Send smaller batches, or convert with other ranges (tensorrt.axes)",
                )
        for name, value in self._fixed.items():
            if not np.all(feeds[name] == value):
                raise InvalidInput(
                    f"Input {name!r} is not {value:g}, which the engine was built for",
                    field=name,
                    fix="Use another variant, or convert with another value (tensorrt.fixed)",
                )

    def _check_names(self, inputs: set[str], outputs: set[str]) -> None:
        stated = {spec.name for spec in self.inputs} - set(self._fixed)
        if inputs != stated or outputs != {spec.name for spec in self.outputs}:
            raise BundleError(
                f"The engine of {self._label} has the inputs {sorted(inputs)} and the outputs "
                f"{sorted(outputs)}, its manifest states others",
                fix="Convert the model again, and build its engine again",
            )

    def _dtype(self, name: str) -> np.dtype[Any]:
        stated = getattr(self._engine.get_tensor_dtype(name), "name", "")
        datatype = _DATATYPES.get(stated)
        if datatype is None:
            raise EngineError(
                f"{self._label} has the tensor {name!r} of TensorRT's type {stated}, which cannot "
                "be exchanged",
                fix="Convert the model with inputs and outputs of FP32, FP16 or integers",
            )
        return numpy_of(datatype)

    def _error(self, what: str) -> EngineError:
        said = "; ".join(self._said[:3]) or "it does not say why"
        return EngineError(
            f"TensorRT {what} of {self._label}: {said}"
            if what.startswith("cannot")
            else f"TensorRT {what} ({self._label}): {said}",
            fix="Build the engine again on this device (nearfar edge build BUNDLE --force), or use "
            "another variant",
        )


def _logger(trt: Any, said: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR and len(said) < _MAX_LINES:
                said.append(text.strip().partition("\n")[0][:300])

    return Logger()
