"""Export a language model as one plain ONNX graph with its KV cache as inputs and outputs.

``input_ids``, ``attention_mask``, ``position_ids`` and ``past_key_values.N.key`` / ``.value`` to
``logits`` and ``present.N.key`` / ``.value``, as optimum and onnxruntime-genai name them. All
operators are ONNX's own, so that TensorRT takes the graph, and every ONNX Runtime, also where there
is no onnxruntime-genai.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from converters.libraries import load, quiet
from converters.sources.huggingface import read_json
from converters.steps.cached_model import cache_shape, cached_decoder, context_limit, text_config
from converters.steps.export_encoder import OPSET
from converters.steps.genai_build import tidy_tokenizer_config
from nearfar.engines.cached_graph import (
    GRAPH,
    INPUTS,
    LOGITS,
    MASK,
    PAST,
    PRESENT,
    GenerationConfig,
    cache_names,
    write_config,
)
from nearfar.errors import ConversionError

DATA = f"{GRAPH}.data"
#: Of weights, activations and cache.
DTYPES = {"fp32": "float32", "fp16": "float16"}

#: Beside the graph; the chat template may be in either of the last two.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
#: Free axes: rows, new tokens, old tokens, and both together.
AXES = _BATCH, _SEQUENCE, _PAST, _TOTAL = (
    "batch", "sequence", "past_sequence", "total_sequence",
)  # fmt: skip
#: The module of a weight, in the exporter's notes: its layer, part and name.
_LAYER = re.compile(r"layers\.(\d+)\.(self_attn|mlp)\.(\w+_proj)'")
#: Of the examples: different from each other, and from 0 and 1, which the exporter takes for
#: constants.
_ROWS, _NEW, _OLD = 2, 3, 5


def export_cached(folder: Path, target: Path, *, precision: str) -> None:
    """Write a model as a folder that the engine for text on plain ONNX Runtime opens.

    Args:
        folder: Hugging Face folder with the model and its tokenizer.
        target: Folder to make.
        precision: ``fp32`` or ``fp16``. What transformers computes in 32 bits in both (norms,
            softmax, rotary angles) stays so, and logits are FP32.

    Raises:
        ConversionError: torch cannot export this architecture, or its cache is of another form.
    """
    torch, transformers = load("torch"), load("transformers")
    load("onnxscript")
    dtype = getattr(torch, DTYPES[precision])
    target.mkdir(parents=True, exist_ok=True)
    try:
        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype, local_files_only=True
            ).eval()
            decoder = cached_decoder(model)
            _export(decoder, cache_shape(model.config), dtype, target / GRAPH)
    except ConversionError:
        raise
    except Exception as exc:  # the exporter raises whatever the traced code raises
        first = str(exc).strip().partition("\n")[0]
        raise ConversionError(
            "torch.onnx cannot export this model with its KV cache "
            f"({type(exc).__name__}: {first})",
            fix="Leave the onnx-… variants out, or try the torch version that nearfar names",
        ) from exc
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    tidy_tokenizer_config(target)
    write_config(target, _generation_config(folder, model.config))


def _export(decoder: Any, shape: tuple[int, int, int], dtype: Any, path: Path) -> None:
    torch = load("torch")
    layers, heads, width = shape
    ids = torch.ones((_ROWS, _NEW), dtype=torch.int64)
    mask = torch.ones((_ROWS, _OLD + _NEW), dtype=torch.int64)
    positions = torch.arange(_OLD, _OLD + _NEW).repeat(_ROWS, 1)
    past = tuple(torch.zeros((_ROWS, heads, _OLD, width), dtype=dtype) for _ in range(2 * layers))
    dim = torch.export.Dim
    rows, new, old = dim(_BATCH), dim(_SEQUENCE), dim(_PAST)
    with torch.no_grad():
        program = torch.onnx.export(
            decoder,
            (ids, mask, positions, past),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(
                {0: rows, 1: new},
                {0: rows, 1: dim.AUTO},  # the sum of the other two, as the exporter finds out
                {0: rows, 1: new},
                tuple({0: rows, 2: old} for _ in past),
            ),
            verbose=False,
        )
    _tidy(program.model.graph, shape)
    program.save(str(path), external_data=True)


def _tidy(graph: Any, shape: tuple[int, int, int]) -> None:
    """Names of tensors and axes that people know; nothing about the converting machine."""
    ir = load("onnx_ir")
    layers, heads, width = shape
    vocabulary = graph.outputs[0].shape[-1]
    inputs = (*INPUTS, *cache_names(PAST, layers))
    outputs = (LOGITS, *cache_names(PRESENT, layers))
    if len(graph.inputs) != len(inputs) or len(graph.outputs) != len(outputs):
        raise ValueError(f"{len(graph.inputs)} inputs and {len(graph.outputs)} outputs")
    taken = {*inputs, *outputs}
    for node in graph:
        _name_by_module(node)
        node.metadata_props.clear()  # stack traces with the paths of this machine
        for value in node.outputs:
            # The exporter does not notice an output named as an inner value, and writes an
            # invalid model. So inner values make way first.
            if value.name in taken:
                value.name = f"{value.name}_inner"
    for value, name in zip(graph.inputs, inputs):  # noqa: B905
        value.name = name
    for value, name in zip(graph.outputs, outputs):  # noqa: B905
        value.name = name
    for value in graph.inputs[: len(INPUTS)]:
        value.shape = ir.Shape([_BATCH, _TOTAL if value.name == MASK else _SEQUENCE])
    for value in graph.inputs[len(INPUTS) :]:
        value.shape = ir.Shape([_BATCH, heads, _PAST, width])
    for value in graph.outputs[1:]:
        value.shape = ir.Shape([_BATCH, heads, _TOTAL, width])
    graph.outputs[0].shape = ir.Shape([_BATCH, _SEQUENCE, vocabulary])


def _name_by_module(node: Any) -> None:
    """Call what reads weights as onnxruntime-genai's model builder does: later steps know these."""
    if node.op_type not in ("MatMul", "Gather"):
        return
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    if node.op_type == "Gather":
        if "embed_tokens" in scopes:
            node.name = "/model/embed_tokens/Gather"
        return
    layer = _LAYER.search(scopes)
    if layer is not None:
        part = {"self_attn": "attn"}.get(layer[2], layer[2])
        node.name = f"/model/layers.{layer[1]}/{part}/{layer[3]}/MatMul"
    elif "lm_head" in scopes:
        node.name = "/lm_head/MatMul"


def _generation_config(folder: Path, config: Any) -> GenerationConfig:
    """End tokens are those of ``generation_config.json``, else those of the model."""
    stated = folder / "generation_config.json"
    found = read_json(stated).get("eos_token_id") if stated.is_file() else None
    if found is None:
        found = getattr(text_config(config), "eos_token_id", None)
    ends = found if isinstance(found, list) else [found]
    return GenerationConfig(
        context_length_tokens=context_limit(config),
        vocabulary_size=int(text_config(config).vocab_size),
        end_tokens=tuple(int(token) for token in ends if token is not None),
    )
