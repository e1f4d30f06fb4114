"""WAV files to samples."""

from __future__ import annotations

import io
import struct
import wave

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.bundle.manifest import AudioPreprocessing
from nearfar.errors import InvalidInput
from nearfar.processing.audio import read_wav, reduce, samples_of

SPEC = AudioPreprocessing(input="x", sample_rate_hz=8000, min_samples=2, max_samples=100)


def wav(frames: bytes, *, width: int = 2, channels: int = 1, rate: int = 8000) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(frames)
    return stream.getvalue()


def header(tag: int, bits: int, more: bytes = b"", size: int = 20) -> bytes:
    width = bits // 8
    form = struct.pack("<HHIIHH", tag, 1, 8000, 8000 * width, width, bits) + more
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks) + size) + b"WAVE" + chunks


def extensible(sub: int = 1) -> bytes:
    """As programs write 24 bits: the kind of samples stands at the end of the format."""
    kind = struct.pack("<H", sub) + bytes.fromhex("000000001000800000aa00389b71")
    frames = b"\0\0\0" + b"\0\0\x40" + b"\0\0\x80"
    return header(0xFFFE, 24, struct.pack("<HHI", 22, 24, 4) + kind, len(frames)) + frames


@pytest.mark.parametrize(
    ("width", "frames"),
    [
        (1, bytes([128, 192, 0])),
        (2, np.array([0, 1 << 14, -1 << 15], "<i2").tobytes()),
        (3, b"\0\0\0" + b"\0\0\x40" + b"\0\0\x80"),
        (4, np.array([0, 1 << 30, -1 << 31], "<i4").tobytes()),
    ],
)
def test_every_width_means_the_same(width: int, frames: bytes):
    samples, rate = read_wav(wav(frames, width=width))
    assert (samples.tolist(), samples.dtype, rate) == ([0.0, 0.5, -1.0], np.float32, 8000)


def test_channels_are_mixed():
    frames = np.array([[1 << 14, 0], [-1 << 15, -1 << 15]], "<i2").tobytes()
    np.testing.assert_array_equal(samples_of([wav(frames, channels=2)], SPEC), [[0.25, -1.0]])


def test_a_normalised_sound_has_mean_zero_and_variance_one_and_silence_stays_silent():
    spec = AudioPreprocessing(input="x", sample_rate_hz=8000, normalize=True, max_samples=100)
    loud = samples_of([wav(np.arange(-40, 50, dtype="<i2").tobytes())], spec)
    assert loud.mean() == pytest.approx(0, abs=1e-5)
    assert not samples_of([wav(bytes(20))], spec).any()


@pytest.mark.parametrize(
    ("sounds", "message"),
    [
        ([wav(bytes(20), rate=16000)], "16000 samples in a second, the model hears 8000"),
        ([wav(bytes(2))], "1 samples, the model takes 2"),
        ([wav(bytes(202))], "101 samples"),
        ([wav(bytes(4)), wav(bytes(8))], "2 to 4 samples"),
        ([b"RIFF"], "no WAV file"),
        ([b""], "it ends too early"),
        ([wav(b"")], "0 samples, the model takes 2"),
        ([header(3, 32) + bytes(20)], "unknown format: 3.*"),
        ([header(1, 40) + bytes(20)], "have 40 bits"),
        ([header(1, 64) + bytes(20)], "have 64 bits"),
        ([extensible(sub=3)], "unknown"),
    ],
)
def test_what_the_model_cannot_hear_is_refused(sounds: list[bytes], message: str):
    with pytest.raises(InvalidInput, match=message) as caught:
        samples_of(sounds, SPEC)
    assert caught.value.fix
    if len(sounds) == 1:
        with pytest.raises(InvalidInput, match=message):
            reduce(sounds[0], SPEC)


def test_a_file_of_the_extensible_kind_is_one_like_others():
    np.testing.assert_array_equal(samples_of([extensible()], SPEC), [[0.0, 0.5, -1.0]])


@given(st.integers(1, 4), st.integers(1, 3), st.binary(min_size=24, max_size=100))
def test_what_leaves_of_a_sound_is_all_that_the_model_hears(
    width: int, channels: int, frames: bytes
):
    frames = frames[: len(frames) // (width * channels) * width * channels]
    plain = wav(frames, width=width, channels=channels)
    told = b"LIST" + struct.pack("<I", 12) + b"canary, city"
    whole = plain[:36] + told + plain[36:]
    whole = whole[:4] + struct.pack("<I", len(whole) - 8) + whole[8:]
    part = reduce(whole, SPEC)
    np.testing.assert_array_equal(samples_of([part], SPEC), samples_of([whole], SPEC))
    assert b"canary" not in part
    assert reduce(part, SPEC) == part


@given(st.binary(max_size=80), st.integers(0, 60))
def test_damaged_files_are_refused_and_nothing_else(noise: bytes, cut: int):
    for data in (noise, wav(bytes(20))[:cut] + noise):
        try:
            samples, _ = read_wav(data)
        except InvalidInput:
            continue
        assert samples.ndim == 1
