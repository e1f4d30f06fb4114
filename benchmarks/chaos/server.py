"""The cloud runtime, writing down each computation it begins.

``python -m benchmarks.chaos.server serve …`` is ``nearfar cloud serve …``, with a line in the file
that the environment variable `LOG` names for each computation: process, kind, request id. That is
what tells whether a request that was sent twice was computed twice.
"""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOG = "NEARFAR_BENCH_COMPUTATIONS"


def note_computations(path: str) -> None:
    """Have every computation of this process written down from now on.

    The line is there before the engine computes; a computation that was cancelled in the queue has
    none. Lines are written at once and whole, so a killed process loses none.
    """
    from cloud_runtime.answers import Answers
    from cloud_runtime.executor import Ticket
    from cloud_runtime.recent import RecentRuns

    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    ids: dict[Ticket, bytes] = {}
    begin, join, generate = Ticket.begin, RecentRuns.join, Answers.begin

    def note(kind: str, request_id: bytes) -> None:
        os.write(log, f"{os.getpid()} {kind} {request_id.hex()}\n".encode())

    @functools.wraps(begin)
    def begin_noted(self: Ticket) -> None:
        begin(self)
        note("infer", ids.pop(self))

    @functools.wraps(join)
    def join_noted(
        self: RecentRuns,
        key: tuple[str, bytes],
        fingerprint: object,
        start: Callable[[Ticket], Any],
    ) -> Any:
        def started(ticket: Ticket) -> Any:
            ids[ticket] = key[1]
            return start(ticket)

        return join(self, key, fingerprint, started)

    @functools.wraps(generate)
    def generate_noted(
        self: Answers, key: tuple[str, bytes], request: Any, ticket: bytes,
        start: Callable[[], Any], *arguments: Any, **options: Any,
    ) -> Any:  # fmt: skip
        def started() -> Any:
            relay = start()
            note("generate", key[1])
            return relay

        return generate(self, key, request, ticket, started, *arguments, **options)

    # The one place where a request's id and the engine meet is inside the server.
    Ticket.begin = begin_noted  # type: ignore[method-assign]
    RecentRuns.join = join_noted  # type: ignore[method-assign]
    Answers.begin = generate_noted  # type: ignore[method-assign]


def computations(path: Path) -> Counter[tuple[int, str]]:
    """How often each server process computed each request id."""
    if not path.exists():
        return Counter()
    lines = [line.split() for line in path.read_text("ascii").splitlines()]
    return Counter((int(process), request_id) for process, _, request_id in lines)


def main() -> int:
    """As ``nearfar cloud``."""
    from cloud_runtime.commands import app
    from nearfar.cli import run

    note_computations(os.environ[LOG])
    return run(app, program="python -m benchmarks.chaos.server")


if __name__ == "__main__":
    sys.exit(main())
