"""A PyTorch module of a person's own becomes an ONNX Runtime bundle, through ONNX."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from msgspec import to_builtins

from converters.recipes import onnx_model
from converters.recipes.base import Workshop
from converters.recipes.slim import SLIM
from converters.slim.module import slim_module
from converters.sources.onnx_file import OnnxSource, open_onnx
from converters.sources.torch_module import TorchSource, TrainingData, open_training, run_module
from converters.steps.export_module import export_module
from converters.steps.prune import prune_module
from converters.steps.verify_tensors import Feeds
from nearfar.bundle.manifest import Manifest

_TOOLS = ("torch", "onnxscript")
_PRUNE_TOOLS = ("torch", "torch-pruning", "onnxscript")


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
    """Export the module, and a pruned one if that is wished, then go on as with an ONNX file.

    Raises:
        ConversionError: A step refused or failed.
    """
    is_sliced = shop.settings.slim.is_wished
    is_pruned = bool(shop.settings.prune.ratio)
    stated = shop.options.train
    is_trained = is_pruned or is_sliced
    data = open_training(source, stated) if is_trained and stated is not None else None
    path = shop.work / "exported.onnx"
    with shop.reporter.step("export to ONNX and compare with torch") as step:
        step.note(f"differs by {export_module(source, path):.1e} of the largest output")
    narrow = _pruned(source, data, shop) if is_pruned else None
    narrow = _sliced(source, data, shop) if is_sliced else narrow
    return onnx_model.build(
        _exported(source, path),
        name,
        shop,
        examples=_rows(source),
        tools=_PRUNE_TOOLS if is_pruned else _TOOLS,
        pruned=narrow,
        narrow_id=SLIM if is_sliced else "pruned",
    )


def _exported(source: TorchSource, path: Path) -> ExportedSource:
    opened = open_onnx(path)
    values = {field.name: getattr(opened, field.name) for field in fields(OnnxSource)}
    return ExportedSource(**{**values, "title": source.title, "spec": source.spec})


def _pruned(source: TorchSource, data: TrainingData | None, shop: Workshop) -> ExportedSource:
    """The module made narrower and trained, as ONNX."""
    settings, seed = shop.settings.prune, shop.settings.seed
    path = shop.work / "pruned.onnx"
    with shop.reporter.step(f"prune {settings.ratio:.0%} of every layer and train") as step:

        def make(target: Path) -> None:
            made = prune_module(source, settings, seed, data)
            narrow = replace(
                source, module=made.module, outputs=run_module(made.module, source.inputs)
            )
            export_module(narrow, target)
            step.note(
                f"{made.weights_before} weights become {made.weights_after}; loss {made.loss:.2g}"
            )

        parts = _parts(source, to_builtins(settings), seed, data)
        shop.cache.output("prune", parts, path, make, tools=_PRUNE_TOOLS)
    return _exported(source, path)


def _parts(
    source: TorchSource, settings: object, seed: int, data: TrainingData | None
) -> dict[str, object]:
    """What a module that was made smaller depends on."""
    return {
        "source": source.digest(),
        "axes": sorted(f"{name}.{axis}={size}" for (name, axis), size in source.axes.items()),
        "settings": settings,
        "seed": seed,
        "data": data.digest() if data is not None else "",
    }


def _sliced(source: TorchSource, data: TrainingData | None, shop: Workshop) -> ExportedSource:
    """The module with fewer layers and channels, trained, as ONNX."""
    settings, seed = shop.settings.slim, shop.settings.seed
    path = shop.work / "slim.onnx"
    said = path.with_suffix(".txt")
    with shop.reporter.step("slice the layers, and train what is left") as step:

        def make(target: Path) -> None:
            made = slim_module(
                source, settings, seed, data,
                lambda done, _: step.progress(done / settings.recovery_steps),
            )  # fmt: skip
            outputs = run_module(made.module, source.inputs)
            target.mkdir()
            export_module(replace(source, module=made.module, outputs=outputs), target / path.name)
            (target / said.name).write_text(made.said, encoding="utf-8")

        parts = _parts(source, to_builtins(settings), seed, data)
        folder = shop.work / SLIM
        shop.cache.output("slim-module", parts, folder, make, tools=_TOOLS)
        facts = (folder / said.name).read_text(encoding="utf-8")
        step.note(facts)
    shop.evidence.changed = f"{SLIM} and what is made of it: {facts}"
    return _exported(source, folder / path.name)


def _rows(source: TorchSource) -> list[Feeds]:
    """The example inputs one row at a time, where rows can be told apart."""
    arrays = {name: tensor.numpy() for name, tensor in source.inputs.items()}
    if not all((name, 0) in source.axes for name in arrays):
        return [arrays]
    count = next(iter(arrays.values())).shape[0]
    return [{name: array[row : row + 1] for name, array in arrays.items()} for row in range(count)]
