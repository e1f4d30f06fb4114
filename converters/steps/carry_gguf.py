"""Carry a GGUF file's own 4- and 8-bit blocks into an ONNX language model.

Weights of a quantized GGUF file are numbers on a coarse grid already. Dequantizing them and
rounding to another grid loses a second time, so the codes are taken over instead; `gguf_blocks`
says how, `carry_graph` edits the graph, and here both sides are matched, matrix for matrix.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.libraries import load
from converters.sources.gguf import GgufSource
from converters.steps.carry_graph import GraphEditor
from converters.steps.gguf_blocks import BLOCK, Blocks, joined, matrix_of, read_blocks

#: A node of the model builder, in its layer, to GGUF tensors and those of transformers.
_PARTS = {
    "attn/qkv_proj": (("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"),
                      ("attn_v", "self_attn.v_proj")),
    "attn/q_proj": (("attn_q", "self_attn.q_proj"),),
    "attn/k_proj": (("attn_k", "self_attn.k_proj"),),
    "attn/v_proj": (("attn_v", "self_attn.v_proj"),),
    "attn/o_proj": (("attn_output", "self_attn.o_proj"),),
    "mlp/gate_proj": (("ffn_gate", "mlp.gate_proj"),),
    "mlp/up_proj": (("ffn_up", "mlp.up_proj"),),
    "mlp/down_proj": (("ffn_down", "mlp.down_proj"),),
}  # fmt: skip
_NODE = re.compile(r"/model/layers\.(\d+)/(\w+/\w+)/MatMul")


@dataclass(frozen=True, slots=True)
class Carried:
    """How much was carried over.

    Attributes:
        nodes: Nodes that have the file's own blocks now.
        left: Nodes that keep what the model builder rounded.
    """

    nodes: int
    left: int


def carry_blocks(
    folder: Path, source: GgufSource, weights: Path, *, minima: Sequence[str], digits: int
) -> Carried:
    """Replace what the model builder rounded by the file's own blocks, in place.

    Args:
        folder: As the model builder wrote it, in 4 bits with blocks of 32.
        source: The GGUF file.
        weights: Folder with the dequantized weights as safetensors; every row that is carried over
            is checked to be the same number for number.
        minima: Parts of a layer that are carried over although they have minima, such as
            ``down_proj``; other matrices with minima are left as they are.
        digits: How exactly minima are kept; see `gguf_blocks`.

    Raises:
        ConversionError: The folder is not what it should be.
    """
    onnx = load("onnx")
    model = onnx.load(str(folder / "model.onnx"))
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    tensors = {tensor.name: tensor for tensor in source.reader.tensors}
    reference = _Reference(weights)
    editor = GraphEditor(onnx, model)
    carried = left = 0
    for nodes in _groups(model.graph):
        found = [_blocks_of(node.name, tensors, reference) for node in nodes]
        fitting = [
            (node, blocks)
            for node, blocks in zip(nodes, found, strict=True)
            if blocks is not None and _fits(node, blocks, stored, minima)
        ]
        left += len(nodes) - len(fitting)
        carried += len(fitting)
        together = joined([blocks for _, blocks in fitting])
        if together is not None:
            editor.replace([node for node, _ in fitting], matrix_of(together, digits=digits))
            continue
        for node, blocks in fitting:
            editor.replace([node], matrix_of(blocks, digits=digits))
    if not carried:
        return Carried(0, left)
    editor.finish()
    data = folder / "model.onnx.data"
    data.unlink(missing_ok=True)
    onnx.save(
        model, str(folder / "model.onnx"), save_as_external_data=True,
        all_tensors_to_one_file=True, location=data.name, size_threshold=1024,
    )  # fmt: skip
    return Carried(carried, left)


def _groups(graph: Any) -> list[list[Any]]:
    """Nodes with quantized weights; those that can become one, gate and up, are together."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            match = _NODE.match(node.name)
            is_mergeable = match is not None and match[2] in ("mlp/gate_proj", "mlp/up_proj")
            groups.setdefault((node.input[0], "" if is_mergeable else node.name), []).append(node)
    return list(groups.values())


def _fits(node: Any, blocks: Blocks, stored: dict[str, Any], minima: Sequence[str]) -> bool:
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    is_table = "lm_head" in node.name
    return (
        numbers.get("block_size") == BLOCK
        and stored[node.input[2]].dims[0] == len(blocks.codes)
        and numbers["K"] == blocks.codes.shape[1] * BLOCK
        and not any(node.input[4:])  # an order of columns, a bias
        and (blocks.minima is None or any(part in node.name for part in minima))
        # A table shared with the embedding cannot have minima, nor other bits than it.
        and not (is_table and (blocks.minima is not None or blocks.bits != numbers["bits"]))
    )


def can_carry(source: GgufSource) -> bool:
    """Whether most weights of the file are of a type that can be carried over."""
    sizes: dict[bool, int] = {True: 0, False: 0}
    for tensor in source.reader.tensors:
        sizes[tensor.tensor_type.name in ("Q4_0", "Q4_1")] += int(tensor.n_elements)
    # The embedding is often of another type; in small models it is a fifth of everything.
    return sizes[True] > sizes[False]


class _Reference:
    """Dequantized weights by their transformers name, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        safetensors = load("safetensors")
        self._open = safetensors.safe_open
        for path in sorted(folder.glob("*.safetensors")):
            with self._open(str(path), framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    self._files[name] = path

    def __getitem__(self, name: str) -> np.ndarray | None:
        if name not in self._files:
            return None
        with self._open(str(self._files[name]), framework="numpy") as file:
            array: np.ndarray = file.get_tensor(name)
        return array


def _blocks_of(name: str, tensors: dict[str, Any], reference: _Reference) -> Blocks | None:
    """Blocks of a node's matrix, its rows in the order of transformers."""
    parts: list[tuple[str, str]] = []
    match = _NODE.match(name)
    if match is not None and match[2] in _PARTS:
        parts = [
            (f"blk.{match[1]}.{gguf}.weight", f"model.layers.{match[1]}.{hf}.weight")
            for gguf, hf in _PARTS[match[2]]
        ]
    elif "/lm_head/" in name:
        tied = "output.weight" not in tensors
        parts = [("token_embd.weight", "model.embed_tokens.weight")] if tied else [
            ("output.weight", "lm_head.weight")
        ]  # fmt: skip
    found = []
    for gguf_name, hf_name in parts:
        tensor, weights = tensors.get(gguf_name), reference[hf_name]
        if tensor is None or weights is None:
            return None
        blocks = read_blocks(tensor.tensor_type.name, np.asarray(tensor.data))
        order = None if blocks is None else _order(blocks.dequantized(), weights)
        if blocks is None or order is None:
            return None
        found.append(blocks.rows(order))
    return joined(found)


def _order(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray | None:
    """Which row of `rows` each row of `wanted` is; `None` if one is not among them.

    llama.cpp stores rows of query and key in another order than transformers. Finding them by
    their numbers needs no knowledge of it, and proves that both hold the same.
    """
    if rows.shape != wanted.shape:
        return None
    rows = rows + np.float32(0)  # minus zero becomes zero
    places = {row.tobytes(): place for place, row in enumerate(rows)}
    wanted = wanted.astype(np.float32) + np.float32(0)
    found = [places.get(row.tobytes(), -1) for row in wanted]
    return None if -1 in found else np.array(found)
