"""Images and sounds as files, with what cameras and recorders write beside them."""

from __future__ import annotations

import io
import struct
import wave

import numpy as np

#: Stands in the metadata, and must be found nowhere else.
CANARY = "canary-5d1e"
_OWNER, _COPYRIGHT = 0x013B, 0x8298


def photo(colour: tuple[int, int, int], height: int = 300, width: int = 400) -> bytes:
    """A noisy JPEG of one colour, with `CANARY` as its owner and in its comment."""
    from PIL import Image

    exif = Image.Exif()
    exif[_OWNER] = exif[_COPYRIGHT] = CANARY
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    pixels = (np.array(colour, np.uint8) // 2 + noise).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG", exif=exif, comment=CANARY.encode())
    return stream.getvalue()


def sound(loudness: float, count: int = 4000, *, rate: int = 16_000, channels: int = 1) -> bytes:
    """A WAV file of 16 bits with a tone; a chunk with `CANARY` stands behind the samples."""
    tone = loudness * np.sin(np.arange(count) / 4)
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(tone * 32_767, channels).astype("<i2").tobytes())
    told = CANARY.encode() + b"\0"
    whole = stream.getvalue() + b"LIST" + struct.pack("<I", len(told)) + told
    return whole[:4] + struct.pack("<I", len(whole) - 8) + whole[8:]
