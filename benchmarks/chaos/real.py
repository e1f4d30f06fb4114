"""Real requests while a seeded script breaks the real cloud runtime and the link to it."""

from __future__ import annotations

import gc
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.chaos.alarms import Alarms
from benchmarks.chaos.server import LOG, computations
from benchmarks.emulator import LinkSpec
from benchmarks.processes import OPEN_POLICY, RealCloud, Ticks, wait_until_s
from nearfar.engines.base import SessionOptions
from nearfar.errors import CloudUnavailable, NearfarError
from sdk import Client
from sdk.routing import Mode

Kind = Literal["tensors", "bytes", "text"]
Fault = Literal["kill", "freeze", "reset", "stall", "refuse"]

FAULTS: tuple[Fault, ...] = ("kill", "freeze", "reset", "stall", "refuse")
DEADLINES_MS: dict[Kind, float] = {"tensors": 400.0, "bytes": 250.0, "text": 2500.0}
#: Half of the requests insist on the cloud or prefer it: it is what breaks.
MODES: tuple[Mode, ...] = ("auto", "auto", "prefer_edge", "prefer_cloud", "cloud_only")
TOKENS = 6
ROW_TOKENS = 64
#: What a caller may be late by, beside the delay of the machine itself.
GRACE_MS = 5.0
#: Whoever has not heard anything so long after the deadline never will.
HUNG_S = 10.0
#: Models are loaded with the first request.
WARM_UP_MS = 60_000.0
LINK = LinkSpec(rtt_ms=20.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request: what, when, how."""

    at_s: float
    kind: Kind
    mode: Mode
    rows: int
    deadline_ms: float


@dataclass(slots=True, kw_only=True)
class Told:
    """What the caller heard.

    Attributes:
        ask: The request.
        due_s: Its deadline, `time.monotonic()`.
        ended_s: When the call returned; `None` when it never did.
        error: ``""`` for an answer, else the error's code, or its type where it is none of ours.
        is_typed: Whether it was an answer or an error of ours.
        path: The routes that were taken.
        hedge: What was started beside the first route.
        is_in_order: Whether no token came twice or out of order.
    """

    ask: Ask
    due_s: float
    ended_s: float | None = None
    error: str = ""
    is_typed: bool = True
    path: str = ""
    hedge: str = ""
    is_in_order: bool = True

    @property
    def late_ms(self) -> float:
        return float("inf") if self.ended_s is None else (self.ended_s - self.due_s) * 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A run.

    Attributes:
        told: What each caller heard, in the order of asking.
        faults: How often each was done.
        computed_twice: Request ids that one server process computed more than once.
        computed_again: Request ids that were computed again after the server was killed.
        computed: Computations in the cloud.
        tick_ms: Delays of the machine above 1 ms.
        allowed_ms: By how much each caller may be late, in the order of `told`.
        alarm_ms: How late a thread of the client's process woke that only waited for the deadline
            of each, in the order of `told`; 0 where it did not wake before the end.
    """

    told: Sequence[Told]
    faults: Counter[Fault]
    computed_twice: int
    computed_again: int
    computed: int
    tick_ms: Sequence[float]
    allowed_ms: Sequence[float]
    alarm_ms: Sequence[float]


def asks_of(count: int, rate_s: float, kinds: Sequence[Kind], rng: random.Random) -> list[Ask]:
    """Draw requests that come at random."""
    asks, at_s = [], 0.0
    for _ in range(count):
        at_s += rng.expovariate(rate_s)
        kind = rng.choice(kinds)
        ask = Ask(
            at_s=at_s, kind=kind, mode=rng.choice(MODES), rows=rng.randint(1, 6),
            deadline_ms=DEADLINES_MS[kind],
        )  # fmt: skip
        asks.append(ask)
    return asks


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Which model of a store serves each kind of request; a kind without one is not asked."""

    tensors: str = "minilm"
    bytes: str = "file-type"
    text: str = "assistant"

    def of(self, kind: Kind) -> str:
        name: str = getattr(self, kind)
        return name


@dataclass(slots=True)
class _Saboteur:
    """Breaks things, one after the other, until it is told to stop."""

    cloud: RealCloud
    rng: random.Random
    done: Counter[Fault] = field(default_factory=Counter)

    def run(self, stop: threading.Event) -> None:
        turn: list[Fault] = []
        while not stop.wait(self.rng.uniform(0.5, 2.5)):
            if not turn:  # each of them in every turn, in an order of its own
                turn = list(FAULTS)
                self.rng.shuffle(turn)
            fault = turn.pop()
            self.do(fault, self.rng.uniform(0.2, 2.5), stop)
            self.done[fault] += 1

    def do(self, fault: Fault, for_s: float, stop: threading.Event) -> None:
        process, link = self.cloud.process, self.cloud.link
        if fault == "kill":
            process.kill()
            process.start()  # takes as long as loading the models does
        elif fault == "freeze":
            process.freeze()
            stop.wait(for_s)
            process.thaw()
        elif fault == "stall":
            link.do("stall")
            stop.wait(for_s)
            link.do("resume")
        elif fault == "refuse":
            link.do("refuse")
            link.do("reset")
            stop.wait(for_s)
            link.do("accept")
        else:
            link.do("reset")


class _Caller:
    """Asks one client, each request in a thread of its own."""

    def __init__(self, client: Client, models: Models, seed: int, alarms: Alarms) -> None:
        self._client = client
        self._alarms = alarms
        self._models = models
        rng = np.random.default_rng(seed)
        self._ids = rng.integers(1000, 20_000, (8, ROW_TOKENS))
        self._data = rng.bytes(4096)

    def call(self, ask: Ask) -> Told:
        told = Told(ask=ask, due_s=time.monotonic() + ask.deadline_ms / 1000.0)
        self._alarms.at(told.due_s)
        try:
            self._ask(ask, told)
        except NearfarError as error:
            told.error = error.code
        except BaseException as error:  # noqa: BLE001 (this is what is looked for)
            told.error, told.is_typed = f"{type(error).__name__}: {error}", False
        told.ended_s = time.monotonic()
        return told

    def _ask(self, ask: Ask, told: Told) -> None:
        model = self._models.of(ask.kind)
        common: dict[str, Any] = {"mode": ask.mode, "deadline_ms": ask.deadline_ms}
        if ask.kind == "tensors":
            result = self._client.infer(model, self.feeds(model, ask.rows), **common)
            told.path, told.hedge = result.route.path, result.route.hedge
        elif ask.kind == "bytes":
            label = self._client.classify(model, self._data, **common)
            told.path, told.hedge = label.route.path, label.route.hedge
        else:
            stream = self._client.generate(model, _PROMPT, max_new_tokens=TOKENS, **common)
            indexes = [chunk.index for chunk in stream]
            told.is_in_order = all(a < b for a, b in pairwise(indexes))
            told.path, told.hedge = stream.route.path, stream.route.hedge

    def feeds(self, model: str, rows: int) -> dict[str, np.ndarray]:
        """Inputs of a batch, made of the model's manifest."""
        info = next(info for info in self._client.models() if info.name == model)
        feeds: dict[str, np.ndarray] = {}
        for spec in info.manifest.inputs:
            if spec.datatype == "INT64":
                is_ids = spec.name == "input_ids"
                feeds[spec.name] = (
                    self._ids[:rows] if is_ids
                    else np.full((rows, ROW_TOKENS), int("mask" in spec.name), np.int64)
                )  # fmt: skip
            else:
                feeds[spec.name] = np.ones((rows, spec.shape[1]), np.float32)
        return feeds


_PROMPT = "The tide comes in twice a day, and when it goes out again,"


def run(
    *,
    models: Path,
    requests: int,
    rate_s: float,
    seed: int,
    step: Callable[[], None],
    kinds: Sequence[Kind] = ("tensors", "tensors", "bytes", "text"),
    names: Models = Models(),
) -> Outcome:
    """Let real requests meet real faults.

    Args:
        models: Folder of bundles.
        requests: How many are asked.
        rate_s: How many in a second.
        seed: What requests and faults are drawn from.
        step: Called after each request.
        kinds: What is drawn from for each request.
        names: The models that are asked.

    Raises:
        CloudUnavailable: The cloud does not start, or does not come back after it was killed.
    """
    rng = random.Random(seed)
    asks = asks_of(requests, rate_s, kinds, rng)
    with tempfile.TemporaryDirectory(prefix="nearfar-bench-") as name:
        folder = Path(name)
        log = folder / "computations"
        os.environ[LOG] = str(log)
        cloud = RealCloud(
            folder, models, names=sorted({names.of(kind) for kind in kinds}), link=LINK, threads=1,
            module="benchmarks.chaos.server",
        )  # fmt: skip
        with (
            cloud,
            Client(
                models=models, cloud=cloud.config(), policy=OPEN_POLICY, sensitivity="public",
                edge_options=SessionOptions(threads=1),
            ) as client,
            Alarms() as alarms,
        ):  # fmt: skip
            caller = _Caller(client, names, seed, alarms)
            _warm_up(caller, sorted(set(kinds)))
            # As docs/reference/sdk.md advises apps whose deadlines are tight.
            gc.collect()
            gc.freeze()
            with Ticks() as ticks:
                told, faults = _ask_all(caller, asks, cloud, rng, step)
            gc.unfreeze()
        counts = computations(log)
    lives: Counter[str] = Counter(request_id for _, request_id in counts)
    return Outcome(
        told=told,
        faults=faults,
        computed_twice=sum(count > 1 for count in counts.values()),
        computed_again=sum(count > 1 for count in lives.values()),
        computed=sum(counts.values()),
        tick_ms=ticks.late_ms,
        allowed_ms=[
            GRACE_MS + ticks.longest_ms(one.due_s, one.ended_s or one.due_s + HUNG_S)
            for one in told
        ],
        alarm_ms=[alarms.late_ms(one.due_s) or 0.0 for one in told],
    )  # fmt: skip


def _warm_up(caller: _Caller, kinds: Sequence[Kind]) -> None:
    """Load the models on both sides and let the router see them."""
    modes: tuple[Mode, ...] = ("edge_only", "cloud_only")
    for kind in kinds:
        for mode in modes * 3:
            ask = Ask(at_s=0.0, kind=kind, mode=mode, rows=3, deadline_ms=WARM_UP_MS)
            told = caller.call(ask)
            if told.error:
                raise CloudUnavailable(
                    f"{mode} did not answer {kind} before anything was broken: {told.error}",
                    fix="Try again on a machine that is less busy",
                )


def _ask_all(
    caller: _Caller,
    asks: Sequence[Ask],
    cloud: RealCloud,
    rng: random.Random,
    step: Callable[[], None],
) -> tuple[list[Told], Counter[Fault]]:
    told: list[Told | None] = [None] * len(asks)
    saboteur = _Saboteur(cloud, rng)
    stop = threading.Event()
    failures: list[BaseException] = []

    def sabotage() -> None:
        try:
            saboteur.run(stop)
        except BaseException as error:  # noqa: BLE001 (raised below, in the caller's thread)
            failures.append(error)

    def ask(index: int) -> None:
        told[index] = caller.call(asks[index])
        step()

    breaking = threading.Thread(target=sabotage, name="saboteur")
    breaking.start()
    threads = []
    begin_s = time.monotonic()
    try:
        for index, one in enumerate(asks):
            wait_until_s(begin_s + one.at_s)
            thread = threading.Thread(target=ask, args=(index,), daemon=True)
            thread.start()
            threads.append(thread)
        give_up_s = time.monotonic() + max(one.deadline_ms for one in asks) / 1000.0 + HUNG_S
        for thread in threads:
            thread.join(max(0.0, give_up_s - time.monotonic()))
    finally:
        stop.set()
        breaking.join()
    if failures:
        raise failures[0]
    for index, heard in enumerate(told):
        if heard is None:  # hung
            due_s = begin_s + asks[index].at_s + asks[index].deadline_ms / 1000.0
            told[index] = Told(ask=asks[index], due_s=due_s)
    return [heard for heard in told if heard is not None], saboteur.done
