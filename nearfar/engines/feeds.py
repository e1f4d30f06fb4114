"""Check what a caller feeds a model, and find the words when something is wrong.

Everything that can be computed from the model is computed once; a call compares a few attributes.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import numpy as np

from nearfar.bundle.manifest import TensorSpec
from nearfar.errors import InvalidInput
from nearfar.tensors import numpy_of, spell


class FeedCheck:
    """Checks feeds against input specs.

    Args:
        specs: The model's inputs.
        axes: For each input the axes as the graph names them: a size, a symbol or `None`. Axes with
            the same symbol must have the same size. Without it only `specs` count.

    Attributes:
        has_strings: Whether any input takes strings.
    """

    def __init__(
        self, specs: Sequence[TensorSpec], axes: Sequence[Sequence[int | str | None]] = ()
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self.has_strings = any(spec.datatype == "BYTES" for spec in specs)
        self._plan = [
            (
                spec.name,
                numpy_of(spec.datatype),
                len(spec.shape),
                tuple((axis, size) for axis, size in enumerate(spec.shape) if size >= 0),
            )
            for spec in specs
        ]
        self._count = len(self._plan)
        self._shared = _shared_axes(specs, axes)

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Pass, or raise.

        Raises:
            InvalidInput: Names the tensor, what was expected and what came.
        """
        if len(feeds) != self._count:
            raise self._wrong_names(feeds)
        for name, dtype, rank, sizes in self._plan:
            array = feeds.get(name)
            if array is None:
                raise self._wrong_names(feeds)
            if not isinstance(array, np.ndarray) or (
                array.dtype is not dtype and not _is_dtype(array, dtype)
            ):
                raise self._wrong_type(name, array)
            shape = array.shape
            if len(shape) != rank:
                raise self._wrong_shape(name, shape)
            for axis, size in sizes:
                if shape[axis] != size:
                    raise self._wrong_shape(name, shape)
        for first, axis, second, other_axis in self._shared:
            if feeds[first].shape[axis] != feeds[second].shape[other_axis]:
                raise InvalidInput(
                    f"Axis {other_axis} of input {second!r} has size "
                    f"{feeds[second].shape[other_axis]}, axis {axis} of input {first!r} has "
                    f"{feeds[first].shape[axis]}",
                    field=second,
                    fix="They are the same axis to the model: give both the same size",
                )

    def _wrong_names(self, feeds: Mapping[str, np.ndarray]) -> InvalidInput:
        expected = ", ".join(_describe(spec) for spec in self._specs.values())
        extra = [name for name in feeds if name not in self._specs]
        missing = [name for name in self._specs if feeds.get(name) is None]
        if missing:
            close = difflib.get_close_matches(missing[0], extra, n=1)
            return InvalidInput(
                f"Input {missing[0]!r} is missing"
                + (f"; {close[0]!r} is there instead" if close else ""),
                field=missing[0],
                fix=f"The model takes: {expected}",
            )
        return InvalidInput(
            f"The model has no input {extra[0]!r}",
            field=str(extra[0]),
            fix=f"The model takes: {expected}",
        )

    def _wrong_type(self, name: str, array: object) -> InvalidInput:
        spec = self._specs[name]
        wanted = numpy_of(spec.datatype)
        if isinstance(array, np.ndarray):
            text = "" if spec.datatype != "BYTES" else " of str or bytes"
            return InvalidInput(
                f"Input {name!r} has dtype {array.dtype.str if _is_swapped(array) else array.dtype}"
                f", expected {wanted} ({spec.datatype}){text}",
                field=name,
                fix=f"Convert it: array.astype({spell(spec.datatype)})",
            )
        return InvalidInput(
            f"Input {name!r} is of type {type(array).__name__}, expected a numpy array",
            field=name,
            fix=f"Convert it: numpy.asarray(value, dtype={spell(spec.datatype)})",
        )

    def _wrong_shape(self, name: str, shape: tuple[int, ...]) -> InvalidInput:
        spec = self._specs[name]
        free = " (-1 is any size)" if -1 in spec.shape else ""
        one_short = len(shape) == len(spec.shape) - 1 and spec.shape[:1] == (-1,)
        return InvalidInput(
            f"Input {name!r} has shape {list(shape)}, expected {list(spec.shape)}{free}",
            field=name,
            fix="Add the batch axis: array[numpy.newaxis]" if one_short else "Reshape it",
        )


def _is_dtype(array: np.ndarray, wanted: np.dtype[np.generic]) -> bool:
    if wanted.kind == "O":  # BYTES: fixed-width strings will do as well
        return array.dtype.kind in "OSU"
    return array.dtype == wanted


def _is_swapped(array: np.ndarray) -> bool:
    """Whether only the byte order is wrong, which the dtype's name does not show."""
    return not array.dtype.isnative


def _describe(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.datatype}{list(spec.shape)}"


def _shared_axes(
    specs: Sequence[TensorSpec], axes: Sequence[Sequence[int | str | None]]
) -> tuple[tuple[str, int, str, int], ...]:
    """Pairs of axes that carry the same symbol."""
    first: dict[str, tuple[str, int]] = {}
    pairs = []
    for spec, names in zip(specs, axes, strict=False):
        for axis, symbol in enumerate(names):
            if not isinstance(symbol, str) or not symbol:
                continue
            if symbol in first:
                pairs.append((*first[symbol], spec.name, axis))
            else:
                first[symbol] = (spec.name, axis)
    return tuple(pairs)
