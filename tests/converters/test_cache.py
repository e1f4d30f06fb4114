"""Steps that were done are not done again, whatever ended the conversion before."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from converters import cache as cache_module
from converters.cache import StepCache, clear, contents, digest_of_path
from converters.commands import convert
from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.recipes import base, int8, onnx_model
from converters.settings import Gates, Int8Settings, Settings
from nearfar.bundle import Bundle
from nearfar.bundle.writer import BundleWriter
from nearfar.cli import run
from nearfar.errors import ConfigError
from tests.support.tiny import tensor_model

WEIGHTS = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(tensor_model(WEIGHTS), tmp_path / "scores.onnx")
    return tmp_path / "scores.onnx"


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the steps that were really done."""
    names: list[str] = []

    def watch(module: object, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: object, **keywords: object) -> object:
            names.append(name)
            return real(*arguments, **keywords)

        monkeypatch.setattr(module, name, call)

    watch(onnx_model, "slim")
    watch(onnx_model, "verify_tensors")
    watch(int8.Int8Quantizer, "write")
    watch(base, "measure")
    return names


def make(model: Path, name: str = "b", **options: object) -> Bundle:
    options.setdefault("measure", False)
    chosen = ConversionOptions(
        variants=("fp32", "int8"), name="scores", cache=model.parent / "cache", **options
    )
    return convert_model(model, model.parent / name, chosen)


def tree(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_the_second_time_nothing_is_done_and_the_bundle_is_the_same(model: Path, done: list[str]):
    first = make(model, "a", measure=True)
    assert done
    done.clear()
    second = make(model, "b", measure=True)
    assert done == []
    # Measured figures are taken from the first time too, so even the manifest is the same.
    assert tree(first.path) == tree(second.path)
    second.verify()


def test_it_is_the_same_as_without_a_cache(model: Path):
    cached = make(model, "a")
    make(model, "b")
    plain = ConversionOptions(variants=("fp32", "int8"), name="scores", measure=False)
    assert tree(cached.path) == tree(convert_model(model, model.parent / "c", plain).path)


@pytest.mark.parametrize(
    ("settings", "again"),
    [
        # Another block size makes another int8; fp32 is neither made nor verified again.
        (Settings(int8=Int8Settings(block_size=32)), ["write", "verify_tensors"]),
        (Settings(gates=Gates(min_mean_cosine=0.5)), []),
        (Settings(gates=Gates(min_top1_agreement=0.5)), ["verify_tensors"] * 2),
    ],
)
def test_one_changed_setting_redoes_only_what_depends_on_it(model, done, settings, again):
    make(model, "a")
    done.clear()
    make(model, "b", settings=settings)
    assert done == again


def test_another_source_or_other_versions_are_another_conversion(model, done, monkeypatch):
    make(model, "a")
    done.clear()
    onnx.save(tensor_model(WEIGHTS * 2), model)
    make(model, "b")
    assert "write" in done
    done.clear()
    monkeypatch.setattr(cache_module, "tool_versions", lambda *names: dict.fromkeys(names, "0.1"))
    make(model, "c")
    assert "write" in done
    done.clear()
    monkeypatch.setattr(cache_module, "_code_digest", lambda: "rewritten")
    make(model, "d")
    assert "write" in done


@pytest.mark.parametrize("damage", ["output", "entry.json", "missing"])
def test_a_damaged_result_is_made_anew(model: Path, done: list[str], damage: str):
    first = make(model, "a")
    for entry in (model.parent / "cache" / "quantize-int8").iterdir():
        if damage == "missing":
            (entry / "output").unlink()
        else:
            (entry / damage).write_bytes(b"x" * 40)
    done.clear()
    assert tree(make(model, "b").path) == tree(first.path)
    assert done == ["write"]
    done.clear()
    make(model, "c")
    assert done == []


def test_a_step_that_fails_is_not_remembered(tmp_path: Path):
    cache = StepCache(tmp_path / "cache")

    def fail(target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        cache.output("s", {}, tmp_path / "out", fail, tools=())
    assert not cache.has("s", {}, tools=())
    assert cache.output("s", {}, tmp_path / "out", lambda t: t.write_bytes(b"x") > 0, tools=())
    assert cache.has("s", {}, tools=())


def test_folders_are_kept_whole(tmp_path: Path):
    cache = StepCache(tmp_path / "cache")

    def write(target: Path) -> None:
        (target / "deep").mkdir(parents=True)
        (target / "deep" / "file").write_bytes(b"x")

    assert cache.output("s", {"n": 1}, tmp_path / "a", write, tools=())
    assert cache.output("s", {"n": 1}, tmp_path / "b", lambda _: pytest.fail("made"), tools=())
    assert digest_of_path(tmp_path / "a") == digest_of_path(tmp_path / "b")
    # A file that was put into the entry is not part of what the step made.
    (entry,) = (tmp_path / "cache" / "s").iterdir()
    (entry / "output" / "more").write_bytes(b"y")
    assert cache.output("s", {"n": 1}, tmp_path / "c", write, tools=())
    assert sorted(tree(tmp_path / "c")) == ["deep/file"]


def test_a_step_that_makes_nothing_is_remembered_as_such(tmp_path: Path):
    cache = StepCache(tmp_path / "cache")
    assert not cache.output("s", {}, tmp_path / "out", lambda _: False, tools=())
    assert not cache.output("s", {}, tmp_path / "out", lambda _: pytest.fail("made"), tools=())


def test_a_cache_that_cannot_be_written_does_not_stop_a_conversion(model: Path):
    (model.parent / "cache").write_text("a file")
    make(model).verify()


def test_the_cache_is_shown_and_cleared(model: Path, private_cache: Path, capsys):
    arguments = [str(model), "-o", str(model.parent / "b"), "--no-measure", "--variants", "int8"]
    assert run(convert, arguments, program="nearfar convert") == 0
    steps = {"optimise", "quantize-int8", "verify-tensors", "layer-errors"}
    assert set(contents(private_cache)) == steps
    assert run(convert, ["--show-cache"], program="nearfar convert") == 0
    assert "quantize-int8        1" in capsys.readouterr().out
    assert run(convert, ["--clear-cache"], program="nearfar convert") == 0
    assert list(private_cache.iterdir()) == []
    assert run(convert, [*arguments, "--force", "--no-cache"], program="nearfar convert") == 0
    assert list(private_cache.iterdir()) == []


def test_clear_removes_nothing_but_results(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat").write_text("")
    with pytest.raises(ConfigError, match="not a result"):
        clear(tmp_path)
    assert (tmp_path / "photos" / "cat").exists()


def test_after_kill_9_the_same_command_gives_the_same_bundle(model: Path, private_cache: Path):
    """Killed at random moments, each time continuing with what was kept."""
    folder = model.parent
    command = [
        sys.executable, "-m", "converters", str(model), "--variants", "fp32,int8", "--name", "s",
        "--no-measure", "--cache", str(folder / "cache"), "-o",
    ]  # fmt: skip
    started_s = time.monotonic()
    subprocess.run([*command, str(folder / "whole"), "--no-cache"], check=True, capture_output=True)
    whole_s = time.monotonic() - started_s
    chance = random.Random(7)
    kills = 0
    for _ in range(6):
        process = subprocess.Popen(
            [*command, str(folder / "b"), "--force"], stdout=subprocess.DEVNULL
        )
        try:
            process.wait(chance.uniform(0.2, 1.0) * whole_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
    assert kills
    left = [path for path in folder.iterdir() if path.name.startswith(".b.")]
    for path in left:
        os.utime(path, (0, 0))  # as if the machine had been left alone for a minute
    subprocess.run([*command, str(folder / "b"), "--force"], check=True, capture_output=True)
    assert tree(folder / "b") == tree(folder / "whole")
    assert not [path for path in folder.iterdir() if path.name.startswith(".b.")]


def test_the_work_folder_of_a_living_conversion_is_left_alone(model: Path):
    from converters.pipeline import _remove_stale, work_folder

    with BundleWriter(model.parent / "b"), work_folder(model.parent / "b", keep=False) as work:
        os.utime(work, (0, 0))
        _remove_stale(model.parent, ".b.work-")
        assert work.exists()
