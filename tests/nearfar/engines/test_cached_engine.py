"""Text on plain ONNX Runtime: a tiny model whose answers numpy knows."""

from __future__ import annotations

import numpy as np
import pytest

from nearfar.engines import load_engine
from nearfar.engines.base import CancelToken, GenerationEngine
from nearfar.errors import BundleError, EngineError, InvalidInput
from nearfar.generation import ChatMessage, GenerationOptions, Prompt
from tests.support.tiny import tensor_model

pytest.importorskip("onnxruntime")
pytest.importorskip("tokenizers")

from nearfar.engines.cached_engine import CachedDecoding, CachedModel
from nearfar.engines.onnxruntime_engine import ORT_EXCEPTIONS
from nearfar.engines.sampling import Sampler
from tests.support.tiny_text import (
    CONTEXT_TOKENS,
    END,
    WORDS,
    expected_logits,
    write_tiny_text_bundle,
)

STORY = Prompt(text="ba de fi go ku la")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_tiny_text_bundle(tmp_path_factory.mktemp("bundles") / "tiny-text")


@pytest.fixture(scope="module")
def engine(bundle):
    engine = load_engine(bundle, "onnx-fp32")
    assert isinstance(engine, GenerationEngine)
    yield engine
    engine.close()


def tokens_of(text):
    return [WORDS.index(word) for word in text.split()]


def best(tokens):
    return int(expected_logits(tokens)[-1].argmax())


def greedy(text, count):
    """What the model says next, with everything computed anew for every token."""
    tokens, said = tokens_of(text), []
    while len(said) < count and (token := best([*tokens, *said])) != END:
        said.append(token)
    return " ".join(WORDS[token] for token in said)


def run(engine, prompt, *, cancel=None, watch=None, **options):
    options.setdefault("max_new_tokens", 12)
    made = GenerationOptions(**options)
    return list(engine.generate(prompt, made, cancel=cancel, watch=watch))


def text_of(chunks):
    return "".join(chunk.text for chunk in chunks).strip()


def decoding_of(engine, **options):
    return CachedDecoding(engine._model, Sampler(GenerationOptions(**options)))


# -- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (4, 1, 4), (8, 1)])
def test_logits_do_not_depend_on_how_the_tokens_come(engine, pieces):
    tokens = np.random.default_rng(3).integers(2, len(WORDS), 9).tolist()
    cache, found, start = [], [], 0
    for piece in pieces:
        logits, cache = engine._model.run(tokens[start : start + piece], cache, start)
        found.append(logits)
        start += piece
    np.testing.assert_allclose(np.concatenate(found), expected_logits(tokens), rtol=1e-4, atol=1e-4)


def test_every_token_is_computed_once(engine, monkeypatch):
    counts = []
    whole = CachedModel.run

    def counted(self, tokens, cache, seen, options=None):
        counts.append((seen, len(tokens)))
        return whole(self, tokens, cache, seen, options)

    monkeypatch.setattr(CachedModel, "run", counted)
    chunks = run(engine, STORY, max_new_tokens=5)
    assert chunks[-1].finish_reason == "length"
    assert counts[0] == (0, 6)
    assert [seen for seen, _ in counts] == list(np.cumsum([0, *(n for _, n in counts)])[:-1])
    # The answer's last token is not: nobody wants to know what would follow.
    assert sum(count for _, count in counts) == 6 + 5 - 1


def test_a_graph_of_another_kind_is_refused(tmp_path):
    bundle = write_tiny_text_bundle(tmp_path / "b", graph=tensor_model())
    with pytest.raises(BundleError, match="no language model with its KV cache"):
        load_engine(bundle, "onnx-fp32")


def test_a_folder_without_its_settings_is_refused(tmp_path):
    bundle = write_tiny_text_bundle(tmp_path / "b", has_config=False)
    with pytest.raises(BundleError, match=r"generation\.json of tiny-text/onnx-fp32 is missing"):
        load_engine(bundle, "onnx-fp32")


# -- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ba", "ba de fi go ku la", "to to to", "si ru pe no mi lu ki"])
def test_greedy_answers_are_those_that_numpy_gives(engine, text):
    assert text_of(run(engine, Prompt(text=text))) == greedy(text, 12)


def test_a_conversation_goes_through_the_chat_template(engine):
    prompt = Prompt(messages=(ChatMessage("user", "ba de"), ChatMessage("user", "fi")))
    assert engine.count_prompt_tokens(prompt) == 6
    assert text_of(run(engine, prompt)) == greedy("<s> ba de <s> fi <s>", 12)


def test_indices_have_no_gaps_and_only_the_last_chunk_says_how_it_ended(engine):
    chunks = run(engine, STORY, max_new_tokens=4)
    assert [chunk.index for chunk in chunks] == list(range(5))
    *pieces, last = chunks
    assert all(piece.finish_reason is None and piece.usage is None for piece in pieces)
    assert (last.finish_reason, last.usage.prompt_tokens) == ("length", 6)
    assert last.usage.completion_tokens == 4


def test_the_end_token_ends_the_answer_and_is_not_part_of_it(engine):
    pairs = (f"{one} {other}" for one in WORDS[2:] for other in WORDS[2:])
    text = next(pair for pair in pairs if best(tokens_of(pair)) == END)
    (last,) = run(engine, Prompt(text=text))
    assert (last.index, last.finish_reason, last.text) == (0, "stop", "")


def test_a_stop_string_ends_the_answer(engine):
    whole = text_of(run(engine, STORY))
    stop = whole.split()[3]
    chunks = run(engine, STORY, stop=(stop,))
    assert text_of(chunks) == whole[: whole.index(stop)].strip()
    assert chunks[-1].finish_reason == "stop_string"


def test_an_answer_is_continued_as_it_was_begun(engine):
    whole = text_of(run(engine, STORY)).split()
    # The tiny tokenizer puts no space in front of what follows, so the rest begins a text.
    prompt = Prompt(text=f"{STORY.text} {' '.join(whole[:5])}")
    assert text_of(run(engine, prompt, max_new_tokens=7)).split() == whole[5:]


def test_a_seed_makes_sampling_reproducible_and_without_one_it_varies(engine):
    options = {"temperature": 3.0, "max_new_tokens": 16}
    first, again = (text_of(run(engine, STORY, seed=11, **options)) for _ in range(2))
    assert first == again
    assert len({text_of(run(engine, STORY, **options)) for _ in range(4)}) > 1


def test_a_repetition_penalty_counts_the_prompt_too(engine):
    text = "ba de"
    tokens = tokens_of(text)
    logits = expected_logits(tokens)[-1]
    penalised = logits.copy()
    for token in set(tokens):
        penalised[token] = logits[token] * 9 if logits[token] < 0 else logits[token] / 9
    (first, _) = run(engine, Prompt(text=text), max_new_tokens=1, repetition_penalty=9.0)
    assert first.text.strip() == WORDS[int(penalised.argmax())]


def test_who_watches_is_told_the_logits_of_every_token(engine):
    told = []
    chunks = run(engine, STORY, max_new_tokens=3, watch=lambda *seen: told.append(seen))
    tokens = [token for _, token in told]
    assert " ".join(WORDS[token] for token in tokens) == text_of(chunks)
    wanted = expected_logits([*tokens_of(STORY.text), *tokens])[5:8]
    for (logits, _), expected in zip(told, wanted, strict=True):
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
        assert logits.dtype == np.float32


def test_two_answers_at_once_do_not_mix(engine):
    prompts = (STORY, Prompt(text="si ru pe no mi lu ki"))
    running = [engine.generate(one, GenerationOptions(max_new_tokens=9)) for one in prompts]
    found = ["", ""]
    for pair in zip(*running, strict=False):
        for position, chunk in enumerate(pair):
            found[position] += chunk.text
    for text, prompt in zip(found, prompts, strict=True):
        assert len(text.split()) > 2
        assert greedy(prompt.text, 9).startswith(text.strip())


# -- ends and refusals ----------------------------------------------------------------------------


def test_cancelling_ends_the_answer_after_the_current_token(engine):
    cancel, chunks = CancelToken(), []
    for chunk in engine.generate(STORY, GenerationOptions(max_new_tokens=40), cancel=cancel):
        chunks.append(chunk)
        if chunk.index == 2:
            cancel.cancel()
    assert chunks[-1].finish_reason == "cancelled"
    assert chunks[-1].usage.completion_tokens == 3


def test_cancelling_stops_the_prompt_from_being_processed(engine):
    cancel = CancelToken()
    cancel.cancel()
    (last,) = run(engine, STORY, cancel=cancel)
    assert last.finish_reason == "cancelled"


def test_a_computation_that_is_terminated_fails(engine):
    decoding = decoding_of(engine)
    decoding.append_tokens([2, 3])
    decoding.terminate()
    with pytest.raises(ORT_EXCEPTIONS, match="terminate"):
        decoding.append_tokens([4])
    decoding.close()
    decoding.close()


def test_a_prompt_that_does_not_fit_is_refused(engine):
    with pytest.raises(InvalidInput) as caught:
        engine.generate(Prompt(text="ba " * CONTEXT_TOKENS), GenerationOptions())
    assert caught.value.field == "prompt"
    with pytest.raises(InvalidInput, match="max_new_tokens"):
        engine.generate(STORY, GenerationOptions(max_new_tokens=CONTEXT_TOKENS))


def test_after_closing_there_are_no_more_answers(bundle):
    engine = load_engine(bundle, "onnx-fp32")
    running = engine.generate(STORY, GenerationOptions(max_new_tokens=3))
    engine.close()
    engine.close()
    assert text_of(running)  # what had begun goes on
    with pytest.raises(EngineError, match="closed"):
        engine.generate(STORY, GenerationOptions())


# -- sampling -------------------------------------------------------------------------------------

LOGITS = np.array([2.0, 1.0, 0.0, -1.0, -40.0], np.float32)


def drawn(count=4000, **options):
    sampler = Sampler(GenerationOptions(seed=5, **options))
    return np.bincount([sampler.choose(LOGITS) for _ in range(count)], minlength=5) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_by_their_probability(temperature):
    shares = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
    # Four standard deviations of the least certain of them.
    np.testing.assert_allclose(drawn(temperature=temperature), shares, atol=4 * 0.5 / 4000**0.5)


def test_only_the_best_or_the_likely_are_drawn():
    assert drawn(temperature=5.0, top_k=2)[2:].sum() == 0
    assert drawn(temperature=5.0, top_k=1)[0] == 1
    shares = drawn(temperature=1.0, top_p=0.8)  # 0.64 and 0.24 hold more than 0.8 together
    assert shares[2:].sum() == 0
    assert shares[1] > 0.2
    assert drawn(temperature=1.0, top_p=0.5)[0] == 1


def test_logits_are_left_as_they_are():
    before = LOGITS.copy()
    sampler = Sampler(GenerationOptions(repetition_penalty=2.0))
    sampler.saw([0])
    assert sampler.choose(LOGITS) == 0  # 2.0 halves to 1.0: a tie, that the first wins
    assert sampler.choose(LOGITS) == 0
    np.testing.assert_array_equal(LOGITS, before)
