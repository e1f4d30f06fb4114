"""ONNX files: checked as a file of foreign origin, before an engine opens them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.libraries import load, told_by_onnxruntime
from converters.sources.base import Source, find_wheel
from nearfar.bundle.manifest import TensorSpec
from nearfar.bundle.paths import path_problem
from nearfar.errors import ConversionError
from nearfar.tensors import OF_ONNXRUNTIME


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxSource(Source):
    """An ONNX model.

    Attributes:
        inputs: As ONNX Runtime reports them.
        outputs: As ONNX Runtime reports them.
        precision: ``fp32``, ``fp16`` or ``int8``: the type of most weights.
        external_files: Files with weights, beside the model.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: str
    external_files: tuple[Path, ...] = ()

    @property
    def full_bytes(self) -> int:
        """About how large it is, or would be, in 32 bits; 0 when it is compressed already."""
        size = self.path.stat().st_size + sum(f.stat().st_size for f in self.external_files)
        return size * {"fp32": 1, "fp16": 2}.get(self.precision, 0)


def open_onnx(path: Path) -> OnnxSource:
    """Check the file, the places its weights lie in, and that ONNX Runtime can load it.

    Raises:
        ConversionError: Damaged, pointing outside its folder, or not runnable.
    """
    onnx = load("onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
        if not model.graph.node or not model.graph.output:
            raise ValueError("it has no nodes or no outputs")
    except Exception as exc:  # protobuf raises DecodeError, onnx its own, OSError for the file
        raise ConversionError(
            f"{path} is not an ONNX model ({exc})",
            fix="It is damaged or not ONNX; export it again",
        ) from exc
    external = _external_files(path, model, onnx)
    inputs, outputs = io_specs(path)
    _check_numbers(path, model, onnx)
    wheel = find_wheel(path)
    generic = path.stem.lower() in ("model", "network", "onnx")
    return OnnxSource(
        path=path,
        title=path.resolve().parent.name if generic else path.stem,
        license=wheel.license if wheel else "",
        inputs=inputs,
        outputs=outputs,
        precision=_precision(model, onnx),
        external_files=external,
    )


def io_specs(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a model, as ONNX Runtime reports them.

    Raises:
        ConversionError: ONNX Runtime refuses the model, or a type cannot be served.
    """
    ort = load("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # ONNX Runtime's exceptions have no common base but Exception
        raise ConversionError(
            f"ONNX Runtime cannot load {path} ({told_by_onnxruntime(exc)})",
            fix="Check the model with onnx.checker, or export it again with a lower opset",
        ) from exc
    return _specs(path, session.get_inputs()), _specs(path, session.get_outputs())


def _specs(path: Path, args: Any) -> tuple[TensorSpec, ...]:
    specs = []
    for arg in args:
        datatype = OF_ONNXRUNTIME.get(arg.type)
        if datatype is None:
            raise ConversionError(
                f"{path}: {arg.name!r} has the type {arg.type}, which cannot be served",
                fix="Inputs and outputs must be tensors of numbers, booleans or strings",
            )
        shape = tuple(size if isinstance(size, int) else -1 for size in arg.shape)
        specs.append(TensorSpec(name=arg.name, datatype=datatype, shape=shape))
    return tuple(specs)


def stored_tensors(graph: Any, onnx: Any) -> list[Any]:
    """All stored tensors, those of subgraphs and of attributes too."""
    found = list(graph.initializer)
    found += [
        part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices)
    ]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                found.append(attribute.t)
            found.extend(attribute.tensors)
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                found += stored_tensors(inner, onnx)
    return found


def _external_files(path: Path, model: Any, onnx: Any) -> tuple[Path, ...]:
    folder = path.resolve().parent
    found: dict[Path, None] = {}
    tensors = stored_tensors(model.graph, onnx)
    for function in model.functions:
        tensors += [
            attribute.t
            for node in function.node
            for attribute in node.attribute
            if attribute.HasField("t")
        ]
    for tensor in tensors:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = next((item.value for item in tensor.external_data if item.key == "location"), "")
        file = folder / location
        if path_problem(location) is not None or not file.resolve().is_relative_to(folder):
            raise ConversionError(
                f"{path}: tensor {tensor.name!r} has its data in {location!r}, outside the "
                "model's folder",
                fix="Save the model with its data beside it (onnx.save with save_as_external_data)",
            )
        if not file.is_file():
            raise ConversionError(
                f"{path}: the file {location!r} with its weights is missing",
                fix="Copy it into the model's folder",
            )
        found[file] = None
    return tuple(found)


def _check_numbers(path: Path, model: Any, onnx: Any) -> None:
    """Refuse weights with NaN; infinity is what masks are made of, and one NaN may be meant.

    Raises:
        ConversionError: There are some; names the tensor.
    """
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    for tensor in stored_tensors(model.graph, onnx):
        if tensor.data_type not in kinds or sum(tensor.dims) <= 1:
            continue
        numbers = onnx.numpy_helper.to_array(tensor, str(path.resolve().parent))
        if np.isnan(numbers).any():
            raise ConversionError(
                f"{path}: weight {tensor.name!r} has NaN",
                fix="Fetch the file again, or take weights of a training run that did not diverge",
            )


def _precision(model: Any, onnx: Any) -> str:
    kinds = onnx.TensorProto
    counts = {"fp32": 0, "fp16": 0, "int8": 0}
    names = {
        kinds.FLOAT: "fp32", kinds.FLOAT16: "fp16", kinds.BFLOAT16: "fp16",
        kinds.INT8: "int8", kinds.UINT8: "int8",
    }  # fmt: skip
    for tensor in stored_tensors(model.graph, onnx):
        size = 1
        for dim in tensor.dims:
            size *= dim
        if tensor.data_type in names:
            counts[names[tensor.data_type]] += size
    return max(counts, key=lambda name: counts[name]) if any(counts.values()) else "fp32"
