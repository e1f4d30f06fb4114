"""WAV files to samples."""

from __future__ import annotations

import io
import struct
import wave
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nearfar.bundle.manifest import AudioPreprocessing
from nearfar.errors import InvalidInput

#: Against a variance of zero; that of transformers.
_LEAST_VARIANCE = 1e-7
_MAX_WIDTH_BYTES = 4
#: RIFF, its size, WAVE; then chunks with a name and a size.
_HEADER_BYTES, _CHUNK = 12, struct.Struct("<4sI")
#: Microsoft's WAVEFORMATEXTENSIBLE: its tag, where the kind of samples stands instead, and PCM.
_EXTENSIBLE, _SUBFORMAT_AT = b"\xfe\xff", 24
_PCM_SUBFORMAT = b"\x01\0\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"


def samples_of(sounds: Sequence[bytes], spec: AudioPreprocessing) -> np.ndarray:
    """Decode, mix to one channel, normalise.

    Args:
        sounds: WAV files with PCM samples of 8, 16, 24 or 32 bits.
        spec: How.

    Returns:
        float32 of shape (len(sounds), samples).

    Raises:
        InvalidInput: One is no WAV file, has another rate, is too short or too long, or they
            differ in length: padding would change what the model says.
    """
    rows = [_row(data, spec) for data in sounds]
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise InvalidInput(
            f"The sounds have {min(lengths)} to {max(lengths)} samples, and a batch must have "
            "one length",
            field="data",
            fix="Ask for one after another",
        )
    return np.stack(rows)


def normalized(samples: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1."""
    deviation = np.sqrt(samples.var() + _LEAST_VARIANCE)
    return np.asarray((samples - samples.mean()) / deviation, dtype=np.float32)


def reduce(data: bytes, spec: AudioPreprocessing) -> bytes:
    """The part of a WAV file that the model can hear, so that the rest need not leave the device.

    The same samples, and nothing of who recorded them, when, where and with what.
    ``samples_of([reduce(data, spec)], spec)`` equals ``samples_of([data], spec)``.

    Raises:
        InvalidInput: As `samples_of`, but of one file.
    """
    pcm = _read(data)
    _check(pcm, spec)
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(pcm.channels)
        file.setsampwidth(pcm.width_bytes)
        file.setframerate(pcm.rate_hz)
        file.writeframes(pcm.frames)
    return stream.getvalue()


def read_wav(data: bytes) -> tuple[np.ndarray, int]:
    """(float32 samples from -1 to 1, the mean of all channels; samples in a second).

    Raises:
        InvalidInput: It is no WAV file with PCM samples.
    """
    pcm = _read(data)
    return _samples(pcm), pcm.rate_hz


class _Pcm(NamedTuple):
    """What is in a WAV file: whole frames of integers, little-endian."""

    frames: bytes
    width_bytes: int
    channels: int
    rate_hz: int

    @property
    def samples(self) -> int:
        """How many of each channel."""
        return len(self.frames) // (self.width_bytes * self.channels)


def _read(data: bytes) -> _Pcm:
    try:
        with wave.open(io.BytesIO(_plain(data)), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError, RuntimeError, ValueError) as exc:
        raise _no_wav(str(exc) or "it ends too early") from exc
    if width > _MAX_WIDTH_BYTES:
        raise _no_wav(f"its samples have {8 * width} bits")
    frame = width * channels
    return _Pcm(raw[: len(raw) // frame * frame], width, channels, rate)


def _plain(data: bytes) -> bytes:
    """A file of the extensible kind, which 24 bits and many channels come in, as a plain one.

    The module `wave` knows it from Python 3.12 on; an answer must not depend on that.
    """
    at = _HEADER_BYTES
    while at + _CHUNK.size <= len(data):
        name, size = _CHUNK.unpack_from(data, at)
        if name == b"fmt ":
            kind = at + _CHUNK.size
            sub = kind + _SUBFORMAT_AT
            if data[kind : kind + 2] == _EXTENSIBLE and data[sub : sub + 16] == _PCM_SUBFORMAT:
                return data[:kind] + _PCM_SUBFORMAT[:2] + data[kind + 2 :]
            break
        at += _CHUNK.size + size + size % 2
    return data


def _samples(pcm: _Pcm) -> np.ndarray:
    raw, width = pcm.frames, pcm.width_bytes
    if width == 1:  # the one width that is unsigned
        values = np.frombuffer(raw, np.uint8).astype(np.float32) - 128
    elif width == 3:
        wide = np.zeros((len(raw) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        values = (wide.view("<i4")[:, 0] >> 8).astype(np.float32)
    else:
        values = np.frombuffer(raw, f"<i{width}").astype(np.float32)
    scaled = values / np.float32(1 << (8 * width - 1))
    return np.asarray(scaled.reshape(-1, pcm.channels).mean(axis=1, dtype=np.float32))


def _row(data: bytes, spec: AudioPreprocessing) -> np.ndarray:
    pcm = _read(data)
    _check(pcm, spec)
    samples = _samples(pcm)
    return normalized(samples) if spec.normalize else samples


def _check(pcm: _Pcm, spec: AudioPreprocessing) -> None:
    """Refuse what the model does not hear.

    Raises:
        InvalidInput: Another rate, too short or too long.
    """
    if pcm.rate_hz != spec.sample_rate_hz:
        raise InvalidInput(
            f"The sound has {pcm.rate_hz} samples in a second, the model hears "
            f"{spec.sample_rate_hz}",
            field="data",
            fix="Resample it first",
        )
    if not spec.min_samples <= pcm.samples <= spec.max_samples:
        raise InvalidInput(
            f"The sound has {pcm.samples} samples, the model takes {spec.min_samples} to "
            f"{spec.max_samples}",
            field="data",
            fix="Give a longer piece, or cut it and ask for each part",
        )


def _no_wav(why: str) -> InvalidInput:
    return InvalidInput(
        f"The data is no WAV file with PCM samples ({why})",
        field="data",
        fix="Write it as WAV with 16-bit samples; MP3, FLAC and floats are others",
    )
