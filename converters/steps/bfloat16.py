"""BF16 typed ONNX, for TensorRT: products and what lies between them in BF16, the rest in FP32.

BF16 has FP32's range and eight bits of precision. As under torch's autocast, what adds up many
numbers or magnifies small differences stays in FP32 (`_PRECISE`), and so does what is made of whole
numbers alone: positions, angles and masks, of which BF16 knows 256 one after another. ONNX says
which operators take BF16 at an opset (`Conv` since 22); the others stay in FP32 too.

ONNX Runtime cannot run it on CPUs: it is judged by its twin (`converters.steps.rounding_twin`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from converters.libraries import load, quiet
from converters.steps.round_weights import LARGEST, bfloat16_tensor
from converters.steps.rounding_twin import BF16_SUFFIX, types_of
from converters.tensorrt.graph import Graph
from nearfar.errors import ConversionError

#: Operators that stay in FP32: those of torch's autocast, as ONNX writes them.
_PRECISE = frozenset(
    ("BatchNormalization", "Cos", "CumSum", "Erf", "Exp", "GroupNormalization",
     "InstanceNormalization", "LayerNormalization", "Log", "LogSoftmax", "LpNormalization",
     "MeanVarianceNormalization", "Pow", "RMSNormalization", "Reciprocal", "ReduceL1", "ReduceL2",
     "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare",
     "Sin", "Softmax", "Softplus", "Sqrt", "Tan")
)  # fmt: skip
#: What BF16 is for: never left in FP32 because its inputs happen to be.
_PRODUCTS = frozenset(("Attention", "Conv", "ConvTranspose", "Gemm", "GRU", "LSTM", "MatMul"))
#: They make floats of whole numbers, or of none.
_FROM_NUMBERS = frozenset(("Cast", "ConstantOfShape", "EyeLike", "OneHot", "Range"))
#: They read a value in any form.
_ANY_FORM = frozenset(("Cast", "CastLike", "Shape", "Size"))
#: From here on ONNX says BF16 at all, and from here on of convolutions and pooling.
_LEAST_OPSET, _CONV_OPSET = 13, 22
_SINCE_CONV = frozenset(
    ("AveragePool", "Conv", "ConvTranspose", "GlobalAveragePool", "GlobalMaxPool", "MaxPool")
)


def to_bfloat16(source: Path, target: Path) -> None:
    """Write a model that computes in BF16; inputs and outputs stay as they are.

    Constants beyond BF16's range become its largest numbers, so masks of -3.4e38 still mask.

    Raises:
        ConversionError: The model cannot say it, or has operators whose types are not known.
    """
    onnx = load("onnx")
    model = _raised(onnx.load(str(source)))
    if Graph(model).opset < _LEAST_OPSET:
        raise _refused(f"opset {Graph(model).opset} has no BF16", "Export with opset 18 or newer")
    _constants_first(model)
    try:
        with quiet():
            known = onnx.shape_inference.infer_shapes(model)
    except Exception as exc:  # protobuf's and the checker's errors have no common base
        raise _refused(str(exc), "Take the variant trt-fp16") from exc
    typed = _Typing(model, known)
    typed.rewrite()
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except Exception as exc:  # as above
        raise _refused(str(exc).partition("\n")[0], "Take the variant trt-fp16") from exc
    onnx.save(model, str(target))


class _Typing:
    """Decides for every node, and writes the casts between them.

    A value keeps its name in FP32; its form in BF16 has `BF16_SUFFIX` behind it. Either is made by
    a `Cast` of the other where somebody reads it.
    """

    def __init__(self, model: Any, known: Any) -> None:
        self._onnx = load("onnx")
        self._model = model
        self._graph = Graph(model)
        self._types = types_of(known)
        self._stored = {
            tensor.name: tensor
            for tensor in model.graph.initializer
            if tensor.data_type == self._onnx.TensorProto.FLOAT
        }
        #: Values by the form that they are made in.
        self._short: set[str] = set()
        #: Values in FP32 because of what they are, and not because an input is.
        self._precise: set[str] = set()
        #: Of these, those that come of whole numbers alone.
        self._numbers: set[str] = set()

    def rewrite(self) -> None:
        """Change the model in place."""
        made: set[str] = set()
        nodes: list[Any] = []
        for node in list(self._model.graph.node):
            is_short = self._is_short(node)
            for position, name in enumerate(node.input):
                form = self._form(node, position, is_short=is_short)
                if form is not None and form != name:
                    node.input[position] = form
                if form is not None:
                    nodes += self._cast(name, form, made)
            for inner in _read_inside(node):
                if self._is_float(inner):
                    nodes += self._cast(inner, inner, made)
            nodes.append(node)
            if is_short:
                for position, name in enumerate(node.output):
                    if self._is_float(name):
                        self._short.add(name)
                        node.output[position] = name + BF16_SUFFIX
        for value in self._model.graph.output:
            if self._is_float(value.name):
                nodes += self._cast(value.name, value.name, made)
        _replace_nodes(self._model, nodes)
        self._store(made)

    def _is_short(self, node: Any) -> bool:
        """Whether a node computes in BF16; notes what its outputs are otherwise."""
        outputs = [name for name in node.output if name and self._is_float(name)]
        if not outputs:
            return False
        given = [name for name in node.input if name and self._is_float(name)]
        moving = [name for name in given if name not in self._stored]
        of_numbers = node.op_type in _FROM_NUMBERS and not moving
        if of_numbers or (moving and all(name in self._numbers for name in moving)):
            self._numbers.update(outputs)
            self._precise.update(outputs)
            return False
        is_after = bool(moving) and all(name in self._precise for name in moving)
        is_precise = node.op_type in _PRECISE or (is_after and node.op_type not in _PRODUCTS)
        if is_precise or node.op_type in _ANY_FORM or any(_read_inside(node)):
            self._precise.update(outputs)
            return False
        return self._takes(node)

    def _takes(self, node: Any) -> bool:
        """Whether ONNX has the operator in BF16, by the types of all its outputs in floats."""
        schema = self._schema(node)
        allowed = _allowed(schema)
        return all(
            "tensor(bfloat16)" in allowed.get(_type_name(schema.outputs, position), ())
            for position, name in enumerate(node.output)
            if name and self._is_float(name)
        )

    def _form(self, node: Any, position: int, *, is_short: bool) -> str | None:
        """Under which name a node reads a float; `None` where it is none."""
        name: str = node.input[position]
        if not name or not self._is_float(name):
            return None
        if node.op_type in _ANY_FORM and name in self._short:
            return name + BF16_SUFFIX
        if not is_short:
            return name
        schema = self._schema(node)
        allowed = _allowed(schema).get(_type_name(schema.inputs, position), ())
        # Some inputs are FP32 whatever the others are: the scales of `Resize`.
        return name + BF16_SUFFIX if "tensor(bfloat16)" in allowed else name

    def _cast(self, name: str, form: str, made: set[str]) -> Iterator[Any]:
        """The node that makes a form that nobody made yet."""
        if form in made:
            return
        made.add(form)
        is_there = form == (name + BF16_SUFFIX if name in self._short else name)
        if name in self._stored or is_there:
            return
        types = self._onnx.TensorProto
        given, to = (name + BF16_SUFFIX, types.FLOAT) if form == name else (name, types.BFLOAT16)
        yield self._onnx.helper.make_node("Cast", [given], [form], name=f"{form}_cast", to=to)

    def _store(self, read: set[str]) -> None:
        """Write weights in the forms that are read."""
        graph = self._model.graph
        rest = [tensor for tensor in graph.initializer if tensor.name not in self._stored]
        for name, tensor in self._stored.items():
            array = self._onnx.numpy_helper.to_array(tensor)
            array = np.clip(array, -LARGEST["bf16"], LARGEST["bf16"])
            if name in read:
                rest.append(self._onnx.numpy_helper.from_array(array, name))
            if name + BF16_SUFFIX in read:
                short = bfloat16_tensor(array)
                short.name = name + BF16_SUFFIX
                rest.append(short)
        del graph.initializer[:]
        graph.initializer.extend(rest)
        del graph.value_info[:]

    def _is_float(self, name: str) -> bool:
        if name in self._stored:
            return True
        return bool(self._types.get(name) == self._onnx.TensorProto.FLOAT)

    def _schema(self, node: Any) -> Any:
        return self._onnx.defs.get_schema(
            node.op_type, max_inclusive_version=self._graph.opset, domain=node.domain
        )


def _raised(model: Any) -> Any:
    """The model at an opset whose convolutions know BF16, where it has any and can be raised."""
    onnx = load("onnx")
    opset = Graph(model).opset
    if not _LEAST_OPSET <= opset < _CONV_OPSET:
        return model
    if not any(node.op_type in _SINCE_CONV for node in model.graph.node):
        return model
    try:
        return onnx.version_converter.convert_version(model, _CONV_OPSET)
    except (onnx.version_converter.ConvertError, RuntimeError):
        # What it cannot raise stays as it is, and its convolutions in FP32.
        return model


def _constants_first(model: Any) -> None:
    """Constant nodes of the top level become initializers; other operators have known types."""
    onnx = load("onnx")
    nodes = []
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise _refused(
                f"its operator {node.op_type} is of {node.domain}, whose types are not known",
                "Convert from the source, without ONNX Runtime's own operators",
            )
        value = Graph.attribute(node, "value") if node.op_type == "Constant" else None
        if value is None:
            nodes.append(node)
            continue
        stored = model.graph.initializer.add()
        stored.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(value)))
        stored.name = node.output[0]
    _replace_nodes(model, nodes)


def _replace_nodes(model: Any, nodes: list[Any]) -> None:
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _read_inside(node: Any) -> Iterator[str]:
    """Names that the inner graphs of a node read; those that they make are among them."""
    for attribute in node.attribute:
        graphs = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
        for graph in graphs:
            for inner in graph.node:
                yield from inner.input
                yield from _read_inside(inner)


def _allowed(schema: Any) -> dict[str, Any]:
    """Name of a type parameter to the types that it may be."""
    return {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}


def _type_name(ends: Any, position: int) -> str:
    """Type parameter of an input or output; the last one stands for all that follow."""
    return str(ends[min(position, len(ends) - 1)].type_str)


def _refused(why: str, fix: str) -> ConversionError:
    return ConversionError(f"The model cannot be written with BF16 ({why})", fix=fix)
