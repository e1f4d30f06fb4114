"""The obvious baselines: what someone would write who had only the libraries underneath.

Each follows its library's own example. Nothing here knows of nearfar's runtimes or its client.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfar.errors import EngineError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedAnswer:
    """One streamed answer and when it came.

    Attributes:
        text: The answer.
        prompt_tokens: Length of the prompt.
        tokens: Length of the answer.
        ttft_s: From the call to the first text.
        total_s: From the call to the last text.
    """

    text: str
    prompt_tokens: int
    tokens: int
    ttft_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        """Speed as the caller sees it, prefill included."""
        return self.tokens / self.total_s

    @property
    def decode_tokens_per_s(self) -> float:
        """Speed after the first token."""
        return (self.tokens - 1) / (self.total_s - self.ttft_s)


class GenaiLoop:
    """The loop of onnxruntime-genai's examples: greedy, every token decoded as it comes.

    Args:
        folder: Folder with ``genai_config.json``.
        threads: Compute threads; 0 leaves the library's default.

    Raises:
        EngineError: onnxruntime-genai is not installed, or cannot open the folder.
    """

    def __init__(self, folder: Path, *, threads: int = 0) -> None:
        og = _import_genai()
        try:
            config = og.Config(str(folder))
            if threads:
                session_options = {"intra_op_num_threads": threads}
                config.overlay(
                    json.dumps({"model": {"decoder": {"session_options": session_options}}})
                )
            self._model = og.Model(config)
        except RuntimeError as exc:
            raise EngineError(f"onnxruntime-genai cannot open {folder}: {exc}") from exc
        self._encode, self._new_stream = _tokenizer(og, self._model, folder)
        self._og = og

    def generate(self, prompt: str, *, tokens: int) -> TimedAnswer:
        """Continue raw text greedily.

        Args:
            prompt: Raw text.
            tokens: Upper bound of the answer.
        """
        started_s = time.perf_counter()
        prompt_ids = self._encode(prompt)
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=len(prompt_ids) + tokens, do_sample=False)
        generator = self._og.Generator(self._model, params)
        generator.append_tokens(prompt_ids)
        decode = self._new_stream()
        pieces: list[str] = []
        first_s: float | None = None
        while not generator.is_done():
            generator.generate_next_token()
            pieces.append(decode(int(generator.get_next_tokens()[0])) or "")
            if first_s is None:
                first_s = time.perf_counter()
        ended_s = time.perf_counter()
        return TimedAnswer(
            text="".join(pieces),
            prompt_tokens=len(prompt_ids),
            tokens=len(pieces),
            ttft_s=(first_s or ended_s) - started_s,
            total_s=ended_s - started_s,
        )


def _tokenizer(
    og: Any, model: Any, folder: Path
) -> tuple[Callable[[str], Any], Callable[[], Callable[[int], str | None]]]:
    """The library's own tokenizer; where it cannot read the file, `tokenizers`.

    onnxruntime-genai 0.11, the last one for Python 3.10, refuses files of transformers 5.
    """
    try:
        own = og.Tokenizer(model)
    except RuntimeError:
        from tokenizers import Tokenizer
        from tokenizers.decoders import DecodeStream

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

        def new_stream() -> Callable[[int], str | None]:
            stream = DecodeStream(skip_special_tokens=True)
            return lambda token: stream.step(tokenizer, token)

        return lambda text: tokenizer.encode(text).ids, new_stream
    return own.encode, lambda: own.create_stream().decode


class OnnxCall:
    """One ``InferenceSession.run`` with the library's default options.

    Args:
        model: The ONNX file.
        execution_provider: Where it shall run.
        threads: Compute threads; 0 leaves the library's default.
        use_arena: Keep freed memory for reuse, as the library does by default.

    Raises:
        EngineError: onnxruntime is not installed, or cannot open the file.
    """

    def __init__(
        self, model: Path, *, execution_provider: str, threads: int = 0, use_arena: bool = True
    ) -> None:
        try:
            import onnxruntime as ort
        except ImportError as exc:
            raise _missing(exc) from exc
        options = ort.SessionOptions()
        options.enable_cpu_mem_arena = use_arena
        if threads:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(
                str(model), sess_options=options, providers=[execution_provider]
            )
        except Exception as exc:  # its exceptions have no common base but Exception
            raise EngineError(f"onnxruntime cannot open {model}: {exc}") from exc

    def run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run once; outputs in model order."""
        outputs: list[np.ndarray] = self._session.run(None, feeds)
        return outputs


class RunClock:
    """Times every ``InferenceSession.run`` of this process from inside the call around it.

    The difference of two calls of milliseconds cannot show microseconds on a busy machine; the
    time that one call spends outside ONNX Runtime can. Costs well below a microsecond per call.

    Attributes:
        last_ns: How long the last run took.
    """

    def __init__(self) -> None:
        self.last_ns = 0

    def __enter__(self) -> RunClock:
        try:
            import onnxruntime as ort
        except ImportError as exc:
            raise _missing(exc) from exc
        self._owner: Any = ort.InferenceSession
        for method in _RUN_METHODS:
            setattr(self._owner, method, self._timed(getattr(self._owner, method)))
        return self

    def __exit__(self, *exc: object) -> None:
        for method in _RUN_METHODS:
            delattr(self._owner, method)  # the base class has the real one

    def _timed(self, real: Any) -> Any:
        clock = time.perf_counter_ns

        def run(*arguments: Any, **options: Any) -> Any:
            started_ns = clock()
            result = real(*arguments, **options)
            self.last_ns = clock() - started_ns
            return result

        return run


_RUN_METHODS = ("run", "run_with_iobinding")


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a fresh Python cost.

    Attributes:
        wall_s: Time of the statement.
        cpu_s: Processor time of the statement, which other work on the machine disturbs less.
        rss_bytes: Resident memory of the process after it.
    """

    wall_s: float
    cpu_s: float
    rss_bytes: int


_PROBE = """
import time
wall_s, cpu_s = time.perf_counter(), time.process_time()
{statement}
wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
with open("/proc/self/status") as status:
    rss_kib = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
print(wall_s, cpu_s, rss_kib * 1024)
"""


def start_python(statement: str = "pass") -> Start:
    """Run one statement in a fresh Python and say what it cost.

    Raises:
        EngineError: The statement failed.
    """
    # From an empty folder, so that what lies in the current one is never imported by accident.
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE.format(statement=statement)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise EngineError(
            f"A fresh {sys.executable} failed on `{statement}`: {last[0]}",
            fix="Install nearfar into this environment: pip install -e .",
        )
    wall_s, cpu_s, rss_bytes = done.stdout.split()
    return Start(wall_s=float(wall_s), cpu_s=float(cpu_s), rss_bytes=int(rss_bytes))


def _import_genai() -> Any:
    try:
        import onnxruntime_genai
    except ImportError as exc:
        raise _missing(exc) from exc
    return onnxruntime_genai


def _missing(exc: ImportError) -> EngineError:
    return EngineError(
        f"The baseline cannot run: {exc.name} is not installed",
        fix="pip install 'nearfar[edge]'",
    )
