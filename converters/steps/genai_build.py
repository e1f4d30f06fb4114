"""Build model folders for onnxruntime-genai with its own model builder, in child processes.

The builder is a program more than a library: it prints, it exits, and it keeps the whole model in
memory. A child of its own keeps all that apart and lets two precisions be built side by side.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.libraries import OFFLINE, load, tool_versions
from converters.steps.apart import FRUGAL
from nearfar.errors import ConversionError

CONFIG = "genai_config.json"
PRECISIONS = ("int4", "int8", "fp32")

#: Both spellings are given: versions before and after the option's renaming each ignore the other.
_INT4_OPTIONS = ("int4_algo_config", "algo_config")

#: Before that version `rtn` leaves an initializer out where head and embedding share weights.
_RTN_SINCE = (0, 17)

#: Two builders at once need about eight times the weights' size in memory.
_SIDE_BY_SIDE_BYTES = 128 << 20


def build_genai(
    model_folder: Path,
    targets: Mapping[str, Path],
    work: Path,
    int4_algorithm: str,
) -> None:
    """Build one folder for each precision.

    Args:
        model_folder: Hugging Face folder.
        targets: Precision (``int4``, ``int8``, ``fp32``) to the folder to write.
        work: Folder for logs and the builder's temporary files.
        int4_algorithm: How weights become 4 bits, as the builder names it.

    Raises:
        ConversionError: The builder refused or failed; the error quotes its last lines.
    """
    load("onnxruntime_genai")
    if "int4" in targets:
        _refuse_broken(int4_algorithm)
    size_bytes = sum(file.stat().st_size for file in model_folder.glob("*.safetensors"))
    commands = {
        precision: _command(model_folder, precision, target, work, int4_algorithm)
        for precision, target in targets.items()
    }
    if size_bytes <= _SIDE_BY_SIDE_BYTES:
        _run(commands, work)
    else:
        for precision, command in commands.items():
            _run({precision: command}, work)
    for target in targets.values():
        normalise_genai_folder(target)


def _refuse_broken(int4_algorithm: str) -> None:
    installed = tool_versions("onnxruntime-genai").get("onnxruntime-genai", "")
    parts = re.findall(r"\d+", installed)[:2]
    if int4_algorithm == "rtn" and parts and tuple(map(int, parts)) < _RTN_SINCE:
        raise ConversionError(
            f"onnxruntime-genai {installed} makes models that do not load with algorithm 'rtn'",
            fix="Use another one (int4.algorithm), or Python 3.11 and onnxruntime-genai 0.17",
        )


def _command(
    model_folder: Path, precision: str, target: Path, work: Path, int4_algorithm: str
) -> list[str]:
    options = [f"{name}={int4_algorithm}" for name in _INT4_OPTIONS if precision == "int4"]
    return [
        sys.executable, "-m", "converters.steps.genai_builder",
        "-i", str(model_folder), "-o", str(target), "-p", precision, "-e", "cpu",
        "-c", str(work / f"builder-{precision}"),
        # hf_remote=false: old versions run a model's own Python code unless told not to.
        "--extra_options", "hf_token=false", "hf_remote=false", *options,
    ]  # fmt: skip


def _run(commands: Mapping[str, list[str]], work: Path) -> None:
    running: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
    try:
        for name, command in commands.items():
            log = work / f"builder-{name}.log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **OFFLINE, **FRUGAL},
                    cwd=work,
                )
            running[name] = (process, log)
        while running:
            for name, (process, log) in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[name]
                if status != 0:
                    raise ConversionError(
                        f"onnxruntime-genai's model builder failed for {name}: {_last_words(log)}",
                        fix="Check that it supports the architecture; --keep-work keeps its log",
                    )
            time.sleep(0.1)
    finally:
        for process, _ in running.values():
            process.kill()
            process.wait()


def _last_words(log: Path) -> str:
    """Last lines of a log, without progress bars."""
    text = log.read_text(encoding="utf-8", errors="replace")[-20_000:]
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    telling = [line for line in lines if line and "it/s]" not in line and "%|" not in line]
    return " / ".join(telling[-3:])[-600:] or "it said nothing"


def normalise_genai_folder(folder: Path) -> None:
    """Make what the builder wrote readable by all versions of the library.

    Older versions refuse a search setting that is null, and the tokenizer class name that
    transformers 5 writes; the class named instead is the general one for ``tokenizer.json``.

    Raises:
        ConversionError: A file that must be there is missing.
    """
    for name in (CONFIG, "model.onnx", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ConversionError(
                f"onnxruntime-genai's model builder wrote no {name}",
                fix="Use the version of onnxruntime-genai that nearfar asks for",
            )
    config = _read(folder / CONFIG)
    search = config.get("search", {})
    config["search"] = {key: value for key, value in search.items() if value is not None}
    _write(folder / CONFIG, config)
    tidy_tokenizer_config(folder)


def tidy_tokenizer_config(folder: Path) -> None:
    """Name the general class of tokenizers, and leave out where the source lay."""
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        settings = _read(tokenizer)
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Where the source lay on the converting machine is nobody's business.
        settings.pop("name_or_path", None)
        _write(tokenizer, settings)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
