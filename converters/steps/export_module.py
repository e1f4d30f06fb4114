"""Export a person's own torch module to ONNX, its free sizes named."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np

from converters.libraries import load, quiet
from converters.sources.torch_module import TorchSource, run_module
from converters.steps.export_encoder import OPSET
from converters.steps.onnx_session import open_session, run
from nearfar.errors import ConversionError

#: Largest difference from torch, as a share of the largest output. Sound exports: 1e-6.
_MAX_ERROR = 1e-3


def export_module(source: TorchSource, path: Path) -> float:
    """Write one ONNX file and compare it with the module.

    Returns:
        The largest difference found, as a share of the largest output.

    Raises:
        ConversionError: torch cannot export the module, or what came out computes something else.
    """
    torch = load("torch")
    load("onnxscript")
    examples = {name: _grown(source, name) for name in source.inputs}
    dynamic = {
        name: {
            axis: torch.export.Dim.DYNAMIC for (owner, axis) in source.axes if owner == name
        }
        for name in examples
    }  # fmt: skip
    try:
        # torch prints the graph it was at when it fails; what failed is in the error.
        with quiet(), redirect_stderr(io.StringIO()), torch.no_grad():
            program = torch.onnx.export(
                source.module,
                (),
                kwargs=examples,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=dynamic,
                verbose=False,
            )
            _tidy(program.model.graph, source)
            program.save(str(path), external_data=False)
    except Exception as exc:  # the exporter raises whatever the traced code raises
        raise ConversionError(
            f"torch.onnx cannot export {source.spec} ({_reason(exc)})",
            fix="Express that part with operators that ONNX has, without branches on the data; if "
            "a size cannot be free, leave it out of --axes",
        ) from exc
    return _compare(source, path)


def _grown(source: TorchSource, name: str) -> Any:
    """An example whose free sizes are at least two: the exporter takes one for a constant."""
    torch = load("torch")
    tensor = source.inputs[name]
    for owner, axis in source.axes:
        if owner == name and tensor.shape[axis] == 1:
            tensor = torch.cat([tensor, tensor], dim=axis)
        elif owner == name and tensor.shape[axis] == 0:
            raise ConversionError(
                f"Example input {name!r} is empty along axis {axis}",
                fix="Give an example with at least one entry there",
            )
    return tensor


def _tidy(graph: Any, source: TorchSource) -> None:
    """Names that people gave instead of the exporter's; nothing about the converting machine."""
    ir = load("onnx_ir")
    for value in graph.inputs:
        # Inputs are named by `forward` already; a name the exporter changed would not be served.
        if value.name not in source.inputs:
            raise ValueError(f"input {value.name!r} is not a parameter of forward")
    symbols: dict[str, str] = {}
    for value in graph.inputs:
        for axis, size in enumerate(value.shape):
            name = source.axes.get((value.name, axis))
            symbol = None if isinstance(size, int) else getattr(size, "value", None)
            if name is not None and symbol is not None:
                symbols.setdefault(str(symbol), name)
    outputs = list(graph.outputs)
    names = list(source.outputs)
    if len(outputs) != len(names):
        raise ValueError(f"{len(outputs)} outputs were exported of {len(names)}")
    values = [value for node in graph for value in node.outputs]
    for value in values:
        # The exporter does not notice an output named as an inner value, and writes an invalid
        # model. So inner values make way first.
        if value.name in names:
            value.name = f"{value.name}_inner"
    for value, name in zip(outputs, names):  # noqa: B905
        value.name = name
    for value in (*graph.inputs, *values, *outputs):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, symbols) for size in value.shape])
    for node in graph:
        node.metadata_props.clear()  # stack traces with the paths of this machine


def _renamed(size: Any, symbols: Mapping[str, str]) -> Any:
    if isinstance(size, int):
        return size
    text = getattr(size, "value", None)
    if text is None:
        return size
    # Sizes may be expressions such as "2*s10 + 1".
    return re.sub(r"[A-Za-z_]\w*", lambda match: symbols.get(match[0], match[0]), str(text))


def _compare(source: TorchSource, path: Path) -> float:
    """On the example inputs, and where the first axis is free also on their first row."""
    session = open_session(path)
    trials = [(source.inputs, source.outputs)]
    if all((name, 0) in source.axes for name in source.inputs):
        one = {name: tensor[:1] for name, tensor in source.inputs.items()}
        trials.append((one, run_module(source.module, one)))
    worst = 0.0
    for inputs, expected in trials:
        feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
        found = run(session, feeds, name=source.spec)
        for name, array in expected.items():
            got = found[name]
            if got.shape != array.shape:
                raise ConversionError(
                    f"The exported model gives {name!r} of shape {list(got.shape)}, torch of "
                    f"{list(array.shape)}: a size was taken for a constant",
                    fix="Use tensor.shape instead of numbers in forward, or leave that size out of "
                    "--axes",
                )
            wide = array.astype(np.float64)
            error = float(np.abs(wide - got.astype(np.float64)).max(initial=0.0))
            worst = max(worst, error / max(1e-6, float(np.abs(wide).max(initial=0.0))))
    if worst > _MAX_ERROR:
        raise ConversionError(
            f"The exported model computes something else than {source.spec}: it differs by "
            f"{worst:.2g} of the largest output",
            fix="Make forward free of randomness; another torch version may export it right",
        )
    return worst


def _reason(exc: BaseException) -> str:
    """The first telling line of the innermost cause: the exporter wraps it in pages of advice."""
    seen = exc
    while seen.__cause__ is not None:
        seen = seen.__cause__
    lines = [line.strip() for line in str(seen).splitlines() if line.strip()]
    return f"{type(seen).__name__}: {lines[0] if lines else 'it does not say why'}"[:400]
