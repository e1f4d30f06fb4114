"""A streamed LLM answer through the client, against the bare loop of onnxruntime-genai."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from benchmarks.baselines import GenaiLoop, TimedAnswer
from benchmarks.harness import Figure, Run, interleave, is_decided, per_round
from benchmarks.subjects import Begin, Part, Settings, Subject
from nearfar.errors import EngineError
from sdk import Client

MIN_LLM_SPEED_RATIO = 0.95

#: Continued greedily, it runs on for hundreds of tokens, so every answer has the full length.
PROMPT = (
    "The sea has always drawn people to its shores. Long before there were maps, sailors learned "
    "to read the stars, the wind and the colour of the water. The first long voyages began when"
)

#: On a busy machine, single answers differ by more than the bar allows: then up to so many times
#: `Settings.rounds` are measured, until the median is known well enough.
_MORE_ROUNDS = 3


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
        max_rounds=settings.rounds * _MORE_ROUNDS,
        is_enough=lambda seen: is_decided(_ratios(seen), MIN_LLM_SPEED_RATIO),
    )
    for one, other in zip(answers["bare"], answers["sdk"], strict=True):
        same_work(subject, one, other)
    ratio = Figure.of_rounds(
        f"{subject.name}: tokens/s of the client ÷ bare loop",
        "",
        _ratios(speeds),
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


def _ratios(speeds: Mapping[str, list[float]]) -> list[float]:
    return per_round(lambda sdk, bare: sdk / bare, speeds["sdk"], speeds["bare"])


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
