"""Engines that hang: their callers, those who wait, the next ones, and the end of the runtime."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")

from edge_runtime import EdgeGeneration, EdgeRuntime, hosted
from edge_runtime.generation import Watching
from edge_runtime.hands import Hands
from edge_runtime.stalls import StallWatch
from nearfar.bundle import BundleStore
from nearfar.engines.base import CancelToken
from nearfar.engines.slots import SlotGate
from nearfar.errors import Cancelled, DeadlineExceeded, EngineError
from nearfar.generation import GenerationChunk
from nearfar.patience import Patience
from nearfar.units import Deadline
from tests.support.tiny import write_tiny_tensor_bundle

X = {"x": np.array([[1, 2, 3, 4]], np.float32)}
#: Far more than a tiny model takes, and soon over.
SHORT = Patience(first_s=0.15, token_s=0.15, is_cold=False)
PATIENCE_S = 20.0


class Wedge:
    """Stands where an engine stands; hangs while it is told to."""

    def __init__(self, engine, *, heeds: bool = False) -> None:
        self._engine = engine
        self.heeds = heeds
        self.go_on = threading.Event()
        self.inside = threading.Event()
        self.hangs = True
        for name in ("variant_id", "execution_provider", "inputs", "outputs", "close"):
            setattr(self, name, getattr(engine, name))

    def infer(self, feeds, cancel=None):
        self.inside.set()
        if self.hangs:
            if self.heeds:
                cancel.on_cancel(self.go_on.set)
            self.go_on.wait(PATIENCE_S)
        return self._engine.infer(feeds, cancel)


@pytest.fixture
def told():
    return []


@pytest.fixture
def runtime(tmp_path, told):
    write_tiny_tensor_bundle(tmp_path / "tiny")
    with EdgeRuntime(BundleStore(tmp_path), on_stall=told.append) as runtime:
        runtime.warm_up("tiny")
        yield runtime


def wedge(runtime, model="tiny", **options) -> Wedge:
    loaded = runtime._hosted[model, None].loaded
    loaded._tensors = loaded.engine = Wedge(loaded.engine, **options)
    return loaded.engine


def past_its_time(monkeypatch) -> None:
    """What hangs has had its time to end."""
    monkeypatch.setattr(hosted, "END_S", 0.0)


def test_a_call_that_hangs_is_given_up_and_told_of_in_words(runtime, told):
    engine = wedge(runtime)
    with pytest.raises(EngineError, match="'tiny' on this device has been silent for") as caught:
        runtime.infer("tiny", X, patience=SHORT)
    assert caught.value.retryable
    assert [(stall.model, stall.phase) for stall in told] == [("tiny", "batch")]
    assert told[0].silent_ms >= 150
    engine.go_on.set()


def test_those_who_wait_for_a_slot_are_told_as_well(runtime, told):
    engine, errors = wedge(runtime), []

    def call():
        with pytest.raises(EngineError, match="has been silent") as caught:
            runtime.infer("tiny", X, patience=SHORT)
        errors.append(caught.value)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(PATIENCE_S)
    assert len(errors) == 4
    assert len(told) == 1
    engine.go_on.set()


def test_who_comes_next_hears_of_it_at_once_until_it_has_had_its_time_to_end(runtime, monkeypatch):
    engine = wedge(runtime)
    monkeypatch.setattr(hosted, "END_S", 1e6)
    for _ in range(2):
        with pytest.raises(EngineError, match="has been silent"):
            runtime.infer("tiny", X, patience=SHORT)
    assert runtime.lost_sessions("tiny") == 0
    engine.go_on.set()


def test_a_session_that_does_not_end_is_left_and_the_model_loaded_anew(runtime, monkeypatch):
    past_its_time(monkeypatch)
    engine = wedge(runtime)
    with pytest.raises(EngineError):
        runtime.infer("tiny", X, patience=SHORT)
    assert runtime.infer("tiny", X, patience=SHORT).outputs["y"].shape == (1, 3)
    assert runtime.lost_sessions("tiny") == 1
    engine.go_on.set()
    ends_s = time.monotonic() + PATIENCE_S
    while runtime.lost_sessions("tiny"):
        assert time.monotonic() < ends_s, "the session that ended is still counted"
        time.sleep(0.005)


def test_no_more_than_a_few_sessions_are_lost(runtime, monkeypatch):
    past_its_time(monkeypatch)
    engines = []
    for _ in range(hosted.MOST_LOST + 1):
        hosting = runtime._hosted["tiny", None]
        hosting.refuse_if_hung()
        runtime.warm_up("tiny")
        engines.append(wedge(runtime))
        with pytest.raises(EngineError, match="has been silent"):
            runtime.infer("tiny", X, patience=SHORT)
    with pytest.raises(EngineError, match="3 sessions of 'tiny' hang") as caught:
        runtime.infer("tiny", X, patience=SHORT)
    assert "Restart" in caught.value.fix
    assert sum(thread.name == "nearfar-engine" for thread in threading.enumerate()) >= 3
    for engine in engines:
        engine.go_on.set()


def test_an_engine_that_ends_when_it_is_told_keeps_its_session(runtime, told):
    engine = wedge(runtime, heeds=True)
    with pytest.raises(EngineError, match="has been silent"):
        runtime.infer("tiny", X, patience=SHORT)
    ends_s = time.monotonic() + PATIENCE_S
    while runtime.state("tiny").running:
        assert time.monotonic() < ends_s
        time.sleep(0.005)
    engine.hangs = False
    assert runtime.infer("tiny", X, patience=SHORT).outputs["y"].shape == (1, 3)
    assert runtime._hosted["tiny", None].loaded.engine is engine
    assert len(told) == 1


def test_a_deadline_is_kept_although_the_engine_does_not_look_up(runtime, told):
    engine = wedge(runtime)
    patience = Patience(first_s=0.6, token_s=0.6, is_cold=False)
    with pytest.raises(DeadlineExceeded):
        runtime.infer("tiny", X, patience=patience, deadline=Deadline.after_ms(50))
    ends_s = time.monotonic() + PATIENCE_S
    while not told:  # nobody waits for it any more, and still it is noticed
        assert time.monotonic() < ends_s, "what was left at its deadline is not watched"
        time.sleep(0.005)
    engine.go_on.set()


def test_closing_does_not_wait_for_what_hangs(tmp_path):
    write_tiny_tensor_bundle(tmp_path / "tiny")
    runtime = EdgeRuntime(BundleStore(tmp_path))
    runtime.warm_up("tiny")
    engine = wedge(runtime)
    with pytest.raises(EngineError):
        runtime.infer("tiny", X, patience=SHORT)
    runtime.close()
    assert not engine.go_on.is_set()
    engine.go_on.set()


def test_closing_ends_its_wait_when_what_runs_turns_out_to_hang(tmp_path, monkeypatch):
    write_tiny_tensor_bundle(tmp_path / "tiny")
    runtime = EdgeRuntime(BundleStore(tmp_path))
    runtime.warm_up("tiny")
    monkeypatch.setattr("edge_runtime.runtime._CLOSE_TIMEOUT_S", 1e6)
    engine = wedge(runtime)
    errors = []

    def call():
        try:
            runtime.infer("tiny", X, patience=SHORT)
        except EngineError as error:
            errors.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    assert engine.inside.wait(PATIENCE_S)
    runtime.close()
    caller.join(PATIENCE_S)
    assert len(errors) == 1
    engine.go_on.set()


def test_a_direct_call_that_heeds_is_ended_with_the_error_of_a_stall(runtime, told):
    engine = wedge(runtime, heeds=True)
    direct = runtime.direct("tiny")
    with pytest.raises(EngineError, match="has been silent"):
        direct.infer(X, None, SHORT)
    assert [stall.phase for stall in told] == ["batch"]
    assert direct.infer(X) is None  # it decides anew
    engine.hangs = False
    assert runtime.direct("tiny").infer(X)[0]["y"].shape == (1, 3)


def test_direct_calls_that_answer_are_never_disturbed(runtime, told):
    direct = runtime.direct("tiny")
    patience = Patience(first_s=1.5, token_s=1.5, is_cold=True)
    ends_s = time.monotonic() + 0.3
    while time.monotonic() < ends_s:
        assert direct.infer(X, None, patience)[0]["y"].shape == (1, 3)
    assert told == []


class Stuck:
    """Chunks that stop coming; ends when it is told to, unless it is deaf."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.go_on = threading.Event()
        self.ended = threading.Event()

    def chunks(self):
        try:
            for index in range(8):
                if index == self.after:
                    self.go_on.wait(PATIENCE_S)
                yield GenerationChunk(index=index, text=f"t{index} ")
        finally:
            self.ended.set()


@pytest.mark.parametrize(("after", "phase"), [(0, "prompt"), (3, "token")])
def test_an_answer_that_hangs_is_given_up_where_it_is_and_ends_later(after, phase):
    stuck, told, gate = Stuck(after), [], SlotGate(1, 4)
    hands, watch, cancel = Hands(), StallWatch(), CancelToken()
    generation = EdgeGeneration(
        stuck.chunks(), slot=gate.acquire(), deadline=Deadline(), cancel=cancel, variant="v",
        execution_provider="CPUExecutionProvider",
        watching=Watching("tiny", SHORT, hands, watch, told.append),
    )  # fmt: skip
    texts = []
    with pytest.raises(EngineError, match="has been silent"):
        texts.extend(chunk.text for chunk in generation)
    assert texts == [f"t{index} " for index in range(after)]
    assert [stall.phase for stall in told] == [phase]
    assert cancel.is_cancelled
    with pytest.raises(Cancelled):
        next(generation)
    generation.close()
    assert gate.running()  # it is still inside
    stuck.go_on.set()
    assert stuck.ended.wait(PATIENCE_S)
    ends_s = time.monotonic() + PATIENCE_S
    while gate.running():
        assert time.monotonic() < ends_s, "the slot was not given back"
        time.sleep(0.005)
    watch.close()
    hands.close()


def test_a_real_run_that_is_watched_answers_and_can_be_ended_by_the_library(runtime, told):
    cancel = CancelToken()
    patience = Patience(first_s=30.0, token_s=1.0)
    result = runtime.infer("tiny", X, patience=patience, cancel=cancel)
    assert result.outputs["y"].shape == (1, 3)
    assert cancel.handle is not None
    assert not cancel.handle.terminate
    cancel.cancel()
    with pytest.raises(Cancelled):
        runtime.infer("tiny", X, patience=patience, cancel=cancel)
    assert told == []


_HANGS = """
import os, sys
import numpy as np
from edge_runtime import EdgeRuntime
from nearfar.bundle import BundleStore
from nearfar.errors import EngineError
from nearfar.patience import Patience

runtime = EdgeRuntime(BundleStore(sys.argv[1]))
runtime.warm_up("tiny")
loaded = runtime._hosted["tiny", None].loaded
reading, _ = os.pipe()


class Deaf:
    def __getattr__(self, name):
        return getattr(loaded.engine, name)

    def infer(self, feeds, cancel=None):
        os.read(reading, 1)  # for ever, and without Python's lock


loaded._tensors = Deaf()
try:
    feeds, patience = {"x": np.ones((1, 4), np.float32)}, Patience(first_s=0.1, token_s=1)
    runtime.infer("tiny", feeds, patience=patience)
except EngineError as error:
    sys.stdout.write(error.code)
"""


def test_a_process_ends_although_an_engine_hangs_and_nobody_closed_anything(tmp_path):
    write_tiny_tensor_bundle(tmp_path / "tiny")
    done = subprocess.run(
        [sys.executable, "-c", _HANGS, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "engine"), done.stderr
