"""Two sans-IO ends over a network that delays, cuts, reorders, repeats, replays and flips bits.

Whatever happens, an answer is byte-identical or the client has a typed error; nothing is lost,
repeated or taken that nobody said; memory stays bounded; every request ends. A seed that fails is
named, and does the same again:

    python -m tests.simulator.test_simulator SEED            # one seed, told in full
    NEARFAR_SIMULATOR_SEEDS=10000 python -m pytest tests/simulator
"""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from nearfar.errors import from_code
from tests.simulator.ends import RETENTION, Client, Job, Server
from tests.simulator.link import Clock, Faults

SEEDS = int(os.environ.get("NEARFAR_SIMULATOR_SEEDS", "600"))
#: Seeds of one test; a failing one is found again by its number.
BATCH = 100
#: One in so many connections of a run goes through the real handshake from its first byte.
REAL_HANDSHAKES = 8
#: Virtual seconds after which a request that has not ended is hung.
PATIENCE_S = 300.0
_LETTERS = "abc defg äöü 漢字 🙂"


@dataclass
class Run:
    """What became of one seed."""

    jobs: list[Job]
    server: Server
    client: Client


def simulate(seed: int) -> Run:
    """Everything that happens follows from the seed, but for the keys of real handshakes."""
    rng = random.Random(seed)
    clock = Clock()
    faults = Faults(
        attack=rng.choice((0.0, 0.0, 0.01, 0.05)),
        cut_after_s=rng.choice((float("inf"), 0.2, 0.5, 2.0)),
        delay_s=rng.choice((0.001, 0.02, 0.2)),
    )
    jobs = [_job(rng) for _ in range(rng.randint(1, 3))]
    server = Server(clock, rng, {job.request_id: job for job in jobs})
    shaping = rng.choices(("off", "balanced", "strict"), (12, 4, 1))[0]
    client = Client(server, jobs, faults, shaping, is_short=seed % REAL_HANDSHAKES != 0)
    clock.run(lambda: client.is_done, PATIENCE_S)
    return Run(jobs, server, client)


def _job(rng: random.Random) -> Job:
    request_id = rng.randbytes(16)
    if rng.random() < 0.3:
        # Now and then long enough to travel in pieces.
        size = rng.choice((1, 100, 100, 40_000))
        return Job(request_id, None, np.frombuffer(rng.randbytes(4 * size), np.float32))
    count = rng.choice((0, 1, 5, 12, 30))
    tokens = ["".join(rng.choices(_LETTERS, k=rng.randint(1, 6))) for _ in range(count)]
    return Job(request_id, tokens, None)


def check(run: Run) -> None:
    """The promises."""
    for job in run.jobs:
        assert job.outcome, "a request is hung"
        if job.outcome != "done":
            assert type(from_code(job.outcome, "")).__name__ != "NearfarError", job.outcome
        if job.tokens is not None:
            assert job.text == job.tokens[: len(job.text)]
            assert job.outcome != "done" or job.text == job.tokens
        elif job.outcome == "done":
            assert job.result is not None
            assert job.array is not None
            assert job.result.tobytes() == job.array.tobytes()
        runs = run.server.runs[job.request_id]
        assert runs <= 1 or job.request_id in run.server.given_up, f"it was run {runs} times"
    assert run.server.most_kept_bytes <= RETENTION.total_bytes


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_answers_are_whole_or_typed_errors_whatever_the_network_does(first: int) -> None:
    outcomes: Counter[str] = Counter()
    connections = 0
    for seed in range(first, min(first + BATCH, SEEDS)):
        try:
            run = simulate(seed)
            check(run)
        except Exception as problem:
            raise AssertionError(f"seed {seed}: {type(problem).__name__}: {problem}") from problem
        outcomes.update(job.outcome for job in run.jobs)
        connections += run.client.connections
    # The network was bad enough to matter, and the ends good enough to bear it.
    assert connections > 1.5 * BATCH
    assert outcomes["done"] > 0.8 * outcomes.total()


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_seed_does_the_same_again(seed: int) -> None:
    first, second = simulate(seed), simulate(seed)
    assert [(job.outcome, job.text) for job in first.jobs] == [
        (job.outcome, job.text) for job in second.jobs
    ]
    assert first.client.connections == second.client.connections


def test_the_checks_notice_a_lost_a_repeated_and_a_foreign_token() -> None:
    for spoil in (
        lambda text: text[:-1],
        lambda text: [*text, text[-1]],
        lambda text: ["?", *text],
    ):
        run = next(
            run
            for run in map(simulate, range(1, 100))
            if run.jobs[0].outcome == "done" and len(run.jobs[0].text) > 1
        )
        check(run)
        run.jobs[0].text = spoil(run.jobs[0].text)
        with pytest.raises(AssertionError):
            check(run)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        told = simulate(int(argument))
        sys.stdout.write(f"seed {argument}: {told.client.connections} connections\n")
        for job in told.jobs:
            sys.stdout.write(
                f"  {job.outcome}: {len(job.text)} of {len(job.tokens or [])} tokens\n"
            )
        check(told)
