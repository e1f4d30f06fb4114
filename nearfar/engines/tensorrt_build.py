"""Build a TensorRT engine, or find out whether that would work, in a process of its own.

TensorRT libraries can crash where there is no driver or too little memory; that is then a result
like any other. See `nearfar.engines.tensorrt_child`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Literal

import msgspec

from nearfar.bundle.manifest import ShapeRange
from nearfar.errors import Cancelled, EngineError

#: An interpreter with TensorRT, where it is not installed beside nearfar.
INTERPRETER_VARIABLE = "NEARFAR_TENSORRT_PYTHON"
#: The real library, and the one that builds without a GPU.
Library = Literal["tensorrt", "tensorrt_rtx"]
Stage = Literal["library", "parse", "profile", "build", "crash", "timeout"]

_CHILD = Path(__file__).with_name("tensorrt_child.py")
_MAX_EVENT_BYTES = 1 << 20
_MAX_SAID_BYTES = 4000


class RawError(msgspec.Struct, frozen=True, kw_only=True):
    """One error as TensorRT told it.

    Attributes:
        text: Its words.
        code: Its kind, such as ``UNSUPPORTED_NODE``.
        node: Name of the graph's node.
        operator: Its operator.
        function: Function of the parser.
    """

    text: str
    code: str = ""
    node: str = ""
    operator: str = ""
    function: str = ""


class TensorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An input or output as TensorRT understood it; `dtype` is TensorRT's own name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_shape: bool = False


class BuildResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it.

    Attributes:
        library: ``tensorrt_rtx 1.7.1.116``; without a version when it could not be loaded.
        stage: Where it ended; `None` when an engine was built.
        errors: Why, in TensorRT's words.
        log: Its log lines, each beginning with ``E`` or ``W``.
        inputs: As TensorRT sees them; empty when it did not parse.
        outputs: Likewise.
        layers: Layers of the parsed network.
        engine_bytes: Size of the engine; 0 when none was built.
        build_s: Seconds of building.
    """

    library: str
    stage: Stage | None = None
    errors: tuple[RawError, ...] = ()
    log: tuple[str, ...] = ()
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    layers: int = 0
    engine_bytes: int = 0
    build_s: float = 0.0

    @property
    def is_built(self) -> bool:
        return self.stage is None


class _Event(msgspec.Struct, kw_only=True):
    """Any line of the child."""

    event: str
    name: str = ""
    version: str = ""
    seconds: float = 0.0
    layers: int = 0
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    phase: str = ""
    step: int = 0
    steps: int = 0
    stage: Stage = "build"
    errors: tuple[RawError, ...] = ()
    log: tuple[str, ...] = ()
    engine_bytes: int = 0


Progress = Callable[[str, int, int], None]


def build(
    model: Path,
    *,
    library: Library,
    profile: Sequence[ShapeRange] = (),
    values: Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]] | None = None,
    engine: Path | None = None,
    timing_cache: Path | None = None,
    workspace_bytes: int = 0,
    optimization_level: int | None = None,
    timeout_s: float = 3600.0,
    interpreter: str | None = None,
    progress: Progress | None = None,
    cancelled: threading.Event | None = None,
) -> BuildResult:
    """Parse a graph, strongly typed, and build an engine of it.

    Args:
        model: ONNX file; data outside it is read from its folder.
        library: Which TensorRT.
        profile: Sizes of every input with a free axis.
        values: Smallest, usual and largest values of inputs that decide about sizes.
        engine: Where the engine is written; `None` throws it away.
        timing_cache: File that remembers how fast kernels were; made when it is not there.
        workspace_bytes: Most scratch memory of one layer; 0 leaves it to TensorRT.
        optimization_level: 0 to 5; `None` leaves it to TensorRT.
        timeout_s: After that many seconds the process is ended.
        interpreter: Python with the library; `None` takes `find_interpreter`.
        progress: Called with phase, step and number of steps.
        cancelled: Ends the process when it is set.

    Returns:
        What came of it: refusals, crashes and timeouts are results too.

    Raises:
        EngineError: The interpreter cannot be started.
        Cancelled: `cancelled` was set.
    """
    ranges: dict[str, dict[str, object]] = {
        one.name: {"shapes": [one.smallest, one.usual, one.largest]} for one in profile
    }
    for name, three in (values or {}).items():
        ranges.setdefault(name, {})["values"] = [list(one) for one in three]
    job = {
        "library": library,
        "model": str(model.resolve()),
        "profiles": [ranges],
        "engine": str(engine) if engine is not None else "",
        "timing_cache": str(timing_cache) if timing_cache is not None else "",
        "workspace_bytes": workspace_bytes,
        "optimization_level": optimization_level,
    }
    command = [interpreter or find_interpreter(), str(_CHILD)]
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A library that forks or prints prompts must not reach our terminal.
            start_new_session=True,
        )
    except OSError as exc:
        raise EngineError(
            f"{command[0]} cannot be started ({exc.strerror})",
            fix=f"Set {INTERPRETER_VARIABLE} to a Python that has {library}",
        ) from exc
    return _Run(child, library, progress).result(
        msgspec.json.encode(job), timeout_s=timeout_s, cancelled=cancelled
    )


def find_interpreter() -> str:
    """The Python that TensorRT is loaded into: that of `INTERPRETER_VARIABLE`, or this one."""
    return os.environ.get(INTERPRETER_VARIABLE) or sys.executable


class _Run:
    """One child, and what it told."""

    def __init__(
        self, child: subprocess.Popen[bytes], library: Library, progress: Progress | None
    ) -> None:
        self._child = child
        self._library: str = library
        self._progress = progress
        self._parsed = _Event(event="parsed")
        self._last: _Event | None = None
        self._said = b""

    def result(
        self, job: bytes, *, timeout_s: float, cancelled: threading.Event | None
    ) -> BuildResult:
        child = self._child
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        readers = [
            threading.Thread(target=self._read_events, args=(child.stdout,), daemon=True),
            threading.Thread(target=self._read_said, args=(child.stderr,), daemon=True),
        ]
        for reader in readers:
            reader.start()
        is_late = False
        try:
            try:
                child.stdin.write(job)
                child.stdin.close()
            except BrokenPipeError:
                pass  # it has died already; its status tells why
            is_late = not self._wait(timeout_s, cancelled)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
            for reader in readers:
                reader.join(timeout=5)
        if cancelled is not None and cancelled.is_set() and self._last is None:
            raise Cancelled("Building the engine was cancelled")
        if is_late and self._last is None:
            return self._ended("timeout", f"it did not finish within {timeout_s:.0f} s")
        if self._last is None:
            said = self._said.decode(errors="replace").strip().rpartition("\n")[2]
            return self._ended("crash", f"{_status(child.returncode)} ({said or 'no last words'})")
        last = self._last
        if last.event == "refused":
            return self._ended(last.stage, *last.errors, log=last.log)
        return BuildResult(
            library=self._library,
            log=last.log,
            inputs=self._parsed.inputs,
            outputs=self._parsed.outputs,
            layers=self._parsed.layers,
            engine_bytes=last.engine_bytes,
            build_s=last.seconds,
        )

    def _wait(self, timeout_s: float, cancelled: threading.Event | None) -> bool:
        """Whether the child ended by itself."""
        if cancelled is None:
            try:
                self._child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return False
            return True
        waited_s = 0.0
        while waited_s < timeout_s:
            if cancelled.is_set():
                return False
            try:
                self._child.wait(0.2)
            except subprocess.TimeoutExpired:
                waited_s += 0.2
            else:
                return True
        return False

    def _ended(
        self, stage: Stage, *errors: str | RawError, log: tuple[str, ...] = ()
    ) -> BuildResult:
        return BuildResult(
            library=self._library,
            stage=stage,
            errors=tuple(RawError(text=one) if isinstance(one, str) else one for one in errors),
            log=log,
            inputs=self._parsed.inputs,
            outputs=self._parsed.outputs,
            layers=self._parsed.layers,
        )

    def _read_events(self, stream: IO[bytes]) -> None:
        decoder = msgspec.json.Decoder(_Event)
        with stream:
            while line := stream.readline(_MAX_EVENT_BYTES):
                try:
                    event = decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    continue  # not ours: something of the library that found its way here
                if event.event == "library":
                    self._library = f"{event.name} {event.version}"
                elif event.event == "parsed":
                    self._parsed = event
                elif event.event == "progress" and self._progress is not None:
                    self._progress(event.phase, event.step, event.steps)
                elif event.event in ("refused", "built"):
                    self._last = event

    def _read_said(self, stream: IO[bytes]) -> None:
        with stream:
            while chunk := stream.read1(4096):  # type: ignore[attr-defined]
                self._said = (self._said + chunk)[-_MAX_SAID_BYTES:]


def _status(code: int) -> str:
    if code >= 0:
        return f"the process that loads TensorRT ended with status {code}"
    return f"the process that loads TensorRT was ended by signal {-code}"
