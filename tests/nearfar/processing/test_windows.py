"""A signal in pieces of any length gives the windows that it gives in one piece."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.bundle.checks import manifest_problems
from nearfar.bundle.manifest import Manifest, decode_manifest, encode_manifest
from nearfar.errors import EngineError, InvalidInput
from nearfar.processing.windows import SignalWindows
from tests.support import tiny


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    return tiny.write_tiny_stream_bundle(tmp_path_factory.mktemp("ear") / "ear").manifest


def hear(windows: SignalWindows) -> list[np.ndarray]:
    """The model's part: level = state / 2 + mean(|x|), as `tiny.stream_model` has it."""
    found = []
    while (feeds := windows.feeds()) is not None:
        assert feeds["sr"].shape == ()
        assert feeds["sr"] == windows.rate.sample_rate_hz
        level = feeds["state"] / 2 + np.abs(feeds["x"]).mean()
        found.append(feeds["x"][0])
        assert list(windows.took({"level": level, "stateN": level})) == ["level"]
    return found


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=8), rate=st.sampled_from([8, 16]))
def test_however_a_signal_is_cut_its_windows_are_the_same(manifest, cuts, rate):
    signal = np.linspace(-1, 1, 40, dtype=np.float32)
    whole, parts = SignalWindows(manifest, rate), SignalWindows(manifest, rate)
    whole.add(signal)
    expected = hear(whole)
    found = []
    for piece in np.split(signal, sorted(cuts)):
        parts.add(piece)
        found += hear(parts)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(parts.state["state"], whole.state["state"])
    context, window = whole.rate.context_samples, whole.rate.window_samples
    padded = np.concatenate([np.zeros(context, np.float32), signal])
    for number, row in enumerate(expected):
        start = number * window
        np.testing.assert_array_equal(row, padded[start : start + context + window])
    assert parts.taken_samples + parts.waiting_samples == len(signal)


def test_a_window_is_given_again_until_its_outputs_came(manifest):
    windows = SignalWindows(manifest, 8)
    windows.add([0.5, 0.5, 0.5])
    assert windows.feeds() is None
    windows.pad()
    first, again = windows.feeds(), windows.feeds()
    np.testing.assert_array_equal(first["x"], again["x"])
    assert first["x"].tolist() == [[0, 0, 0.5, 0.5, 0.5, 0]]
    windows.took({"level": np.ones((1, 1)), "stateN": np.full((1, 1), 7, np.float32)})
    assert windows.state["state"] == 7
    windows.pad()  # nothing was begun
    assert windows.feeds() is None
    windows.reset()
    assert windows.state["state"] == 0 == windows.taken_samples


def test_the_three_forms_of_samples_are_the_same_signal(manifest):
    wave = np.array([0, 16384, -32768, 100], np.int16)
    found = []
    for samples in (wave, wave.astype("<i2").tobytes(), wave / 32768):
        windows = SignalWindows(manifest, 8)
        windows.add(samples)
        found.append(windows.feeds()["x"])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        (b"abc", "odd number of bytes"),
        (np.zeros((2, 4), np.float32), "shape [2, 4]"),
        (np.zeros(4, np.int32), "dtype int32"),
        ([0.0, float("nan")], "NaN"),
    ],
)
def test_what_is_no_signal_is_refused_and_not_taken(manifest, samples, says):
    windows = SignalWindows(manifest, 8)
    with pytest.raises(InvalidInput) as caught:
        windows.add(samples)
    assert says in caught.value.problem
    assert windows.waiting_samples == 0


def test_a_rate_that_the_model_does_not_know_is_refused(manifest):
    with pytest.raises(InvalidInput, match="8, 16 Hz, and the signal has 44100 Hz"):
        SignalWindows(manifest, 44_100)
    with pytest.raises(InvalidInput, match="no sample rate is given"):
        SignalWindows(manifest)
    with pytest.raises(InvalidInput, match="takes no signal"):
        SignalWindows(msgspec.structs.replace(manifest, preprocessing=tiny.HEAD_TAIL))


def test_a_model_that_loses_its_state_is_noticed(manifest):
    windows = SignalWindows(manifest, 8)
    windows.add(np.zeros(4))
    for state in ({}, {"stateN": np.zeros((2, 1), np.float32)}):
        with pytest.raises(EngineError, match="no state 'stateN'"):
            windows.took(state)
    assert windows.taken_samples == 0


def test_a_manifest_with_a_stream_survives_being_written(manifest):
    assert decode_manifest(encode_manifest(manifest)) == manifest
    assert list(manifest_problems(manifest)) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rates": ()}, "is empty"),
        ({"input": "y"}, "fills y, state, sr"),
        ({"rate_input": None}, "the inputs are x, state, sr"),
        ({"states": ({"input": "state", "output": "z", "shape": (1, 1)},)}, "'z' is not one"),
        ({"states": ({"input": "state", "output": "stateN", "shape": (0,)},)}, "a size outside"),
        (
            {"states": ({"input": "state", "output": "stateN", "shape": (2048, 2048)},)},
            "holds more than",
        ),
        ({"rates": ({"sample_rate_hz": 8, "window_samples": 0},)}, "has a size outside"),
        (
            {"rates": ({"sample_rate_hz": 8, "window_samples": 4, "context_samples": 5},)},
            "exceeds window_samples",
        ),
    ],
)  # fmt: skip
def test_a_stream_that_does_not_fit_its_model_is_a_problem(manifest, changes, says):
    spec = msgspec.convert(
        {**msgspec.to_builtins(manifest.preprocessing), **changes}, type(manifest.preprocessing)
    )
    changed = msgspec.structs.replace(manifest, preprocessing=spec)
    problems = [f"{field} {problem}" for field, problem in manifest_problems(changed)]
    assert any(says in problem for problem in problems), problems
