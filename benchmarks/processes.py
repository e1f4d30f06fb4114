"""A real cloud runtime behind an emulated link, and the machine's own delays, as processes."""

from __future__ import annotations

import bisect
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from benchmarks.emulator import HOST, EmulatedLink, LinkSpec
from nearfar.errors import InvalidInput
from sdk.config import CloudConfig
from sdk.policy import parse_policy
from sdk.quickstart.cloud_process import CloudProcess

#: Everything may go everywhere: benchmarks send nothing that is anybody's.
OPEN_POLICY = parse_policy('version = 1\n[[rule]]\nid = "all"\nwhen = {}\neffect = "cloud_ok"\n')


def check_store(models: Path) -> None:
    """Find out early that there are no models.

    Raises:
        InvalidInput: The folder of bundles is not there.
    """
    if not models.is_dir():
        raise InvalidInput(
            f"There is no model store {models}",
            field="--models",
            fix="Make the models with `nearfar quickstart`, or name another folder: --models DIR",
        )


class RealCloud:
    """`nearfar cloud serve` in a process, reached through a link in another; a context manager.

    Args:
        folder: Takes keys, certificates and logs.
        models: Bundle store to serve.
        names: Models to serve.
        link: What the link is like.
        threads: Compute threads of a running request.
        module: What runs as the server.

    Attributes:
        process: The server.
        link: The link to it.
    """

    def __init__(
        self,
        folder: Path,
        models: Path,
        *,
        names: Sequence[str],
        link: LinkSpec = LinkSpec(),  # noqa: B008 (frozen)
        threads: int = 0,
        module: str = "cloud_runtime",
    ) -> None:
        self.process = CloudProcess(
            state=folder / "cloud",
            models=models,
            log=folder / "cloud.log",
            module=module,
            options=[
                *(option for name in names for option in ("--model", name)),
                "--threads", str(threads), "--quiet",
            ],
        )  # fmt: skip
        self._spec = link

    def __enter__(self) -> RealCloud:
        self.process.provision()
        self.process.start()
        try:
            self.link = EmulatedLink(self.process.port, self._spec).__enter__()
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.link.__exit__(kind, exc, trace)
        self.process.thaw()
        self.process.kill()

    def config(self, link: EmulatedLink | None = None) -> CloudConfig:
        """How a client reaches it: through its link, or through another one."""
        port = (link or self.link).port
        state = self.process.state
        path = urlsplit(self.process.url).path
        return CloudConfig(
            url=f"wss://{HOST}:{port}{path}",
            identity=self.process.pin,
            credentials=f"file:{state / 'client-key.txt'}",
            ca_file=state / "ca.pem",
        )


#: A sleeper that was woken so much too late says something about the machine.
_NOTED_MS = 1.0
_TICK_S = 0.001


class Ticks:
    """How late the system wakes a process that only sleeps; a context manager.

    It is a process of its own, so it measures the machine and not the interpreter that is measured.
    """

    def __init__(self) -> None:
        self._ends_s: list[float] = []
        self._late_ms: list[float] = []

    def __enter__(self) -> Ticks:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SLEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        output, _ = self._process.communicate("\n", timeout=30)
        for ended_s, late_ms in json.loads(output):
            self._ends_s.append(ended_s)
            self._late_ms.append(late_ms)

    @property
    def late_ms(self) -> list[float]:
        """Every delay above 1 ms, in milliseconds."""
        return self._late_ms

    def longest_ms(self, from_s: float, to_s: float) -> float:
        """The longest delay that touches a span of `time.monotonic()`; at least 1 ms."""
        longest_ms = _NOTED_MS
        for index in range(bisect.bisect_left(self._ends_s, from_s), len(self._ends_s)):
            late_ms = self._late_ms[index]
            if self._ends_s[index] - late_ms / 1000.0 > to_s:
                break
            longest_ms = max(longest_ms, late_ms)
        return longest_ms


_SLEEPER = f"""
import json, select, sys, time
seen, before_s = [], time.monotonic()
while not select.select([sys.stdin], [], [], {_TICK_S})[0]:
    now_s = time.monotonic()
    late_ms = (now_s - before_s - {_TICK_S}) * 1000.0
    if late_ms > {_NOTED_MS}:
        seen.append((now_s, late_ms))
    before_s = now_s
print(json.dumps(seen))
"""


def wait_until_s(at_s: float) -> None:
    """Sleep until a moment of `time.monotonic()`."""
    left_s = at_s - time.monotonic()
    if left_s > 0.0:
        time.sleep(left_s)
