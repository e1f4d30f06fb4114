"""How soon engines that hang on the device, and servers that fall silent, are noticed.

The device hangs in a real blocking call: the engine's thread reads from a pipe into which nobody
writes, with Python's lock released, and heeds no cancellation. The server is stopped (SIGSTOP).
Everything else is what an app has: a real client, a real runtime, a real server behind a link.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos.real import ROW_TOKENS, Models
from benchmarks.processes import OPEN_POLICY, RealCloud
from edge_runtime import Stall
from nearfar.engines.base import CancelToken
from nearfar.engines.model import LoadedModel
from nearfar.errors import NearfarError
from nearfar.generation import GenerationChunk
from sdk import Client
from sdk.stalls import PAUSE_MARGIN_MS, pause_limit_s

#: Where it hangs.
PHASES = ("batch", "prompt", "answer")
#: Answers that make a route known.
_BATCHES, _TEXTS = 12, 4
_TOKENS, _CUT_AFTER = 12, 4
_PROMPT = "The tide"
_PATIENCE_S = 60.0
#: Honest work while so many processes take the processors: none of it is a stall.
_BUSY_PROCESSES, _BUSY_CALLS = 4, 20


@dataclass(slots=True)
class Wedges:
    """What was seen.

    Attributes:
        noticed: (route, phase, "warm" | "cold") to milliseconds from the silence to its being
            noticed; beyond what was expected where that was measured.
        answered: What became of the requests, by route and phase: the path, or the error's code.
        wrong: Answers with a token lost, twice or out of order, or with no mark at the handover.
        closed_ms: How long closing a client took whose engine hung.
        false_alarms: Stalls noticed while honest work was slow.
        honest: Calls that were.
    """

    noticed: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    answered: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    closed_ms: list[float] = field(default_factory=list)
    false_alarms: int = 0
    honest: int = 0

    def add(self, route: str, phase: str, warmth: str, noticed_ms: float) -> None:
        self.noticed.setdefault((route, phase, warmth), []).append(noticed_ms)


class _Wedge:
    """Stands where an engine stands, and hangs when it is told to."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._reading, self._writing = os.pipe()
        self.phase = ""
        self.began_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def _hang(self, phase: str) -> None:
        if self.phase == phase:
            self.began_s = self.began_s or time.monotonic()
            os.read(self._reading, 1)

    def infer(
        self, feeds: Mapping[str, np.ndarray], cancel: CancelToken | None = None
    ) -> dict[str, np.ndarray]:
        self._hang("batch")
        outputs: dict[str, np.ndarray] = self._engine.infer(feeds, cancel)
        return outputs

    def generate(self, *arguments: Any, **options: Any) -> Generator[GenerationChunk, None, None]:
        pieces = self._engine.generate(*arguments, **options)

        def run() -> Generator[GenerationChunk, None, None]:
            self._hang("prompt")
            for piece in pieces:
                if piece.index == _CUT_AFTER:
                    self._hang("answer")
                yield piece

        return run()

    def release(self) -> None:
        """Let everybody go who hangs."""
        self.phase = ""
        os.write(self._writing, b"0" * 64)

    @classmethod
    def put_into(cls, client: Client, model: str) -> _Wedge:
        """Have a loaded model hang on command."""
        assert client._edge is not None
        loaded = client._edge.runtime._hosted[model, None].loaded
        assert isinstance(loaded, LoadedModel)
        wedge = cls(loaded.engine)
        loaded.engine = wedge
        if loaded._tensors is not None:
            loaded._tensors = wedge
        else:
            loaded._text = wedge
        return wedge


def hang_device(
    cloud: RealCloud, models: Path, names: Models, rounds: int, found: Wedges,
    step: Callable[[], None],
) -> None:  # fmt: skip
    """Have the device's engine hang in a batch, in a prompt and in an answer.

    Args:
        cloud: A server that has the models too.
        models: Folder of bundles.
        names: Which of them are asked.
        rounds: Of each phase, warm and cold.
        found: What was seen is added to it.
        step: Called after each.
    """
    for _ in range(rounds):
        for phase in PHASES:
            for warmth in ("warm", "cold"):
                _hang_once(cloud, models, names, phase, warmth, found)
                step()


def _hang_once(
    cloud: RealCloud, models: Path, names: Models, phase: str, warmth: str, found: Wedges
) -> None:
    model = names.tensors if phase == "batch" else names.text
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(_client(cloud, models))
        client.warm_up(model)
        ask = _batch(client, model) if phase == "batch" else _text(client, model, found)
        if warmth == "warm":
            for mode in ("edge_only", "cloud_only"):
                for _ in range(_BATCHES if phase == "batch" else _TEXTS):
                    ask(mode)
        assert client._edge is not None
        limits: list[float] = []
        stalls: list[tuple[float, Stall]] = []
        client._edge.on_stall.append(lambda stall: stalls.append((time.monotonic(), stall)))
        client._core.record = lambda decision: limits.append(
            _usual_ms(client, phase, warmth, model)
        )
        wedge = _Wedge.put_into(client, model)
        wedge.phase = phase
        path = ask("prefer_edge")
        found.answered[f"device, {phase}: {path}"] += 1
        if stalls:
            silent_ms = (stalls[0][0] - wedge.began_s) * 1000.0
            found.add("device", phase, warmth, silent_ms - limits[0])
        else:
            found.add("device", phase, warmth, float("inf"))
        began_s = time.monotonic()
        stack.close()
        found.closed_ms.append((time.monotonic() - began_s) * 1000.0)
        wedge.release()


def _usual_ms(client: Client, phase: str, warmth: str, model: str) -> float:
    """What 99 of 100 stay within, where that was measured."""
    if warmth == "cold":
        return 0.0
    request = _request(client, phase, model)
    first, pause = client._known.predictor.silences(
        "edge", model, client._known.size(request), now_s=time.monotonic()
    )
    known = pause if phase == "answer" else first
    return known[0][4] if known is not None and known[1] else 0.0


def _request(client: Client, phase: str, model: str) -> Any:
    if phase == "batch":
        return client._infer_request(model, _feeds(), {})
    from sdk import requests

    return client._generate_request(
        model, requests.text_prompt(_PROMPT), {"max_new_tokens": _TOKENS}
    )


def silence_cloud(
    cloud: RealCloud, models: Path, names: Models, rounds: int, found: Wedges,
    step: Callable[[], None],
) -> None:  # fmt: skip
    """Stop the server before the first token, and in the middle of an answer.

    Arguments as `hang_device`.
    """
    for _ in range(rounds):
        for phase in ("prompt", "answer"):
            for warmth in ("warm", "cold"):
                with _client(cloud, models) as client:
                    client.warm_up(names.text)
                    _text(client, names.text, found)("edge_only")
                    if warmth == "warm":
                        for _ in range(_TEXTS):
                            _text(client, names.text, found)("cloud_only")
                    _silence_once(client, cloud, names.text, phase, warmth, found)
                step()


def _silence_once(
    client: Client, cloud: RealCloud, model: str, phase: str, warmth: str, found: Wedges
) -> None:
    core = client._core
    breaker = client._known.endpoints[0].breaker_of(model)
    usual_ms: list[float] = []

    def note(decision: Any) -> None:
        expected = decision.inputs.cloud.prediction
        known = expected.first_answer()
        limit_s = pause_limit_s(client._known, _request(client, phase, model), decision)
        if warmth == "cold" or known is None or limit_s is None:
            usual_ms.append(0.0)
        else:  # the largest margin is part of the limit between tokens
            usual_ms.append(known[4] if phase == "prompt" else limit_s * 1000.0 - PAUSE_MARGIN_MS)

    core.record = note
    started = core.hedging.started
    if phase == "prompt":
        cloud.process.freeze()
    stream, chunks = _begin(client, model, phase)
    failures = 0
    if phase == "answer":  # what came before, a hedge of the first token say, is not meant
        started, failures = core.hedging.started, breaker.failures
        cloud.process.freeze()
    began_s = time.monotonic()
    noticed_s: list[float] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            if breaker.failures > failures or core.hedging.started > started:
                noticed_s.append(time.monotonic())
                return
            time.sleep(0.001)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        came_s = began_s  # what was sent before the server stopped still comes
        for chunk in stream:
            chunks.append(chunk)
            if chunk.route == "cloud":
                came_s = time.monotonic()
        path = stream.route.path
    except NearfarError as error:
        path = error.code
    finally:
        done.set()
        cloud.process.thaw()
        watcher.join(_PATIENCE_S)
        core.record = None
    found.answered[f"cloud, {phase}: {path}"] += 1
    found.wrong += not _is_whole(chunks, has_handover=len({one.route for one in chunks}) > 1)
    noticed_ms = (noticed_s[0] - came_s) * 1000.0 if noticed_s else float("inf")
    found.add("cloud", phase, warmth, noticed_ms - usual_ms[0])


def _begin(client: Client, model: str, phase: str) -> tuple[Any, list[Any]]:
    """An answer that the cloud gives, and its first chunks; one that was outrun is left."""
    while True:
        stream = client.generate(model, _PROMPT, max_new_tokens=_TOKENS, mode="prefer_cloud")
        if phase == "prompt":
            return stream, []
        chunks = [next(stream) for _ in range(_CUT_AFTER)]
        if all(chunk.route == "cloud" for chunk in chunks):
            return stream, chunks
        stream.close()


def be_busy(models: Path, model: str, found: Wedges, step: Callable[[], None]) -> None:
    """Run honest batches while others take the processors, and count what is taken for a stall."""
    with Client(models=models, policy=OPEN_POLICY, sensitivity="public") as client:
        client.warm_up(model)
        ask = _batch(client, model)
        for _ in range(_BATCHES):
            ask("edge_only")
        assert client._edge is not None
        stalls: list[Stall] = []
        client._edge.on_stall.append(stalls.append)
        with _busy_processes():
            for number in range(_BUSY_CALLS):
                if number % 2:
                    client._plans.clear()  # half of them by their plan, half in a thread
                ask("edge_only")
                step()
        found.honest += _BUSY_CALLS
        found.false_alarms += len(stalls)


@contextlib.contextmanager
def _busy_processes() -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_burn, daemon=True) for _ in range(_BUSY_PROCESSES)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.join()


def _burn() -> None:
    values = np.ones((256, 256), np.float32)
    while True:
        values @ values


def _client(cloud: RealCloud, models: Path) -> Client:
    return Client(cloud=cloud.config(), models=models, policy=OPEN_POLICY, sensitivity="public")


def _feeds() -> dict[str, np.ndarray]:
    ids = np.ones((2, ROW_TOKENS), np.int64)
    return {"input_ids": ids, "attention_mask": ids, "token_type_ids": 0 * ids}


def _batch(client: Client, model: str) -> Callable[[str], str]:
    def ask(mode: Any) -> str:
        try:
            return client.infer(model, _feeds(), mode=mode).route.path
        except NearfarError as error:
            return error.code

    return ask


def _text(client: Client, model: str, found: Wedges) -> Callable[[str], str]:
    def ask(mode: Any) -> str:
        stream = client.generate(model, _PROMPT, max_new_tokens=_TOKENS, mode=mode)
        try:
            chunks = list(stream)
        except NearfarError as error:
            return error.code
        path = stream.route.path
        has_handover = len({chunk.route for chunk in chunks}) > 1
        found.wrong += not _is_whole(chunks, has_handover=has_handover)
        return path

    return ask


def _is_whole(chunks: list[Any], *, has_handover: bool) -> bool:
    """Whether each token came once, in order, and the change of routes is marked."""
    tokens = [chunk.index for chunk in chunks]
    in_order = all(later > earlier for earlier, later in pairwise(tokens))
    marks = [chunk.handover for chunk in chunks]
    return in_order and sum(marks) == has_handover
