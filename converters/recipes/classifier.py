"""A Hugging Face classifier of texts, images or sounds becomes an ONNX Runtime bundle.

The graph has two outputs: ``scores``, which transformers' pipelines give (softmax, or sigmoid where
several classes may be true), and the ``logits`` that they are made of.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from converters import texts
from converters.libraries import load
from converters.recipe_file import fingerprint
from converters.recipes import onnx_model
from converters.recipes.base import Workshop
from converters.recipes.onnx_model import Meaning
from converters.sources.classifier import is_multi_label, labels_of
from converters.sources.huggingface import HuggingFaceSource, load_huggingface, load_tokenizer
from converters.sources.onnx_file import OnnxSource, open_onnx
from converters.sources.torch_module import TorchSource, run_module
from converters.steps.classifier_module import SCORES, classifier_module
from converters.steps.export_module import export_module
from converters.steps.onnx_session import open_session, run
from converters.steps.processors import read_audio, read_image, text_length
from converters.steps.raw_samples import feeds_of, made_up
from converters.steps.tokenizer_file import write_tokenizer
from nearfar.bundle.manifest import (
    AudioPreprocessing,
    ImagePreprocessing,
    Manifest,
    Preprocessing,
    TextPreprocessing,
)
from nearfar.errors import ConversionError

DEFAULT_VARIANTS = ("int8", "fp32")
_TOKENIZER = "tokenizer.json"
_TOOLS = ("torch", "transformers", "onnxscript")
_AXES = {
    "text": {0: "batch", 1: "tokens"},
    "image": {0: "batch"},
    "audio": {0: "batch", 1: "samples"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedClassifier(OnnxSource):
    """An ONNX file that was made of a folder on the way.

    Attributes:
        origin: The folder.
    """

    origin: HuggingFaceSource

    @property
    def label(self) -> str:
        return self.origin.label

    def sha256(self) -> str:
        return self.origin.sha256()


def build(source: HuggingFaceSource, name: str, shop: Workshop) -> Manifest:
    """Read the preprocessing, export with it, then go on as with an ONNX file.

    Raises:
        ConversionError: A step refused or failed.
    """
    assert source.modality is not None
    labels = onnx_model.stated_labels(shop) or labels_of(source.path, source.config)
    with shop.reporter.step("read labels and preprocessing") as step:
        spec = _preprocessing(source, shop)
        step.note(f"{len(labels)} classes of {source.modality}")
    path = shop.work / "exported.onnx"
    with shop.reporter.step("export to ONNX and compare with torch") as step:

        def export(target: Path) -> None:
            error = export_module(_module(source, spec, shop), target)
            _check_least(target, spec)
            step.note(f"differs by {error:.1e} of the largest output")

        parts: dict[str, object] = {"source": fingerprint(source), "spec": repr(spec)}
        shop.cache.output("export-classifier", parts, path, export, tools=_TOOLS)
    exported = _exported(source, path)
    scores = next(one for one in exported.outputs if one.name == SCORES)
    if scores.shape[-1] not in (-1, len(labels)):
        raise ConversionError(
            f"There are {len(labels)} labels, and the head of {source.path} has "
            f"{scores.shape[-1]} outputs",
            fix="Give one label for each, in their order (--labels, or id2label in config.json)",
        )
    meaning = Meaning(
        task="classification",
        labels=labels,
        label_output=SCORES,
        preprocessing=spec,
        multi_label=is_multi_label(source.config),
    )
    return onnx_model.build(
        exported, name, shop, tools=_TOOLS, meaning=meaning, default=DEFAULT_VARIANTS
    )


def _preprocessing(source: HuggingFaceSource, shop: Workshop) -> Preprocessing:
    if source.modality == "image":
        return read_image(source, shop.settings.seed)
    if source.modality == "audio":
        return read_audio(source, shop.settings.seed)
    tokenizer = write_tokenizer(source.path, shop.writer.file(_TOKENIZER))
    spec = TextPreprocessing(
        tokenizer=_TOKENIZER, max_length_tokens=text_length(source), truncate=True
    )
    _check_tokens(source, tokenizer, spec)
    return spec


def _check_tokens(source: HuggingFaceSource, tokenizer: Path, spec: TextPreprocessing) -> None:
    """The file alone must say what the folder's tokenizer says."""
    from nearfar.processing.text import TextEncoder

    passages = texts.passages(8)
    own = load_tokenizer(source.path)
    given = TextEncoder(tokenizer, spec)
    for passage in passages:
        wanted = own(passage, truncation=True, max_length=spec.max_length_tokens).input_ids
        if given([passage])["input_ids"][0].tolist() != list(wanted):
            raise ConversionError(
                f"The tokenizer in {source.path} says something else than its tokenizer.json",
                fix="Write it anew with save_pretrained of the tokenizer that the model was "
                "trained with",
            )


def _module(source: HuggingFaceSource, spec: Preprocessing, shop: Workshop) -> TorchSource:
    """The model with its scores, and inputs that it takes."""
    torch = load("torch")
    with shop.reporter.step("load the source") as step:
        model = load_huggingface(source)
        step.note(type(model).__name__)
    module = classifier_module(model, source.config)
    examples = _examples(spec, shop)
    inputs = {name: torch.from_numpy(examples[name]) for name in module.input_names}
    assert source.modality is not None
    axes = _AXES[source.modality]
    try:
        outputs = run_module(module, inputs)
    except Exception as exc:  # whatever the model's code raises
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
        raise ConversionError(
            f"{source.architecture} in {source.path} does not take what its preprocessing makes "
            f"({shapes}): {type(exc).__name__}: {str(exc).strip().partition(chr(10))[0]}",
            fix="Give config.json and the files of the tokenizer or processor that belong together",
        ) from exc
    return TorchSource(
        path=source.path,
        title=source.title,
        spec=str(source.path),
        module=module,
        inputs=inputs,
        axes={(name, axis): size for name in inputs for axis, size in axes.items()},
        outputs=outputs,
    )


def _examples(spec: Preprocessing, shop: Workshop) -> dict[str, np.ndarray]:
    """Two rows; of texts one is shorter than the other, and padded."""
    if isinstance(spec, TextPreprocessing):
        from nearfar.processing.text import TextEncoder

        passages = sorted(texts.passages(8), key=len)
        encode = TextEncoder(shop.writer.folder / spec.tokenizer, spec)
        return encode([passages[len(passages) // 2], passages[0]])
    assert isinstance(spec, (ImagePreprocessing, AudioPreprocessing))
    rows = [feeds_of(data, spec)[spec.input] for data in made_up(spec, shop.settings.seed, 2)]
    shortest = min(row.shape[-1] for row in rows)
    return {spec.input: np.concatenate([row[..., :shortest] for row in rows])}


def _check_least(path: Path, spec: Preprocessing) -> None:
    """The shortest sound that the bundle says it takes must be one."""
    if isinstance(spec, AudioPreprocessing):
        silence = np.zeros((1, spec.min_samples), np.float32)
        run(open_session(path), {spec.input: silence}, name="exported")


def _exported(source: HuggingFaceSource, path: Path) -> ExportedClassifier:
    opened = open_onnx(path)
    values: dict[str, Any] = {
        field.name: getattr(opened, field.name) for field in fields(OnnxSource)
    }
    values |= {"title": source.title, "license": source.license, "origin": source}
    return ExportedClassifier(**values)
