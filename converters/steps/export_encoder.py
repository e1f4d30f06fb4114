"""Export a sentence encoder to ONNX, with pooling and normalisation inside the graph."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.libraries import load, quiet
from converters.sources.huggingface import HuggingFaceSource, read_json
from nearfar.errors import ConversionError

#: Highest opset that ONNX Runtime 1.23, the last for Python 3.10, and its quantizers know well.
OPSET = 20
OUTPUT = "embedding"
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
#: Used during export only; chosen so that no part of a model can have the name.
_TEMPORARY_OUTPUT = "nearfar_exported_output"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """How token vectors become one vector.

    Attributes:
        mode: ``mean`` over the tokens that are not padding, or ``cls``: the first token.
        normalise: Whether the vector is scaled to length 1.
        max_length_tokens: What the model was trained to see.
    """

    mode: str
    normalise: bool
    max_length_tokens: int


def read_pooling(source: HuggingFaceSource) -> Pooling:
    """Settings in the form sentence-transformers stores; without them: mean, normalised.

    Raises:
        ConversionError: The model has a part or a pooling that is not supported.
    """
    path, config = source.path, source.config
    longest = int(config.get("max_position_embeddings") or 512)
    if config.get("model_type") in ("roberta", "xlm-roberta", "mpnet"):
        longest -= 2  # positions of these models begin behind the padding index
    settings = path / "sentence_bert_config.json"
    if settings.is_file():
        longest = min(longest, int(read_json(settings).get("max_seq_length") or longest))
    modules = path / "modules.json"
    if not modules.is_file():
        return Pooling(mode="mean", normalise=True, max_length_tokens=longest)
    kinds = _module_kinds(modules)
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise ConversionError(
            f"{modules} has a module of the kind {unknown[0]!r}, which is not supported",
            fix="Supported are Transformer, Pooling and Normalize",
        )
    pooling = path / "1_Pooling" / "config.json"
    stated = read_json(pooling) if pooling.is_file() else {"pooling_mode_mean_tokens": True}
    modes = sorted(key for key, value in stated.items() if "pooling_mode_" in key and value is True)
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise ConversionError(
            f"{pooling} asks for {' and '.join(modes) or 'no pooling'}, which is not supported",
            fix="Supported are mean pooling and CLS pooling",
        )
    return Pooling(mode=known[modes[0]], normalise="Normalize" in kinds, max_length_tokens=longest)


def _module_kinds(path: Path) -> list[str]:
    import json

    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        return [str(module["type"]).rpartition(".")[2] for module in modules]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConversionError(
            f"{path} is not a list of modules ({exc})", fix="Correct the file"
        ) from exc


def sentence_encoder(model: Any, pooling: Pooling) -> Any:
    """A torch module from token ids to one vector per text.

    Its `input_names` says which of ``input_ids``, ``attention_mask``, ``token_type_ids`` it takes,
    in this order.
    """
    torch = load("torch")
    accepted = inspect.signature(model.forward).parameters
    names = tuple(name for name in _TEXT_INPUTS if name in accepted)

    class SentenceEncoder(torch.nn.Module):  # type: ignore[misc, name-defined]
        input_names = names

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *arrays: Any) -> Any:
            feeds = dict(zip(names, arrays))  # noqa: B905  (strict= breaks the tracer)
            hidden = self.model(**feeds).last_hidden_state  # (batch, tokens, width)
            return pooled(hidden, feeds["attention_mask"], pooling)

    return SentenceEncoder().eval()


def pooled(hidden: Any, attention_mask: Any, pooling: Pooling) -> Any:
    """Token vectors (batch, tokens, width) to one vector for each text, as torch tensors."""
    if pooling.mode == "cls":
        vectors = hidden[:, 0]
    else:
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        vectors = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)
    if pooling.normalise:
        vectors = load("torch").nn.functional.normalize(vectors, p=2.0, dim=1)
    return vectors


def export_encoder(encoder: Any, path: Path, *, max_length_tokens: int) -> None:
    """Write the encoder as one ONNX file: INT64 [batch, tokens] inputs to FP32 [batch, width].

    Raises:
        ConversionError: torch cannot export this architecture.
    """
    torch = load("torch")
    load("onnxscript")
    names = encoder.input_names
    ids = torch.arange(5, 23, dtype=torch.int64).reshape(2, 9)
    examples = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=max_length_tokens)}
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                encoder,
                tuple(examples[name] for name in names),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(names),
                output_names=[_TEMPORARY_OUTPUT],
                dynamic_shapes=(tuple(axes for _ in names),),
                verbose=False,
            )
            _name_output(program.model.graph)
            program.save(str(path), external_data=False)
    except Exception as exc:  # the exporter raises whatever the traced code raises
        first = str(exc).strip().partition("\n")[0]
        raise ConversionError(
            f"torch.onnx cannot export this model ({type(exc).__name__}: {first})",
            fix="Try the torch version that nearfar names, or convert a model of another kind",
        ) from exc


def _name_output(graph: Any) -> None:
    # The exporter does not notice when an output is given the name of an inner value, and writes
    # an invalid model. So inner values make way first.
    for node in graph:
        for value in node.outputs:
            if value.name == OUTPUT:
                value.name = f"{OUTPUT}_inner"
    graph.outputs[0].name = OUTPUT
