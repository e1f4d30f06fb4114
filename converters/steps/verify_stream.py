"""Models that hear a signal window by window: what is given to them, and whether they agree.

A variant is judged as it will run, on its own state from the first window to the last: an error
that a state carries along and lets grow is then seen.
"""

from __future__ import annotations

import math
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.sources.onnx_file import OnnxSource
from converters.steps.onnx_session import open_session, run
from converters.steps.verify_tensors import Feeds
from nearfar.bundle.manifest import (
    Manifest,
    QualityFigure,
    StreamPreprocessing,
    StreamRate,
    StreamState,
    TensorSpec,
)
from nearfar.errors import ConversionError, InvalidInput
from nearfar.processing.windows import SignalWindows

#: Of all recordings together; two minutes and more of 32 ms each.
_MAX_WINDOWS = 4000
_SYNTHETIC_S = 2.0
_RATE_NAME = "sample_rate_hz"
#: From where a single score means yes, for any model with a probability.
_THRESHOLD = 0.5

#: silero-vad 4 to 6 as ONNX: both rates, 32 ms windows with the last 4 ms of the one before.
_SILERO_INPUTS = {"input": ("FP32", 2), "state": ("FP32", 3), "sr": ("INT64", 0)}
_SILERO = StreamPreprocessing(
    input="input",
    rate_input="sr",
    rates=(
        StreamRate(sample_rate_hz=8000, window_samples=256, context_samples=32),
        StreamRate(sample_rate_hz=16000, window_samples=512, context_samples=64),
    ),
    states=(StreamState(input="state", output="stateN", shape=(2, 1, 128)),),
)


@dataclass(frozen=True, slots=True)
class Recording:
    """One channel of sound.

    Attributes:
        samples: float32, -1 to 1.
        rate_hz: Samples in a second.
    """

    samples: np.ndarray
    rate_hz: int


def known_stream(source: OnnxSource) -> StreamPreprocessing | None:
    """How a model that is known by its inputs hears; `None` for others (``--preprocessing``)."""
    inputs = {tensor.name: (tensor.datatype, len(tensor.shape)) for tensor in source.inputs}
    outputs = {tensor.name for tensor in source.outputs}
    state = next((tensor for tensor in source.inputs if tensor.name == "state"), None)
    if inputs != _SILERO_INPUTS or outputs != {"output", "stateN"} or state is None:
        return None
    return _SILERO if (state.shape[0], state.shape[2]) == (2, 128) else None


def recordings(
    path: Path | None, spec: StreamPreprocessing, seed: int
) -> tuple[list[Recording], str]:
    """Sound to verify with.

    Args:
        path: A ``.wav`` file with 16-bit samples, or an ``.npz`` in which each array is one
            channel, and ``sample_rate_hz`` one number for all; `None` makes some up.
        spec: What the model hears.
        seed: Of sound that is made up.

    Returns:
        (recordings, what they are for people).

    Raises:
        ConversionError: The file does not hold sound of a rate that the model knows.
    """
    if path is None:
        made = [Recording(_voice(rate.sample_rate_hz, seed), rate.sample_rate_hz)
                for rate in spec.rates]  # fmt: skip
        return made, "windows of synthetic sound (real sound: --samples)"
    try:
        found = _of_wav(path) if path.suffix.lower() == ".wav" else _of_npz(path)
    except (OSError, ValueError, EOFError, KeyError, wave.Error) as exc:
        raise ConversionError(
            f"{path} holds no sound that can be read ({exc})",
            fix="Give a .wav with 16-bit samples, or an .npz with one array for each recording "
            f"and a number {_RATE_NAME!r}",
        ) from exc
    known = sorted(rate.sample_rate_hz for rate in spec.rates)
    for recording in found:
        if recording.rate_hz not in known:
            raise ConversionError(
                f"{path} has {recording.rate_hz} samples in a second, the model hears "
                f"{' or '.join(map(str, known))}",
                fix="Resample it first",
            )
    return found, "windows of recorded sound"


def windows_of(
    source: Path,
    inputs: Sequence[TensorSpec],
    heard: Sequence[Recording],
    spec: StreamPreprocessing,
) -> list[Feeds]:
    """Inputs of one call after another, with the states that the source gives.

    Every recording begins with a state of zeros.

    Raises:
        ConversionError: The recordings are too short, or the source fails.
    """
    session = open_session(source)
    feeds: list[Feeds] = []
    for recording in heard:
        windows = _signal(spec, inputs, recording.rate_hz)
        try:
            windows.add(recording.samples)
        except InvalidInput as exc:
            raise ConversionError(exc.problem, fix=exc.fix) from exc
        while len(feeds) < _MAX_WINDOWS and (given := windows.feeds()) is not None:
            feeds.append(given)
            windows.took(run(session, given, name="source"))
    if not feeds:
        raise ConversionError(
            "The recordings are shorter than one window", fix="Give some seconds of sound"
        )
    return feeds


def split_windows(
    feeds: Sequence[Feeds], spec: StreamPreprocessing
) -> tuple[list[Feeds], list[Feeds]]:
    """Windows to verify with, and others: of each recording the last quarter and the rest."""
    verify: list[Feeds] = []
    others: list[Feeds] = []
    for row in _runs(feeds, spec):
        first = max(1, 3 * len(row) // 4) if len(row) > 1 else 0
        others += row[:first] or row
        verify += row[first:]
    return verify, others


def stream_agreement(
    source: Path, variant: Path, feeds: Sequence[Feeds], spec: StreamPreprocessing, reference: str
) -> tuple[QualityFigure, ...]:
    """Share of windows in which a variant decides as its source, each on its own state.

    A single score means yes from 0.5 on; of several the greatest counts. What is compared is the
    first output that is no state.
    """
    one, other = ((open_session(path), path.parent.name) for path in (source, variant))
    same = total = 0
    for row in _runs(feeds, spec):
        decided = zip(_decisions(one, row, spec), _decisions(other, row, spec))  # noqa: B905
        for expected, found in decided:
            same += int((expected == found).sum())
            total += expected.size
    return (
        QualityFigure(
            metric="top1_agreement",
            value=same / max(1, total),
            higher_is_better=True,
            samples=total,
            reference=reference,
        ),
    )


def _decisions(
    named: tuple[Any, str], row: Sequence[Feeds], spec: StreamPreprocessing
) -> Iterator[np.ndarray]:
    session, name = named
    states = {state.input: state.output for state in spec.states}
    carried: dict[str, np.ndarray] = {}
    for given in row:
        outputs = run(session, {**given, **carried}, name=name)
        carried = {into: outputs[out] for into, out in states.items()}
        scores = next(array for key, array in outputs.items() if key not in states.values())
        yield scores >= _THRESHOLD if scores.shape[-1:] in ((), (1,)) else scores.argmax(axis=-1)


def _runs(feeds: Sequence[Feeds], spec: StreamPreprocessing) -> list[list[Feeds]]:
    """Windows that follow each other: a recording begins where all states are zeros."""
    runs: list[list[Feeds]] = []
    previous: Feeds | None = None
    for given in feeds:
        begins = not any(np.any(given[state.input]) for state in spec.states)
        other_rate = previous is not None and previous[spec.input].shape != given[spec.input].shape
        if begins or other_rate or not runs:
            runs.append([])
        runs[-1].append(given)
        previous = given
    return runs


def _signal(spec: StreamPreprocessing, inputs: Sequence[TensorSpec], rate_hz: int) -> SignalWindows:
    manifest = Manifest(
        name="source", version="0.0.0", task="tensor", variants=(), inputs=tuple(inputs),
        preprocessing=spec,
    )  # fmt: skip
    return SignalWindows(manifest, rate_hz)


def _of_wav(path: Path) -> list[Recording]:
    with wave.open(str(path), "rb") as file:
        if file.getsampwidth() != 2:
            raise ValueError(f"it has {8 * file.getsampwidth()}-bit samples")
        raw = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        channels = raw.reshape(-1, file.getnchannels())
        return [Recording((channels.mean(axis=1) / 32768).astype(np.float32), file.getframerate())]


def _of_npz(path: Path) -> list[Recording]:
    with np.load(path, allow_pickle=False) as stored:
        rate_hz = int(stored[_RATE_NAME])
        arrays = [stored[name] for name in stored.files if name != _RATE_NAME]
    found = []
    for array in arrays:
        if array.ndim != 1 or not (array.dtype == np.int16 or array.dtype.kind == "f"):
            raise ValueError(f"an array has shape {list(array.shape)} and dtype {array.dtype}")
        scale = 32768 if array.dtype == np.int16 else 1
        found.append(Recording((array / scale).astype(np.float32), rate_hz))
    return found


def _voice(rate_hz: int, seed: int) -> np.ndarray:
    """Something between a vowel and noise, four syllables a second: for want of a recording."""
    generator = np.random.default_rng(seed)
    time_s = np.arange(int(_SYNTHETIC_S * rate_hz)) / rate_hz
    pitch = 120 + 20 * np.sin(2 * math.pi * 0.7 * time_s)
    phase = 2 * math.pi * np.cumsum(pitch) / rate_hz
    # Harmonics near the first two formants of an open vowel are the loudest.
    weights = [1 / (1 + (abs(n * 120 - 700) / 300) ** 2) for n in range(1, 25)]
    tone = sum(w * np.sin(n * phase) for n, w in enumerate(weights, 1))
    syllables = np.clip(np.sin(2 * math.pi * 4 * time_s), 0, 1)
    sound = 0.2 * syllables * tone + 0.01 * generator.standard_normal(len(time_s))
    return np.clip(sound, -1, 1).astype(np.float32)
