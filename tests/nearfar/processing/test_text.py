"""Text to token ids, with a tokenizer small enough to read."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from nearfar.bundle.manifest import TextPreprocessing
from nearfar.errors import BundleError, InvalidInput

tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers")

from nearfar.processing.text import TextEncoder  # noqa: E402

VOCABULARY = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "near": 3, "far": 4, "[PAD]": 9}


@pytest.fixture
def path(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    # As files come from training: padded and cut to fixed sizes, which must not have an effect.
    tokenizer.enable_padding(length=50, pad_id=9, pad_token="[PAD]")
    tokenizer.enable_truncation(3)
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def encoder(path, *, limit=6, truncate=True):
    return TextEncoder(
        path, TextPreprocessing(tokenizer=path.name, max_length_tokens=limit, truncate=truncate)
    )


def test_a_batch_is_padded_to_its_longest_text(path):
    encoded = encoder(path)(["near", "near far near"])
    assert encoded["input_ids"].tolist() == [[1, 3, 2, 9, 9], [1, 3, 4, 3, 2]]
    assert encoded["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert encoded["token_type_ids"].tolist() == [[0] * 5] * 2
    assert {array.dtype for array in encoded.values()} == {np.dtype(np.int64)}


def test_long_text_is_cut_where_the_model_was_trained_so(path):
    assert encoder(path)(["near " * 50])["input_ids"].tolist() == [[1, 3, 3, 3, 3, 2]]


def test_long_text_is_an_error_where_it_must_not_be_cut(path):
    with pytest.raises(InvalidInput, match="Text 1 has 12 tokens; the model takes 6"):
        encoder(path, truncate=False)(["near", "near " * 10])


def test_empty_text_is_allowed_and_an_empty_batch_is_not(path):
    assert encoder(path)([""])["input_ids"].tolist() == [[1, 2]]
    with pytest.raises(InvalidInput, match="batch is empty"):
        encoder(path)([])


def test_threads_may_share_an_encoder(path):
    encode = encoder(path)
    wrong = []

    def work(count):
        for _ in range(50):
            if encode(["near " * count])["input_ids"].shape != (1, count + 2):
                wrong.append(count)

    threads = [threading.Thread(target=work, args=(count,)) for count in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_file_that_is_no_tokenizer_is_a_bundle_error(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text('{"version": "1.0"}')
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer"):
        encoder(file)


def test_texts_without_a_token_or_a_meaning_are_refused(path):
    with pytest.raises(InvalidInput, match="surrogates"):
        encoder(path)(["near", "\ud800"])
    assert encoder(path)([""])["input_ids"].tolist() == [[1, 2]]
    bare = tokenizers.Tokenizer.from_file(str(path))
    bare.post_processor = tokenizers.processors.TemplateProcessing(single="$A")
    bare.save(str(path))
    for texts in ([""], ["near", ""]):
        with pytest.raises(InvalidInput, match=f"Text {len(texts) - 1} has no tokens"):
            encoder(path)(texts)
