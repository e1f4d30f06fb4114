"""The edge runtime on tiny real models: loading, queueing, timings, errors, closing."""

from __future__ import annotations

import threading
import time

import msgspec
import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")

from edge_runtime import EdgeRuntime
from edge_runtime import runtime as runtime_module
from nearfar.bundle import BundleStore
from nearfar.engines.devices import Device
from nearfar.engines.model import LoadedModel
from nearfar.errors import (
    BundleError,
    Cancelled,
    DeadlineExceeded,
    EngineError,
    InvalidInput,
    ModelNotFound,
    Overloaded,
)
from nearfar.units import Deadline
from tests.support.tiny import write_tiny_classifier_bundle, write_tiny_tensor_bundle

X = {"x": np.array([[1, 2, 3, 4]], np.float32)}

#: Rows that keep the tiny model busy for about a tenth of a second.
SLOW = {"x": np.zeros((4_000_000, 4), np.float32)}

PATIENCE_S = 20.0


@pytest.fixture
def store(tmp_path):
    write_tiny_tensor_bundle(tmp_path / "tiny")
    write_tiny_classifier_bundle(tmp_path / "bytes", name="bytes")
    return BundleStore(tmp_path)


@pytest.fixture
def runtime(store):
    with EdgeRuntime(store) as runtime:
        yield runtime


class Call(threading.Thread):
    def __init__(self, function):
        super().__init__(daemon=True)
        self.result = self.error = None
        self._function = function
        self.start()

    def run(self):
        try:
            self.result = self._function()
        except Exception as error:
            self.error = error


def wait_until(condition):
    give_up_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_s, "it never came to that"
        time.sleep(0.001)


def test_the_device_runs_the_variant_meant_for_it(runtime):
    assert runtime.describe("tiny").variant.id == "int8"
    assert not runtime.is_loaded("tiny")
    result = runtime.infer("tiny", X)
    assert runtime.is_loaded("tiny")
    assert result.variant == "int8"
    assert result.execution_provider == "CPUExecutionProvider"
    assert result.outputs["y"].shape == (1, 3)
    assert result.queue_s == 0
    assert 0 < result.compute_s < PATIENCE_S


def test_bytes_are_preprocessed_here(runtime):
    result = runtime.infer("bytes", form="bytes", items=[b"text " * 20, bytes([250]) * 100])
    assert result.outputs["scores"].argmax(axis=1).tolist() == [0, 1]


def test_models_are_those_of_the_store(runtime):
    assert [manifest.name for manifest in runtime.models()] == ["bytes", "tiny"]


def test_the_newest_version_runs_unless_another_is_asked_for(tmp_path):
    write_tiny_tensor_bundle(tmp_path / "old", version="1.0.0")
    write_tiny_tensor_bundle(tmp_path / "new", version="1.2.0")
    with EdgeRuntime(BundleStore(tmp_path)) as runtime:
        assert runtime.describe("tiny").manifest.version == "1.2.0"
        assert runtime.describe("tiny", "1.0.0").manifest.version == "1.0.0"
        runtime.warm_up("tiny")
        assert runtime.is_loaded("tiny", "1.2.0")  # one model, however it is named
        assert not runtime.is_loaded("tiny", "1.0.0")


def test_callers_that_come_together_wait_for_one_load(runtime, monkeypatch):
    loads = []

    class Slow(LoadedModel):
        def __init__(self, *arguments):
            loads.append(threading.get_ident())
            time.sleep(0.1)
            super().__init__(*arguments)

    monkeypatch.setattr(runtime_module, "LoadedModel", Slow)
    calls = [Call(lambda: runtime.infer("tiny", X)) for _ in range(8)]
    for call in calls:
        call.join(PATIENCE_S)
    assert [call.error for call in calls] == [None] * 8
    assert len(loads) == 1


def test_a_load_that_failed_is_tried_again_by_the_next_call(runtime, store):
    file = store.root / "tiny" / "int8" / "model.onnx"
    whole = file.read_bytes()
    runtime.describe("tiny")
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(BundleError, match="SHA-256"):
        runtime.infer("tiny", X)
    assert not runtime.is_loaded("tiny")
    file.write_bytes(whole)
    assert runtime.infer("tiny", X).variant == "int8"


def test_waiting_for_a_load_ends_with_the_deadline(runtime, monkeypatch):
    go_on = threading.Event()

    class Stuck(LoadedModel):
        def __init__(self, *arguments):
            go_on.wait(PATIENCE_S)
            super().__init__(*arguments)

    monkeypatch.setattr(runtime_module, "LoadedModel", Stuck)
    first = Call(lambda: runtime.infer("tiny", X))
    hosted = runtime._host("tiny", None)
    wait_until(hosted.load_lock.locked)
    with pytest.raises(DeadlineExceeded):
        runtime.infer("tiny", X, deadline=Deadline.after_ms(50))
    go_on.set()
    first.join(PATIENCE_S)
    assert first.error is None


def test_who_loads_first_is_told_at_its_deadline_and_the_next_finds_it_loaded(runtime, monkeypatch):
    go_on = threading.Event()

    class Slow(LoadedModel):
        def __init__(self, *arguments):
            go_on.wait(PATIENCE_S)
            super().__init__(*arguments)

    monkeypatch.setattr(runtime_module, "LoadedModel", Slow)
    with pytest.raises(DeadlineExceeded, match="was loaded on this device"):
        runtime.infer("tiny", X, deadline=Deadline.after_ms(50))
    go_on.set()
    wait_until(lambda: runtime.is_loaded("tiny"))
    assert runtime.infer("tiny", X, deadline=Deadline.after_ms(60_000)).variant == "int8"


def test_calls_of_one_model_take_turns_and_say_how_long_they_waited(runtime):
    runtime.warm_up("tiny")
    calls = [Call(lambda: runtime.infer("tiny", SLOW)) for _ in range(3)]
    wait_until(lambda: runtime.state("tiny").running == 1)
    for call in calls:
        call.join(PATIENCE_S)
    waits = sorted(call.result.queue_s for call in calls)
    shortest = min(call.result.compute_s for call in calls)
    assert waits[0] == 0
    assert waits[1] > 0.5 * shortest
    assert waits[2] > 1.5 * shortest


def test_another_model_does_not_wait(runtime):
    runtime.warm_up("tiny")
    runtime.warm_up("bytes")
    busy = Call(lambda: runtime.infer("tiny", SLOW))
    wait_until(lambda: runtime.state("tiny").running == 1)
    assert runtime.infer("bytes", form="bytes", items=[b"x" * 50]).queue_s == 0
    busy.join(PATIENCE_S)


def test_the_state_of_a_busy_model_tells_the_expected_wait(runtime):
    runtime.warm_up("tiny")
    assert runtime.state("tiny").expected_wait_s == 0
    busy = Call(lambda: runtime.infer("tiny", SLOW, expected_s=50.0))
    wait_until(lambda: runtime.state("tiny").running == 1 or busy.error)
    assert 40 < runtime.state("tiny").expected_wait_s <= 50
    busy.join(PATIENCE_S)


def test_a_deadline_ends_waiting_for_a_slot(runtime):
    runtime.warm_up("tiny")
    busy = Call(lambda: runtime.infer("tiny", SLOW))
    wait_until(lambda: runtime.state("tiny").running == 1)
    with pytest.raises(DeadlineExceeded):
        runtime.infer("tiny", X, deadline=Deadline.after_ms(5))
    busy.join(PATIENCE_S)
    assert runtime.state("tiny").waiting == 0


def test_more_calls_than_may_wait_are_refused(store):
    with EdgeRuntime(store, max_waiting_per_model=0) as runtime:
        runtime.warm_up("tiny")
        busy = Call(lambda: runtime.infer("tiny", SLOW))
        wait_until(lambda: runtime.state("tiny").running == 1)
        with pytest.raises(Overloaded, match="'tiny'"):
            runtime.infer("tiny", X)
        busy.join(PATIENCE_S)


# -- errors ----------------------------------------------------------------------------------------


def test_an_unknown_model_is_not_found_and_those_there_are_named(runtime):
    for ask in (runtime.describe, runtime.infer, runtime.state, runtime.warm_up):
        with pytest.raises(ModelNotFound, match=r"'nope'.*bytes 1\.0\.0, tiny 1\.0\.0"):
            ask("nope")
    assert not runtime.is_loaded("nope")


def test_a_device_that_can_run_nothing_says_why_for_every_variant(store):
    bare = Device(
        machine="bare", execution_providers=(), physical_cores=1, memory_bytes=1 << 30,
        has_genai=False,
    )  # fmt: skip
    runtime = EdgeRuntime(store, device=bare)
    with pytest.raises(EngineError) as caught:
        runtime.describe("tiny")
    assert caught.value.problem.count("onnxruntime is not installed") == 2


def test_a_variant_that_cannot_run_here_is_passed_over(store):
    bundle = store.open("tiny")
    needy = tuple(
        msgspec.structs.replace(
            variant,
            requirements=msgspec.structs.replace(
                variant.requirements, memory_bytes=(1 << 60) if variant.id == "int8" else 0
            ),
        )
        for variant in bundle.manifest.variants
    )
    path = bundle.path / "manifest.json"
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(bundle.manifest, variants=needy)))
    with EdgeRuntime(BundleStore(store.root)) as runtime:
        assert runtime.infer("tiny", X).variant == "fp32"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"feeds": None}, "There are no inputs"),
        ({"feeds": {"x": np.zeros((1, 5), np.float32)}}, r"expected \[-1, 4\]"),
        ({"form": "text", "items": ["a"]}, "Use tensors"),
    ],
)
def test_wrong_input_is_refused_and_frees_its_slot(runtime, arguments, said):
    with pytest.raises(InvalidInput, match=said):
        runtime.infer("tiny", **arguments)
    assert runtime.state("tiny").running == 0


# -- closing ---------------------------------------------------------------------------------------


def test_closing_waits_for_the_running_and_sends_the_waiting_away(runtime):
    runtime.warm_up("tiny")
    running = Call(lambda: runtime.infer("tiny", SLOW))
    wait_until(lambda: runtime.state("tiny").running == 1)
    waiting = Call(lambda: runtime.infer("tiny", SLOW))
    wait_until(lambda: runtime.state("tiny").waiting == 1)
    runtime.close()
    for call in (running, waiting):
        call.join(PATIENCE_S)
    assert running.error is None
    assert running.result.outputs["y"].shape == (4_000_000, 3)
    assert isinstance(waiting.error, Cancelled)


def test_a_closed_runtime_refuses_and_may_be_closed_again(runtime):
    runtime.warm_up("tiny")
    runtime.close()
    runtime.close()
    assert not runtime.is_loaded("tiny")
    for model in ("tiny", "bytes"):
        with pytest.raises(EngineError, match="closed"):
            runtime.infer(model, X)


def test_only_a_loaded_model_with_a_free_slot_runs_directly(runtime):
    assert runtime.direct("tiny") is None
    runtime.warm_up("tiny")
    call = runtime.direct("tiny")
    outputs, seconds = call.infer(X)
    np.testing.assert_array_equal(outputs["y"], runtime.infer("tiny", X).outputs["y"])
    assert seconds > 0
    busy = Call(lambda: runtime.infer("tiny", SLOW))
    wait_until(lambda: runtime.state("tiny").running == 1)
    assert call.infer(X) is None
    busy.join(PATIENCE_S)
    runtime.close()
    assert call.infer(X) is None
    assert runtime.direct("tiny") is None
