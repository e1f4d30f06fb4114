"""onnxruntime-genai through its C interface, which does not hold Python's lock while it computes.

The library's Python module keeps Python's global lock during a token, and during a whole piece of a
prompt: every other thread of the process stands still meanwhile, an event loop with all its
connections, too, and a cancellation is not even heard. Its C interface (``ort_genai_c.h``,
documented at onnxruntime.ai/docs/genai/api/c) is in the same shared library; calling it through
`ctypes` lets Python go on, and lets another thread end a computation in its middle
(``terminate_session``). Only what the engine needs is here.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from ctypes import POINTER, byref, c_bool, c_char_p, c_double, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai

_FILES = {"win32": "onnxruntime-genai.dll", "darwin": "libonnxruntime-genai.dylib"}
_FILE = _FILES.get(sys.platform, "libonnxruntime-genai.so")
#: How long the end of the process waits for a computation that still runs.
_EXIT_S = 2.0
# OgaElementType, which is ONNX's TensorProto.DataType.
_FLOAT32, _FLOAT16 = 1, 10

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "OgaCreateConfig": (c_char_p, POINTER(c_void_p)),
    "OgaConfigClearProviders": (c_void_p,),
    "OgaConfigAppendProvider": (c_void_p, c_char_p),
    "OgaConfigOverlay": (c_void_p, c_char_p),
    "OgaCreateModelFromConfig": (c_void_p, POINTER(c_void_p)),
    "OgaModelGetDeviceType": (c_void_p, POINTER(c_void_p)),
    "OgaCreateGeneratorParams": (c_void_p, POINTER(c_void_p)),
    "OgaGeneratorParamsSetSearchNumber": (c_void_p, c_char_p, c_double),
    "OgaGeneratorParamsSetSearchBool": (c_void_p, c_char_p, c_bool),
    "OgaCreateGenerator": (c_void_p, c_void_p, POINTER(c_void_p)),
    "OgaGenerator_AppendTokens": (c_void_p, POINTER(c_int32), c_size_t),
    "OgaGenerator_GenerateNextToken": (c_void_p,),
    "OgaGenerator_GetNextTokens": (c_void_p, POINTER(POINTER(c_int32)), POINTER(c_size_t)),
    "OgaGenerator_GetLogits": (c_void_p, POINTER(c_void_p)),
    "OgaGenerator_SetRuntimeOption": (c_void_p, c_char_p, c_char_p),
    "OgaTensorGetType": (c_void_p, POINTER(c_int32)),
    "OgaTensorGetShapeRank": (c_void_p, POINTER(c_size_t)),
    "OgaTensorGetShape": (c_void_p, POINTER(c_int64), c_size_t),
    "OgaTensorGetData": (c_void_p, POINTER(c_void_p)),
}
_DESTROY = (
    "OgaDestroyConfig", "OgaDestroyModel", "OgaDestroyGeneratorParams", "OgaDestroyGenerator",
    "OgaDestroyTensor", "OgaDestroyString", "OgaDestroyResult",
)  # fmt: skip


def _library() -> ctypes.CDLL:
    """The library that the Python module has loaded.

    Raises:
        ImportError: This version has it elsewhere, or it lacks a function.
    """
    try:
        library = ctypes.CDLL(str(Path(onnxruntime_genai.__file__).parent / _FILE))
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_void_p
        for name in _DESTROY:
            function = getattr(library, name)
            function.argtypes, function.restype = (c_void_p,), None
        library.OgaResultGetError.argtypes = (c_void_p,)
        library.OgaResultGetError.restype = c_char_p
    except (OSError, AttributeError) as exc:
        raise ImportError(
            f"onnxruntime-genai {onnxruntime_genai.__version__} has no C interface that is known "
            f"here: {exc}",
            name="onnxruntime_genai",
        ) from exc
    return library


_LIB = _library()


def _check(result: int | None) -> None:
    """Raise what a function returned, as the library's Python module does.

    Raises:
        RuntimeError: The function failed.
    """
    if result:
        text = _LIB.OgaResultGetError(result) or b""
        message = text.decode("utf-8", "replace")
        _LIB.OgaDestroyResult(result)
        raise RuntimeError(message)


class _Handle:
    """An object of the library; destroyed with its owner, at the latest when the process ends."""

    def __init__(self, owner: object, value: int, destroy: str) -> None:
        self._lock = threading.Lock()
        self._value: int | None = value
        self._destroy = getattr(_LIB, destroy)
        weakref.finalize(owner, self.close)

    def __enter__(self) -> int:
        self._lock.acquire()
        if self._value is None:
            self._lock.release()
            raise RuntimeError("It has been closed")
        return self._value

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def value(self) -> int | None:
        """For a call that may be made beside another; `None` when it was destroyed."""
        return self._value

    def close(self) -> None:
        # At the end of the process a thread may still compute with it; then it is left alone.
        if self._lock.acquire(timeout=_EXIT_S):
            value, self._value = self._value, None
            self._lock.release()
            if value is not None:
                self._destroy(value)


class Model:
    """A model folder. Computes one call at a time.

    Args:
        path: The folder.
        device: ``cpu``, or a provider of the library, such as ``cuda``.
        overlay: JSON that is laid over ``genai_config.json``.

    Raises:
        RuntimeError: The library cannot load it.
    """

    def __init__(self, path: Path, device: str, overlay: str) -> None:
        self.computing = threading.Lock()
        config = c_void_p()
        _check(_LIB.OgaCreateConfig(str(path).encode(), byref(config)))
        try:
            _check(_LIB.OgaConfigClearProviders(config))
            if device != "cpu":
                _check(_LIB.OgaConfigAppendProvider(config, device.encode()))
            _check(_LIB.OgaConfigOverlay(config, overlay.encode()))
            model = c_void_p()
            _check(_LIB.OgaCreateModelFromConfig(config, byref(model)))
        finally:
            _LIB.OgaDestroyConfig(config)
        assert model.value is not None
        self.handle = _Handle(self, model.value, "OgaDestroyModel")

    @property
    def device_type(self) -> str:
        """Where it runs, in the library's words."""
        text = c_void_p()
        with self.handle as model:
            _check(_LIB.OgaModelGetDeviceType(model, byref(text)))
        try:
            return (ctypes.cast(text, c_char_p).value or b"").decode()
        finally:
            _LIB.OgaDestroyString(text)


class Generator:
    """One answer. One thread at a time may use it; `terminate` may be called from any.

    Args:
        model: Computes it.
        settings: The library's search options.

    Raises:
        RuntimeError: The library refuses; here and below.
    """

    def __init__(self, model: Model, settings: Mapping[str, float]) -> None:
        self._model = model  # lives as long as its answers
        parameters, generator = c_void_p(), c_void_p()
        with model.handle as handle:
            _check(_LIB.OgaCreateGeneratorParams(handle, byref(parameters)))
            try:
                for name, value in settings.items():
                    if isinstance(value, bool):
                        _check(
                            _LIB.OgaGeneratorParamsSetSearchBool(parameters, name.encode(), value)
                        )
                    else:
                        _check(
                            _LIB.OgaGeneratorParamsSetSearchNumber(parameters, name.encode(), value)
                        )
                _check(_LIB.OgaCreateGenerator(handle, parameters, byref(generator)))
            finally:
                _LIB.OgaDestroyGeneratorParams(parameters)
        assert generator.value is not None
        self._handle = _Handle(self, generator.value, "OgaDestroyGenerator")
        self._terminating = threading.Lock()

    def append_tokens(self, tokens: Sequence[int]) -> None:
        """Process tokens of the prompt."""
        array = (c_int32 * len(tokens))(*tokens)
        with self._model.computing, self._handle as generator:
            _check(_LIB.OgaGenerator_AppendTokens(generator, array, len(tokens)))

    def generate_next_token(self) -> None:
        """Compute and choose one token."""
        with self._model.computing, self._handle as generator:
            _check(_LIB.OgaGenerator_GenerateNextToken(generator))

    def get_next_tokens(self) -> list[int]:
        """The token that was chosen last."""
        tokens, count = POINTER(c_int32)(), c_size_t()
        with self._handle as generator:
            _check(_LIB.OgaGenerator_GetNextTokens(generator, byref(tokens), byref(count)))
            return tokens[: count.value]

    def get_logits(self) -> np.ndarray:
        """Logits of the next token, FP32."""
        tensor, kind, rank, data = c_void_p(), c_int32(), c_size_t(), c_void_p()
        with self._model.computing, self._handle as generator:
            _check(_LIB.OgaGenerator_GetLogits(generator, byref(tensor)))
            try:
                _check(_LIB.OgaTensorGetType(tensor, byref(kind)))
                _check(_LIB.OgaTensorGetShapeRank(tensor, byref(rank)))
                shape = (c_int64 * rank.value)()
                _check(_LIB.OgaTensorGetShape(tensor, shape, rank.value))
                _check(_LIB.OgaTensorGetData(tensor, byref(data)))
                dtypes = {_FLOAT32: np.float32, _FLOAT16: np.float16}
                if kind.value not in dtypes:
                    raise RuntimeError(f"logits of the unknown element type {kind.value}")
                dtype = np.dtype(dtypes[kind.value])
                size = int(np.prod(list(shape))) * dtype.itemsize
                flat = np.frombuffer(ctypes.string_at(data, size), dtype)
                return flat.reshape(list(shape)).astype(np.float32)
            finally:
                _LIB.OgaDestroyTensor(tensor)

    def terminate(self) -> None:
        """End the computation that another thread is in, which then fails; nothing when it is idle.

        The library looks at it between two operators.
        """
        with self._terminating:  # so that it is not destroyed meanwhile
            generator = self._handle.value
            if generator is not None:
                _check(_LIB.OgaGenerator_SetRuntimeOption(generator, b"terminate_session", b"1"))

    def close(self) -> None:
        """Free the KV cache; idempotent."""
        with self._terminating:
            self._handle.close()
