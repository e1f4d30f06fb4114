"""Tokens to text, with a byte-level tokenizer in which every character outside ASCII is split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers")

from nearfar.engines.token_text import Seam, TextStream  # noqa: E402


def make_tokenizer():
    """Bytes of the alphabet, and a few words with the space before them, as real ones have."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(alphabet)}
    merges = [("Ġ", "c"), ("Ġc", "a"), ("Ġca", "p"), ("i", "t"), ("a", "l"), ("it", "al")]
    merges += [("Ġcap", "ital"), ("Ġ", "o"), ("Ġo", "f")]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


TOKENIZER = make_tokenizer()
END = TOKENIZER.token_to_id("<end>")


def ids(text):
    return TOKENIZER.encode(text).ids


@given(st.text(st.sampled_from("ab cé日🙂\n"), max_size=20))
def test_pieces_make_up_the_text_and_never_hold_half_a_character(text):
    stream = TextStream(TOKENIZER, [])
    pieces = [stream.step(token) for token in ids(text)]
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_a_character_of_several_tokens_comes_with_its_last_one():
    stream = TextStream(TOKENIZER, [])
    assert [stream.step(token) for token in ids("🙂!")] == ["", "", "", "🙂", "!"]


def test_half_a_character_at_the_end_is_not_shown():
    stream = TextStream(TOKENIZER, [])
    assert "".join(stream.step(token) for token in ids("a日")[:-1]) == "a"


def test_special_tokens_have_no_text():
    stream = TextStream(TOKENIZER, ids("a"))
    assert [stream.step(END), *map(stream.step, ids("b"))] == ["", "b"]


def logits_for(token):
    logits = np.zeros((1, 1, TOKENIZER.get_vocab_size()), np.float32)
    logits[0, 0, token] = 1
    return logits


def seam(prompt, answer):
    return Seam(TOKENIZER, ids(prompt + answer), answer)


def test_a_word_that_was_cut_is_completed():
    cut = seam("the", " cap")
    assert cut.tail == ids(" cap")
    (whole,) = ids(" capital")
    assert cut.choose(0, logits_for(whole)) == (whole, "ital")
    assert cut.stream([whole]).step(*ids("!")) == "!"


def test_a_cut_that_makes_several_tokens_is_completed_from_their_first():
    cut = seam("the", " capita")
    assert cut.tail == ids(" capita")
    assert len(cut.tail) > 1
    (whole,) = ids(" capital")
    assert cut.choose(0, logits_for(whole)) == (whole, "l")


def test_a_cut_inside_the_last_token_of_a_word_is_completed_there():
    cut = seam("the", " capi")
    first, second = cut.tail
    assert cut.choose(0, logits_for(first)) == (first, "")
    (ending,) = ids("it")
    assert cut.choose(1, logits_for(ending)) == (ending, "t")
    assert second != ending


def test_a_lone_space_becomes_the_beginning_of_the_next_word():
    cut = seam("a", "b ")
    (word,) = ids(" of")
    assert cut.choose(0, logits_for(word)) == (word, "of")


@pytest.mark.parametrize("other", [" of", "x", " cap", " ca"])
def test_the_answer_is_left_as_it_was_where_the_model_would_go_elsewhere(other):
    (token,) = ids(" cap")
    assert seam("the", " cap").choose(0, logits_for(ids(other)[-1])) == (token, "")


def test_the_end_of_the_answer_is_not_taken_for_a_continuation():
    cut = seam("the", " cap")
    assert cut.choose(0, logits_for(END)) == (cut.tail[0], "")


@pytest.mark.parametrize(
    ("prompt", "answer"), [("the cap", ""), ("", "x"), ("a", "日"), (" ca", "p")]
)
def test_a_seam_that_is_not_inside_the_answer_is_not_touched(prompt, answer):
    # No answer; nothing before it; half a character; a token that reaches into the prompt.
    untouched = seam(prompt, answer)
    assert untouched.tail == []
    assert untouched.before == ids(prompt + answer)


def test_a_word_of_many_tokens_is_asked_about_near_its_end_only():
    long = seam("x", " xyzxyzxyz")
    assert len(long.tail) == 4
    assert long.before + long.tail == ids("x xyzxyzxyz")
