"""A PyTorch module of a person's own becomes an ONNX Runtime bundle, through ONNX."""

from __future__ import annotations

from dataclasses import dataclass, fields

from converters.recipes import onnx_model
from converters.recipes.base import Workshop
from converters.sources.onnx_file import OnnxSource, open_onnx
from converters.sources.torch_module import TorchSource
from converters.steps.export_module import export_module
from converters.steps.verify_tensors import Feeds
from nearfar.bundle.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedSource(OnnxSource):
    """An ONNX file that was made on the way.

    Attributes:
        spec: What it was made of.
    """

    spec: str

    @property
    def label(self) -> str:
        return self.spec

    def sha256(self) -> str:
        return ""


def build(source: TorchSource, name: str, shop: Workshop) -> Manifest:
    """Export the module, then go on as with an ONNX file.

    Raises:
        ConversionError: A step refused or failed.
    """
    path = shop.work / "exported.onnx"
    with shop.reporter.step("export to ONNX and compare with torch") as step:
        step.note(f"differs by {export_module(source, path):.1e} of the largest output")
    opened = open_onnx(path)
    values = {field.name: getattr(opened, field.name) for field in fields(OnnxSource)}
    exported = ExportedSource(**{**values, "title": source.title, "spec": source.spec})
    return onnx_model.build(
        exported, name, shop, examples=_rows(source), tools=("torch", "onnxscript")
    )


def _rows(source: TorchSource) -> list[Feeds]:
    """The example inputs one row at a time, where rows can be told apart."""
    arrays = {name: tensor.numpy() for name, tensor in source.inputs.items()}
    if not all((name, 0) in source.axes for name in arrays):
        return [arrays]
    count = next(iter(arrays.values())).shape[0]
    return [{name: array[row : row + 1] for name, array in arrays.items()} for row in range(count)]
