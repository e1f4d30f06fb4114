"""Scales of AWQ, found in another environment; see `converters.awq.worker`."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from converters import texts
from converters.awq.blocks import round_to_nearest
from converters.awq.environment import Interpreter
from converters.libraries import OFFLINE, load
from converters.reporting import Step
from converters.settings import Int4Settings
from converters.steps.apart import FRUGAL
from converters.steps.carry_gguf import Carried, Load, fill_graph, is_layer
from converters.steps.gguf_blocks import BLOCK, Blocks
from nearfar.errors import ConversionError

WINDOW_TOKENS = 512
_WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What came of it.

    Attributes:
        scaled: Matrices whose input channels have scales now.
        unscaled: Matrices that have nothing before them that could take the division.
        max_error: Largest difference between logits of the scaled model and the original, both in
            full precision.
    """

    scaled: int
    unscaled: int
    max_error: float


class _Event(msgspec.Struct, kw_only=True):
    """Any line of the child."""

    event: str
    text: str = ""
    scaled: int = 0
    unscaled: int = 0
    max_error: float = 0.0


def calibration_windows(tokenizer: Path, count: int) -> np.ndarray:
    """Token ids of documentation strings, int64 of shape (count, WINDOW_TOKENS).

    Verification never reads these texts; see `texts.calibration_passages`.
    """
    tokenizers: Any = load("tokenizers")
    encoder = tokenizers.Tokenizer.from_file(str(tokenizer))
    encoder.no_truncation()
    # 120 characters or more each: enough for the windows also where a token is a character.
    wanted = count * WINDOW_TOKENS
    passages = texts.calibration_passages(max(64, wanted // 24))
    ids = encoder.encode("\n\n".join(passages), add_special_tokens=False).ids
    return np.resize(np.array(ids, np.int64), (count, WINDOW_TOKENS))


def calibrate(
    model: Path,
    target: Path,
    interpreter: Interpreter,
    settings: Int4Settings,
    *,
    max_error: float,
    step: Step,
) -> Calibrated:
    """Write `model` again with scales folded in; it computes the same, in full precision.

    Args:
        model: Hugging Face folder with float32 safetensors.
        target: Folder to make.
        interpreter: Python with modelopt.
        settings: How many texts.
        max_error: Most that a logit may differ.
        step: Told what is being done.

    Raises:
        ConversionError: modelopt failed, or the scaled model is not the same model.
    """
    tokens = target.parent / f"{target.name}-tokens.npy"
    np.save(tokens, calibration_windows(model / "tokenizer.json", settings.awq.windows))
    job = {"model": str(model), "target": str(target), "tokens": str(tokens), "block": BLOCK}
    last = _run(interpreter.python, job, target.parent / f"{target.name}.log", step)
    if not last.max_error <= max_error:  # NaN too
        raise ConversionError(
            f"With AWQ's scales the model is another one: logits differ by {last.max_error:.3g}",
            fix="Use another int4.algorithm: its architecture is not computed as modelopt thinks",
        )
    return Calibrated(last.scaled, last.unscaled, last.max_error)


def _run(python: str, job: dict[str, object], log: Path, step: Step) -> _Event:
    environment = {**os.environ, **OFFLINE, **FRUGAL, "CUDA_VISIBLE_DEVICES": ""}
    last = _Event(event="")
    with log.open("wb") as said:
        process = subprocess.Popen(
            # Isolated: modules beside the script must not stand in for libraries.
            [python, "-I", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environment,
            cwd=log.parent,
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with process.stdin as stdin:
                stdin.write(json.dumps(job).encode())
            for line in process.stdout:
                last = msgspec.json.decode(line, type=_Event)
                if last.event == "progress":
                    step.tell(last.text)
            status = process.wait()
        except (BrokenPipeError, msgspec.DecodeError):
            status = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if last.event != "done":
        words = last.text if last.event == "failed" else _last_line(log)
        raise ConversionError(
            f"nvidia-modelopt could not scale the model: {words or f'status {status}'}",
            fix="If it was killed, there was not enough memory (1 GB and two layers); "
            "else use another int4.algorithm",
        )
    return last


def _last_line(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")[-2000:].strip()
    return text.rpartition("\n")[2][-300:]


def round_scaled(full: Path, target: Path, settings: Int4Settings) -> Carried:
    """Make a 4-bit folder of the scaled model's full-precision one.

    Matrices of layers are rounded to the nearest of sixteen steps, in blocks of 32; head and
    embedding, which AWQ does not scale, get 8 bits.
    """

    def find(name: str, array: Load) -> Blocks | None:
        return round_to_nearest(array()) if is_layer(name) else None

    return fill_graph(full, target, find, settings)
