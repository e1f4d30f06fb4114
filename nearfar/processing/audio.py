"""WAV files to samples."""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence

import numpy as np

from nearfar.bundle.manifest import AudioPreprocessing
from nearfar.errors import InvalidInput

#: Against a variance of zero; that of transformers.
_LEAST_VARIANCE = 1e-7


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


def read_wav(data: bytes) -> tuple[np.ndarray, int]:
    """(float32 samples from -1 to 1, the mean of all channels; samples in a second).

    Raises:
        InvalidInput: It is no WAV file with PCM samples.
    """
    try:
        with wave.open(io.BytesIO(data), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError, RuntimeError, ValueError) as exc:
        raise InvalidInput(
            f"The data is no WAV file with PCM samples ({exc})",
            field="data",
            fix="Write it as WAV with 16-bit samples",
        ) from exc
    raw = raw[: len(raw) // (width * channels) * width * channels]
    if width == 1:  # the one width that is unsigned
        values = np.frombuffer(raw, np.uint8).astype(np.float32) - 128
    elif width == 3:
        wide = np.zeros((len(raw) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        values = (wide.view("<i4")[:, 0] >> 8).astype(np.float32)
    else:
        values = np.frombuffer(raw, f"<i{width}").astype(np.float32)
    scaled = values / np.float32(1 << (8 * width - 1))
    return scaled.reshape(-1, channels).mean(axis=1, dtype=np.float32), rate


def _row(data: bytes, spec: AudioPreprocessing) -> np.ndarray:
    samples, rate = read_wav(data)
    if rate != spec.sample_rate_hz:
        raise InvalidInput(
            f"The sound has {rate} samples in a second, the model hears {spec.sample_rate_hz}",
            field="data",
            fix="Resample it first",
        )
    if not spec.min_samples <= len(samples) <= spec.max_samples:
        raise InvalidInput(
            f"The sound has {len(samples)} samples, the model takes {spec.min_samples} to "
            f"{spec.max_samples}",
            field="data",
            fix="Give a longer piece, or cut it and ask for each part",
        )
    return normalized(samples) if spec.normalize else samples
