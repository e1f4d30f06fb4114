"""The child of `converters.steps.measure`: a `Job` on stdin, `Measured` on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from converters.steps.measure import Job, Measured

#: Enough calls for a 99th percentile to mean something, within about three seconds.
_MAX_CALLS, _MIN_CALLS, _BUDGET_S = 300, 20, 3.0
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
    return Measured(
        p50_ms=float(np.percentile(times_ms, 50)),
        p99_ms=float(np.percentile(times_ms, 99)),
        calls=len(times_ms),
        memory_bytes=max(0, _resident_bytes() - before_bytes),
    )


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

    return _timed(begin, before_bytes)


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

    return _timed(begin, before_bytes)


def _timed(begin: Callable[[], Answer], before_bytes: int) -> Measured:
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
