"""Text generation with the real small language model."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from nearfar.bundle import BundleStore
from nearfar.engines import load_engine
from nearfar.engines.base import CancelToken, GenerationEngine, SessionOptions
from nearfar.engines.token_text import Seam
from nearfar.errors import EngineError, InvalidInput
from nearfar.generation import ChatMessage, GenerationOptions, Prompt

pytestmark = pytest.mark.models
pytest.importorskip("onnxruntime_genai", reason="needs the package onnxruntime-genai")

QUESTION = Prompt(messages=(ChatMessage("user", "What is the capital of Germany?"),))
STORY = Prompt(text="Once upon a time, in a village by the sea,")


@pytest.fixture(scope="module")
def bundle(bundles_dir):
    return BundleStore(bundles_dir).open("assistant")


@pytest.fixture(scope="module")
def engine(bundle):
    engine = load_engine(bundle, "int4")
    assert isinstance(engine, GenerationEngine)
    yield engine
    engine.close()


def run(engine, prompt, *, cancel=None, **options):
    options.setdefault("max_new_tokens", 16)
    return list(engine.generate(prompt, GenerationOptions(**options), cancel=cancel))


def text_of(chunks):
    return "".join(chunk.text for chunk in chunks)


def test_the_model_knows_the_capital_of_germany(engine):
    chunks = run(engine, QUESTION)
    assert "Berlin" in text_of(chunks)
    assert engine.execution_provider == "CPUExecutionProvider"


def test_indices_have_no_gaps_and_only_the_last_chunk_says_how_it_ended(engine):
    chunks = run(engine, STORY, max_new_tokens=9)
    assert [chunk.index for chunk in chunks] == list(range(10))
    *pieces, last = chunks
    assert all(piece.finish_reason is None and piece.usage is None for piece in pieces)
    assert last.finish_reason == "length"
    assert last.usage.completion_tokens == 9
    assert last.usage.prompt_tokens == engine.count_prompt_tokens(STORY)


def test_greedy_answers_are_the_same_every_time(engine):
    assert run(engine, STORY) == run(engine, STORY)


def test_an_answer_that_is_complete_ends_with_stop(engine):
    prompt = Prompt(
        messages=(
            ChatMessage("user", "What is 1+1?"),
            ChatMessage("assistant", "2"),
            ChatMessage("user", "Reply with one sentence: capital of France?"),
        ),
        answer_so_far="The capital of France is Paris.",
    )
    (last,) = run(engine, prompt)
    assert (last.index, last.finish_reason, last.text) == (0, "stop", "")
    assert last.usage.completion_tokens == 0


def test_every_cut_of_an_answer_is_continued_to_the_same_answer(engine):
    whole = text_of(run(engine, QUESTION, max_new_tokens=8))
    # Also inside words and after a space, where the tokens of the two parts are not those of the
    # whole answer.
    for cut in range(1, len(whole)):
        prompt = Prompt(messages=QUESTION.messages, answer_so_far=whole[:cut])
        rest = text_of(run(engine, prompt, max_new_tokens=12))
        assert (whole[:cut] + rest).startswith(whole), whole[:cut]


def test_raw_text_is_continued_without_a_template(engine):
    assert engine.count_prompt_tokens(STORY) < engine.count_prompt_tokens(
        Prompt(messages=(ChatMessage("user", STORY.text),))
    )
    first = text_of(run(engine, STORY))
    assert first.startswith((" ", "\n"))  # the space before the next word is not lost


def test_a_stop_string_across_tokens_ends_the_answer_and_is_not_part_of_it(engine):
    whole = text_of(run(engine, STORY, max_new_tokens=24))
    stop = whole[9:17]  # begins and ends inside words
    chunks = run(engine, STORY, max_new_tokens=24, stop=("never said", stop))
    assert text_of(chunks) == whole[: whole.index(stop)]
    assert chunks[-1].finish_reason == "stop_string"
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))


def test_text_held_back_for_a_stop_string_comes_at_the_end(engine):
    whole = text_of(run(engine, STORY, max_new_tokens=8))
    chunks = run(engine, STORY, max_new_tokens=8, stop=(whole[-5:] + " and nothing of it",))
    assert text_of(chunks) == whole
    assert chunks[-1].text


def test_a_seed_makes_sampling_reproducible(engine):
    options = {"temperature": 1.5, "top_p": 0.95, "top_k": 100, "max_new_tokens": 24}
    first, again = (text_of(run(engine, STORY, seed=11, **options)) for _ in range(2))
    assert first == again
    assert len({text_of(run(engine, STORY, seed=seed, **options)) for seed in range(4)}) > 1


def test_without_a_seed_samples_differ(engine):
    options = {"temperature": 2.0, "max_new_tokens": 24}
    assert len({text_of(run(engine, STORY, **options)) for _ in range(4)}) > 1


def test_a_repetition_penalty_changes_a_repetitive_answer(engine):
    prompt = Prompt(text="a a a a a a a a a a a a")
    assert text_of(run(engine, prompt)) != text_of(run(engine, prompt, repetition_penalty=2.0))


def test_cancelling_ends_the_answer_after_the_current_token(engine):
    cancel = CancelToken()
    chunks = []
    for chunk in engine.generate(STORY, GenerationOptions(max_new_tokens=64), cancel=cancel):
        chunks.append(chunk)
        if chunk.index == 2:
            cancel.cancel()
    assert chunks[-1].finish_reason == "cancelled"
    assert chunks[-1].usage.completion_tokens == 3


def test_cancelling_stops_the_prompt_from_being_processed(engine):
    cancel = CancelToken()
    cancel.cancel()
    (last,) = run(engine, Prompt(text="word " * 6000), cancel=cancel)
    assert last.finish_reason == "cancelled"


def test_other_threads_go_on_while_it_computes_and_can_end_it(engine, monkeypatch):
    monkeypatch.setattr(engine, "_piece_tokens", 512)  # the whole prompt at once
    cancel, ended = CancelToken(), []
    prompt = Prompt(text="The tide comes in and the tide goes out. " * 40)

    def read() -> None:
        ended.extend(run(engine, prompt, max_new_tokens=200, cancel=cancel))

    reader = threading.Thread(target=read)
    reader.start()
    beats = 0
    while beats < 20 and reader.is_alive():
        time.sleep(0.001)
        beats += 1
    assert beats == 20  # with Python's lock held, one beat would take the whole prompt
    cancel.cancel()
    reader.join()
    assert ended[-1].finish_reason == "cancelled"
    assert len(ended) == 1  # in the middle of the prompt


def test_a_failure_of_the_library_is_told_in_its_words(engine):
    from nearfar.engines import genai_native as native

    generator = native.Generator(engine._model, {"max_length": 8, "do_sample": False})
    with pytest.raises(RuntimeError, match="max"):
        generator.append_tokens(list(range(100, 140)))
    generator.close()
    generator.close()
    generator.terminate()  # nothing is left to end
    with pytest.raises(RuntimeError, match="closed"):
        generator.generate_next_token()
    with pytest.raises(RuntimeError):
        native.Model(Path("/nowhere"), "cpu", "{}")


def test_a_prompt_in_pieces_gives_the_same_answer_as_in_one(engine, monkeypatch):
    prompt = Prompt(text=" ".join(["The tide comes in and the tide goes out."] * 6))
    monkeypatch.setattr(engine, "_piece_tokens", 512)
    whole = text_of(run(engine, prompt, max_new_tokens=12))
    monkeypatch.setattr(engine, "_piece_tokens", 7)
    assert text_of(run(engine, prompt, max_new_tokens=12)) == whole


def test_closing_the_iterator_frees_the_generator_at_once(engine, monkeypatch):
    from nearfar.engines import genai_native as native

    freed = threading.Event()

    class Watched(native.Generator):
        def close(self):
            super().close()
            freed.set()

    monkeypatch.setattr(native, "Generator", Watched)
    chunks = engine.generate(STORY, GenerationOptions(max_new_tokens=64))
    next(chunks)
    assert not freed.is_set()
    chunks.close()
    assert freed.is_set()


def test_emoji_and_japanese_come_out_whole(engine):
    prompt = Prompt(text="🙂🙂🙂🙂🙂🙂 日本語日本語日本語日本語 🙂🙂🙂🙂🙂🙂 日本語日本語")
    for penalty in (1.0, 1.05):
        chunks = run(engine, prompt, max_new_tokens=40, repetition_penalty=penalty)
        assert "\N{REPLACEMENT CHARACTER}" not in text_of(chunks)
        assert any(not chunk.text for chunk in chunks[:-1])  # a character still incomplete
        assert any(ord(letter) > 0x3000 for letter in text_of(chunks))


def test_two_answers_at_once_do_not_mix(engine):
    expected = [text_of(run(engine, prompt)) for prompt in (QUESTION, STORY)]
    first = engine.generate(QUESTION, GenerationOptions(max_new_tokens=16))
    second = engine.generate(STORY, GenerationOptions(max_new_tokens=16))
    found = ["", ""]
    for pair in itertools.zip_longest(first, second):
        for position, chunk in enumerate(pair):
            found[position] += chunk.text if chunk else ""
    assert found == expected


# -- refusals --------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context_says_both_lengths(engine):
    prompt = Prompt(text="word " * 9000)
    with pytest.raises(InvalidInput) as caught:
        engine.generate(prompt, GenerationOptions())
    assert caught.value.field == "prompt"
    assert str(engine.count_prompt_tokens(prompt)) in caught.value.problem
    assert str(engine.context_length_tokens) in caught.value.problem


def test_more_new_tokens_than_fit_say_how_many_do(engine):
    with pytest.raises(InvalidInput) as caught:
        engine.generate(STORY, GenerationOptions(max_new_tokens=engine.context_length_tokens))
    fitting = engine.context_length_tokens - engine.count_prompt_tokens(STORY)
    assert caught.value.field == "max_new_tokens"
    assert f"at most {fitting} new tokens" in caught.value.fix


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt(),
        Prompt(text=""),
        Prompt(answer_so_far="x"),
        Prompt(text="x", messages=QUESTION.messages),
    ],
)
def test_a_prompt_that_is_empty_or_double_is_refused(engine, prompt):
    with pytest.raises(InvalidInput, match="Give either text or messages"):
        engine.generate(prompt, GenerationOptions())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**31),
        ("stop", ("",)),
    ],
)
def test_an_option_out_of_range_is_named(engine, name, value):
    with pytest.raises(InvalidInput) as caught:
        engine.generate(STORY, GenerationOptions(**{name: value}))
    assert caught.value.field == name


def test_a_provider_that_is_not_there_is_an_error_where_it_is_required(bundle):
    options = SessionOptions(
        execution_providers=("QNNExecutionProvider", "CPUExecutionProvider"),
        require_execution_provider=True,
    )
    with pytest.raises(EngineError, match="QNNExecutionProvider is not in the installed"):
        load_engine(bundle, "int4", options)


def test_a_provider_that_is_not_there_falls_back_to_the_next(bundle):
    options = SessionOptions(
        execution_providers=("QNNExecutionProvider", "CPUExecutionProvider"), threads=1
    )
    engine = load_engine(bundle, "int4", options)
    assert engine.execution_provider == "CPUExecutionProvider"
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.generate(STORY, GenerationOptions())


def test_a_program_that_ends_half_way_through_an_answer_ends_quietly(bundles_dir):
    program = (
        "from nearfar.bundle import BundleStore\n"
        "from nearfar.engines import load_engine\n"
        "from nearfar.generation import GenerationOptions, Prompt\n"
        f"engine = load_engine(BundleStore({str(bundles_dir)!r}).open('assistant'), 'int4')\n"
        "chunks = engine.generate(Prompt(text='Hello'), GenerationOptions())\n"
        "next(chunks)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_context_of_the_manifest_bounds_that_of_the_model(engine, bundle):
    folder = bundle.variant_entry(bundle.variant("int4"))
    config = json.loads((folder / "genai_config.json").read_text())
    assert engine.context_length_tokens <= config["model"]["context_length"]
    assert engine.context_length_tokens <= bundle.manifest.context_length_tokens


def test_white_space_may_have_been_written_in_shorter_tokens(bundles_dir):
    tokenizer = Tokenizer.from_file(str(bundles_dir / "assistant" / "fp32" / "tokenizer.json"))
    answer = "One.\n\n"
    tokens = tokenizer.encode("Say it. " + answer).ids
    (line_break,) = tokenizer.encode("\n").ids
    seam = Seam(tokenizer, tokens, answer)
    assert len(seam.tail) == 1  # it is read as one token
    assert seam.spare_tokens == 1
    logits = np.zeros(tokenizer.get_vocab_size(), np.float32)
    logits[line_break] = 1.0
    assert seam.choose(0, logits) == (line_break, "")
    assert seam.tail == [line_break, line_break]
    assert seam.choose(1, logits) == (line_break, "")
    assert tokenizer.decode([*seam.before, *seam.tail]).endswith(answer)
