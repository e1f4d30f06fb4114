"""A signal, piece by piece as it comes, to the inputs of one call after another, state included.

Nothing is run here: the caller takes `feeds`, runs the model wherever it likes, and gives the
outputs to `took`. Until then the same feeds are given again, so a failed call loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nearfar.bundle.manifest import Manifest, StreamPreprocessing, StreamRate, TensorSpec
from nearfar.errors import EngineError, InvalidInput
from nearfar.tensors import numpy_of

#: Full scale of 16-bit samples.
_INT16_SCALE = np.float32(1 / 32768)

Samples = bytes | bytearray | memoryview | np.ndarray | Sequence[float]


class SignalWindows:
    """Cuts one signal of one rate into windows and carries the model's state. Not thread-safe.

    Args:
        manifest: Of a model with `StreamPreprocessing`.
        sample_rate_hz: One of the model's rates; `None` takes the only one.

    Attributes:
        rate: How the signal is cut.
        state: Input name to what the next call is given.
        taken_samples: How many samples of the signal have been answered.

    Raises:
        InvalidInput: The model takes no signal, or none of that rate.
    """

    def __init__(self, manifest: Manifest, sample_rate_hz: int | None = None) -> None:
        spec = manifest.preprocessing
        if not isinstance(spec, StreamPreprocessing):
            raise InvalidInput(
                f"Model {manifest.name!r} takes no signal that is given piece by piece",
                field="model",
                fix="Use a model that was converted with preprocessing of the kind 'stream'",
            )
        self._spec = spec
        self.rate = _rate(spec, manifest.name, sample_rate_hz)
        self._zeros = _zeros(spec, manifest.inputs)
        self._fixed: dict[str, np.ndarray] = {}
        if spec.rate_input is not None:
            shape = next(i.shape for i in manifest.inputs if i.name == spec.rate_input)
            value = np.int64(self.rate.sample_rate_hz)
            self._fixed[spec.rate_input] = np.full([1] * len(shape), value, np.int64)
        self.reset()

    def reset(self) -> None:
        """Start anew: another signal, without a past."""
        self.state = dict(self._zeros)
        self.taken_samples = 0
        # Context, then samples that have not been answered yet.
        self._buffer = np.zeros(self.rate.context_samples, np.float32)

    @property
    def waiting_samples(self) -> int:
        """Samples that have not been answered yet."""
        return len(self._buffer) - self.rate.context_samples

    def add(self, samples: Samples) -> None:
        """Append samples of the signal, any number of them.

        Args:
            samples: Floats from -1 to 1, or 16-bit integers; bytes are 16-bit little-endian PCM.

        Raises:
            InvalidInput: They are not one channel of such numbers.
        """
        added = _as_floats(samples)
        if added.size:
            self._buffer = np.concatenate([self._buffer, added])

    def pad(self) -> None:
        """Fill the last window up with silence, if it was begun."""
        missing = -self.waiting_samples % self.rate.window_samples
        if missing:
            self._buffer = np.concatenate([self._buffer, np.zeros(missing, np.float32)])

    def feeds(self) -> dict[str, np.ndarray] | None:
        """The inputs of the next call, or `None` while too little of the signal is there."""
        width = self.rate.context_samples + self.rate.window_samples
        if len(self._buffer) < width:
            return None
        # A copy: what is sent or kept elsewhere must not change with the buffer.
        return {self._spec.input: self._buffer[None, :width].copy(), **self.state, **self._fixed}

    def took(self, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Go on to the next window.

        Args:
            outputs: What the model gave for the last `feeds`.

        Returns:
            The outputs without the states.

        Raises:
            EngineError: A state is missing, or has another shape than it went in with.
        """
        state = {}
        for carried in self._spec.states:
            array = outputs.get(carried.output)
            wanted = self._zeros[carried.input]
            if array is None or array.shape != wanted.shape or array.dtype != wanted.dtype:
                raise EngineError(
                    f"The model gave no state {carried.output!r} of shape {list(wanted.shape)}",
                    fix="Its manifest's preprocessing.states must fit the model; convert it again",
                )
            state[carried.input] = array
        self.state = state
        self._buffer = self._buffer[self.rate.window_samples :]
        self.taken_samples += self.rate.window_samples
        hidden = {carried.output for carried in self._spec.states}
        return {name: array for name, array in outputs.items() if name not in hidden}


def _rate(spec: StreamPreprocessing, model: str, wished_hz: int | None) -> StreamRate:
    if wished_hz is None and len(spec.rates) == 1:
        return spec.rates[0]
    for rate in spec.rates:
        if rate.sample_rate_hz == wished_hz:
            return rate
    known = ", ".join(str(rate.sample_rate_hz) for rate in spec.rates)
    said = "no sample rate is given" if wished_hz is None else f"the signal has {wished_hz} Hz"
    raise InvalidInput(
        f"Model {model!r} knows signals of {known} Hz, and {said}",
        field="sample_rate_hz",
        fix="Resample the signal first" if wished_hz is not None else f"Give one of {known}",
    )


def _zeros(spec: StreamPreprocessing, inputs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    types = {tensor.name: numpy_of(tensor.datatype) for tensor in inputs}
    return {state.input: np.zeros(state.shape, types[state.input]) for state in spec.states}


def _as_floats(samples: Samples) -> np.ndarray:
    if isinstance(samples, (bytes, bytearray, memoryview)):
        if len(samples) % 2:
            raise InvalidInput(
                "The samples are an odd number of bytes",
                field="samples",
                fix="Give whole 16-bit samples, little-endian",
            )
        array = np.frombuffer(samples, "<i2")
    else:
        array = np.asarray(samples)
    if array.ndim != 1:
        raise InvalidInput(
            f"The samples have shape {list(array.shape)}",
            field="samples",
            fix="Give one channel as a row: samples.mean(axis=…) mixes several",
        )
    if array.dtype == np.int16:
        scaled: np.ndarray = array.astype(np.float32) * _INT16_SCALE
        return scaled
    if array.dtype.kind != "f" and array.size:
        raise InvalidInput(
            f"The samples have dtype {array.dtype}",
            field="samples",
            fix="Give floats from -1 to 1, or int16",
        )
    floats = array.astype(np.float32)
    if not np.isfinite(floats).all():
        raise InvalidInput(
            "There is NaN or infinity among the samples",
            field="samples",
            fix="Give floats from -1 to 1, or int16",
        )
    return floats
