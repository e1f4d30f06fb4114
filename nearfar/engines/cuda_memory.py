"""The few CUDA runtime calls that a TensorRT engine needs, through NVIDIA's cuda-python.

Written after NVIDIA's documentation; not run on a GPU yet.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from nearfar.errors import EngineError

_MODULES = ("cuda.bindings.runtime", "cuda.cudart")  # cuda-python 12.6 and later, earlier ones


class Cuda:
    """A stream and growing buffers on the first GPU. Not thread-safe.

    Args:
        api: `cuda.bindings.runtime`, or something with the same functions; `None` imports it.

    Raises:
        EngineError: cuda-python is missing, or there is no GPU.
    """

    def __init__(self, api: Any = None) -> None:
        self._api = api if api is not None else _imported()
        self._buffers: dict[str, tuple[int, int]] = {}
        self.stream = int(self._call("cudaStreamCreate"))

    def reserve(self, name: str, size_bytes: int) -> int:
        """Address of a buffer of at least that size, the same until a larger one is asked for."""
        address, size = self._buffers.get(name, (0, 0))
        if size < size_bytes or not address:
            if address:
                del self._buffers[name]
                self._call("cudaFree", address)
            size = max(size_bytes, 1)
            address = int(self._call("cudaMalloc", size))
            self._buffers[name] = (address, size)
        return address

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the GPU; it must stay as it is until `wait`."""
        self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the GPU into a contiguous array, which is filled after `wait`."""
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")

    def wait(self) -> None:
        """Return when everything that was asked of the stream is done."""
        self._call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        """Free everything; idempotent."""
        while self._buffers:
            _, (address, _) = self._buffers.popitem()
            self._call("cudaFree", address)
        if self.stream:
            stream, self.stream = self.stream, 0
            self._call("cudaStreamDestroy", stream)

    def _copy(self, target: int, source: int, size_bytes: int, kind: str) -> None:
        if size_bytes:
            way = getattr(self._api.cudaMemcpyKind, kind)
            self._call("cudaMemcpyAsync", target, source, size_bytes, way, self.stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._api, name)(*arguments)
        if int(status) != 0:
            raise EngineError(
                f"CUDA failed: {name} returned {getattr(status, 'name', status)}",
                fix="Check the driver (nvidia-smi, or tegrastats on a Jetson) and free memory",
            )
        return results[0] if results else None


def _imported() -> Any:
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise EngineError(
        "TensorRT engines need the package cuda-python, which cannot be imported here",
        fix="Install it: pip install 'nearfar[tensorrt]'",
    )
