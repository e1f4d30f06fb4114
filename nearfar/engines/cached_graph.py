"""What a folder with a plain ONNX language model holds: the graph, and what it does not say itself.

The graph has its KV cache as inputs and outputs. Names are those of optimum and
onnxruntime-genai; docs/reference/bundle.md states them.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

GRAPH, CONFIG = "model.onnx", "generation.json"
IDS, MASK, POSITIONS = INPUTS = ("input_ids", "attention_mask", "position_ids")
LOGITS = "logits"
PAST, PRESENT = "past_key_values", "present"


class GenerationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`generation.json`.

    Attributes:
        context_length_tokens: Prompt and answer together.
        vocabulary_size: Tokens that the model has logits for.
        end_tokens: Tokens that end an answer.
    """

    context_length_tokens: int
    vocabulary_size: int
    end_tokens: tuple[int, ...]


def cache_names(prefix: str, layers: int) -> tuple[str, ...]:
    """Names of a cache's tensors: key and value of every layer.

    Args:
        prefix: `PAST` or `PRESENT`.
        layers: How many there are.
    """
    return tuple(f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value"))


def write_config(folder: Path, config: GenerationConfig) -> None:
    """Write `generation.json`."""
    data = msgspec.json.format(msgspec.json.encode(config), indent=2)
    (folder / CONFIG).write_bytes(data + b"\n")


def read_config(folder: Path) -> GenerationConfig:
    """Read it.

    Raises:
        OSError: There is none.
        msgspec.ValidationError: It is another file.
    """
    return msgspec.json.decode((folder / CONFIG).read_bytes(), type=GenerationConfig)
