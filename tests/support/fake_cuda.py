"""`cuda.bindings.runtime` whose device memory is this process' own."""

from __future__ import annotations

import ctypes
import enum


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class FakeCuda:
    """Counts what is allocated; `limit_bytes` is the card's memory."""

    cudaMemcpyKind = cudaMemcpyKind

    def __init__(self, limit_bytes: int = 1 << 30) -> None:
        self.limit_bytes = limit_bytes
        self.buffers: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.streams = 0

    def cudaStreamCreate(self) -> tuple[cudaError_t, int]:
        self.streams += 1
        return cudaError_t.cudaSuccess, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[cudaError_t]:
        self.streams -= 1
        return (cudaError_t.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[cudaError_t]:
        return (cudaError_t.cudaSuccess,)

    def cudaMalloc(self, size: int) -> tuple[cudaError_t, int]:
        if size > self.limit_bytes:
            return cudaError_t.cudaErrorMemoryAllocation, 0
        buffer = ctypes.create_string_buffer(size)
        address = ctypes.addressof(buffer)
        self.buffers[address] = buffer
        return cudaError_t.cudaSuccess, address

    def cudaFree(self, address: int) -> tuple[cudaError_t]:
        del self.buffers[address]
        return (cudaError_t.cudaSuccess,)

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, kind: cudaMemcpyKind, stream: int
    ) -> tuple[cudaError_t]:
        ctypes.memmove(target, source, size)
        return (cudaError_t.cudaSuccess,)
