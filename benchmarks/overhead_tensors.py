"""`infer`, `classify` and `embed` on the device, against a bare ONNX Runtime call.

What a call costs around the model is the part that was not spent in its own
``InferenceSession.run``: exact to a microsecond, also on a busy machine, and with the caches as a
real model leaves them. Blocks of bare calls take turns with the client's, and what the client's
calls cost more around the model than the bare calls of the same round is what nearfar adds. The
difference of the whole calls is shown as well, without a bar: on a busy machine it drowns in the
noise of the model itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.baselines import OnnxCall, RunClock
from benchmarks.harness import (
    Figure,
    Run,
    interleave,
    per_round,
    quantile,
)
from benchmarks.subjects import Begin, Part, Settings, Subject
from edge_runtime import EdgeRuntime
from nearfar.bundle import BundleStore
from nearfar.bundle.manifest import HeadTailPreprocessing, TextPreprocessing
from nearfar.engines.base import SessionOptions
from nearfar.errors import EngineError, InvalidInput
from nearfar.tensors import NUMPY_OF
from sdk import Client

if TYPE_CHECKING:
    from sdk.results import InferResult

MAX_INFER_ADDED_US = 100.0

SENTENCE = "The nearest place that policy allows and the deadline needs."

#: One block of calls takes about this long: many calls for a median, yet short against the
#: disturbances that interleaving is to spread over all sides.
_BLOCK_S = 0.1
_MIN_CALLS, _MAX_CALLS = 8, 500
#: A deadline that no call meets the end of.
_AMPLE_MS = 60_000.0
#: At the start of a block, the other session's threads still spin and its weights fill the cache.
_SETTLING_CALLS = 3
#: Blocks for each of `Settings.rounds`: they are far shorter than an LLM answer.
_BLOCKS_PER_ROUND = 4


class Blocks:
    """Times blocks of calls.

    Args:
        call: What is timed; it leads to one ``InferenceSession.run``.
        calls: How many make a block.
        inside: Times the run within the call.

    Attributes:
        calls_us: Every call of all blocks.
        outside_us: For each block, the median of what its calls spent outside the run.
    """

    def __init__(self, call: Callable[[], object], *, calls: int, inside: RunClock) -> None:
        self._call = call
        self._calls = calls
        self._inside = inside
        self.calls_us: list[float] = []
        self.outside_us: list[float] = []

    def __call__(self) -> float:
        """Run one block; its median in microseconds."""
        call, inside, clock = self._call, self._inside, time.perf_counter_ns
        for _ in range(_SETTLING_CALLS):
            call()
        whole_us, outside_us = [], []
        for _ in range(self._calls):
            started_ns = clock()
            call()
            took_ns = clock() - started_ns
            whole_us.append(took_ns / 1e3)
            outside_us.append((took_ns - inside.last_ns) / 1e3)
        self.calls_us += whole_us
        self.outside_us.append(quantile(sorted(outside_us), 0.5))
        return quantile(sorted(whole_us), 0.5)


def measure_tensors(
    client: Client, subject: Subject, settings: Settings, run: Run, begin: Begin
) -> Part:
    """What `infer` adds, and what an app calls on this model."""
    name = subject.name
    feeds, whole = _input(client, subject)
    options = SessionOptions(threads=settings.threads)
    with (
        RunClock() as inside,
        EdgeRuntime(BundleStore(settings.models), options=options) as runtime,
    ):
        result = client.infer(name, feeds)
        bare = OnnxCall(
            subject.entry,
            execution_provider=result.execution_provider,
            threads=settings.threads,
        )
        same_outputs(subject, bare.run(feeds), result)
        calls = _calls_per_block(lambda: bare.run(feeds))
        method = "classify" if subject.bundle.manifest.task == "classification" else "embed"
        sides = {
            "bare": Blocks(lambda: bare.run(feeds), calls=calls, inside=inside),
            "runtime": Blocks(lambda: runtime.infer(name, feeds), calls=calls, inside=inside),
            "infer": Blocks(lambda: client.infer(name, feeds), calls=calls, inside=inside),
            # A deadline makes the decision depend on the moment, so it is made for every call.
            "decided": Blocks(
                lambda: client.infer(name, feeds, deadline_ms=_AMPLE_MS), calls=calls, inside=inside
            ),
            method: Blocks(whole, calls=calls, inside=inside),
        }
        rounds = settings.rounds * _BLOCKS_PER_ROUND
        step = begin(f"{name}: single calls", rounds)
        medians = interleave(sides, rounds=rounds, random=run.random, on_round=step)
        decisions_us = [_timed_us(lambda: client.explain(name, feeds=feeds)) for _ in range(2000)]

    def added(what: str, side: str) -> Figure:
        return Figure.of_rounds(
            f"{name}: {what} (p50)",
            "µs",
            per_round(
                lambda ours, bare: ours - bare, sides[side].outside_us, sides["bare"].outside_us
            ),
        )

    infer = added("infer adds", "infer")
    return Part(
        (infer.bar(MAX_INFER_ADDED_US, "at_most"),),
        (
            infer,
            added("infer with a deadline adds", "decided"),
            added("runtime adds, without the client", "runtime"),
            added(f"{method} adds, with preprocessing", method),
            Figure.of_rounds(
                f"{name}: bare call around the model (p50)", "µs", sides["bare"].outside_us
            ),
            Figure.of_rounds(
                f"{name}: infer − bare call, interleaved",
                "µs",
                per_round(lambda ours, bare: ours - bare, medians["infer"], medians["bare"]),
            ),
            Figure.of_calls(f"{name}: a decision, one after the other", "µs", decisions_us),
            Figure.of_calls(f"{name}: bare call", "µs", sides["bare"].calls_us),
            Figure.of_calls(f"{name}: infer", "µs", sides["infer"].calls_us),
            Figure.of_calls(f"{name}: {method}", "µs", sides[method].calls_us),
        ),
    )


def same_outputs(subject: Subject, bare: list[np.ndarray], ours: InferResult) -> None:
    """Refuse to compare the speeds of different work.

    Raises:
        EngineError: The outputs differ.
    """
    for (output, array), other in zip(ours.outputs.items(), bare, strict=True):
        if array.shape != other.shape or not np.allclose(array, other, rtol=1e-3, atol=1e-4):
            raise EngineError(
                f"The two sides gave different outputs {output!r} of {subject.name!r}",
                fix="Check the bundle: nearfar bundle verify DIR",
            )


def _input(client: Client, subject: Subject) -> tuple[Mapping[str, np.ndarray], Callable[[], Any]]:
    """Real tensors for `infer`, and the call that makes the same ones from what an app has."""
    bundle, name = subject.bundle, subject.name
    spec = bundle.manifest.preprocessing
    if isinstance(spec, HeadTailPreprocessing):
        from nearfar.processing import head_tail

        data = Path(__file__).read_bytes()
        (tensor,) = bundle.manifest.inputs
        row = head_tail.features(data, spec).astype(NUMPY_OF[tensor.datatype])
        feeds = {tensor.name: row[np.newaxis]}
        return feeds, lambda: client.classify(name, data)
    if isinstance(spec, TextPreprocessing):
        from nearfar.processing import text

        encoder = text.TextEncoder(bundle.shared_file(spec.tokenizer), spec)
        encoded = encoder([SENTENCE])
        wanted = {tensor.name for tensor in bundle.manifest.inputs}
        feeds = {key: array for key, array in encoded.items() if key in wanted}
        if bundle.manifest.task == "classification":
            return feeds, lambda: client.classify(name, SENTENCE)
        return feeds, lambda: client.embed(name, [SENTENCE])
    raise InvalidInput(
        f"Model {name!r} says nothing about preprocessing, so `classify` and `embed` cannot be "
        "measured on it",
        field="--models",
        fix="Use the models of `nearfar quickstart`",
    )


def _timed_us(call: Callable[[], object]) -> float:
    started_ns = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started_ns) / 1e3


def _calls_per_block(call: Callable[[], object]) -> int:
    for _ in range(_SETTLING_CALLS):
        call()
    started_s = time.perf_counter()
    for _ in range(_MIN_CALLS):
        call()
    each_s = (time.perf_counter() - started_s) / _MIN_CALLS
    return min(_MAX_CALLS, max(_MIN_CALLS, math.ceil(_BLOCK_S / each_s)))
