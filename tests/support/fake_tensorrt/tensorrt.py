"""The part of TensorRT's Python API that nearfar calls, over ONNX and ONNX Runtime.

An "engine" is the ONNX file with four bytes before it. What goes wrong is asked for by the graph's
doc string, or by NEARFAR_TEST_TENSORRT: ``crash``, ``hang``, ``refuse``, ``no engine``.
"""

from __future__ import annotations

import enum
import os
import time
from typing import Any

__version__ = "10.3.0"
_MAGIC = b"TRT!"


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    INT64 = 8


_TYPES = {1: "FLOAT", 10: "HALF", 3: "INT8", 6: "INT32", 9: "BOOL", 2: "UINT8", 7: "INT64",
          11: "FLOAT"}  # fmt: skip


class IProgressMonitor:
    pass


class Tensor:
    is_shape_tensor = False

    def __init__(self, value: Any) -> None:
        self.name = value.name
        self.dtype = DataType[_TYPES[value.type.tensor_type.elem_type]]
        self.shape = tuple(
            d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim
        )


class Network:
    def __init__(self, flags: int) -> None:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        self.model: Any = None
        self.data = b""
        self.num_layers = 0

    def load(self, path: str) -> None:
        import onnx

        with open(path, "rb") as file:
            self.data = file.read()
        self.model = onnx.load_from_string(self.data)
        self.num_layers = len(self.model.graph.node)

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    @property
    def num_outputs(self) -> int:
        return len(self.model.graph.output)

    def get_input(self, index: int) -> Tensor:
        return Tensor(self.model.graph.input[index])

    def get_output(self, index: int) -> Tensor:
        return Tensor(self.model.graph.output[index])


class ParserError:
    def code(self) -> str:
        return "ErrorCode.UNSUPPORTED_NODE"

    def desc(self) -> str:
        return "false"

    def node_name(self) -> str:
        return "bad"

    def node_operator(self) -> str:
        return "DynamicQuantizeLinear"

    def func(self) -> str:
        return "checkDynamicQuantizeLinear"


class OnnxParser:
    num_errors = 1

    def __init__(self, network: Network, logger: Any) -> None:
        self._network = network

    def parse_from_file(self, path: str) -> bool:
        self._network.load(path)
        return self._network.model.doc_string != "refuse"

    def get_error(self, index: int) -> ParserError:
        return ParserError()


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, smallest: Any, usual: Any, largest: Any) -> None:
        self.shapes[name] = (smallest, usual, largest)


class TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"t"


class Config:
    builder_optimization_level = 3
    progress_monitor: Any = None

    def __init__(self) -> None:
        self.pools: dict[Any, int] = {}
        self._cache: TimingCache | None = None

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self.pools[pool] = size

    def add_optimization_profile(self, profile: Profile) -> int:
        return 0

    def create_timing_cache(self, data: bytes) -> TimingCache:
        return TimingCache(data)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self._cache


class Builder:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> Network:
        return Network(flags)

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        print("TensorRT prints what it likes")
        wish = os.environ.get("NEARFAR_TEST_TENSORRT") or network.model.doc_string
        if wish == "crash":
            os.abort()
        if wish == "hang":
            time.sleep(600)
        if wish == "no engine":
            self._logger.log(ILogger.Severity.ERROR, "IBuilder::x: Error Code 2: out of memory")
            return None
        config.progress_monitor.phase_start("Building engine", None, 2)
        config.progress_monitor.step_complete("Building engine", 0)
        config.progress_monitor.phase_finish("Building engine")
        return _MAGIC + network.data


class Context:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._results()[name].shape)

    def execute_async_v3(self, stream: int) -> bool:
        import ctypes

        for name, array in self._results().items():
            ctypes.memmove(self._addresses[name], array.ctypes.data, array.nbytes)
        return True

    def _results(self) -> dict[str, Any]:
        import ctypes

        import numpy as np

        feeds = {}
        for item in self._engine.session.get_inputs():
            dtype = {"tensor(float)": np.float32, "tensor(int64)": np.int64,
                     "tensor(double)": np.float64}[item.type]  # fmt: skip
            # FP64 is FP32 to TensorRT.
            own = np.dtype(np.float32 if dtype is np.float64 else dtype)
            shape = self._shapes[item.name]
            size = int(np.prod(shape)) * own.itemsize
            data = ctypes.string_at(self._addresses[item.name], size)
            feeds[item.name] = np.frombuffer(data, own).reshape(shape).astype(dtype)
        found = self._engine.session.run(None, feeds)
        return {
            item.name: np.ascontiguousarray(
                array.astype(np.float32) if array.dtype == np.float64 else array
            )
            for item, array in zip(self._engine.session.get_outputs(), found, strict=True)
        }


class Engine:
    def __init__(self, data: bytes) -> None:
        import onnx
        import onnxruntime

        self.session = onnxruntime.InferenceSession(data)
        graph = onnx.load_from_string(data).graph
        self._tensors = [Tensor(value) for value in (*graph.input, *graph.output)]
        self._inputs = {value.name for value in graph.input}
        self.num_io_tensors = len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return str(self._tensors[index].name)

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return next(one.dtype for one in self._tensors if one.name == name)

    def create_execution_context(self) -> Context:
        return Context(self)


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        if not data.startswith(_MAGIC):
            self._logger.log(ILogger.Severity.ERROR, "magic tag does not match")
            return None
        return Engine(data[len(_MAGIC) :])
