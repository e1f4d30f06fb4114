"""Optimization profiles: which sizes an engine must cover, from what a recipe states by axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from converters.libraries import load
from nearfar.bundle.manifest import (
    AudioPreprocessing,
    Preprocessing,
    ShapeRange,
    TextPreprocessing,
)
from nearfar.errors import ConfigError

Three = tuple[int, int, int]

#: Of the first axis, where nothing is stated.
BATCH: Three = (1, 4, 16)
#: Of every other free axis, where there is neither a statement nor a sample.
_OTHER: Three = (1, 32, 128)
#: Other axes may grow to this many times the sample's size.
GROWTH = 4


class Bounds(NamedTuple):
    """What is known of axes other than the first.

    Attributes:
        least: Their smallest size.
        most: Their largest; 0 where it is not known.
    """

    least: int = 1
    most: int = 0


#: Nothing is known.
ANY_SIZE = Bounds()


def free_axes(model: Any) -> dict[str, tuple[int | str, ...]]:
    """Inputs of an ONNX model: for each axis its size, its name, or "" when it has none."""
    stored = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, tuple[int | str, ...]] = {}
    for value in model.graph.input:
        if value.name in stored:
            continue
        found[value.name] = tuple(
            axis.dim_value if axis.HasField("dim_value") else axis.dim_param
            for axis in value.type.tensor_type.shape.dim
        )
    return found


def profile_of(
    model: Any,
    stated: Mapping[str, Three],
    *,
    sample: Mapping[str, Sequence[int]] | None = None,
    bounds: Bounds = ANY_SIZE,
) -> tuple[ShapeRange, ...]:
    """Ranges of all inputs with a free axis.

    Args:
        model: An `onnx.ModelProto`.
        stated: Smallest, usual and largest size by the axis' name in the graph, or by
            ``INPUT.AXIS`` (which wins), such as ``input.1``.
        sample: Shapes of one real input: the usual sizes of axes that are not stated.
        bounds: Sizes of axes other than the first that are not stated.

    Raises:
        ConfigError: A statement fits no free axis, or does not rise.
    """
    axes = free_axes(model)
    unused = set(stated)
    found = []
    for name, sizes in axes.items():
        if all(isinstance(size, int) for size in sizes):
            continue
        ranges: list[Three] = []
        for axis, size in enumerate(sizes):
            if isinstance(size, int):
                ranges.append((size, size, size))
                continue
            keys = [key for key in (f"{name}.{axis}", size) if key in stated]
            unused -= set(keys)
            if keys:
                ranges.append(_risen(keys[0], stated[keys[0]]))
            else:
                usual = (sample or {}).get(name, ())[axis : axis + 1]
                ranges.append(_default(axis, int(usual[0]) if usual else 0, bounds))
        smallest, usual_, largest = zip(*ranges, strict=True)
        found.append(ShapeRange(name=name, smallest=smallest, usual=usual_, largest=largest))
    if unused:
        known = sorted({str(s) for sizes in axes.values() for s in sizes if isinstance(s, str)})
        raise ConfigError(
            f"There is no free axis {sorted(unused)[0]!r}",
            field="tensorrt.axes",
            fix=f"Free axes are: {', '.join(known) or 'none'}; or INPUT.AXIS, such as "
            f"{next(iter(axes), 'input')}.0",
        )
    return tuple(found)


def bounds_of(spec: Preprocessing | None, sample: Mapping[str, Sequence[int]]) -> Bounds:
    """Which sizes of texts and sounds a bundle lets through.

    Args:
        spec: How its inputs are prepared.
        sample: Shapes of one real input, or `usual_of`.
    """
    if isinstance(spec, TextPreprocessing):
        return Bounds(most=spec.max_length_tokens)
    if isinstance(spec, AudioPreprocessing):
        return Bounds(spec.min_samples, min(spec.max_samples, GROWTH * sample[spec.input][-1]))
    return ANY_SIZE


def usual_of(spec: Preprocessing | None) -> dict[str, tuple[int, ...]]:
    """Shapes of an input, where there is no real one at hand: a sound has a second."""
    if not isinstance(spec, AudioPreprocessing):
        return {}
    usual = min(max(spec.sample_rate_hz, spec.min_samples), spec.max_samples)
    return {spec.input: (1, usual)}


def stated_axes(model: Any, profile: Sequence[ShapeRange]) -> dict[str, Three]:
    """A profile as a recipe states it: by the axis' name, by ``INPUT.AXIS`` where it has none."""
    axes = free_axes(model)
    found: dict[str, Three] = {}
    for one in profile:
        for axis, size in enumerate(axes[one.name]):
            if isinstance(size, int):
                continue
            three = (one.smallest[axis], one.usual[axis], one.largest[axis])
            key = size if size and found.get(size, three) == three else f"{one.name}.{axis}"
            found[key] = three
    return found


def _risen(key: str, three: Three) -> Three:
    if len(three) != 3 or not 0 <= three[0] <= three[1] <= three[2] or three[2] < 1:
        raise ConfigError(
            f"The range of {key!r} is {list(three)}",
            field="tensorrt.axes",
            fix="Give smallest, usual and largest size, each at least the one before",
        )
    return three


def _default(axis: int, usual: int, bounds: Bounds) -> Three:
    if axis == 0:
        return BATCH
    least, most = bounds
    most = max(least, most or (GROWTH * usual if usual > 0 else _OTHER[2]))
    return least, min(max(least, usual if usual > 0 else _OTHER[1]), most), most


def load_model(path: Any, *, with_data: bool = True) -> Any:
    """An ONNX file as a `ModelProto`."""
    return load("onnx").load(str(path), load_external_data=with_data)
