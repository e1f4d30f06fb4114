"""The `nearfar` command: finding, running and explaining subcommands."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nearfar import cli
from nearfar.errors import BundleError, InvalidInput


def test_help_lists_every_registered_command_with_a_summary(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("quickstart", "infer", "chat", "explain", "doctor", "policy", "convert", "bundle",
                 "edge", "cloud", "bench"):  # fmt: skip
        line = next(line for line in text.splitlines() if line.strip().startswith(name + " "))
        assert len(line.split()) > 3, f"{name} has no summary"
        assert "not installed" not in line


def test_unknown_command_suggests_the_nearest_and_exits_2(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["quikstart"]) == 2
    assert "nearfar quickstart" in capsys.readouterr().err


def test_version_is_printed(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("nearfar 0.")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BundleError("The bundle is broken", fix="Convert it again"), 1),
        (InvalidInput("The input is wrong", fix="Correct it"), 2),
    ],
)
def test_errors_become_problem_fix_and_exit_status(error, status, capsys):
    def command() -> None:
        raise error

    assert cli.run(command, [], program="nearfar test") == status
    text = capsys.readouterr().err
    assert error.problem in text
    assert error.fix in text
    assert "Traceback" not in text


def test_interrupt_exits_130():
    def command() -> None:
        raise KeyboardInterrupt

    assert cli.run(command, [], program="nearfar test") == 130


def test_running_one_command_does_not_import_the_others():
    code = (
        "import sys; from nearfar.cli import main; main(['policy', '--help']); "
        "heavy = {'torch', 'onnxruntime', 'transformers', 'converters.commands',"
        " 'cloud_runtime.commands', 'websockets'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
