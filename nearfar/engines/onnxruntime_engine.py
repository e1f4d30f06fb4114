"""Run ONNX models with ONNX Runtime: on the CPU, with CUDA, with TensorRT.

The CUDA and TensorRT settings follow ONNX Runtime's documentation of the two execution providers;
they have not been run on that hardware yet.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from nearfar.bundle.manifest import Manifest, TensorSpec, Variant
from nearfar.engines import extended_tensors
from nearfar.engines.base import CancelToken, SessionOptions, ShapeRange
from nearfar.engines.devices import physical_cores
from nearfar.engines.feeds import FeedCheck
from nearfar.errors import BundleError, Cancelled, EngineError, InvalidInput, NearfarError
from nearfar.tensors import EXTENDED, OF_ONNXRUNTIME, numpy_of

logger = logging.getLogger(__name__)

#: What is tried when the caller wishes nothing, as far as the installed package has it.
_BY_DEVICE = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")

#: Everything ONNX Runtime raises derives from Exception alone, each class on its own.
ORT_EXCEPTIONS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(
        item
        for item in vars(ort_errors).values()
        if isinstance(item, type) and issubclass(item, Exception)
    ),
)

#: The model file itself is at fault.
_BROKEN_MODEL = (ort_errors.InvalidProtobuf, ort_errors.InvalidGraph, ort_errors.NoSuchFile)


class OnnxRuntimeEngine:
    """One ONNX model in one session. Thread-safe: ONNX Runtime runs calls side by side.

    Args:
        path: The model file, verified by the caller.
        variant: What the manifest says about it.
        options: Session settings.
        manifest: For the tensor specs, which the model must match.

    Raises:
        BundleError: The file is no model, or its inputs and outputs are not the manifest's.
        EngineError: ONNX Runtime cannot run it here, or a required provider is missing.
    """

    def __init__(
        self, path: Path, variant: Variant, options: SessionOptions, *, manifest: Manifest
    ) -> None:
        self.variant_id = variant.id
        self._label = f"{manifest.name}/{variant.id}"
        session, self.execution_provider = open_session(path, variant, options, self._label)
        self.inputs: Sequence[TensorSpec] = _specs(session.get_inputs(), self._label)
        self.outputs: Sequence[TensorSpec] = _specs(session.get_outputs(), self._label)
        _check_specs(self._label, "input", manifest.inputs, self.inputs)
        _check_specs(self._label, "output", manifest.outputs, self.outputs)
        self._session = session
        self._output_names = [spec.name for spec in self.outputs]
        self._dtypes = [(spec.name, numpy_of(spec.datatype)) for spec in self.inputs]
        self._check = FeedCheck(self.inputs, [list(item.shape) for item in session.get_inputs()])
        # Outputs made on the GPU are bound there and copied once at the end; on the CPU binding
        # costs more than it saves.
        self._bind_to = "cuda" if self.execution_provider in _BY_DEVICE[:2] else None
        self._is_extended = any(spec.datatype in EXTENDED for spec in (*self.inputs, *self.outputs))
        if self._is_extended and any(
            spec.datatype == "BYTES" for spec in (*self.inputs, *self.outputs)
        ):
            raise EngineError(
                f"{self._label} has strings beside BF16 or 4-bit tensors, which the Python API of "
                "ONNX Runtime cannot bind together",
                fix="Convert the model with FP16 or FP32 instead of BF16, INT8 instead of INT4",
            )
        self._close_lock = threading.Lock()

    def infer(
        self, feeds: Mapping[str, np.ndarray], cancel: CancelToken | None = None
    ) -> dict[str, np.ndarray]:
        """Run one call; see `TensorEngine.infer`. On the CPU it can be cancelled between nodes."""
        # After a model has filled the processor's caches, every further line here costs more than
        # it seems. So only what ONNX Runtime would take for something else (lists, None, swapped
        # bytes) is checked before; it refuses the rest itself, and then the full check finds words.
        for name, dtype in self._dtypes:
            array = feeds.get(name)
            if not isinstance(array, np.ndarray) or array.dtype is not dtype:
                self._check(feeds)
        session = self._session
        if session is None:
            raise EngineError(f"{self._label} has been closed", fix="Load it again")
        if self._check.has_strings:
            feeds = _with_text(feeds)
        try:
            if self._is_extended:
                outputs = extended_tensors.run(session, feeds, self.inputs, self.outputs)
            elif self._bind_to is None:
                outputs = session.run(self._output_names, feeds, _stopped_by(cancel))
            else:
                outputs = _run_bound(session, feeds, self._output_names, self._bind_to)
        except ORT_EXCEPTIONS as exc:
            if cancel is not None and cancel.is_cancelled:
                raise Cancelled(f"The call of {self._label} was cancelled") from None
            self._check(feeds)
            raise self._run_error(exc) from exc
        return dict(zip(self._output_names, outputs))  # noqa: B905 (`strict` costs 15 µs here)

    def close(self) -> None:
        """Free the session once the calls that run are done; idempotent."""
        with self._close_lock:
            self._session = None

    def _run_error(self, exc: Exception) -> NearfarError:
        if isinstance(exc, ort_errors.InvalidArgument):
            return InvalidInput(
                f"{self._label} refuses the inputs: {_first_line(exc)}",
                field="inputs",
                fix="Compare names, types and shapes with `nearfar bundle inspect`",
            )
        return EngineError(
            f"ONNX Runtime failed while running {self._label}: {_first_line(exc)}",
            fix="Try another variant or execution provider; less memory pressure may help",
        )


def open_session(
    path: Path,
    variant: Variant,
    options: SessionOptions,
    label: str,
    *,
    by_device: Sequence[str] = _BY_DEVICE,
) -> tuple[Any, str]:
    """Open a model file.

    Args:
        path: The file, verified by the caller.
        variant: What the manifest says about it.
        options: Session settings.
        label: Names the variant in errors.
        by_device: Providers that are tried where the options wish nothing.

    Returns:
        The session, and the execution provider it really runs on.

    Raises:
        BundleError: The file is no model.
        EngineError: ONNX Runtime cannot run it here, or a required provider is missing.
    """
    wished = _wished_providers(options, variant, by_device)
    try:
        session = ort.InferenceSession(
            str(path),
            sess_options=_session_options(options),
            providers=[
                (name, provider_options(name, options, variant.precision)) for name in wished
            ],
        )
        # Without this a failing GPU run is repeated on the CPU in silence.
        session.disable_fallback()
    except ORT_EXCEPTIONS as exc:
        raise _load_error(path, exc, label) from exc
    # ONNX Runtime drops providers that do not start, with a log line only; what it kept is what
    # really runs.
    provider: str = session.get_providers()[0]
    if provider != wished[0]:
        _check_fallback(label, wished[0], provider, options)
    return session, provider


def _load_error(path: Path, exc: Exception, label: str) -> NearfarError:
    if isinstance(exc, _BROKEN_MODEL):
        return BundleError(
            f"ONNX Runtime cannot read {path.name} of {label}: {_first_line(exc)}",
            fix="Convert the model again",
        )
    return EngineError(
        f"ONNX Runtime {ort.__version__} cannot load {label}: {_first_line(exc)}",
        fix="Update onnxruntime, or convert the model again with an older opset",
    )


def provider_options(name: str, options: SessionOptions, precision: str) -> dict[str, str]:
    """Settings of one execution provider; empty for those that need none.

    Source: ONNX Runtime documentation, "CUDA Execution Provider" and "TensorRT Execution
    Provider". Not run on a GPU yet.
    """
    settings: dict[str, str] = {}
    if name == "CUDAExecutionProvider":
        # HEURISTIC: the default EXHAUSTIVE search makes the first call of each shape take seconds.
        settings["cudnn_conv_algo_search"] = "HEURISTIC"
        if not options.use_arena:
            settings["arena_extend_strategy"] = "kSameAsRequested"
    elif name == "TensorrtExecutionProvider":
        settings["trt_fp16_enable"] = str(precision == "fp16")
        if options.cache_dir is not None:
            # Building an engine takes minutes on a Jetson; the cache makes it once per machine.
            settings["trt_engine_cache_enable"] = "True"
            settings["trt_engine_cache_path"] = options.cache_dir
            settings["trt_timing_cache_enable"] = "True"
            settings["trt_timing_cache_path"] = options.cache_dir
        if options.shape_ranges:
            for key in ("min", "opt", "max"):
                settings[f"trt_profile_{key}_shapes"] = _profile(key, options.shape_ranges)
    return settings


def _profile(key: str, ranges: Sequence[ShapeRange]) -> str:
    """TensorRT's notation: ``ids:1x16,mask:1x16``."""
    field = {"min": "smallest", "opt": "usual", "max": "largest"}[key]
    return ",".join(
        f"{item.name}:{'x'.join(str(size) for size in getattr(item, field))}" for item in ranges
    )


def _wished_providers(
    options: SessionOptions, variant: Variant, by_device: Sequence[str] = _BY_DEVICE
) -> list[str]:
    """Providers to ask for, CPU last; those the installed package lacks are left out."""
    available = ort.get_available_providers()
    wished = list(options.execution_providers or by_device)
    needed = variant.requirements.execution_provider
    if not options.execution_providers and needed in wished:
        # A variant built for CUDA is not handed to TensorRT, which would rebuild it.
        wished = wished[wished.index(needed) :] if needed != "CPUExecutionProvider" else wished
    usable = [name for name in wished if name in available]
    missing = [name for name in wished if name not in available]
    if (
        missing
        and options.execution_providers
        and (options.require_execution_provider or not usable)
    ):
        raise EngineError(
            f"The execution provider {missing[0]} is not in the installed onnxruntime, which has "
            f"{', '.join(available)}",
            fix="Install the onnxruntime build for your hardware, or wish for another provider",
        )
    if "CPUExecutionProvider" not in usable:
        usable.append("CPUExecutionProvider")  # runs the operators a GPU provider leaves over
    return usable


def _check_fallback(label: str, wished: str, actual: str, options: SessionOptions) -> None:
    if options.require_execution_provider:
        raise EngineError(
            f"{label} would run on {actual}: ONNX Runtime could not start {wished}",
            fix="Check the driver and the CUDA / TensorRT libraries (ONNX Runtime logs which one "
            "is missing), or do not require the provider",
        )
    logger.warning("%s runs on %s, because %s did not start", label, actual, wished)


def _session_options(options: SessionOptions) -> ort.SessionOptions:
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.intra_op_num_threads = options.threads or physical_cores()
    # Sequential execution: the models here have no wide branches, and parallel mode costs a second
    # thread pool.
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.enable_cpu_mem_arena = options.use_arena
    settings.enable_mem_pattern = options.use_arena
    settings.add_session_config_entry(
        "session.intra_op.allow_spinning", "1" if options.allow_spinning else "0"
    )
    settings.log_severity_level = 3  # errors; what we must know of warnings is checked above
    return settings


def _specs(nodes: Sequence[Any], label: str) -> list[TensorSpec]:
    """Specs of a session's inputs or outputs; named and unknown axes become -1."""
    specs = []
    for node in nodes:
        datatype = OF_ONNXRUNTIME.get(node.type)
        if datatype is None:
            raise BundleError(
                f"{label} has the tensor {node.name!r} of type {node.type}, which cannot be "
                "exchanged",
                fix="Convert the model with plain tensors of a numpy type as inputs and outputs",
            )
        shape = tuple(axis if isinstance(axis, int) else -1 for axis in node.shape)
        specs.append(TensorSpec(name=node.name, datatype=datatype, shape=shape))
    return specs


def _check_specs(
    label: str, kind: str, stated: Sequence[TensorSpec], actual: Sequence[TensorSpec]
) -> None:
    """A manifest that describes another model would mislead every caller."""
    if {(s.name, s.datatype, len(s.shape)) for s in stated} != {
        (s.name, s.datatype, len(s.shape)) for s in actual
    }:
        raise BundleError(
            f"{label} has the {kind}s {_describe(actual)}; its manifest states {_describe(stated)}",
            fix="Convert the model again",
        )


def _describe(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.datatype}{list(spec.shape)}" for spec in specs) or "none"


def _with_text(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """BYTES tensors as ONNX Runtime takes them: objects of type str."""
    changed = dict(feeds)
    for name, array in feeds.items():
        if array.dtype.kind in "SO":
            try:
                texts = [
                    item.decode() if isinstance(item, bytes) else str(item) for item in array.flat
                ]
            except UnicodeDecodeError as exc:
                raise InvalidInput(
                    f"Input {name!r} holds bytes that are not UTF-8, and ONNX strings are text",
                    field=name,
                    fix="Encode them as text first, for example with base64",
                ) from exc
            changed[name] = np.array(texts, dtype=np.object_).reshape(array.shape)
    return changed


def _stopped_by(cancel: CancelToken | None) -> Any:
    """Options of a run that ends with the token: ONNX Runtime looks at them between two nodes."""
    if cancel is None:
        return None
    if cancel.handle is not None:
        return cancel.handle
    options = ort.RunOptions()

    def stop() -> None:
        options.terminate = True

    cancel.on_cancel(stop)
    cancel.handle = options
    return options


def _run_bound(
    session: Any, feeds: Mapping[str, np.ndarray], outputs: Sequence[str], device: str
) -> list[np.ndarray]:
    """Run with outputs bound to a device: they are made there and copied together at the end."""
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    for name in outputs:
        binding.bind_output(name, device)
    session.run_with_iobinding(binding)
    copies: list[np.ndarray] = binding.copy_outputs_to_cpu()
    return copies


def _first_line(exc: Exception) -> str:
    """The library's message without its stack trace."""
    return str(exc).strip().partition("\n")[0][:500].rstrip(". ") or type(exc).__name__
