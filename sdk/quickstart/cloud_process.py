"""A cloud runtime as a process of its own, with keys and certificates made for it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nearfar.errors import CloudUnavailable

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 20.0


class CloudProcess:
    """`nearfar cloud serve` on loopback, started, killed and stopped on demand.

    Args:
        state: Directory of identity, certificates and API key; made by `nearfar cloud init`.
        models: Bundle store to serve.
        log: File that receives the server's output.
        module: What runs as the server; another one stands around the real one.
        options: Further options of `nearfar cloud serve`.
    """

    def __init__(
        self,
        *,
        state: Path,
        models: Path,
        log: Path,
        module: str = "cloud_runtime",
        options: Sequence[str] = (),
    ) -> None:
        self.state = state
        self.url = ""
        self.pin = ""
        self._models = models
        self._log = log
        self._module = module
        self._options = tuple(options)
        self._process: subprocess.Popen[str] | None = None
        self._port = 0

    def provision(self) -> None:
        """Make CA, certificate, identity and API key, once per workspace."""
        if (self.state / "identity.key").exists():
            return
        done = subprocess.run(
            [sys.executable, "-m", "cloud_runtime", "init", str(self.state),
             "--host", "127.0.0.1", "--host", "localhost"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise CloudUnavailable(
                f"`nearfar cloud init` failed: {done.stderr.strip() or done.stdout.strip()}",
                fix=f"Remove {self.state} and try again",
            )

    def start(self) -> None:
        """Start the server and wait until its models are loaded; keeps its port over restarts.

        Raises:
            CloudUnavailable: It stopped before it was ready, or was not ready in time.
        """
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module, "serve", "--models", str(self._models),
                 "--state", str(self.state), "--listen", f"127.0.0.1:{self._port}", "--ready-json",
                 *self._options],
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        ready = self._wait_for_ready(self._process)
        self.url, self.pin = ready["url"], ready["pin"]
        self._port = int(self.url.partition("://")[2].partition("/")[0].rpartition(":")[2])

    def _wait_for_ready(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        watchdog = threading.Timer(_START_TIMEOUT_S, process.kill)
        watchdog.start()
        try:
            line = process.stdout.readline()
        except BaseException:
            process.kill()
            raise
        finally:
            watchdog.cancel()
        if not line:
            status = process.wait()
            raise CloudUnavailable(
                f"The cloud runtime ended with status {status} before it was ready",
                fix=f"Its output is in {self._log}",
            )
        ready: dict[str, Any] = json.loads(line)
        return ready

    def freeze(self) -> None:
        """Stop the process where it stands (SIGSTOP): it accepts bytes and answers nothing."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen process go on (SIGCONT)."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    @property
    def port(self) -> int:
        """Where it listens; 0 before it was started."""
        return self._port

    def kill(self) -> None:
        """End the process at once (SIGKILL), as a crash or a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Let the server drain and end (SIGTERM); kill it if it does not."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
