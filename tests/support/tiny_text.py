"""A tiny language model as a plain ONNX graph with a KV cache, written in milliseconds.

One layer of attention over random numbers: what it says makes no sense, but depends on every token,
on positions and on the mask, so that a mistake with the cache changes it. `expected_logits`
computes the same with numpy. Needs `onnx` and `tokenizers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from nearfar.bundle import Bundle, BundleWriter
from nearfar.bundle.manifest import Manifest, Variant
from nearfar.engines.cached_graph import GenerationConfig, write_config

WORDS = ("<s>", "</s>", *(f"{sound}{vowel}" for sound in "bdfgklmnprst" for vowel in "aeiou"))
END, CONTEXT_TOKENS = 1, 64
_WIDTH = 8
_random = np.random.default_rng(7)
EMBEDDING = _random.standard_normal((len(WORDS), _WIDTH)).astype(np.float32)
#: Added by position, so that the order of tokens matters.
PLACES = _random.standard_normal((CONTEXT_TOKENS, _WIDTH)).astype(np.float32)
HEAD = (3 * _random.standard_normal((_WIDTH, len(WORDS)))).astype(np.float32)


def expected_logits(tokens: Sequence[int]) -> np.ndarray:
    """Logits behind every token, float32 of shape (len(tokens), words)."""
    x = EMBEDDING[list(tokens)] + PLACES[: len(tokens)]
    scores = x @ x.T + np.triu(np.full((len(x), len(x)), -1e4, np.float32), 1)
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    logits: np.ndarray = (shares @ x + x) @ HEAD
    return logits


def text_model() -> onnx.ModelProto:
    """The graph, FP32."""
    node = helper.make_node
    ints = {"zero": 0, "one": 1}
    constants = [
        *(numpy_helper.from_array(np.array(value), name) for name, value in ints.items()),
        *(numpy_helper.from_array(np.array([value]), f"axis{value}") for value in (1, 2)),
        numpy_helper.from_array(np.float32(0), "seen_score"),
        numpy_helper.from_array(np.float32(-1e4), "hidden_score"),
        numpy_helper.from_array(EMBEDDING, "embedding"),
        numpy_helper.from_array(PLACES, "places"),
        numpy_helper.from_array(HEAD, "head"),
    ]
    key, value = "past_key_values.0.key", "past_key_values.0.value"
    graph = helper.make_graph(
        [
            node("Gather", ["embedding", "input_ids"], ["words"]),
            node("Gather", ["places", "position_ids"], ["there"]),
            node("Add", ["words", "there"], ["x"]),
            node("Unsqueeze", ["x", "axis1"], ["new"]),  # (batch, 1 head, new, width)
            node("Concat", [key, "new"], ["present.0.key"], axis=2),
            node("Concat", [value, "new"], ["present.0.value"], axis=2),
            node("Shape", ["attention_mask"], ["total"], start=1, end=2),
            node("Squeeze", ["total"], ["columns"]),
            node("Range", ["zero", "columns", "one"], ["column"]),
            node("Unsqueeze", ["position_ids", "axis2"], ["row"]),
            node("LessOrEqual", ["column", "row"], ["is_before"]),
            node("Unsqueeze", ["attention_mask", "axis1"], ["wide_mask"]),
            node("Equal", ["wide_mask", "one"], ["is_shown"]),
            node("And", ["is_before", "is_shown"], ["is_seen"]),
            node("Where", ["is_seen", "seen_score", "hidden_score"], ["added"]),
            node("Unsqueeze", ["added", "axis1"], ["mask"]),
            node("Transpose", ["present.0.key"], ["keys"], perm=[0, 1, 3, 2]),
            node("MatMul", ["new", "keys"], ["scores"]),
            node("Add", ["scores", "mask"], ["masked"]),
            node("Softmax", ["masked"], ["shares"], axis=-1),
            node("MatMul", ["shares", "present.0.value"], ["mixed"]),
            node("Squeeze", ["mixed", "axis1"], ["heard"]),
            node("Add", ["heard", "x"], ["thought"]),
            node("MatMul", ["thought", "head"], ["logits"]),
        ],
        "tiny_text",
        [
            *(
                helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", axis])
                for name, axis in (
                    ("input_ids", "sequence"),
                    ("attention_mask", "total_sequence"),
                    ("position_ids", "sequence"),
                )
            ),
            *(
                helper.make_tensor_value_info(
                    name, TensorProto.FLOAT, ["batch", 1, "past_sequence", _WIDTH]
                )
                for name in (key, value)
            ),
        ],
        [
            helper.make_tensor_value_info(
                "logits", TensorProto.FLOAT, ["batch", "sequence", len(WORDS)]
            ),
            *(
                helper.make_tensor_value_info(
                    f"present.0.{part}", TensorProto.FLOAT, ["batch", 1, "total_sequence", _WIDTH]
                )
                for part in ("key", "value")
            ),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.checker.check_model(model)
    return model


def write_tiny_text_bundle(
    path: Path,
    name: str = "tiny-text",
    version: str = "1.0.0",
    *,
    graph: onnx.ModelProto | None = None,
    has_config: bool = True,
) -> Bundle:
    """One variant ``onnx-fp32`` of `text_model`; its tokens are `WORDS`, and it has a template."""
    with BundleWriter(path) as writer:
        file = writer.file("onnx-fp32/model.onnx")
        onnx.save(graph or text_model(), file)
        vocabulary = {word: number for number, word in enumerate(WORDS)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(file.parent / "tokenizer.json"))
        (file.parent / "chat_template.jinja").write_text(
            "{% for turn in messages %}<s> {{ turn.content }} {% endfor %}<s> "
        )
        config = GenerationConfig(
            context_length_tokens=CONTEXT_TOKENS, vocabulary_size=len(WORDS), end_tokens=(END,)
        )
        if has_config:
            write_config(file.parent, config)
        return writer.finish(
            Manifest(
                name=name,
                version=version,
                task="text-generation",
                context_length_tokens=CONTEXT_TOKENS,
                variants=(
                    Variant(
                        id="onnx-fp32", engine="onnxruntime", precision="fp32",
                        entry="onnx-fp32/model.onnx", files=(),
                    ),
                ),
            )
        )  # fmt: skip
