"""PyTorch modules of a person's own: ``package.module:factory`` and example inputs.

Importing runs that person's code, which is what they ask for by naming it. Nothing else that
converters read is ever run.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.libraries import load
from converters.sources.base import Source
from converters.sources.weights import check_weights
from nearfar.errors import ConversionError

_SPEC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
#: Where example inputs are looked for when nobody says: beside the factory.
_USUAL_INPUTS = "example_inputs"
_DEFAULT_AXES = "batch=0"


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchSource(Source):
    """A module with inputs it takes.

    Attributes:
        spec: ``package.module:factory``.
        module: In evaluation mode.
        inputs: Parameter of `forward` to example tensor, in the order of `forward`.
        axes: (input, axis) to the name of a size that is free.
        outputs: Output name to what the module gives for the example inputs.
    """

    spec: str
    module: Any
    inputs: dict[str, Any]
    axes: dict[tuple[str, int], str]
    outputs: dict[str, np.ndarray]

    @property
    def label(self) -> str:
        return self.spec

    def sha256(self) -> str:
        return ""

    @property
    def weights_bytes(self) -> int:
        """Size of all parameters and buffers."""
        tensors = self.module.state_dict().values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def digest(self) -> str:
        """SHA-256 of structure, parameters, buffers and example inputs."""
        digest = hashlib.sha256(repr(self.module).encode())
        for name, tensor in (*self.module.state_dict().items(), *self.inputs.items()):
            array = np.ascontiguousarray(tensor.detach().cpu().numpy())
            digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a pruned module is trained on.

    Attributes:
        inputs: Parameter of `forward` to tensor; the first axis counts rows.
        labels: Class numbers, INT64, one for each row; `None` trains without.
    """

    inputs: dict[str, Any]
    labels: Any = None

    def digest(self) -> str:
        """SHA-256 of all of it."""
        digest = hashlib.sha256()
        tensors = {**self.inputs, **({} if self.labels is None else {"": self.labels})}
        for name, tensor in tensors.items():
            array = np.ascontiguousarray(tensor.numpy())
            digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


def open_training(source: TorchSource, stated: str) -> TrainingData:
    """Read training data.

    Args:
        source: The module.
        stated: ``package.module:function`` that returns what `example_inputs` may return, or a
            pair of that and labels; or an ``.npz`` with one array for each parameter of `forward`
            and ``labels`` if there are any.

    Raises:
        ConversionError: It is missing or does not fit the module.
    """
    torch = load("torch")
    found = _examples(source.spec, stated)
    labels = None
    if isinstance(found, Mapping) and "labels" in found and "labels" not in source.inputs:
        found = dict(found)
        labels = found.pop("labels")
    elif (
        isinstance(found, (tuple, list))
        and len(found) == 2
        # Of a module with several inputs, two tensors are two inputs.
        and (len(source.inputs) == 1 or isinstance(found[0], Mapping))
    ):
        found, labels = found
    inputs = _named(source.spec, source.module, found, torch)
    if labels is not None:
        labels = torch.as_tensor(labels).detach().cpu().long()
    rows = {len(tensor) for tensor in inputs.values()} | ({len(labels)} if labels is not None
                                                          else set())  # fmt: skip
    if set(inputs) != set(source.inputs) or len(rows) != 1 or rows == {0}:
        raise ConversionError(
            f"The training data {stated} does not fit {source.spec}",
            fix="Give all inputs that the example inputs have, and labels if there are any, with "
            "the same number of rows",
        )
    return TrainingData(inputs, labels)


def is_spec(path: Path) -> bool:
    """Whether this is no file but ``package.module:factory``."""
    return _SPEC.fullmatch(str(path)) is not None and not path.exists()


def open_torch(spec: str, inputs: str | None = None, axes: str | None = None) -> TorchSource:
    """Make the module and run it once.

    Args:
        spec: ``package.module:factory``; the current folder is searched too. `factory` is called
            without arguments, or is a module itself.
        inputs: ``package.module:function`` or an ``.npz`` file; `None` takes ``example_inputs`` of
            the factory's package. A tensor, a tuple of them, or a dict by `forward`'s parameters.
        axes: Free sizes: ``NAME=AXIS`` for all inputs or ``NAME=INPUT.AXIS`` for one, separated by
            commas; "" for none, `None` for ``batch=0``.

    Raises:
        ConversionError: Something is missing, is not what it should be, or the module does not
            take the inputs.
    """
    torch = load("torch")
    module = _made(spec)
    if not isinstance(module, torch.nn.Module):
        raise ConversionError(
            f"{spec} gives {type(module).__name__}, which is no torch.nn.Module",
            fix="Name a function without arguments that returns the module",
        )
    module = module.eval().float().cpu()
    check_weights(module, spec)
    examples = _named(spec, module, _examples(spec, inputs), torch)
    outputs = _run(spec, module, examples, torch)
    return TorchSource(
        path=Path(spec),
        title=spec.rpartition(":")[2].rpartition(".")[2],
        spec=spec,
        module=module,
        inputs=examples,
        axes=_axes(axes, examples),
        outputs=outputs,
    )


def run_module(module: Any, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Outputs of one call by name; of a module that names none, ``output`` or ``output_0`` on.

    Raises:
        TypeError: It gives something else than tensors.
    """
    torch = load("torch")
    with torch.no_grad():
        made = module(**inputs)
    if isinstance(made, torch.Tensor):
        named: dict[str, Any] = {"output": made}
    elif isinstance(made, Mapping):
        named = {str(name): value for name, value in made.items() if value is not None}
    elif isinstance(made, (tuple, list)):
        named = {f"output_{number}": value for number, value in enumerate(made)}
    else:
        raise TypeError(f"it gives {type(made).__name__}")
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"its output {name!r} is {type(value).__name__}, no tensor")
    return {name: value.detach().numpy() for name, value in named.items()}


def _made(spec: str) -> Any:
    found = _found(spec)
    if inspect.isclass(found) or (callable(found) and not hasattr(found, "state_dict")):
        try:
            return found()
        except Exception as exc:  # whatever the person's code raises
            raise ConversionError(
                f"{spec} cannot be called without arguments ({type(exc).__name__}: {exc})",
                fix="Name a function without arguments that returns the module with its weights",
            ) from exc
    return found


def _found(spec: str) -> Any:
    module_name, _, attribute = spec.partition(":")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as exc:  # whatever the person's code raises while it is imported
        raise ConversionError(
            f"{spec} cannot be imported ({type(exc).__name__}: {exc})",
            fix="Name an importable module and something in it, as package.module:factory",
        ) from exc
    finally:
        if added:
            sys.path.remove(here)
    return found


def _examples(spec: str, inputs: str | None) -> Any:
    if inputs is None:
        inputs = f"{spec.partition(':')[0]}:{_USUAL_INPUTS}"
        try:
            found = _found(inputs)
        except ConversionError as exc:
            raise ConversionError(
                f"There are no example inputs for {spec}",
                fix=f"Write a function {_USUAL_INPUTS}() beside it, or give --inputs "
                "package.module:function or FILE.npz",
            ) from exc
    elif _SPEC.fullmatch(inputs):
        found = _found(inputs)
    else:
        try:
            with np.load(inputs, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except (OSError, ValueError, EOFError) as exc:
            raise ConversionError(
                f"{inputs} is not an .npz file with example inputs ({exc})",
                fix="Write it with numpy.savez, one array for each parameter of forward",
            ) from exc
    if not callable(found):
        return found
    try:
        return found()
    except Exception as exc:  # whatever the person's code raises
        raise ConversionError(
            f"{inputs} fails ({type(exc).__name__}: {exc})",
            fix="It must return example inputs when it is called without arguments",
        ) from exc


def _named(spec: str, module: Any, examples: Any, torch: Any) -> dict[str, Any]:
    """Example tensors by `forward`'s parameters, in their order."""
    parameters = inspect.signature(module.forward).parameters
    names = [
        name for name, parameter in parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]  # fmt: skip
    if isinstance(examples, Mapping):
        unknown = sorted(set(examples) - set(names))
        if unknown:
            raise ConversionError(
                f"forward of {spec} has no parameter {unknown[0]!r}; it has {', '.join(names)}",
                fix="Name the example inputs as forward names its parameters",
            )
        given = {name: examples[name] for name in names if name in examples}
    else:
        row = examples if isinstance(examples, (tuple, list)) else (examples,)
        if len(row) > len(names):
            raise ConversionError(
                f"There are {len(row)} example inputs, but forward of {spec} takes {len(names)}",
                fix="Give one tensor for each parameter",
            )
        given = dict(zip(names, row))  # noqa: B905  (trailing parameters have defaults)
    found = {}
    for name, value in given.items():
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        if not isinstance(tensor, torch.Tensor):
            raise ConversionError(
                f"Example input {name!r} of {spec} is {type(value).__name__}, not a tensor",
                fix="Give tensors only; fix other arguments inside the factory",
            )
        found[name] = tensor.detach().cpu().contiguous()
    if not found:
        raise ConversionError(f"There are no example inputs for {spec}", fix="Give at least one")
    return found


def _run(spec: str, module: Any, examples: Mapping[str, Any], torch: Any) -> dict[str, np.ndarray]:
    try:
        outputs = run_module(module, examples)
    except Exception as exc:  # whatever the person's code raises
        first = str(exc).strip().partition("\n")[0]
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in examples.items())
        raise ConversionError(
            f"{spec} does not take its example inputs ({shapes}): {type(exc).__name__}: {first}",
            fix="Give inputs of the shapes and types that forward expects",
        ) from exc
    for name, array in outputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ConversionError(
                f"Output {name!r} of {spec} is NaN or infinite for the example inputs",
                fix="Check the weights, and give inputs as the model sees them in use",
            )
    return outputs


def _axes(stated: str | None, examples: Mapping[str, Any]) -> dict[tuple[str, int], str]:
    found: dict[tuple[str, int], str] = {}
    text = _DEFAULT_AXES if stated is None else stated
    for part in (piece.strip() for piece in text.split(",") if piece.strip()):
        match = re.fullmatch(r"([A-Za-z_]\w*)=(?:([A-Za-z_]\w*)\.)?(\d+)", part)
        if match is None or (match[2] and match[2] not in examples):
            raise ConversionError(
                f"{part!r} does not name a free size",
                fix="Write --axes batch=0,tokens=1 for all inputs, or tokens=INPUT.1 for one",
            )
        axis = int(match[3])
        owners = (match[2],) if match[2] else tuple(examples)
        having = [name for name in owners if axis < examples[name].ndim]
        if not having and stated is not None:
            raise ConversionError(
                f"No example input has an axis {axis}, which {part!r} names",
                fix="Axes are counted from 0: --axes batch=0,tokens=1",
            )
        for name in having:
            found[name, axis] = match[1]
    sizes: dict[str, set[int]] = {}
    for (name, axis), size in found.items():
        sizes.setdefault(size, set()).add(int(examples[name].shape[axis]))
    for size, values in sizes.items():
        if len(values) > 1:
            raise ConversionError(
                f"Size {size!r} is {' and '.join(map(str, sorted(values)))} in the example inputs",
                fix="Say which axes are the same size: --axes NAME=INPUT.AXIS,…",
            )
    return found
