"""Measure speed and memory of a variant in a process of its own, where nothing else is loaded."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from nearfar.bundle.manifest import LatencyFigure
from nearfar.errors import ConversionError

_TIMEOUT_S = 600.0


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What the child shall time.

    Attributes:
        engine: ``onnxruntime`` or ``onnxruntime-genai``.
        entry: The file or folder.
        threads: Compute threads.
        feeds: ``.npz`` with the inputs of one call, for ``onnxruntime``.
        prompt_tokens: The prompt, for language models; then the entry is a folder.
    """

    engine: str
    entry: str
    threads: int
    feeds: str = ""
    prompt_tokens: tuple[int, ...] = ()


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What it found; durations in milliseconds."""

    p50_ms: float
    p99_ms: float
    calls: int
    memory_bytes: int
    ms_per_token: float | None = None
    rows_per_s: float | None = None
    batch_rows: int | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None


def measure(
    engine: str,
    entry: Path,
    *,
    feeds: Mapping[str, np.ndarray] | None = None,
    prompt_tokens: Sequence[int] = (),
    input_tokens: int | None = None,
) -> tuple[LatencyFigure, int]:
    """Time one variant on this machine's CPU.

    Args:
        engine: Name of the engine.
        entry: The file or folder it opens.
        feeds: Inputs of one call, for ``onnxruntime``.
        prompt_tokens: Prompt to continue, for language models; then the entry is a folder.
        input_tokens: Length of the timed input, where it is text.

    Returns:
        The figure for the manifest, and the resident memory in bytes while loaded.

    Raises:
        ConversionError: The variant does not run.
    """
    from nearfar.engines.devices import physical_cores, probe

    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "feeds.npz"
        if feeds is not None:
            np.savez(arrays, **dict(feeds))  # type: ignore[arg-type]
        job = Job(
            engine=engine,
            entry=str(entry),
            threads=physical_cores(),
            feeds=str(arrays) if feeds is not None else "",
            prompt_tokens=tuple(prompt_tokens),
        )
        measured = _run(job)
    figure = LatencyFigure(
        machine=probe().machine,
        execution_provider="CPUExecutionProvider",
        p50_ms=measured.p50_ms,
        p99_ms=measured.p99_ms,
        calls=measured.calls,
        ms_per_token=measured.ms_per_token,
        input_tokens=len(prompt_tokens) or input_tokens,
        rows_per_s=measured.rows_per_s,
        batch_rows=measured.batch_rows,
        prefill_tokens_per_s=measured.prefill_tokens_per_s,
        decode_tokens_per_s=measured.decode_tokens_per_s,
    )
    return figure, measured.memory_bytes


def _run(job: Job) -> Measured:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "converters.steps.measure_process"],
            input=msgspec.json.encode(job),
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise ConversionError(
            f"Measuring took longer than {_TIMEOUT_S:.0f} s", fix="Skip it with --no-measure"
        ) from exc
    last = done.stdout.strip().rpartition(b"\n")[2]
    try:
        return msgspec.json.decode(last, type=Measured)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ConversionError(
            f"The converted model does not run: the measuring process ended with status "
            f"{done.returncode} ({said or 'it said nothing'})",
            fix="Check the versions of the engines; --no-measure skips this step",
        ) from exc
