"""`nearfar bench handover`: an answer whose route dies after each of its tokens.

The same variant on both routes, so that a greedy answer must come out the same wherever it was
continued. The dying is real from the router's point of view (the engine raises, the cloud sends its
error), and exact: after so many tokens and no other number, which no killed process would give.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Figure, Report, Run
from benchmarks.overhead_llm import PROMPT
from benchmarks.subjects import Begin, Part
from cloud_runtime.auth import Authenticator
from cloud_runtime.executor import ModelExecutor
from cloud_runtime.models import ServedModel, ServedModels
from cloud_runtime.provision import provision, url_of
from cloud_runtime.server import CloudServer, tls_context
from cloud_runtime.state import StateDir
from nearfar.bundle import BundleStore
from nearfar.engines.base import CancelToken, TokenWatch
from nearfar.engines.model import LoadedModel
from nearfar.errors import EngineError, InvalidInput
from nearfar.generation import GenerationChunk, GenerationOptions, Prompt
from nearfar.secure.identity import ServerIdentity
from nearfar.secure.keys import KeyRing
from sdk import Client, parse_policy
from sdk.background import BackgroundLoop
from sdk.config import CloudConfig
from sdk.results import RouteName
from sdk.routing import Mode

_POLICY = parse_policy('version = 1\n[[rule]]\nid = "all"\nwhen = {}\neffect = "cloud_ok"\n')
_HOST = "127.0.0.1"
_MOST_ASKED = 8  # for one handover; what is early every time is not the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        models: Folder of bundles.
        model: A text generation model in it.
        variant: Runs on both routes. FP32 gives the same tokens whether the text before was
            generated or read; engines that round activations do not where two tokens are close.
        tokens: Length of the answer.
        other: Another variant, for the device: then an answer may go on differently, but must keep
            what was shown and be well-formed. ``""``: the same on both.
    """

    models: Path
    model: str = "assistant"
    variant: str = "fp32"
    tokens: int = 64
    other: str = ""


def measure(settings: Settings, begin: Begin) -> Report:
    """Let each route die after each token.

    Args:
        settings: What is measured.
        begin: Shows progress.

    Raises:
        InvalidInput: The folder of bundles is not there.
        ModelNotFound: The model is not in it, or has no such variant.
        EngineError: The model answers with fewer tokens than asked for.
    """
    if not settings.models.is_dir():
        raise InvalidInput(
            f"There is no model store {settings.models}",
            field="--models",
            fix="Make the models with `nearfar quickstart`, or name another folder: --models DIR",
        )
    run = Run("handover")
    with tempfile.TemporaryDirectory(prefix="nearfar-bench-") as folder:
        bench = _Bench(Path(folder), settings)
        try:
            references = bench.references()
            parts = [
                bench.way("cloud", "edge", references["cloud"], begin),
                bench.way("edge", "cloud", references["edge"], begin),
            ]
        finally:
            bench.close()
    return run.report(
        bars=[bar for part in parts for bar in part.bars],
        figures=[figure for part in parts for figure in part.figures],
        settings={
            "model": settings.model,
            "variant": settings.variant,
            "device's variant": settings.other or settings.variant,
            "tokens": settings.tokens,
        },
    )


class MortalModel(LoadedModel):
    """A model whose answers end with an error after so many tokens, if it is told to.

    Attributes:
        dies_after: How many; `None` for a model that lives.
        began_s: When the last answer was asked for, on the monotonic clock; `None`: not yet.
        died_s: When the last death was; `None`: not yet.
    """

    dies_after: int | None = None
    began_s: float | None = None
    died_s: float | None = None

    def generate(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        cancel: CancelToken | None = None,
        watch: TokenWatch | None = None,
    ) -> Generator[GenerationChunk, None, None]:
        """As `LoadedModel.generate`."""
        self.began_s = time.monotonic()
        return self._until_death(super().generate(prompt, options, cancel, watch))

    def _until_death(
        self, chunks: Generator[GenerationChunk, None, None]
    ) -> Generator[GenerationChunk, None, None]:
        try:
            for count, chunk in enumerate(chunks):
                if count == self.dies_after:
                    self.died_s = time.monotonic()
                    raise EngineError("The model died, as this benchmark asked it to")
                yield chunk
        finally:
            chunks.close()


@dataclass(frozen=True, slots=True)
class _Answer:
    pieces: tuple[tuple[int, str], ...]  # index, text
    finish_reason: str
    path: str
    marked_at: tuple[int, ...]
    tokens: int
    total_ms: float

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.pieces)

    def begins_as(self, other: _Answer, tokens: int) -> bool:
        """Whether the text of the first tokens is the other's."""
        return self.text.startswith("".join(text for index, text in other.pieces if index < tokens))

    def is_well_formed(self, tokens: int) -> bool:
        """Whole characters, every piece once and in order, an end, and no more than was asked."""
        indices = [index for index, _ in self.pieces]
        return (
            "\ufffd" not in self.text
            and indices == sorted(set(indices))
            and self.finish_reason in ("stop", "length")
            and 0 < self.tokens <= tokens
        )


class _Bench:
    """A cloud and a client in this process, with the model on both."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._settings = settings
        bundle = BundleStore(settings.models).open(settings.model)
        self._loop = BackgroundLoop()
        self._variants: dict[RouteName, str] = {
            "edge": settings.other or settings.variant,
            "cloud": settings.variant,
        }
        self._models = {
            name: MortalModel(bundle, variant) for name, variant in self._variants.items()
        }
        there = self._models["cloud"]
        state = StateDir(folder)
        provision(state, ("localhost", _HOST))
        self._server = CloudServer(
            models=ServedModels([ServedModel(there, ModelExecutor(there))]),
            keys=KeyRing(ServerIdentity.load(state.identity), now_s=time.time()),
            authenticator=Authenticator(state.api_keys),
            tls=tls_context(state.server_chain, state.server_key),
        )
        port = self._loop.call(self._server.start(_HOST, 0))
        self._client = Client(
            cloud=CloudConfig(
                url=url_of(_HOST, port),
                identity=state.pin.read_text(encoding="ascii").strip(),
                credentials=f"file:{state.client_key}",
                ca_file=state.ca_certificate,
            ),
            models=settings.models,
            policy=_POLICY,
            sensitivity="public",
        )
        self._run_on_device(self._models["edge"])

    def close(self) -> None:
        """End client, server and models."""
        self._client.close()
        self._loop.call(self._server.close())
        self._loop.close()
        self._models["cloud"].engine.close()

    def _run_on_device(self, model: MortalModel) -> None:
        # The one seam for it: whatever the device has loaded is what it runs.
        assert self._client._edge is not None
        self._client._edge.runtime._host(self._settings.model, None).loaded = model

    def _wait_for_device(self) -> None:
        """Until a device that stalled is asked again; with a mortal model, if it loads afresh."""
        assert self._client._edge is not None
        hosted = self._client._edge.runtime._host(self._settings.model, None)
        while self._client._edge.obstacle(self._settings.model, time.monotonic()):
            time.sleep(0.1)
        if hosted.loaded is not self._models["edge"]:  # it was given up
            self._models["edge"] = MortalModel(hosted.bundle, self._variants["edge"])
            self._run_on_device(self._models["edge"])

    def answer(self, mode: Mode, tokens: int = 0) -> _Answer:
        """One greedy answer."""
        started_s = time.perf_counter()
        stream = self._client.generate(
            self._settings.model, PROMPT, max_new_tokens=tokens or self._settings.tokens, mode=mode
        )
        chunks = list(stream)
        return _Answer(
            pieces=tuple((chunk.index, chunk.text) for chunk in chunks),
            finish_reason=stream.finish_reason or "",
            path=stream.route.path,
            marked_at=tuple(chunk.index for chunk in chunks if chunk.handover),
            tokens=stream.usage.completion_tokens if stream.usage is not None else 0,
            total_ms=(time.perf_counter() - started_s) * 1e3,
        )

    def references(self) -> dict[RouteName, _Answer]:
        """The uninterrupted answer of each route.

        Raises:
            EngineError: They are shorter than asked for, or not the same with the same variant.
        """
        here, there = self.answer("edge_only"), self.answer("cloud_only")
        is_short = min(here.tokens, there.tokens) != self._settings.tokens
        if is_short or (not self._settings.other and here.text != there.text):
            raise EngineError(
                f"The model gives {here.tokens} and {there.tokens} tokens where "
                f"{self._settings.tokens} were asked for, or not the same ones on both routes",
                fix="Ask for a shorter answer: --tokens 32",
            )
        return {"edge": here, "cloud": there}

    def way(self, first: RouteName, other: RouteName, reference: _Answer, begin: Begin) -> Part:
        """Let the first route die after each token."""
        name = f"{first} → {other}"
        step = begin(name, self._settings.tokens)
        wrong, unmarked, times_ms, early = [], [], [], 0
        for count in range(self._settings.tokens):
            for _ in range(_MOST_ASKED):
                answer, is_early = self._interrupted(first, other, count)
                shown = min(answer.marked_at, default=0) if is_early else count
                if not self._is_right(answer, reference, shown):
                    wrong.append(count)
                early += is_early
                if not is_early:
                    break
            # Before the first token there is nothing to hand over: the other route just answers,
            # and if the first was late as well, it is not even named.
            if answer.marked_at != ((count,) if count else ()) or (count and answer.path != name):
                unmarked.append(count)
            times_ms.append(answer.total_ms - reference.total_ms)
            step()
        what = "answers that are not well-formed" if self._settings.other else "answers that differ"
        different = Figure.of_rounds(f"{name}: {what}", "", [float(len(wrong))])
        lost = Figure.of_rounds(
            f"{name}: handovers not marked where they were", "", [float(len(unmarked))]
        )
        took = Figure.of_rounds(f"{name}: longer than the uninterrupted answer", "ms", times_ms)
        again = Figure.of_rounds(f"{name}: left for silence, asked again", "", [float(early)])
        return Part((different.bar(0.0, "at_most"), lost.bar(0.0, "at_most")), (took, again))

    def _interrupted(self, first: RouteName, other: RouteName, count: int) -> tuple[_Answer, bool]:
        """One answer, and whether the other route was asked before the first had died.

        On a machine that stands still for a moment the router takes a route's silence for a stall.
        It is right to go on elsewhere then, but that is not the handover that is looked for.
        """
        self._wait_for_device()
        mortal, beside = self._models[first], self._models[other]
        mortal.died_s = beside.began_s = None
        mortal.dies_after = count
        answer = self.answer("prefer_edge" if first == "edge" else "prefer_cloud")
        mortal.dies_after = None
        died_s, began_s = mortal.died_s, beside.began_s
        is_early = died_s is None or (began_s is not None and began_s < died_s)
        self.answer("cloud_only", tokens=1)  # one failure after the other opens the breaker
        return answer, is_early

    def _is_right(self, answer: _Answer, reference: _Answer, shown: int) -> bool:
        """Whether it keeps the tokens that the first route had shown, and is whole."""
        if not self._settings.other:
            return answer.text == reference.text
        most = self._settings.tokens
        return answer.begins_as(reference, shown) and answer.is_well_formed(most)
