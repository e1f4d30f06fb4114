"""Carry a GGUF file's own 4- and 8-bit blocks into an ONNX language model, bit for bit.

Weights of a quantized GGUF file are numbers on a coarse grid already. Dequantizing them and
rounding to another grid loses a second time. ONNX Runtime's `MatMulNBits` has blocks of 32 weights
with one scale, as GGUF has, so the codes can be taken over. What differs is the offset: Q4_1 has a
minimum for each block, ``w = d q + m``, where `MatMulNBits` takes a zero point of four bits (or a
float one, for which it has no fast CPU kernel). So the offset becomes a small product of its own
with the sums of the activations over each block:

    y = MatMulNBits(x, q, scale=d, zero_point=8) + blocksums(x) @ (m + 8 d)

Scales and minima are stored in FP16 as in the GGUF file; ONNX Runtime computes ``m + 8 d`` in FP32
once when it loads the model (constant folding). Layouts: gguf.md of ggml; ContribOperators.md of
ONNX Runtime.
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
from nearfar.errors import ConversionError

#: Weights of one block, in GGUF's types below and in what the model builder writes.
BLOCK = 32

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
class Blocks:
    """One weight matrix as blocks.

    Attributes:
        bits: 4 or 8.
        codes: uint8, shape (rows, blocks, 32), not packed; the zero point is 8 or 128.
        scales: float16, shape (rows, blocks).
        minima: float16 of the same shape, or `None`: then ``w = scale (code - zero point)``,
            else ``w = scale code + minimum``.
    """

    bits: int
    codes: np.ndarray
    scales: np.ndarray
    minima: np.ndarray | None

    def dequantized(self) -> np.ndarray:
        """The weights, float32 of shape (rows, columns)."""
        codes = self.codes.astype(np.float32)
        scales = self.scales.astype(np.float32)[..., None]
        if self.minima is None:
            values = scales * (codes - np.float32(1 << (self.bits - 1)))
        else:
            values = scales * codes + self.minima.astype(np.float32)[..., None]
        return np.asarray(values.reshape(len(codes), -1))

    def rows(self, order: np.ndarray) -> Blocks:
        """The same with its rows in another order."""
        minima = None if self.minima is None else self.minima[order]
        return Blocks(self.bits, self.codes[order], self.scales[order], minima)

    def packed(self) -> np.ndarray:
        """Codes as `MatMulNBits` has them: uint8, shape (rows, blocks, 4 * bits)."""
        if self.bits == 8:
            return self.codes
        low, high = self.codes[..., 0::2], self.codes[..., 1::2]
        return np.asarray(low | (high << 4), dtype=np.uint8)


def read_blocks(kind: str, data: np.ndarray) -> Blocks | None:
    """Blocks of a GGUF tensor; `None` for types that have no equal here.

    Args:
        kind: ``Q4_0``, ``Q4_1``, ``Q8_0``; others are not carried over.
        data: uint8 of shape (rows, bytes of a row).
    """
    sizes = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
    if kind not in sizes:
        return None
    raw = np.ascontiguousarray(data).reshape(len(data), -1, sizes[kind])

    def half(start: int) -> np.ndarray:
        found: np.ndarray = np.ascontiguousarray(raw[..., start : start + 2]).view("<f2")[..., 0]
        return found

    if kind == "Q8_0":
        codes = (raw[..., 2:].view(np.int8).astype(np.int16) + 128).astype(np.uint8)
        return Blocks(8, codes, half(0), None)
    nibbles = raw[..., 4:] if kind == "Q4_1" else raw[..., 2:]
    # The first sixteen weights are in the low halves of the bytes, the others in the high ones.
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
    return Blocks(4, codes, half(0), half(2) if kind == "Q4_1" else None)


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
    folder: Path, source: GgufSource, weights: Path, *, minima: Sequence[str]
) -> Carried:
    """Replace what the model builder rounded by the file's own blocks, in place.

    Args:
        folder: As the model builder wrote it, in 4 bits with blocks of 32.
        source: The GGUF file.
        weights: Folder with the dequantized weights as safetensors; every row that is carried over
            is checked to be the same number for number.
        minima: Parts of a layer whose minima are carried over exactly, such as ``down_proj``. Each
            costs a little time; other matrices with minima are left as they are.

    Raises:
        ConversionError: The folder is not what it should be.
    """
    onnx = load("onnx")
    model = onnx.load(str(folder / "model.onnx"))
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    tensors = {tensor.name: tensor for tensor in source.reader.tensors}
    reference = _Reference(weights)
    editor = _Editor(onnx, model)
    carried = left = 0
    for node in [node for node in model.graph.node if node.op_type == "MatMulNBits"]:
        numbers = {a.name: a.i for a in node.attribute}
        blocks = _blocks_of(node.name, tensors, reference)
        is_fitting = blocks is not None and (
            numbers.get("block_size") == BLOCK
            and stored[node.input[2]].dims[0] == len(blocks.codes)
            and numbers["K"] == blocks.codes.shape[1] * BLOCK
            # A table shared with the embedding cannot have minima, nor other bits than it.
            and (blocks.minima is None or any(part in node.name for part in minima))
            and (blocks.bits == numbers["bits"] or "lm_head" not in node.name)
            and (blocks.minima is None or "lm_head" not in node.name)
        )
        if blocks is None or not is_fitting:
            left += 1
            continue
        editor.replace(node, blocks)
        carried += 1
    editor.finish()
    if not carried:
        return Carried(0, left)
    data = folder / "model.onnx.data"
    data.unlink(missing_ok=True)
    onnx.save(
        model, str(folder / "model.onnx"), save_as_external_data=True,
        all_tensors_to_one_file=True, location=data.name, size_threshold=1024,
    )  # fmt: skip
    return Carried(carried, left)


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
    if not found or len({(b.bits, b.minima is None) for b in found}) != 1:
        return None
    minima = [blocks.minima for blocks in found if blocks.minima is not None]
    return Blocks(
        found[0].bits,
        np.concatenate([blocks.codes for blocks in found]),
        np.concatenate([blocks.scales for blocks in found]),
        np.concatenate(minima) if minima else None,
    )


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


class _Editor:
    """Changes to a graph, kept until all are known."""

    def __init__(self, onnx: Any, model: Any) -> None:
        self._onnx = onnx
        self._model = model
        self._tensors: dict[str, np.ndarray] = {}
        self._before: list[Any] = []
        self._after: dict[str, list[Any]] = {}
        self._sums: dict[str, str] = {}

    def replace(self, node: Any, blocks: Blocks) -> None:
        """Give a `MatMulNBits` node other weights."""
        make = self._onnx.helper.make_node
        source, codes, scales = node.input[:3]
        self._tensors[codes] = blocks.packed()
        self._widened(scales, blocks.scales)
        # Without zero points they are 8 or 128, here and for the embedding that shares the matrix.
        for reader in self._model.graph.node:
            if reader is node or scales in reader.input:
                del reader.input[3:]
        for attribute in node.attribute:
            if attribute.name == "bits":
                attribute.i = blocks.bits
        if blocks.minima is None:
            return
        stem, output = scales.removesuffix("_scale"), node.output[0]
        self._widened(f"{stem}_min", blocks.minima)
        self._tensors["nearfar/eight"] = np.array(8, np.float32)
        self._before += [
            make("Mul", [scales, "nearfar/eight"], [f"{stem}_shift"], name=f"{stem}_shift"),
            make("Add", [f"{stem}_min", f"{stem}_shift"], [f"{stem}_offset"],
                 name=f"{stem}_offset"),
            make("Transpose", [f"{stem}_offset"], [f"{stem}_offsets"], name=f"{stem}_offsets",
                 perm=[1, 0]),
        ]  # fmt: skip
        node.output[0] = f"{output}_codes"
        following = self._after.setdefault(node.name, [])
        if source not in self._sums:
            self._sums[source] = f"{source}_blocksums"
            shape = f"nearfar/blocks_{blocks.codes.shape[1]}"
            self._tensors[shape] = np.array([0, 0, blocks.codes.shape[1], BLOCK], np.int64)
            self._tensors["nearfar/last"] = np.array([-1], np.int64)
            following += [
                make("Reshape", [source, shape], [f"{source}_blocks"], name=f"{source}_blocks"),
                make("ReduceSum", [f"{source}_blocks", "nearfar/last"], [self._sums[source]],
                     name=self._sums[source], keepdims=0),
            ]  # fmt: skip
        following += [
            make("MatMul", [self._sums[source], f"{stem}_offsets"], [f"{output}_offset"],
                 name=f"{node.name}_offset"),
            make("Add", [node.output[0], f"{output}_offset"], [output], name=f"{node.name}_sum"),
        ]  # fmt: skip

    def _widened(self, name: str, half: np.ndarray) -> None:
        """An FP16 constant that the graph sees as FP32 under `name`."""
        if f"{name}_fp16" in self._tensors:
            return
        self._tensors[f"{name}_fp16"] = half
        self._tensors.pop(name, None)
        self._before.append(
            self._onnx.helper.make_node(
                "Cast", [f"{name}_fp16"], [name], name=f"{name}_widened",
                to=self._onnx.TensorProto.FLOAT,
            )
        )  # fmt: skip

    def finish(self) -> None:
        """Apply everything."""
        graph = self._model.graph
        made = {output for node in self._before for output in node.output}
        read = {name for node in graph.node for name in node.input}
        kept = [
            tensor for tensor in graph.initializer
            if tensor.name not in self._tensors and tensor.name not in made and tensor.name in read
        ]  # fmt: skip
        new = [
            self._onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
            for name, array in self._tensors.items()
        ]
        nodes = list(self._before)
        for node in graph.node:
            nodes.append(node)
            nodes += self._after.get(node.name, [])
        del graph.initializer[:]
        graph.initializer.extend([*kept, *new])
        del graph.node[:]
        graph.node.extend(nodes)
        if len({node.name for node in nodes}) != len(nodes):
            raise ConversionError(
                "The model builder gave two nodes one name",
                fix="Use another algorithm for int4 in the recipe, such as k_quant_mixed",
            )
