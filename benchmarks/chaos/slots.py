"""How soon a cancelled answer gives its slot back, and how soon a frozen server is noticed.

Both on real models: text generation for the slots, because one of its calls takes seconds.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.chaos.real import LINK, ROW_TOKENS
from benchmarks.processes import OPEN_POLICY, RealCloud, wait_until_s
from edge_runtime import EdgeRuntime
from nearfar.bundle import BundleStore
from nearfar.errors import NearfarError
from nearfar.generation import GenerationOptions, Prompt
from sdk import Client
from sdk.routing import Prediction

#: What the cancelled answer is doing: reading a long prompt, or writing.
PHASES = ("prompt", "answer")
_LONG_PROMPT = "The tide comes in twice a day, and twice a day it goes out again. " * 24
_SHORT_PROMPT = "The tide"
_ANSWER_TOKENS = 64
#: Into the phase; the next cancellation comes a little later, so that all parts of a step are met.
_FIRST_S, _LATER_S = 0.25, 0.013
_PATIENCE_S = 60.0


@dataclass(slots=True)
class Slots:
    """Milliseconds from the decision to cancel to a free slot, one for each round."""

    edge: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    cloud: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})


@dataclass(slots=True)
class Stalls:
    """Milliseconds from the call to the moment at which a frozen server was noticed.

    That is when another route was started, or the circuit breaker told.

    Attributes:
        warm: After a few answers. Beyond the time that 99 of 100 answers take.
        cold: Before the first answer.
    """

    warm: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)


def free_edge_slots(models: Path, model: str, rounds: int, step: Callable[[], None]) -> Slots:
    """Cancel answers of this device.

    Args:
        models: Folder of bundles.
        model: A text generation model.
        rounds: Of each phase.
        step: Called after each.
    """
    slots = Slots()
    with EdgeRuntime(BundleStore(models)) as runtime:
        runtime.warm_up(model)
        for number in range(rounds):
            for phase in PHASES:
                slots.edge[phase].append(_free_edge_slot(runtime, model, phase, number))
                step()
    return slots


def _free_edge_slot(runtime: EdgeRuntime, model: str, phase: str, number: int) -> float:
    prompt = _LONG_PROMPT if phase == "prompt" else _SHORT_PROMPT
    generation = runtime.generate(
        model, Prompt(text=prompt), GenerationOptions(max_new_tokens=_ANSWER_TOKENS)
    )
    begun = threading.Event()

    def read() -> None:
        if phase == "prompt":
            begun.set()
        with contextlib.suppress(NearfarError):
            for _ in generation:
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait(_PATIENCE_S)
    cancel_s = time.monotonic() + _FIRST_S + number * _LATER_S
    wait_until_s(cancel_s)  # the engine may hold the interpreter beyond it: that counts
    generation.close()
    while runtime.state(model).running:
        time.sleep(0.0005)
    freed_s = time.monotonic()
    reader.join()
    return (freed_s - cancel_s) * 1000.0


@contextlib.contextmanager
def world(models: Path, names: tuple[str, ...]) -> Iterator[RealCloud]:
    """A real cloud runtime behind a link of 20 ms."""
    with (
        tempfile.TemporaryDirectory(prefix="nearfar-bench-") as folder,
        RealCloud(Path(folder), models, names=names, link=LINK) as cloud,
    ):
        yield cloud


def free_cloud_slots(
    cloud: RealCloud, model: str, rounds: int, slots: Slots, step: Callable[[], None]
) -> None:
    """Cancel answers of a real server, and have the next request take the slot.

    What that one waits longer for its first token than on an idle server is the time that the slot
    was still held; the server's own loop is part of it.
    """
    with Client(
        cloud=cloud.config(), policy=OPEN_POLICY, sensitivity="public", edge=False
    ) as client:

        def first_token_ms() -> float:
            stream = client.generate(model, _SHORT_PROMPT, max_new_tokens=1)
            stream.text()
            return stream.timings.total_ms

        for _ in range(3):
            first_token_ms()
        idle_ms = median(first_token_ms() for _ in range(max(5, rounds)))
        for number in range(rounds):
            for phase in PHASES:
                prompt = _LONG_PROMPT if phase == "prompt" else _SHORT_PROMPT
                stream = client.generate(model, prompt, max_new_tokens=_ANSWER_TOKENS)
                if phase == "answer":
                    next(stream)
                wait_until_s(time.monotonic() + _FIRST_S + number * _LATER_S)
                stream.close()
                slots.cloud[phase].append(max(0.0, first_token_ms() - idle_ms))
                step()


def notice_stalls(
    cloud: RealCloud, models: Path, model: str, rounds: int, step: Callable[[], None]
) -> Stalls:
    """Freeze a real server (SIGSTOP), ask it, and see when that is noticed.

    Args:
        cloud: The server.
        models: Folder of bundles for the device.
        model: A model that takes token ids, on both routes.
        rounds: Warm, and cold.
        step: Called after each.
    """
    stalls = Stalls()
    ids = np.ones((2, ROW_TOKENS), np.int64)
    feeds = {"input_ids": ids, "attention_mask": ids, "token_type_ids": 0 * ids}
    for _ in range(rounds):
        for is_warm in (True, False):
            with Client(
                cloud=cloud.config(), models=models, policy=OPEN_POLICY, sensitivity="public"
            ) as client:
                client.warm_up(model)
                if is_warm:
                    for _ in range(12):
                        client.infer(model, feeds, mode="cloud_only")
                        client.infer(model, feeds, mode="edge_only")
                (stalls.warm if is_warm else stalls.cold).append(
                    _notice(client, cloud, lambda: client.infer(model, feeds, mode="prefer_cloud"))
                )
                step()
    return stalls


def _notice(client: Client, cloud: RealCloud, call: Callable[[], object]) -> float:
    """Milliseconds until the client noticed; beyond the usual time where it knows one."""
    core, breaker = client._core, client._known.breaker
    before = core.hedging.started
    usual: list[float] = []
    record, core.record = (
        core.record,
        lambda decision: usual.append(_usual_ms(decision.inputs.cloud.prediction)),
    )
    cloud.process.freeze()
    done = threading.Event()

    def ask() -> None:
        with contextlib.suppress(NearfarError):
            call()
        done.set()

    caller = threading.Thread(target=ask)
    began_s = time.monotonic()
    caller.start()
    try:
        while core.hedging.started == before and not breaker.failures and not done.is_set():
            time.sleep(0.001)
        noticed_ms = (time.monotonic() - began_s) * 1000.0
    finally:
        cloud.process.thaw()
        caller.join(_PATIENCE_S)
        core.record = record
    return noticed_ms - (usual[0] if usual else 0.0)


def _usual_ms(prediction: Prediction) -> float:
    known = prediction.first_answer()
    return known[4] if known is not None and prediction.basis == "measured" else 0.0
