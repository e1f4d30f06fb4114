"""Writes the test vectors: `make vectors`, or `python -m tests.vectors.generate`.

The same code gives the same files, byte for byte: all randomness comes from names (`seeded.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.vectors import channel, codec, shaping

DIRECTORY = Path(__file__).parent

FILES: dict[str, Callable[[], dict[str, Any]]] = {
    "pins.json": channel.pins,
    "handshake.json": channel.handshakes,
    "handshake_refused.json": channel.refused_handshakes,
    "key_schedule.json": channel.key_schedules,
    "records.json": channel.record_streams,
    "records_refused.json": channel.refused_records,
    "frames.json": shaping.frames,
    "frames_refused.json": shaping.refused_frames,
    "shaping.json": shaping.shaping,
    "codec.json": codec.accepted,
    "codec_refused.json": codec.refused,
}


def text_of(name: str) -> str:
    """What the file of that name must hold."""
    return json.dumps(FILES[name](), indent=1, ensure_ascii=True) + "\n"


def load(name: str) -> dict[str, Any]:
    """A checked-in file."""
    content: dict[str, Any] = json.loads((DIRECTORY / name).read_text())
    return content


def main() -> None:
    for name in FILES:
        (DIRECTORY / name).write_text(text_of(name))
        print(f"{name}: {(DIRECTORY / name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
