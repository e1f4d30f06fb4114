"""`nearfar bench convert`: what conversions of real models keep, and what they save.

Every figure of quality is taken from the manifest that the conversion wrote; sizes are those of the
files; memory is that of the conversion's processes; speed is measured here, both variants in turn.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.convert_audio import measure_audio, measure_files
from benchmarks.convert_encoder import measure_encoder
from benchmarks.convert_llm import measure_llm
from benchmarks.convert_resume import measure_resume
from benchmarks.convert_vision import measure_vision
from benchmarks.harness import Bar, Report, Run
from benchmarks.subjects import Begin, Part
from nearfar.cli import report
from nearfar.errors import InvalidInput, NearfarError

PARTS = ("encoder", "llm", "vision", "audio", "files", "resume")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is converted.

    Attributes:
        sources: Folder below which the models lie, as `nearfar quickstart` unpacks them.
        parts: Which of `PARTS`.
        rounds: How often each side of a comparison of speed is measured.
        tokens: Length of each timed answer.
        kills: How often a conversion is killed.
        quick: Leave out what has no bar.
        seed: The order of the sides and the points of killing are drawn from it.
        sounds: Folder with recordings; `None` takes those below `sources`.
        files: How many files magika is asked about.
    """

    sources: Path
    parts: tuple[str, ...] = PARTS
    rounds: int = 6
    tokens: int = 64
    kills: int = 50
    quick: bool = False
    seed: int = 0
    sounds: Path | None = None
    files: int = 1500


def measure(settings: Settings, begin: Begin) -> Report:
    """Convert and compare.

    Args:
        settings: What is converted.
        begin: Shows progress.

    A part that fails is told on standard error, and is a bar that is not met.

    Raises:
        InvalidInput: A model is missing; says how to get it.
    """
    run = Run("convert", seed=settings.seed)
    sources = {
        "encoder": lambda: _one(settings.sources, "sentence encoder", "**/modules.json").parent,
        "llm": lambda: _one(settings.sources, "GGUF file", "**/*.gguf"),
        "vision": lambda: Path("scikit-learn's digits"),
        "audio": lambda: _one(settings.sources, "silero_vad.onnx", "**/silero_vad.onnx", _FETCH),
        "files": lambda: _one(settings.sources, "magika model", "magika/**/model.onnx"),
        "resume": lambda: _one(settings.sources, "ONNX file", "**/*.onnx"),
    }
    # Before minutes of converting, find out whether all are there.
    found = {name: sources[name]() for name in settings.parts}
    parts: list[Part] = []
    with tempfile.TemporaryDirectory(prefix="nearfar-bench-") as folder:
        for name, source in found.items():
            work = Path(folder) / name
            work.mkdir()
            try:
                parts.append(_measure_part(name, source, work, settings, run, begin))
            except NearfarError as exc:  # the other parts take minutes: theirs is not lost
                report(exc)
                bar = Bar(
                    name=f"{name}: measured", value=0.0, limit=1.0, direction="at_least", unit=""
                )
                parts.append(Part((bar,), ()))
            # Models are large, and temporary folders may be memory.
            shutil.rmtree(work)
    return run.report(
        bars=[bar for part in parts for bar in part.bars],
        figures=[figure for part in parts for figure in part.figures],
        settings={
            "parts": ",".join(settings.parts),
            "rounds": settings.rounds,
            "tokens": settings.tokens,
            "kills": settings.kills,
            **{f"{name} source": path.name for name, path in found.items()},
        },
    )


def _measure_part(
    name: str, source: Path, work: Path, settings: Settings, run: Run, begin: Begin
) -> Part:
    if name == "encoder":
        return measure_encoder(source, work, settings.rounds, run, begin)
    if name == "vision":
        return measure_vision(work, begin)
    if name == "audio":
        return measure_audio(source, settings.sounds or settings.sources, work, begin)
    if name == "files":
        return measure_files(source, work, settings.files, settings.seed, begin)
    if name == "llm":
        rounds, tokens = settings.rounds, settings.tokens
        return measure_llm(source, work, rounds, tokens, run, begin, quick=settings.quick)
    return measure_resume(source, work, settings.kills, run, begin)


_FETCH = "Fetch silero-vad and recordings with --fetch; the other models with `nearfar quickstart`"


def _one(folder: Path, what: str, pattern: str, fix: str = "") -> Path:
    """The first path that fits, by name.

    Raises:
        InvalidInput: There is none.
    """
    found = sorted(folder.glob(pattern))
    if not found:
        raise InvalidInput(
            f"There is no {what} below {folder}",
            field="--sources",
            fix=fix or "Fetch the models with `nearfar quickstart`, or name another folder",
        )
    return found[0]
