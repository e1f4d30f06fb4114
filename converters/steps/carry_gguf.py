"""Carry a GGUF file's own 4- and 8-bit blocks into an ONNX language model.

Weights of a quantized GGUF file are numbers on a coarse grid already. Dequantizing them and
rounding to another grid loses a second time, so the codes are taken over instead; `gguf_blocks`
says how, `carry_graph` edits the graph, and here both sides are matched, matrix for matrix.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from converters.libraries import load
from converters.settings import Int4Settings
from converters.sources.gguf import GgufSource
from converters.steps.carry_graph import CONTRIB, GraphEditor
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
_MODEL, _DATA = "model.onnx", "model.onnx.data"
#: Rows that are compared at a time.
_PIECE = 4096
_NODE = re.compile(r"/model/layers\.(\d+)/(\w+/\w+)/MatMul")

Load = Callable[[], np.ndarray]
Find = Callable[[str, Load], Blocks | None]

#: Which of them have the same input and become one.
_TOGETHER = ("mlp/gate_proj", "mlp/up_proj")


@dataclass(frozen=True, slots=True)
class Carried:
    """How much was carried over.

    Attributes:
        carried: Matrices that have the file's own blocks now.
        rounded: Matrices that were rounded to 8 bits, because the file has them in another form.
    """

    carried: int
    rounded: int


def carry_blocks(
    full: Path,
    target: Path,
    source: GgufSource | None,
    weights: Path,
    settings: Int4Settings,
    *,
    kind: str = "Q8_0",
) -> Carried:
    """Make a 4-bit folder of a full-precision one, with the blocks of the GGUF file.

    The graph is read without its weights, so this needs little more memory than it writes.

    Args:
        full: What the model builder, or `export_cached`, wrote in full precision.
        target: Folder to make.
        source: The GGUF file; `None` rounds everything.
        weights: Folder with the dequantized weights as safetensors; every row that is carried over
            is checked to be the same number for number.
        settings: How exactly minima are kept.
        kind: Blocks, as GGUF names them, of matrices that the file does not have: ``Q8_0``, or of 4
            bits ``Q4_1``, but for a table that the embedding and the head share.
    """
    tensors = {tensor.name: tensor for tensor in source.reader.tensors} if source else {}
    reference = _Reference(weights)

    def find(name: str, _: Load) -> Blocks | None:
        return _blocks_of(name, tensors, reference)

    return fill_graph(full, target, find, settings, kind=kind)


def fill_graph(
    full: Path, target: Path, find: Find, settings: Int4Settings, *, kind: str = "Q8_0"
) -> Carried:
    """Make a 4-bit folder of a full-precision one.

    Args:
        full: What the model builder wrote in full precision.
        target: Folder to make.
        find: Blocks for the matrix of a node, which it gets by its name and a function that loads
            the matrix, shape (outputs, inputs); `None` gives it blocks of `kind`. Asked for
            ``/embed_tokens/`` where the table is not the head's.
        settings: How exactly minima are kept.
        kind: As for `carry_blocks`.
    """
    onnx = load("onnx")
    model = onnx.load(str(full / _MODEL), load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    turned = _turned(model.graph, stored)
    _declare_contrib(onnx, model)
    editor = GraphEditor(onnx, model)
    carried = rounded = 0
    tables: dict[str, Blocks] = {}
    for nodes in _groups(model.graph, stored, turned):
        found = []
        for node in nodes:
            is_turned = node.input[1] in turned
            # What is stored takes the transposition's place; it may be the embedding's table too.
            node.input[1] = turned.get(node.input[1], node.input[1])
            tensor = stored[node.input[1]]
            own = partial(_matrix, onnx, tensor, full, is_turned=is_turned)
            blocks = find(node.name, own)
            if blocks is None or not _fits(node, blocks, _shape(tensor, is_turned=is_turned)):
                is_table = "lm_head" in node.name
                blocks, rounded = _rounded(own(), "Q8_0" if is_table else kind), rounded + 1
            else:
                carried += 1
            found.append((node, blocks))
            tables[node.input[1]] = blocks
        _quantize(editor, found, settings)
    for gather, weight in _lookups(model.graph, stored):
        own = partial(_matrix, onnx, stored[weight], full, is_turned=True)
        blocks = tables.get(weight) or find("/embed_tokens/", own)
        if blocks is None or blocks.minima is not None:
            blocks = _rounded(own())
        editor.quantize_table(gather, weight, matrix_of(blocks, digits=0))
    editor.finish()
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(full))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    target.mkdir(parents=True, exist_ok=True)
    for file in full.iterdir():
        if file.name not in (_MODEL, _DATA):
            shutil.copyfile(file, target / file.name)
    onnx.save(
        model, str(target / _MODEL), save_as_external_data=True,
        all_tensors_to_one_file=True, location=_DATA, size_threshold=1024,
    )  # fmt: skip
    return Carried(carried, rounded)


def _turned(graph: Any, stored: dict[str, Any]) -> dict[str, str]:
    """Transpositions of stored matrices: what they give to what is stored."""
    return {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in stored
    }


def _shape(tensor: Any, *, is_turned: bool) -> tuple[int, ...]:
    return tuple(tensor.dims[::-1] if is_turned else tensor.dims)


def _declare_contrib(onnx: Any, model: Any) -> None:
    """Graphs of plain operators do not name the domain of those that they get now."""
    if all(entry.domain != CONTRIB for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(CONTRIB, 1))


def _groups(graph: Any, stored: dict[str, Any], turned: dict[str, str]) -> list[list[Any]]:
    """Products with weights that `MatMulNBits` can take; those that can become one together."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        name = turned.get(node.input[1], node.input[1])
        if name not in stored:
            continue
        shape = _shape(stored[name], is_turned=name != node.input[1])
        if len(shape) != 2 or shape[0] % BLOCK:
            continue
        match = _NODE.match(node.name)
        is_mergeable = match is not None and match[2] in _TOGETHER
        groups.setdefault((node.input[0], "" if is_mergeable else node.name), []).append(node)
    return list(groups.values())


def _lookups(graph: Any, stored: dict[str, Any]) -> list[tuple[Any, str]]:
    """`Gather` nodes for token ids, and the table they read, which may be the head's."""
    transposed = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose"
    }
    found = []
    for node in graph.node:
        if node.op_type == "Gather" and "embed_tokens" in node.name:
            weight = transposed.get(node.input[0], node.input[0])
            is_shared = node.input[0] in transposed
            shape = stored[weight].dims if weight in stored else ()
            if len(shape) == 2 and shape[0 if is_shared else 1] % BLOCK == 0:
                found.append((node, weight))
    return found


def _quantize(
    editor: GraphEditor, found: Sequence[tuple[Any, Blocks]], settings: Int4Settings
) -> None:
    """As one node where the blocks are of one kind."""
    together = joined([blocks for _, blocks in found])
    if together is None:
        for one in found:
            _quantize(editor, [one], settings)
        return
    nodes = [node for node, _ in found]
    is_exact = any(part in nodes[0].name for part in settings.exact_minima)
    digits = settings.minima_digits if is_exact else 0
    rows = [len(blocks.codes) for _, blocks in found]
    editor.quantize(nodes, rows, matrix_of(together, digits=digits))


def _fits(node: Any, blocks: Blocks, shape: tuple[int, ...]) -> bool:
    # A table that the embedding shares cannot have minima.
    is_shared = "lm_head" in node.name and blocks.minima is not None
    return shape == (blocks.codes.shape[1] * blocks.block, len(blocks.codes)) and not is_shared


def _rounded(array: np.ndarray, kind: str = "Q8_0") -> Blocks:
    """Blocks of a matrix whose own form has no equal here."""
    gguf = load("gguf")
    quantized = gguf.quants.quantize(np.ascontiguousarray(array), gguf.GGMLQuantizationType[kind])
    blocks = read_blocks(kind, quantized)
    assert blocks is not None
    return blocks


def _matrix(onnx: Any, tensor: Any, folder: Path, *, is_turned: bool) -> np.ndarray:
    """Shape (outputs, inputs), as tables and transposed matrices are stored."""
    array: np.ndarray = onnx.numpy_helper.to_array(tensor, str(folder))
    return array if is_turned else array.T


def can_carry(source: GgufSource) -> bool:
    """Whether most weights of the file are of a type that can be carried over."""
    sizes: dict[bool, int] = {True: 0, False: 0}
    for tensor in source.reader.tensors:
        sizes[tensor.tensor_type.name in ("Q4_0", "Q4_1", "Q4_K")] += int(tensor.n_elements)
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


def is_layer(name: str) -> bool:
    """Whether a node of the model builder multiplies by one of a layer's matrices."""
    match = _NODE.match(name)
    return match is not None and match[2] in _PARTS


def names_of(node: str) -> list[tuple[str, str]]:
    """Matrices that a node of a layer multiplies by, one below the other.

    Args:
        node: Its name, as the model builder gives it.

    Returns:
        Their names in GGUF and in transformers; none for other nodes.
    """
    match = _NODE.match(node)
    if match is None or match[2] not in _PARTS:
        return []
    return [
        (f"blk.{match[1]}.{gguf}.weight", f"model.layers.{match[1]}.{hf}.weight")
        for gguf, hf in _PARTS[match[2]]
    ]


def _blocks_of(name: str, tensors: dict[str, Any], reference: _Reference) -> Blocks | None:
    """Blocks of a node's matrix, its rows in the order of transformers."""
    parts = names_of(name)
    if "/embed_tokens/" in name:
        parts = [("token_embd.weight", "model.embed_tokens.weight")]
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
        order = None if blocks is None else _order(blocks, weights)
        if blocks is None or order is None:
            return None
        found.append(blocks.piece(order))
    return joined(found)


def _order(blocks: Blocks, wanted: np.ndarray) -> np.ndarray | None:
    """Which row of `blocks` each row of `wanted` is; `None` if one is not among them.

    llama.cpp stores rows of query and key in another order than transformers. Finding them by
    their numbers needs no knowledge of it, and proves that both hold the same.
    """
    if (len(blocks.codes), blocks.codes.shape[1] * BLOCK) != wanted.shape:
        return None
    pieces = [slice(start, start + _PIECE) for start in range(0, len(wanted), _PIECE)]
    # Mostly the order is the same; large tables are compared piece by piece.
    if all(np.array_equal(blocks.piece(at).dequantized(), wanted[at]) for at in pieces):
        return np.arange(len(wanted))
    rows = blocks.dequantized() + np.float32(0)  # minus zero becomes zero
    places = {row.tobytes(): place for place, row in enumerate(rows)}
    wanted = wanted.astype(np.float32) + np.float32(0)
    found = [places.get(row.tobytes(), -1) for row in wanted]
    return None if -1 in found else np.array(found)
