"""Which layers of a compressed variant make its error, found by comparing it node by node.

Both graphs are run with their inner values as outputs, matched by name, and three things are asked
of every layer:

- How far is its output from the reference's, as the variant runs (`output_error`), and how far
  was what it was given (`input_error`)? Error that was there before is not the layer's.
- How far is its output when it is given the reference's own values (`own_error`)? The variant is
  cut at the layers, and each gets exact inputs: what is wrong then was made there. It is the
  comparison of activations of ``onnxruntime.quantization.qdq_loss_debug``, without the error that
  arrives, and for graphs that are not QDQ too.
- What does that do to the outputs (`error`)? The layer's own error alone is added to the
  reference's value, and the rest of the reference is run on.

Relative errors are root mean squares; -20 log10 of one is the SQNR in decibels.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from converters.libraries import load
from converters.steps.onnx_session import open_session, run
from converters.steps.sensitivity import Damage

Feeds = Mapping[str, np.ndarray]

#: Inputs that are looked at: enough to rank layers by, and seconds for a model of 500 MB.
FEEDS, FEEDS_LARGE = 8, 2
_LARGE_BYTES = 64 << 20
#: Layers whose effect on the outputs is measured one by one, running the reference again.
_MEASURED = 24
#: What another order of float additions makes of a layer.
_FLOAT_NOISE = 2e-6
#: Operators with weights. Whatever else differs between the graphs counts as a layer too.
_WEIGHTY = frozenset(
    ("Attention", "Conv", "ConvTranspose", "GRU", "Gather", "Gemm", "GroupQueryAttention", "LSTM",
     "MatMul", "MatMulNBits", "MultiHeadAttention")
)  # fmt: skip
_OWN, _DELTA = "__own", "__delta"

_Arrays = dict[str, np.ndarray]


class Comparison(msgspec.Struct, frozen=True):
    """What was found.

    Attributes:
        layers: Those that make an error, the most harmful first. Of many, those that lie where most
            harm is done.
        error: The sum of what all do, with those that are not in `layers`.
    """

    layers: tuple[Damage, ...] = ()
    error: float = 0.0


def layer_errors(reference: Path, variant: Path, feeds: Sequence[Feeds], work: Path) -> Comparison:
    """Compare a variant with the graph that it was made of.

    What is computed inside branches (`If`) is looked at where the inputs decide them by one number
    that they have in common, such as a sample rate.

    Args:
        reference: ONNX file in full precision.
        variant: ONNX file whose inner values have the same names, as quantizers leave them.
        feeds: Inputs of one call each; some are picked, far apart.
        work: Folder for intermediate files, best on the same disk.

    Returns:
        What was found; nothing where the graphs have no two layers in common.

    Raises:
        ConversionError: One of them does not run.
    """
    picked = _picked(reference, feeds)
    with _Graphs(work) as files:
        one, other = files.open(reference, picked), files.open(variant, picked)
        nodes = _layers(one, other)
        truth, found, alike = _both(files, one, other, nodes, picked)
        nodes = {name: node for name, node in nodes.items() if name in alike}
        if len(nodes) < 2:
            return Comparison()
        own = _own_outputs(files, other, list(nodes), picked, truth, found)
        made = {name: _relative(name, own, truth) for name in nodes}
        erring = [name for name in nodes if made[name] > _FLOAT_NOISE]
        effect = _Effect(files, one, erring, picked, truth, own)
        effects, total = _most_harmful(erring, effect)
    errors = [
        Damage(
            node=nodes[name].name or name,
            error=effects[name],
            operator=nodes[name].op_type,
            own_error=made[name],
            input_error=max(
                (_relative(given, found, truth) for given in nodes[name].input if given in alike),
                default=0.0,
            ),
            output_error=_relative(name, found, truth),
        )
        for name in effects
    ]
    return Comparison(tuple(sorted(errors, key=lambda one: (-one.error, one.node))), total)


def _most_harmful(
    names: Sequence[str], effect: Callable[[Sequence[str]], float]
) -> tuple[dict[str, float], float]:
    """Effects of the layers that matter, and the sum of all.

    Of many, neighbours are measured together first, and then each of the worst neighbourhoods: what
    layers do to the outputs adds up nearly, and a ranking needs no more.
    """
    size = -(-len(names) // _MEASURED)
    if size < 2:
        effects = {name: effect([name]) for name in names}
        return effects, sum(effects.values())
    groups = [names[start : start + size] for start in range(0, len(names), size)]
    together = [effect(group) for group in groups]
    worst = sorted(range(len(groups)), key=lambda number: -together[number])
    near = [name for number in worst[: max(1, _MEASURED // size)] for name in groups[number]]
    return {name: effect([name]) for name in near}, sum(together)


class _Graphs:
    """Opens models, and writes changed ones where their weights can be found."""

    def __init__(self, work: Path) -> None:
        self._folder = work / "layer-errors"

    def __enter__(self) -> _Graphs:
        self._folder.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, path: Path, feeds: Sequence[Feeds]) -> Any:
        """The model without its external weights, these lying where `session` finds them."""
        onnx = load("onnx")
        model = onnx.load(str(path), load_external_data=False)
        _add_weights(model, path.parent, self._folder / path.parent.name)
        model.doc_string = path.parent.name
        if any(node.op_type == "If" for node in model.graph.node):
            _decide(model, feeds)
        return model

    def session(self, model: Any) -> Any:
        """An ONNX Runtime session of a model from `open`."""
        folder = self._folder / model.doc_string
        folder.mkdir(exist_ok=True)
        path = folder / "probe.onnx"
        load("onnx").save(model, str(path))
        try:
            return open_session(path)
        finally:
            path.unlink()


def _add_weights(model: Any, source: Path, target: Path) -> None:
    """Have the files that a model keeps its weights in beside the changed one, without copying."""
    locations = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for location in locations:
        place = target / location
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / location, place)
        except FileExistsError:
            continue
        except OSError:  # another disk
            shutil.copyfile(source / location, place)


def _decide(model: Any, feeds: Sequence[Feeds]) -> None:
    """Take branches out that inputs of one number decide."""
    from converters.tensorrt.branches import decide_branches, fix_inputs
    from converters.tensorrt.ranges import profile_of

    inputs = {value.name for value in model.graph.input}
    numbers = {
        name: float(array.item())
        for name, array in feeds[0].items()
        if name in inputs and array.ndim == 0
    }
    fix_inputs(model, numbers)
    shapes = {name: array.shape for name, array in feeds[0].items() if name not in numbers}
    axes = {
        f"{name}.{axis}": (size, size, size)
        for name, shape in shapes.items()
        for axis, size in enumerate(shape)
    }
    free = _free(model)
    stated = {key: three for key, three in axes.items() if key in free}
    decide_branches(model, profile_of(model, stated, sample=shapes))


def _free(model: Any) -> set[str]:
    """Axes without a size, as ``INPUT.AXIS``."""
    return {
        f"{value.name}.{axis}"
        for value in model.graph.input
        for axis, size in enumerate(value.type.tensor_type.shape.dim)
        if not size.HasField("dim_value")
    }


def _picked(reference: Path, feeds: Sequence[Feeds]) -> list[Feeds]:
    """A few inputs far apart, all of one form: of a stream of two rates, one rate."""
    size = sum(file.stat().st_size for file in reference.parent.glob(reference.name + "*"))
    count = FEEDS if size < _LARGE_BYTES else FEEDS_LARGE

    def form(feed: Feeds) -> list[tuple[str, object]]:
        return [(name, feed[name].item() if feed[name].ndim == 0 else feed[name].ndim)
                for name in sorted(feed)]  # fmt: skip

    alike = [feed for feed in feeds if form(feed) == form(feeds[-1])]
    step = len(alike) / min(count, len(alike))
    return [alike[int(step * (number + 0.5))] for number in range(min(count, len(alike)))]


def _layers(one: Any, other: Any) -> dict[str, Any]:
    """Values of the reference that a layer makes and the variant has too, and their nodes."""
    theirs = {name: node for node in other.graph.node for name in node.output if name}
    constants = [_constants(model) for model in (one, other)]
    found = {}
    for node in one.graph.node:
        for name in node.output:
            twin = theirs.get(name)
            if not name or twin is None or node.op_type == "Constant":
                continue
            is_same = (
                node.op_type == twin.op_type
                and list(node.input) == list(twin.input)
                and all((value in constants[0]) == (value in constants[1]) for value in node.input)
            )
            if not is_same or node.op_type in _WEIGHTY:
                found[name] = node
    return found


def _constants(model: Any) -> set[str]:
    stored = {tensor.name for tensor in model.graph.initializer}
    return stored | {
        name for node in model.graph.node if node.op_type == "Constant" for name in node.output
    }


def _both(
    files: _Graphs, one: Any, other: Any, layers: Mapping[str, Any], feeds: Sequence[Feeds]
) -> tuple[list[_Arrays], list[_Arrays], set[str]]:
    """What layers give and are given in both, as they run; and what of it can be compared."""
    made = [{name for node in model.graph.node for name in node.output} for model in (one, other)]
    given = {name for node in layers.values() for name in node.input if name}
    names = sorted({*layers, *(given & made[0] & made[1])})
    truth = _values(files, one, names, feeds)
    found = _values(files, other, names, feeds)
    alike = {
        name
        for name in names
        if all(
            a[name].dtype.kind == "f" and b[name].dtype.kind == "f" and a[name].size
            and a[name].shape == b[name].shape
            for a, b in zip(truth, found)  # noqa: B905
        )
    }  # fmt: skip
    return truth, found, alike


def _values(
    files: _Graphs, model: Any, names: Sequence[str], feeds: Sequence[Feeds]
) -> list[_Arrays]:
    """Inner values and outputs."""
    onnx = load("onnx")
    probe = _copied(model)
    outputs = {value.name for value in probe.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in outputs)
    session = files.session(probe)
    return [run(session, feed, name="layers") for feed in feeds]


def _own_outputs(
    files: _Graphs,
    model: Any,
    names: Sequence[str],
    feeds: Sequence[Feeds],
    truth: Sequence[_Arrays],
    found: Sequence[_Arrays],
) -> list[_Arrays]:
    """What each layer of a model makes of exact inputs, by the name of its output."""
    onnx = load("onnx")
    probe = _copied(model)
    for node in probe.graph.node:
        for position, name in enumerate(node.output):
            if name in names:
                node.output[position] = name + _OWN
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name + _OWN) for name in names)
    _declare(onnx, probe, {name: found[0][name].dtype for name in names})
    session = files.session(probe)
    made = []
    for feed, exact, theirs in zip(feeds, truth, found):  # noqa: B905
        given = {name: exact[name].astype(theirs[name].dtype) for name in names}
        outputs = run(session, {**feed, **given}, name="layers apart")
        made.append({name: outputs[name + _OWN] for name in names})
    return made


class _Effect:
    """The mean squared error of the outputs when some layers err, as a share of the square.

    Args:
        files: Opens models.
        model: The reference.
        names: What the layers give.
        feeds: Inputs.
        truth: Values of the reference.
        own: What the layers give instead.
    """

    def __init__(
        self,
        files: _Graphs,
        model: Any,
        names: Sequence[str],
        feeds: Sequence[Feeds],
        truth: Sequence[_Arrays],
        own: Sequence[_Arrays],
    ) -> None:
        self._feeds, self._truth, self._own = feeds, truth, own
        onnx = load("onnx")
        probe = _copied(model)
        nodes = list(probe.graph.node)
        del probe.graph.node[:]
        for node in nodes:
            added = []
            for position, name in enumerate(node.output):
                if name in names:
                    node.output[position] = name + _OWN
                    added.append(onnx.helper.make_node("Add", [name + _OWN, name + _DELTA], [name]))
            probe.graph.node.extend([node, *added])
        _declare(onnx, probe, {name + _DELTA: truth[0][name].dtype for name in names})
        self._none = {name + _DELTA: np.zeros((), truth[0][name].dtype) for name in names}
        self._outputs = [value.name for value in probe.graph.output]
        self._session = files.session(probe)

    def __call__(self, names: Sequence[str]) -> float:
        errors = []
        for feed, truth, own in zip(self._feeds, self._truth, self._own):  # noqa: B905
            deltas = {
                name + _DELTA: (own[name].astype(np.float64) - truth[name]).astype(
                    truth[name].dtype
                )
                for name in names
            }
            harmed = run(self._session, {**feed, **self._none, **deltas}, name="layers that err")
            errors += [
                _squared(harmed[key], truth[key])
                for key in self._outputs
                if truth[key].dtype.kind == "f" and truth[key].size
            ]
        return float(np.mean(errors)) if errors else 0.0


def _declare(onnx: Any, model: Any, inputs: Mapping[str, Any]) -> None:
    """Add inputs of any shape."""
    for name, dtype in inputs.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
    # What is known of values that are now given from outside would be stated twice.
    rest = [value for value in model.graph.value_info if value.name not in inputs]
    del model.graph.value_info[:]
    model.graph.value_info.extend(rest)


def _copied(model: Any) -> Any:
    copied = type(model)()
    copied.CopyFrom(model)
    return copied


def _relative(name: str, found: Sequence[_Arrays], truth: Sequence[_Arrays]) -> float:
    lost = power = 0.0
    for a, b in zip(found, truth):  # noqa: B905
        wide = b[name].astype(np.float64)
        lost += float(np.square(a[name].astype(np.float64) - wide).sum())
        power += float(np.square(wide).sum())
    return float(np.sqrt(lost / power)) if power else float(np.sqrt(lost))


def _squared(found: np.ndarray, expected: np.ndarray) -> float:
    wide = expected.astype(np.float64)
    scale = float(np.square(wide).sum())
    return float(np.square(found.astype(np.float64) - wide).sum()) / (scale or 1.0)
