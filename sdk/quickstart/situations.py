"""Three kinds of requests, each in five situations, with what must hold in each.

Everything here goes through `sdk.Client`, as an app's requests do. A situation only prepares the
world (a busy device, a dying cloud) and says which sensitivity, deadline and mode to ask with.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nearfar.errors import Cancelled, EngineError, NearfarError, PolicyDenied
from sdk.quickstart.cloud_process import CloudProcess

RequestName = Literal["classify", "search", "chat"]
REQUESTS: tuple[RequestName, ...] = ("classify", "search", "chat")

POLICY = """\
# Deny by default: a request that no rule matches goes nowhere. The most restrictive match wins.
version = 1
classes = ["public", "internal", "personal", "secret"]

[[rule]]
id = "public-may-travel"
when = { sensitivity = "public" }
effect = "cloud_ok"

[[rule]]
id = "personal-stays-here"
when = { sensitivity = "personal" }
effect = "edge_only"
"""

#: How many tokens of a streamed answer arrive before the cloud is killed in situation (d).
_KILL_AFTER_CHUNKS = 6

#: Passages that the search looks through: enough to find something, and a second of work on a CPU.
_PASSAGES = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """One state of the world, the same for all three requests.

    Attributes:
        key: ``a`` to ``e``.
        title: For the table.
        sensitivity: What the app says about the data.
        mode: Routing mode the app asks for.
        promise: What must hold, in words; `Observation.kept` says whether it did.
    """

    key: str
    title: str
    sensitivity: str
    promise: str
    mode: str | None = None


SITUATIONS = (
    Situation(key="a", title="public data, good link", sensitivity="public",
              promise="answered"),
    Situation(key="b", title="personal data", sensitivity="personal",
              promise="answered on the device, nothing sent"),
    Situation(key="c", title="tight deadline, device busy", sensitivity="public",
              promise="answered in time by the cloud"),
    Situation(key="d", title="cloud killed mid-answer", sensitivity="public", mode="prefer_cloud",
              promise="a complete answer, or a typed error; never a cut one"),
    Situation(key="e", title="no policy rule matches", sensitivity="internal",
              promise="denied with a clear error, nothing sent"),
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Observation:
    """What one request did: a row of the table and of the report.

    Attributes:
        route: ``edge``, ``cloud``, ``cloud → edge`` (repaired), or ``denied`` / ``error``.
        ttft_ms: Time to first token of a streamed answer.
        latency_ms: Until the answer was complete, or refused.
        bytes_sent: Bytes that left the device for this request, as sealed on the wire.
        chunk_times_ms: When each piece of a streamed answer arrived.
        handover_at: Index of the first piece that came from another route.
        answer: The answer, shortened, or the error's text.
        kept: Whether the situation's promise held.
    """

    request: RequestName
    situation: Situation
    asked: str
    route: str = "error"
    reason: str = ""
    ttft_ms: float | None = None
    latency_ms: float = 0.0
    deadline_ms: float | None = None
    bytes_sent: int = 0
    chunk_times_ms: list[float] = field(default_factory=list)
    handover_at: int | None = None
    answer: str = ""
    kept: bool = False
    variant: str = ""


class Laboratory:
    """Runs requests in situations.

    Args:
        make_client: Makes a fresh `sdk.Client` from the workspace's ``nearfar.toml``.
        cloud: The cloud process that situation (d) kills; it is restarted for the next request.
        project: Root of the project's own files: they are classified and searched.
    """

    def __init__(self, make_client: Callable[[], Any], cloud: CloudProcess, project: Path) -> None:
        self._make_client = make_client
        self._cloud = cloud
        self._files = _real_files(project)
        self._passages = _passages(project)

    @property
    def passage_count(self) -> int:
        """How many passages of the documentation the search looks through."""
        return len(self._passages)

    def run(self, request: RequestName, situation: Situation) -> Observation:
        """Run one request in one situation, on a client of its own that is warmed up first."""
        with self._make_client() as client:
            self._warm_up(client, request)
            prepare = _busy(client, request) if situation.key == "c" else nullcontext()
            with prepare:
                observation = self._observe(client, request, situation)
        if situation.key == "d":
            self._cloud.stop()
            self._cloud.start()
        observation.kept = _is_kept(observation)
        return observation

    def _warm_up(self, client: Any, request: RequestName) -> None:
        """Load the model on both routes and let the client measure them, as a running app has."""
        for mode in ("edge_only", "prefer_cloud"):
            for _ in range(3 if request != "chat" else 1):
                ask: dict[str, Any] = {"sensitivity": "public", "mode": mode}
                if request == "classify":
                    client.classify("file-type", b"#!/bin/sh\necho warm-up\n", **ask)
                elif request == "search":
                    client.infer("minilm", _token_rows(client, rows=8, length=64), **ask)
                else:
                    stream = client.generate("assistant", "One, two,", max_new_tokens=8, **ask)
                    stream.text()

    def _observe(self, client: Any, request: RequestName, situation: Situation) -> Observation:
        run = {"classify": self._classify, "search": self._search, "chat": self._chat}[request]
        started = time.perf_counter()
        observation = Observation(request=request, situation=situation, asked="")
        ask: dict[str, Any] = {"sensitivity": situation.sensitivity}
        if situation.mode:
            ask["mode"] = situation.mode
        try:
            run(client, situation, ask, observation)
        except NearfarError as error:
            observation.route = "denied" if isinstance(error, PolicyDenied) else "error"
            observation.reason = error.problem
            observation.answer = f"{type(error).__name__}: {error}"
        observation.latency_ms = (time.perf_counter() - started) * 1000.0
        return observation

    def _classify(
        self, client: Any, situation: Situation, ask: dict[str, Any], seen: Observation
    ) -> None:
        path = self._files[ord(situation.key) % len(self._files)]
        data = path.read_bytes()
        seen.asked = f"what kind of file is {path.name}?"
        if situation.key == "c":
            ask["deadline_ms"] = seen.deadline_ms = 1500.0
        with self._dying_cloud(situation):
            result = client.classify("file-type", data, **ask)
        seen.answer = f"{result.label} ({result.score:.0%})"
        _note_result(seen, result)

    def _search(
        self, client: Any, situation: Situation, ask: dict[str, Any], seen: Observation
    ) -> None:
        question = {
            "a": "How do I convert a model?",
            "b": "What happens to personal data?",
            "c": "How does the client choose a route?",
            "d": "What if the cloud goes away in the middle of an answer?",
            "e": "How are messages encrypted?",
        }[situation.key]
        seen.asked = question
        if situation.key == "c":
            ask["deadline_ms"] = seen.deadline_ms = 8000.0
        with self._dying_cloud(situation):
            # One call embeds question and passages, so that one variant makes all vectors.
            result = client.embed("minilm", [question, *self._passages], **ask)
        scores = result.vectors[1:] @ result.vectors[0]
        best = int(np.argmax(scores))
        seen.answer = f"{self._passages[best][:90]}… (cosine {scores[best]:.2f})"
        _note_result(seen, result)

    def _chat(
        self, client: Any, situation: Situation, ask: dict[str, Any], seen: Observation
    ) -> None:
        question = {
            "a": "Name three things a weather station measures.",
            "b": "Write a short reminder for Anna Keller, born 4 May 1961: pills at 8.",
            "c": "What is the capital of Germany?",
            "d": "Explain in two sentences why the sky is blue.",
            "e": "Summarise our plans for next quarter.",
        }[situation.key]
        seen.asked = question
        max_new_tokens = 16 if situation.key == "c" else 48
        if situation.key == "c":
            ask["deadline_ms"] = seen.deadline_ms = 6000.0
        started = time.perf_counter()
        text = ""
        with client.chat(
            "assistant", [{"role": "user", "content": question}],
            max_new_tokens=max_new_tokens, **ask,
        ) as stream:  # fmt: skip
            try:
                for chunk in stream:
                    seen.chunk_times_ms.append((time.perf_counter() - started) * 1000.0)
                    text += chunk.text
                    if chunk.handover:
                        seen.handover_at = len(seen.chunk_times_ms) - 1
                    if situation.key == "d" and len(seen.chunk_times_ms) == _KILL_AFTER_CHUNKS:
                        self._cloud.kill()
            finally:
                seen.ttft_ms = seen.chunk_times_ms[0] if seen.chunk_times_ms else None
                seen.bytes_sent = stream.bytes_sent
            _note_result(seen, stream)
        seen.answer = text.strip()

    def _dying_cloud(self, situation: Situation) -> AbstractContextManager[None]:
        return _frozen_then_killed(self._cloud) if situation.key == "d" else nullcontext()


@contextmanager
def _frozen_then_killed(cloud: CloudProcess) -> Iterator[None]:
    """The cloud takes the request but dies before it answers: frozen first, killed 0.3 s later."""
    cloud.freeze()
    killer = threading.Timer(0.3, cloud.kill)
    killer.start()
    try:
        yield
    finally:
        killer.join()


@contextmanager
def _busy(client: Any, request: RequestName) -> Iterator[None]:
    """Keep the device's slot for this model really busy, with a queue behind it, for a while."""
    stop = threading.Event()

    def work() -> None:
        ask: dict[str, Any] = {"sensitivity": "public", "mode": "edge_only"}
        while not stop.is_set():
            try:
                if request == "chat":
                    with client.generate(
                        "assistant", "Once upon a time", max_new_tokens=400, **ask
                    ) as story:
                        for _ in story:
                            if stop.is_set():
                                break
                elif request == "search":
                    client.infer("minilm", _token_rows(client, rows=48, length=200), **ask)
                else:
                    rows = np.full((500, 2048), 97, dtype=np.int32)
                    client.infer("file-type", {"bytes": rows}, **ask)
            except (Cancelled, EngineError):
                return  # the client was closed

    workers = [threading.Thread(target=work, name=f"busy-{n}") for n in range(3)]
    for worker in workers:
        worker.start()
    time.sleep(0.3)  # one is running and two are waiting now
    try:
        yield
    finally:
        stop.set()
        client.close()  # sends the waiting calls away
        for worker in workers:
            worker.join()


def _token_rows(client: Any, *, rows: int, length: int) -> dict[str, np.ndarray]:
    """Tokens for the embedding model as plain tensors.

    `Client.embed` would bind the client to the variant that makes its first vectors, which is
    right for an app that compares vectors, and wrong for warming up both routes.
    """
    manifest = next(info.manifest for info in client.models() if info.name == "minilm")
    return {spec.name: np.ones((rows, length), dtype=np.int64) for spec in manifest.inputs}


def _note_result(seen: Observation, result: Any) -> None:
    seen.route = str(result.route.path)
    seen.reason = str(result.route.reason)
    seen.bytes_sent = result.bytes_sent
    seen.variant = result.variant


def _is_kept(seen: Observation) -> bool:
    key = seen.situation.key
    if key == "b":
        return seen.route == "edge" and seen.bytes_sent == 0
    if key == "c":
        in_time = seen.deadline_ms is not None and seen.latency_ms <= seen.deadline_ms
        return seen.route == "cloud" and in_time
    if key == "d":
        return seen.route in ("edge", "cloud", "cloud → edge") or seen.route == "error"
    if key == "e":
        return seen.route == "denied" and seen.bytes_sent == 0
    return seen.route in ("edge", "cloud")


def _real_files(project: Path) -> list[Path]:
    """Files of different kinds that every checkout has."""
    names = ("README.md", "setup.cfg", "Makefile", "LICENSE", "sdk/quickstart/situations.py")
    found = [project / name for name in names if (project / name).is_file()]
    return found or [Path(__file__)]


def _passages(project: Path) -> list[str]:
    """Paragraphs of the project's own documentation, long enough to say something."""
    pages = [project / "README.md", *sorted((project / "docs").rglob("*.md"))]
    passages: list[str] = []
    for page in pages:
        if not page.is_file():
            continue
        for block in page.read_text(encoding="utf-8").split("\n\n"):
            text = " ".join(block.split())
            if 80 <= len(text) <= 420 and not text.startswith(("```", "|", "#", "<")):
                passages.append(text)
    if not passages:  # an installed package has no docs folder; Python's own documentation serves
        from pydoc_data.topics import topics

        passages = [" ".join(text.split())[:400] for text in topics.values()]
    return passages[:_PASSAGES]
