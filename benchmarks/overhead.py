"""`nearfar bench overhead`: what nearfar adds to the libraries underneath it.

Both sides of every comparison open the same files, take turns within one process, and are checked
to do the same work. A bar is held against the median of the rounds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.baselines import GenaiLoop, OnnxCall, TimedAnswer, start_python
from benchmarks.harness import Bar, Figure, Report, Run, interleave, per_round, quantile
from nearfar.bundle import Bundle, BundleStore
from nearfar.bundle.manifest import HeadTailPreprocessing, Manifest, TextPreprocessing, Variant
from nearfar.engines.base import SessionOptions
from nearfar.errors import EngineError, InvalidInput
from nearfar.tensors import NUMPY_OF
from sdk import Client

if TYPE_CHECKING:
    from sdk.results import InferResult

#: Starts a part of the benchmark; returns what to call after each of its steps.
Begin = Callable[[str, int], Callable[[], None]]

#: The promises.
MIN_LLM_SPEED_RATIO = 0.95
MAX_INFER_ADDED_US = 100.0
MAX_IMPORT_MS = 200.0
MAX_IMPORT_RSS_MB = 40.0

#: Continued greedily, it runs on for hundreds of tokens, so every answer has the full length.
PROMPT = (
    "The sea has always drawn people to its shores. Long before there were maps, sailors learned "
    "to read the stars, the wind and the colour of the water. The first long voyages began when"
)
SENTENCE = "The nearest place that policy allows and the deadline needs."

#: One block of calls takes about this long: many calls for a median, yet short against the
#: disturbances that interleaving is to spread over both sides.
_BLOCK_S = 0.1
_MIN_CALLS, _MAX_CALLS = 8, 500
#: At the start of a block, the other session's threads still spin and its weights fill the cache.
_SETTLING_CALLS = 3
#: Blocks for each of `Settings.rounds`: they are far shorter than an LLM answer.
_BLOCKS_PER_ROUND = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        models: Folder of bundles.
        tokens: Length of each LLM answer.
        rounds: How often each side is measured.
        threads: Compute threads of both sides; 0 leaves the libraries' defaults.
        seed: The order of the sides is drawn from it.
    """

    models: Path
    tokens: int = 64
    rounds: int = 12
    threads: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Subject:
    """A bundle, and the variant of it that runs on this device."""

    bundle: Bundle
    variant: Variant

    @property
    def name(self) -> str:
        return self.bundle.manifest.name

    @property
    def entry(self) -> Path:
        """The file or folder that the engine opens, verified."""
        return self.bundle.variant_entry(self.variant)


@dataclass(frozen=True, slots=True)
class Part:
    """What one comparison found out."""

    bars: tuple[Bar, ...]
    figures: tuple[Figure, ...]


def measure(settings: Settings, begin: Begin) -> Report:
    """Run the three comparisons.

    Args:
        settings: What is measured.
        begin: Shows progress.

    Raises:
        InvalidInput: A bundle is missing; says how to make it.
        EngineError: A side cannot run here, or the two did not do the same work.
    """
    manifests = find_models(settings.models)
    run = Run("overhead", seed=settings.seed)
    options = SessionOptions(threads=settings.threads)
    # Without a policy file everything stays on the device, which is what is measured here.
    with Client(models=settings.models, edge_options=options) as client:
        subjects = [_subject(client, settings.models, manifest) for manifest in manifests]
        # First, while this process has not yet warmed the machine up for minutes.
        parts = [measure_import(settings, run, begin)]
        for subject in subjects:
            if subject.bundle.manifest.task == "text-generation":
                parts.append(measure_llm(client, subject, settings, run, begin))
            else:
                parts.append(measure_tensors(client, subject, settings, run, begin))
    return run.report(
        bars=[bar for part in parts for bar in part.bars],
        figures=[figure for part in parts for figure in part.figures],
        settings={
            "tokens": settings.tokens,
            "rounds": settings.rounds,
            "threads": settings.threads,
            **{
                subject.name: f"{subject.bundle.manifest.version} {subject.variant.id}"
                for subject in subjects
            },
        },
    )


def find_models(store: Path) -> list[Manifest]:
    """One model of each task that is compared; those of the quickstart where there are several.

    Raises:
        InvalidInput: There is no such folder, or a task has no model in it.
    """
    fix = "Make the models with `nearfar quickstart`, or name another folder: --models DIR"
    if not store.is_dir():
        raise InvalidInput(f"There is no model store {store}", field="--models", fix=fix)
    manifests = BundleStore(store).models()
    found = []
    for task, usual in (
        ("text-generation", "assistant"),
        ("classification", "file-type"),
        ("embedding", "minilm"),
    ):
        fitting = [manifest for manifest in manifests if manifest.task == task]
        if not fitting:
            raise InvalidInput(
                f"The model store {store} has no {task} model, such as {usual}",
                field="--models",
                fix=fix,
            )
        found.append(next((m for m in fitting if m.name == usual), fitting[0]))
    return found


def _subject(client: Client, store: Path, manifest: Manifest) -> Subject:
    info = next(info for info in client.models() if info.name == manifest.name)
    bundle = BundleStore(store).open(manifest.name, manifest.version)
    if info.edge_variant is None:
        raise EngineError(
            f"No variant of {manifest.name!r} runs on this device",
            fix="`nearfar doctor` says what is missing",
        )
    return Subject(bundle, bundle.variant(info.edge_variant))


# -- import sdk ------------------------------------------------------------------------------------


def measure_import(settings: Settings, run: Run, begin: Begin) -> Part:
    """`import sdk; sdk.Client` in a fresh process against a bare Python."""
    step = begin("import sdk", settings.rounds)
    starts: dict[str, list[Any]] = {"bare": [], "sdk": []}

    def side(name: str, statement: str) -> Callable[[], float]:
        def start() -> float:
            starts[name].append(start_python(statement))
            return 0.0

        return start

    start_python("import sdk; sdk.Client")  # compiled and in the disk cache from here on
    interleave(
        {"bare": side("bare", "pass"), "sdk": side("sdk", "import sdk; sdk.Client")},
        rounds=settings.rounds,
        random=run.random,
        on_round=step,
    )
    wall = Figure.of_rounds("import sdk: time", "ms", [s.wall_s * 1e3 for s in starts["sdk"]])
    rss = Figure.of_rounds(
        "import sdk: memory above bare Python",
        "MB",
        [
            (ours.rss_bytes - bare.rss_bytes) / 1e6
            for ours, bare in zip(starts["sdk"], starts["bare"], strict=True)
        ],
    )
    cpu = Figure.of_rounds(
        "import sdk: processor time", "ms", [s.cpu_s * 1e3 for s in starts["sdk"]]
    )
    return Part(
        (wall.bar(MAX_IMPORT_MS, "at_most"), rss.bar(MAX_IMPORT_RSS_MB, "at_most")),
        (wall, cpu, rss),
    )


# -- the LLM ---------------------------------------------------------------------------------------


def measure_llm(
    client: Client, subject: Subject, settings: Settings, run: Run, begin: Begin
) -> Part:
    """Greedy answers through the client against the library's own loop, on the same folder."""
    step = begin(f"{subject.name}: streamed answers", settings.rounds + 1)
    loop = GenaiLoop(subject.entry, threads=settings.threads)

    def bare() -> TimedAnswer:
        return loop.generate(PROMPT, tokens=settings.tokens)

    def ours() -> TimedAnswer:
        return ask(client, subject.name, tokens=settings.tokens)

    same_work(subject, bare(), ours())  # and both are warm now
    step()
    answers: dict[str, list[TimedAnswer]] = {"bare": [], "sdk": []}

    def side(name: str, answer: Callable[[], TimedAnswer]) -> Callable[[], float]:
        def once() -> float:
            answers[name].append(answer())
            return answers[name][-1].tokens_per_s

        return once

    speeds = interleave(
        {"bare": side("bare", bare), "sdk": side("sdk", ours)},
        rounds=settings.rounds,
        random=run.random,
        on_round=step,
    )
    for one, other in zip(answers["bare"], answers["sdk"], strict=True):
        same_work(subject, one, other)
    ratio = Figure.of_rounds(
        f"{subject.name}: tokens/s of the client ÷ bare loop",
        "",
        per_round(lambda sdk, bare: sdk / bare, speeds["sdk"], speeds["bare"]),
    )
    label = {"bare": "bare loop", "sdk": "client"}
    figures = [ratio]
    for name in ("bare", "sdk"):
        who = f"{subject.name}: {label[name]}"
        figures += [
            Figure.of_rounds(who, "tokens/s", speeds[name]),
            Figure.of_rounds(
                f"{who}, after the first token",
                "tokens/s",
                [a.decode_tokens_per_s for a in answers[name]],
            ),
            Figure.of_rounds(
                f"{who}, time to first token", "ms", [a.ttft_s * 1e3 for a in answers[name]]
            ),
        ]
    return Part((ratio.bar(MIN_LLM_SPEED_RATIO, "at_least"),), tuple(figures))


def ask(client: Client, model: str, *, tokens: int) -> TimedAnswer:
    """The same as `GenaiLoop.generate`, as an app would write it."""
    started_s = time.perf_counter()
    first_s: float | None = None
    pieces: list[str] = []
    stream = client.generate(model, PROMPT, max_new_tokens=tokens)
    for chunk in stream:
        pieces.append(chunk.text)
        if first_s is None:
            first_s = time.perf_counter()
    ended_s = time.perf_counter()
    usage = stream.usage
    return TimedAnswer(
        text="".join(pieces),
        prompt_tokens=usage.prompt_tokens if usage else 0,
        tokens=usage.completion_tokens if usage else 0,
        ttft_s=(first_s or ended_s) - started_s,
        total_s=ended_s - started_s,
    )


def same_work(subject: Subject, bare: TimedAnswer, ours: TimedAnswer) -> None:
    """Refuse to compare the speeds of different work.

    Raises:
        EngineError: Prompt or answer differ in length.
    """
    if (bare.prompt_tokens, bare.tokens) != (ours.prompt_tokens, ours.tokens):
        raise EngineError(
            f"The two sides did not do the same work on {subject.name!r}: the bare loop answered "
            f"{bare.prompt_tokens} tokens with {bare.tokens}, the client {ours.prompt_tokens} "
            f"with {ours.tokens}",
            fix="Ask for shorter answers, which the model does not end by itself: --tokens 32",
        )


# -- tensors ---------------------------------------------------------------------------------------


class Blocks:
    """Times blocks of calls and keeps every call."""

    def __init__(self, call: Callable[[], object], *, calls: int) -> None:
        self._call = call
        self._calls = calls
        self.calls_us: list[float] = []

    def __call__(self) -> float:
        """Run one block; its median in microseconds."""
        call, clock = self._call, time.perf_counter_ns
        for _ in range(_SETTLING_CALLS):
            call()
        times_us = []
        for _ in range(self._calls):
            started_ns = clock()
            call()
            times_us.append((clock() - started_ns) / 1e3)
        self.calls_us += times_us
        return quantile(sorted(times_us), 0.5)


def measure_tensors(
    client: Client, subject: Subject, settings: Settings, run: Run, begin: Begin
) -> Part:
    """`infer`, and `classify` or `embed`, against ``InferenceSession.run`` on the same file."""
    manifest = subject.bundle.manifest
    name = subject.name
    feeds, whole = _input(client, subject)
    result = client.infer(name, feeds)
    bare = OnnxCall(
        subject.entry, execution_provider=result.execution_provider, threads=settings.threads
    )
    same_outputs(subject, bare.run(feeds), result)
    calls = _calls_per_block(lambda: bare.run(feeds))
    method = "classify" if manifest.task == "classification" else "embed"
    sides = {
        "bare": Blocks(lambda: bare.run(feeds), calls=calls),
        "infer": Blocks(lambda: client.infer(name, feeds), calls=calls),
        method: Blocks(whole, calls=calls),
    }
    rounds = settings.rounds * _BLOCKS_PER_ROUND
    step = begin(f"{name}: single calls", rounds)
    medians = interleave(sides, rounds=rounds, random=run.random, on_round=step)

    def added(side: str, what: str) -> Figure:
        extra = per_round(lambda ours, bare: ours - bare, medians[side], medians["bare"])
        return Figure.of_rounds(f"{name}: {what}", "µs", extra)

    infer = added("infer", "infer, added to the bare call")
    return Part(
        (infer.bar(MAX_INFER_ADDED_US, "at_most"),),
        (
            infer,
            added(method, f"{method}, added to the bare call (with preprocessing)"),
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


def _calls_per_block(call: Callable[[], object]) -> int:
    for _ in range(_SETTLING_CALLS):
        call()
    started_s = time.perf_counter()
    for _ in range(_MIN_CALLS):
        call()
    each_s = (time.perf_counter() - started_s) / _MIN_CALLS
    return min(_MAX_CALLS, max(_MIN_CALLS, math.ceil(_BLOCK_S / each_s)))
