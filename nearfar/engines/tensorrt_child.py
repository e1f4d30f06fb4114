"""The child that parses an ONNX graph and builds an engine with TensorRT's Python API.

TensorRT libraries can end the process they are loaded into: without a driver, out of memory, by an
assertion of theirs. So they are only ever loaded here. The file is run by path, with an interpreter
that may have TensorRT and nothing else: it imports the standard library only.

A job comes as JSON on stdin (`tensorrt_build.Job`); events go to stdout, one JSON object a line:
``library``, ``parsed``, ``progress``, and last ``refused`` or ``built``. What TensorRT itself
prints is sent to stderr. The same calls exist in TensorRT 10, TensorRT 11 and TensorRT RTX.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from typing import Any

#: Log lines that are kept; a refusal needs the first few.
_MAX_LINES = 50
_MAX_LINE = 2000


def main() -> int:
    """Run one job."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # TensorRT's own prints must not mix with the events

    def emit(event: str, **fields: Any) -> None:
        events.write(json.dumps({"event": event, **fields}) + "\n")

    job = json.load(sys.stdin)
    try:
        trt = importlib.import_module(job["library"])
    except (ImportError, OSError) as exc:
        emit("refused", stage="library", errors=[{"text": str(exc)}], log=[])
        return 0
    emit("library", name=job["library"], version=str(trt.__version__))
    if not hasattr(trt, "NetworkDefinitionCreationFlag") or not (
        hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") or _major(trt) >= 11
    ):
        emit(
            "refused",
            stage="library",
            errors=[{"text": f"TensorRT {trt.__version__} has no strongly typed networks"}],
            log=[],
        )
        return 0
    log: list[str] = []
    try:
        _build(trt, job, _logger(trt, log), log, emit)
    except Exception as exc:  # noqa: BLE001 (the bindings raise plain exceptions of every kind)
        emit("refused", stage="build", errors=[{"text": f"{type(exc).__name__}: {exc}"}], log=log)
    return 0


def _major(trt: Any) -> int:
    first = str(trt.__version__).partition(".")[0]
    # TensorRT RTX counts on its own; its 1.x has all of this.
    return 11 if trt.__name__ == "tensorrt_rtx" else int(first) if first.isdigit() else 0


def _build(trt: Any, job: dict[str, Any], logger: Any, log: list[str], emit: Any) -> None:
    started_s = time.monotonic()
    builder = trt.Builder(logger)
    # Always on since TensorRT 11, where the flag may be gone.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["model"]):
        errors = [_error(parser.get_error(index)) for index in range(parser.num_errors)]
        emit("refused", stage="parse", errors=errors, log=log)
        return
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    emit(
        "parsed",
        seconds=time.monotonic() - started_s,
        layers=network.num_layers,
        inputs=[_described(tensor) for tensor in inputs],
        outputs=[_described(network.get_output(index)) for index in range(network.num_outputs)],
    )
    config = builder.create_builder_config()
    if job.get("workspace_bytes"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace_bytes"])
    if job.get("optimization_level") is not None:
        config.builder_optimization_level = job["optimization_level"]
    missing = _add_profiles(builder, config, inputs, job.get("profiles") or [])
    if missing:
        emit("refused", stage="profile", errors=[{"text": text} for text in missing], log=log)
        return
    timing = job.get("timing_cache") or ""
    if timing:
        config.set_timing_cache(config.create_timing_cache(_read(timing)), False)
    monitor = _monitor(trt, emit)  # kept: TensorRT only points to it
    config.progress_monitor = monitor
    started_s = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        emit("refused", stage="build", errors=[{"text": line} for line in _errors(log)], log=log)
        return
    view = memoryview(plan)
    if job.get("engine"):
        with open(job["engine"], "wb") as file:
            file.write(view)
            file.flush()
            os.fsync(file.fileno())
    if timing:
        cache = config.get_timing_cache()
        if cache is not None:
            _replace(timing, bytes(cache.serialize()))
    emit("built", seconds=time.monotonic() - started_s, engine_bytes=view.nbytes, log=log)


def _add_profiles(
    builder: Any, config: Any, inputs: list[Any], profiles: list[dict[str, Any]]
) -> list[str]:
    """Add every profile; returns what is missing, in words."""
    missing = []
    for stated in profiles or [{}]:
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            ranges = stated.get(tensor.name)
            if tensor.is_shape_tensor:
                if ranges is None or "values" not in ranges:
                    missing.append(f"shape input {tensor.name!r} has no range of values")
                    continue
                profile.set_shape_input(tensor.name, *ranges["values"])
            elif -1 in tuple(tensor.shape):
                if ranges is None or "shapes" not in ranges:
                    missing.append(
                        f"input {tensor.name!r} of shape {list(tensor.shape)} has no range of sizes"
                    )
                    continue
                profile.set_shape(tensor.name, *[tuple(shape) for shape in ranges["shapes"]])
        if not missing:
            config.add_optimization_profile(profile)
    return missing


def _logger(trt: Any, log: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING and len(log) < _MAX_LINES:
                kind = "E" if severity <= trt.ILogger.Severity.ERROR else "W"
                log.append(f"{kind} {text[:_MAX_LINE]}")

    return Logger()


def _monitor(trt: Any, emit: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells what is done. Called from TensorRT's threads, one at a time for a phase."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps
            emit("progress", phase=phase, step=0, steps=steps)

        def step_complete(self, phase: str, step: int) -> bool:
            emit("progress", phase=phase, step=step + 1, steps=self._steps.get(phase, 0))
            return True

        def phase_finish(self, phase: str) -> None:
            steps = self._steps.pop(phase, 0)
            emit("progress", phase=phase, step=steps, steps=steps)

    return Monitor()


def _error(error: Any) -> dict[str, Any]:
    def told(name: str) -> str:
        # Not every release tells node and operator.
        return str(getattr(error, name, str)() or "")

    return {
        "code": told("code").rpartition(".")[2],
        "node": told("node_name"),
        "operator": told("node_operator"),
        "text": told("desc")[:_MAX_LINE],
        "function": told("func"),
    }


def _errors(log: list[str]) -> list[str]:
    return [line[2:] for line in log if line.startswith("E ")] or ["it does not say why"]


def _described(tensor: Any) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": str(tensor.dtype).rpartition(".")[2],
        "shape": list(tensor.shape),
        "is_shape": bool(tensor.is_shape_tensor),
    }


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def _replace(path: str, data: bytes) -> None:
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


if __name__ == "__main__":
    # The folder of this file holds modules that have nothing to say here.
    sys.path.pop(0)
    sys.exit(main())
