"""Answers of the real small language model through the edge runtime."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from edge_runtime import EdgeRuntime
from nearfar.bundle import BundleStore
from nearfar.engines.base import CancelToken
from nearfar.errors import Cancelled, DeadlineExceeded, EngineError, InvalidInput
from nearfar.generation import GenerationOptions, Prompt
from nearfar.units import Deadline

pytestmark = pytest.mark.models
pytest.importorskip("onnxruntime_genai", reason="needs the package onnxruntime-genai")

STORY = Prompt(text="Once upon a time, in a village by the sea,")
SHORT = GenerationOptions(max_new_tokens=8)
LONG = GenerationOptions(max_new_tokens=2000)


@pytest.fixture(scope="module")
def runtime(bundles_dir):
    with EdgeRuntime(BundleStore(bundles_dir)) as runtime:
        runtime.warm_up("assistant")
        yield runtime


def is_idle(runtime):
    state = runtime.state("assistant")
    return (state.running, state.waiting) == (0, 0)


def test_an_answer_carries_where_it_came_from_and_its_timings(runtime):
    generation = runtime.generate("assistant", STORY, SHORT)
    assert generation.variant == "int4"
    assert generation.execution_provider == "CPUExecutionProvider"
    assert generation.prefill_s is None
    next(generation)
    assert generation.prefill_s > 0
    assert generation.decode_s is None
    assert not is_idle(runtime)
    *_, last = generation
    assert last.usage.completion_tokens == 8
    assert generation.decode_s > 0
    assert generation.queue_s == 0
    assert list(generation) == []


def test_the_last_chunk_frees_the_slot_at_once(runtime):
    generation = runtime.generate("assistant", STORY, SHORT)
    for chunk in generation:
        if chunk.finish_reason is not None:
            assert is_idle(runtime)


def test_closing_half_way_frees_the_slot(runtime):
    with runtime.generate("assistant", STORY, LONG) as generation:
        next(generation)
    assert is_idle(runtime)
    generation.close()
    with pytest.raises(StopIteration):
        next(generation)


def test_dropping_an_answer_frees_the_slot(runtime):
    generation = runtime.generate("assistant", STORY, LONG)
    next(generation)
    del generation
    gc.collect()
    assert is_idle(runtime)


def test_a_deadline_cuts_an_answer_with_an_error(runtime):
    generation = runtime.generate("assistant", STORY, LONG, deadline=Deadline.after_ms(1500))
    received = []
    with pytest.raises(DeadlineExceeded) as caught:
        received.extend(generation)
    assert caught.value.tried == ("edge",)
    assert is_idle(runtime)


def test_a_refused_prompt_takes_no_slot(runtime):
    with pytest.raises(InvalidInput):
        runtime.generate("assistant", Prompt(), SHORT)
    assert is_idle(runtime)


def test_a_text_model_takes_no_tensors(runtime):
    with pytest.raises(InvalidInput, match=r"Use generate\(\)"):
        runtime.infer("assistant", {})


def test_a_second_answer_waits_its_turn_and_can_be_cancelled_there(runtime):
    cancel = CancelToken()
    errors = []

    def second():
        try:
            runtime.generate("assistant", STORY, SHORT, cancel=cancel)
        except Cancelled as error:
            errors.append(error)

    with runtime.generate("assistant", STORY, LONG) as first:
        next(first)
        thread = threading.Thread(target=second)
        thread.start()
        while runtime.state("assistant").waiting == 0:
            time.sleep(0.001)
        cancel.cancel()
        thread.join(10)
    assert len(errors) == 1
    assert is_idle(runtime)


def test_closing_from_another_thread_ends_the_answer_after_its_token(runtime):
    generation = runtime.generate("assistant", STORY, LONG)
    chunks = []
    thread = threading.Thread(target=lambda: chunks.extend(generation))
    thread.start()
    while generation.prefill_s is None:
        time.sleep(0.001)
    generation.close()
    thread.join(10)
    assert not thread.is_alive()
    assert is_idle(runtime)
    assert len(chunks) < 2000


def test_closing_the_runtime_ends_an_answer_that_nobody_reads(bundles_dir):
    runtime = EdgeRuntime(BundleStore(bundles_dir))
    generation = runtime.generate("assistant", STORY, LONG)
    next(generation)
    started_s = time.monotonic()
    runtime.close()
    assert time.monotonic() - started_s < 5
    assert list(generation) == []
    with pytest.raises(EngineError, match="closed"):
        runtime.generate("assistant", STORY, SHORT)


def test_embeddings_of_related_texts_are_closer(runtime):
    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Taxes rose last year."]
    result = runtime.infer("minilm", form="text", items=texts)
    name = runtime.describe("minilm").manifest.embedding_output
    near, kitten, far = result.outputs[name]
    assert near @ kitten > near @ far + 0.2


def test_real_files_get_their_type(runtime, tmp_path):
    from nearfar.processing.classification import top_labels

    python = b"import os\n\ndef main() -> None:\n    print(os.getcwd())\n" * 20
    page = b"<!doctype html><html><head><title>x</title></head><body><p>hello</p></body></html>" * 9
    result = runtime.infer("file-type", form="bytes", items=[python, page])
    manifest = runtime.describe("file-type").manifest
    scores = result.outputs[manifest.label_output]
    assert [top_labels(row, manifest.labels)[0][0] for row in scores] == ["python", "html"]
