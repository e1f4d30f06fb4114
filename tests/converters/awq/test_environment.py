"""The environment for nvidia-modelopt: whole or not there, and never made twice."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from converters import cache
from converters.awq import environment
from converters.options import ConversionOptions
from converters.plan import plan
from converters.reporting import Reporter
from converters.settings import AwqSettings, Int4Settings, Settings
from converters.sources.detect import open_source
from nearfar.errors import ConversionError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ends processes by signals")

AWQ = ConversionOptions(settings=Settings(int4=Int4Settings(algorithm="awq")))


class Machine:
    """Stands in for `venv` and `pip`, which take minutes: notes what would be run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[Sequence[str]] = []
        self.versions = dict(environment.VERSIONS)
        self.fails_with: BaseException | None = None
        monkeypatch.delenv(environment.INTERPRETER_VARIABLE, raising=False)
        monkeypatch.delenv(environment.TORCH_INDEX_VARIABLE, raising=False)
        monkeypatch.setattr(environment, "_run", self._run)
        monkeypatch.setattr(environment, "_versions", lambda python: dict(self.versions))
        monkeypatch.setattr(environment, "_enough_room", lambda root: None)

    def _run(self, command: Sequence[str], tell: Any, **_: Any) -> None:
        self.commands.append(command)
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True)
            (Path(command[-1]) / "bin" / "python").touch()
        elif self.fails_with is not None:
            raise self.fails_with


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_it_is_made_once_and_then_taken(machine: Machine, tmp_path: Path):
    assert not environment.is_made(tmp_path)
    first = environment.ready(tmp_path, Reporter())
    made = len(machine.commands)
    assert environment.is_made(tmp_path)
    assert Path(first.python).is_file()
    assert environment.ready(tmp_path, Reporter()) == first
    assert len(machine.commands) == made
    assert [path.name for path in tmp_path.iterdir()] == ["environment"]


def test_the_build_of_torch_for_cpus_is_asked_for(machine: Machine, tmp_path: Path):
    environment.ready(tmp_path, Reporter())
    installs = [command for command in machine.commands if "pip" in command]
    suffix = "+cpu" if sys.platform == "linux" else ""
    wanted = f"torch=={environment.VERSIONS['torch']}{suffix}"
    assert len(installs) == 2
    # Also beside the others, so that none of them can bring another one.
    assert all(wanted in command for command in installs)


def test_it_is_one_of_the_caches_entries(machine: Machine, tmp_path: Path):
    environment.ready(tmp_path, Reporter())
    assert cache.contents(tmp_path)["environment"][0] == 1
    cache.clear(tmp_path)
    assert not environment.is_made(tmp_path)


def test_a_damaged_one_is_made_anew(machine: Machine, tmp_path: Path):
    environment.ready(tmp_path, Reporter())
    machine.versions["nvidia-modelopt"] = "0.1.0"
    made = len(machine.commands)
    environment.ready(tmp_path, Reporter())
    assert len(machine.commands) == 2 * made


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), ConversionError("no", fix="none")])
def test_nothing_is_left_of_one_that_was_not_finished(
    machine: Machine, tmp_path: Path, reason: BaseException
):
    machine.fails_with = reason
    with pytest.raises(type(reason)):
        environment.ready(tmp_path, Reporter())
    assert list(tmp_path.iterdir()) == []
    assert not environment.is_made(tmp_path)


def test_an_interruption_ends_what_runs(tmp_path: Path):
    script = (
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "print('Collecting torch', flush=True)\n"
        "time.sleep(600)\n"
    )

    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        environment._run([sys.executable, "-c", script], interrupted)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("it is still there")


def test_without_a_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(environment.TORCH_INDEX_VARIABLE, raising=False)
    words = "ERROR: No matching distribution found for torch==2.13.0+cpu"
    with pytest.raises(ConversionError, match="No matching distribution") as caught:
        environment._run(
            [sys.executable, "-c", f"print({words!r}); raise SystemExit(1)"], lambda _: None
        )
    assert environment.INTERPRETER_VARIABLE in caught.value.fix
    assert "download.pytorch.org" in caught.value.fix


def test_a_full_disk_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "SIZE_BYTES", 1 << 60)
    with pytest.raises(ConversionError, match="left"):
        environment._enough_room(tmp_path)


def test_a_named_python_must_run_and_have_modelopt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(environment.INTERPRETER_VARIABLE, "/nowhere/python")
    with pytest.raises(ConversionError, match="cannot be started"):
        environment.ready(tmp_path, Reporter())
    monkeypatch.setenv(environment.INTERPRETER_VARIABLE, sys.executable)
    monkeypatch.setitem(environment.VERSIONS, "no-such-package", "1")
    with pytest.raises(ConversionError, match="no-such-package"):
        environment.stated_versions()


def test_a_plan_says_that_it_will_be_made(machine: Machine, tiny_llama: Path, tmp_path: Path):
    from dataclasses import replace

    source, options = open_source(tiny_llama), replace(AWQ, cache=tmp_path)
    steps = plan(source, options).steps
    assert "environment" in steps[0].title
    assert steps[0].disk_bytes == environment.SIZE_BYTES
    environment.ready(tmp_path, Reporter())
    assert not any("environment" in step.title for step in plan(source, options).steps)
    alike = Int4Settings(algorithm="awq", awq=AwqSettings(scales="none"))
    without = replace(options, cache=tmp_path / "other", settings=Settings(int4=alike))
    assert not any("environment" in step.title for step in plan(source, without).steps)
