"""The child of `converters.steps.measure`: a `Job` on stdin, `Measured` on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np

from converters.steps.measure import Job, Measured

#: Enough calls for a 99th percentile to mean something, within about three seconds.
_MAX_CALLS, _MIN_CALLS, _BUDGET_S = 300, 20, 3.0
#: Of the throughput: as many rows as a busy caller sends at once.
_BATCH_ROWS, _BATCH_BUDGET_S = 8, 1.0
_MIN_BATCHES, _MAX_BATCHES = 5, 100
_PROMPT_CALLS = 5
_NEW_TOKENS = 33

#: How an answer's first token is made, and how each further one.
Answer = tuple[Callable[[], None], Callable[[], None]]


def main() -> None:
    """Run one job."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    if not job.prompt_tokens:
        measured = _time_calls(job)
    elif job.engine == "onnxruntime":
        measured = _time_cached(job)
    else:
        measured = _time_generation(job)
    sys.stdout.write(msgspec.json.encode(measured).decode() + "\n")


def _time_calls(job: Job) -> Measured:
    import onnxruntime as ort

    with np.load(job.feeds, allow_pickle=False) as stored:
        feeds = {name: stored[name] for name in stored.files}
    before_bytes = _resident_bytes()
    options = ort.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.log_severity_level = 3
    session = ort.InferenceSession(job.entry, options, providers=["CPUExecutionProvider"])
    wanted = {argument.name for argument in session.get_inputs()}
    feeds = {name: array for name, array in feeds.items() if name in wanted}
    call: Callable[[], Any] = lambda: session.run(None, feeds)  # noqa: E731
    for _ in range(3):
        call()
    times_ms: list[float] = []
    started_s = time.perf_counter()
    while len(times_ms) < _MAX_CALLS:
        if len(times_ms) >= _MIN_CALLS and time.perf_counter() - started_s > _BUDGET_S:
            break
        times_ms.append(_timed_ms(call))
    # Before batches: what they need more is not what a model needs that answers single calls.
    memory_bytes = max(0, _resident_bytes() - before_bytes)
    rows, rows_per_s = _throughput(session, feeds)
    return Measured(
        p50_ms=float(np.percentile(times_ms, 50)),
        p99_ms=float(np.percentile(times_ms, 99)),
        calls=len(times_ms),
        memory_bytes=memory_bytes,
        rows_per_s=rows_per_s,
        batch_rows=rows,
    )


def _throughput(session: Any, feeds: Mapping[str, np.ndarray]) -> tuple[int, float]:
    """Rows of a call, and rows a second; of one row where the model takes no more."""
    many = batch_of(feeds, {one.name: one.shape for one in session.get_inputs()})
    if many is not None:
        try:
            session.run(None, many)
        except Exception:  # noqa: BLE001 (a size that is fixed inside the graph; its errors vary)
            many = None
    rows, chosen = (_BATCH_ROWS, many) if many is not None else (1, dict(feeds))
    started_s = time.perf_counter()
    elapsed_s, calls = 0.0, 0
    while calls < _MIN_BATCHES or (elapsed_s < _BATCH_BUDGET_S and calls < _MAX_BATCHES):
        session.run(None, chosen)
        elapsed_s, calls = time.perf_counter() - started_s, calls + 1
    return rows, calls * rows / elapsed_s


def batch_of(
    feeds: Mapping[str, np.ndarray], shapes: Mapping[str, Any]
) -> dict[str, np.ndarray] | None:
    """The first row of all inputs, `_BATCH_ROWS` times.

    Args:
        feeds: By input.
        shapes: As ONNX Runtime tells them: free axes have a name or none.

    Returns:
        `None` where the first axis of an input is not free, or is another size than the others'.
    """
    if not feeds or any(array.ndim == 0 for array in feeds.values()):
        return None
    if len({len(array) for array in feeds.values()}) > 1:
        return None
    if any(isinstance(shapes[name][0], int) for name in feeds):
        return None
    return {
        name: np.ascontiguousarray(np.repeat(array[:1], _BATCH_ROWS, axis=0))
        for name, array in feeds.items()
    }


def _time_cached(job: Job) -> Measured:
    """As `_time_generation`, with the decoding of nearfar's own engine."""
    from pathlib import Path

    import onnxruntime as ort

    from nearfar.engines.cached_engine import CachedDecoding, CachedModel
    from nearfar.engines.cached_graph import GRAPH
    from nearfar.engines.sampling import Sampler
    from nearfar.generation import GenerationOptions

    before_bytes = _resident_bytes()
    options = ort.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.log_severity_level = 3
    path = Path(job.entry) / GRAPH
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = CachedModel(session, label=path.parent.name)

    def begin() -> Answer:
        decoding = CachedDecoding(model, Sampler(GenerationOptions()))

        def first() -> None:
            decoding.append_tokens(job.prompt_tokens)
            decoding.generate_next_token()

        return first, decoding.generate_next_token

    return _timed(begin, before_bytes, len(job.prompt_tokens))


def _time_generation(job: Job) -> Measured:
    import onnxruntime_genai as og

    before_bytes = _resident_bytes()
    model = og.Model(job.entry)
    prompt = list(job.prompt_tokens)

    def begin() -> Answer:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(
            max_length=len(prompt) + _NEW_TOKENS, min_length=len(prompt) + _NEW_TOKENS,
            do_sample=False,
        )  # fmt: skip
        generator = og.Generator(model, parameters)

        def first() -> None:
            generator.append_tokens(prompt)
            generator.generate_next_token()

        return first, generator.generate_next_token

    return _timed(begin, before_bytes, len(prompt))


def _timed(begin: Callable[[], Answer], before_bytes: int, prompt_tokens: int) -> Measured:
    """Time first tokens, and of two answers the others too."""
    first_ms: list[float] = []
    token_ms: list[float] = []
    for call in range(_PROMPT_CALLS + 1):
        first, following = begin()
        elapsed_ms = _timed_ms(first)
        if call == 0:
            continue  # the first run also allocates
        first_ms.append(elapsed_ms)
        if call <= 2:
            token_ms += [_timed_ms(following) for _ in range(_NEW_TOKENS - 1)]
    return Measured(
        p50_ms=float(np.percentile(first_ms, 50)),
        p99_ms=float(np.percentile(first_ms, 99)),
        calls=len(first_ms),
        memory_bytes=max(0, _resident_bytes() - before_bytes),
        ms_per_token=float(np.median(token_ms)),
        prefill_tokens_per_s=1000.0 * prompt_tokens * len(first_ms) / sum(first_ms),
        decode_tokens_per_s=1000.0 * len(token_ms) / sum(token_ms),
    )


def _timed_ms(call: Callable[[], Any]) -> float:
    started_s = time.perf_counter()
    call()
    return (time.perf_counter() - started_s) * 1000.0


def _resident_bytes() -> int:
    """Resident memory of this process; 0 where the kernel does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


if __name__ == "__main__":
    main()
