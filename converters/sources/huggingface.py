"""Hugging Face folders with safetensors: checked, then loaded with transformers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.libraries import load, quiet
from converters.sources.base import Source, find_wheel, sha256_file, spdx
from converters.sources.classifier import Modality, check_classifier, modality_of
from converters.sources.weights import check_weights
from nearfar.bundle.manifest import Task
from nearfar.bundle.paths import path_problem
from nearfar.errors import ConversionError

#: Encoders whose last hidden state sentence-transformers pools; others are refused by name.
ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "distilbert", "mpnet"})

_MAX_JSON_BYTES = 64 << 20
_TOKENIZER_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
_ANY_TEXT = "The weather is good today, and water boils when it is hot enough."


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceSource(Source):
    """A folder with ``config.json``, safetensors and a tokenizer.

    Attributes:
        config: Contents of ``config.json``.
        task: What the architecture is for.
        weights: The safetensors files; the pickles where those were allowed.
        is_pickled: Whether they are pickles.
        modality: What a classifier is given; `None` for other models.
    """

    config: dict[str, Any]
    task: Task
    weights: tuple[Path, ...]
    is_pickled: bool = False
    modality: Modality | None = None

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or ["?"])[0])

    def sha256(self) -> str:
        return sha256_file(self.weights[0]) if len(self.weights) == 1 else ""


def open_huggingface(path: Path, *, allow_pickle: bool = False) -> HuggingFaceSource:
    """Check a folder without loading the weights.

    Args:
        path: The folder.
        allow_pickle: Take weights that exist as pickles only. They are read with torch's loader
            for weights, which runs no code of theirs that it knows of.

    Raises:
        ConversionError: Not a model folder, damaged weights, pickles, custom code, or an
            architecture that cannot be converted.
    """
    if not (path / "config.json").is_file():
        raise ConversionError(
            f"Folder {path} is not a Hugging Face model: it has no config.json",
            fix="Give the folder that save_pretrained wrote, a GGUF file or an ONNX file",
        )
    config = read_json(path / "config.json")
    if "auto_map" in config:
        raise ConversionError(
            f"{path / 'config.json'} asks for Python code of its own (auto_map), which is not run",
            fix="Convert a model whose architecture is part of transformers",
        )
    task, modality = _task(path, config)
    if modality is not None:
        check_classifier(path, config, modality)
    weights = _weights(path, allow_pickle=allow_pickle)
    wheel = find_wheel(path)
    return HuggingFaceSource(
        path=path,
        title=_title(path, config),
        license=_card_license(path) or (wheel.license if wheel else ""),
        config=config,
        task=task,
        weights=weights,
        is_pickled=weights[0].suffix == ".bin",
        modality=modality,
    )


def load_huggingface(source: HuggingFaceSource) -> Any:
    """The model in float32, in evaluation mode.

    Raises:
        ConversionError: transformers cannot load it.
    """
    torch = load("torch")
    transformers = load("transformers")
    is_classifier = source.task == "classification"
    try:
        with quiet():
            model, report = _factory(source, transformers).from_pretrained(
                str(source.path),
                dtype=torch.float32,
                # Plain attention exports to plain operators, which every engine can fuse.
                attn_implementation="eager",
                use_safetensors=not source.is_pickled,
                weights_only=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=is_classifier,  # they are named below
            )
    except Exception as exc:  # the library's own errors have no common base
        if source.is_pickled and "Weights only load failed" in str(exc):
            # torch's own words advise to run the code.
            raise ConversionError(
                f"The pickles of {source.path} hold more than weights: damage, or code that "
                "loading them would run",
                fix="Load it where you trust it, call save_pretrained, and convert that folder",
            ) from exc
        raise ConversionError(
            f"transformers cannot load {source.path} with architecture {source.architecture!r} "
            f"({exc})",
            fix="Check the folder's files, or use a newer transformers",
        ) from exc
    if is_classifier:
        _check_head(source, report)
    check_weights(model, source.path.name)
    return model.eval()


def _factory(source: HuggingFaceSource, transformers: Any) -> Any:
    if source.task == "text-generation":
        return transformers.AutoModelForCausalLM
    if source.modality is None:
        return transformers.AutoModel
    return {
        "text": transformers.AutoModelForSequenceClassification,
        "image": transformers.AutoModelForImageClassification,
        "audio": transformers.AutoModelForAudioClassification,
    }[source.modality]


def _check_head(source: HuggingFaceSource, report: dict[str, Any]) -> None:
    """Refuse a classifier with weights that were not in the files: they would be random ones."""
    mismatched = sorted(report.get("mismatched_keys") or ())
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise ConversionError(
            f"{source.path / 'config.json'} does not fit the weights: {name!r} has the shape "
            f"{list(stored)}, and id2label and the other settings ask for {list(wanted)}",
            fix="Give id2label one name for each output of the head, or bring back the config.json "
            "that was saved with these weights",
        )
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        raise ConversionError(
            f"{source.weights[0]} has no weight {missing[0]!r}, so this is no trained "
            f"{source.architecture}",
            fix="Fine-tune the model for its classes first, and convert what save_pretrained wrote",
        )


def load_tokenizer(path: Path) -> Any:
    """The folder's tokenizer, as `AutoTokenizer` gives it.

    Raises:
        ConversionError: There is none, it cannot be read, or it knows no text.
    """
    # transformers 5 makes an empty tokenizer of nothing, which a comparison of token ids passes.
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise ConversionError(
            f"Folder {path} has no tokenizer", fix="Copy tokenizer.json into it from the model"
        )
    transformers = load("transformers")
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
    except Exception as exc:  # the library's own errors have no common base
        raise ConversionError(
            f"The tokenizer in {path} cannot be loaded ({exc})",
            fix="The folder must have tokenizer.json or the files of a known tokenizer",
        ) from exc
    ids = tokenizer(_ANY_TEXT, add_special_tokens=False).input_ids
    if not ids or ids.count(tokenizer.unk_token_id) > len(ids) / 2:
        raise ConversionError(
            f"The tokenizer in {path} knows hardly any word of English text",
            fix="It is empty or another model's; copy the right tokenizer.json into the folder",
        )
    return tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConversionError: Missing, too large, or not a JSON object; names the file.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ConversionError(f"{path} is too large", fix="Check that it is what it should be")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConversionError(
            f"{path} cannot be read ({exc.strerror})", fix="Check the path and its permissions"
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise ConversionError(f"{path} is not valid JSON ({exc})", fix="Correct the file") from exc
    if not isinstance(data, dict):
        raise ConversionError(f"{path} is not a JSON object", fix="Correct the file")
    return data


def _weights(path: Path, *, allow_pickle: bool) -> tuple[Path, ...]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted({str(name) for name in (read_json(index).get("weight_map") or {}).values()})
        for name in names:
            if path_problem(name) is not None:
                raise ConversionError(
                    f"{index} names {name!r}, a file outside the folder", fix="Correct the index"
                )
        files = [path / name for name in names]
    else:
        files = [path / "model.safetensors"]
    if not all(file.is_file() for file in files):
        pickles = sorted(file.name for file in path.glob("pytorch_model*.bin"))
        if pickles and allow_pickle:
            return tuple(path / name for name in pickles)
        if pickles:
            raise ConversionError(
                f"Folder {path} has its weights as pickles only ({', '.join(pickles)}), and "
                "loading one would run whatever code is in it",
                fix="Load it where you trust it, call save_pretrained, and convert that folder; "
                "--allow-pickle reads it with torch's loader for weights",
            )
        missing = ", ".join(file.name for file in files if not file.is_file())
        raise ConversionError(
            f"Folder {path} lacks {missing}", fix="Fetch the model's weights as safetensors"
        )
    for file in files:
        _check_safetensors(file)
    return tuple(files)


def _check_safetensors(file: Path) -> None:
    safetensors = load("safetensors")
    try:
        with safetensors.safe_open(str(file), framework="np") as opened:
            names = list(opened.keys())
    except Exception as exc:  # SafetensorError, or OSError for an unreadable file
        raise ConversionError(
            f"{file} is damaged or cut ({exc})",
            fix="Fetch the file again and compare its SHA-256",
        ) from exc
    if not names:
        raise ConversionError(f"{file} holds no tensors", fix="Fetch the file again")


def _task(path: Path, config: dict[str, Any]) -> tuple[Task, Modality | None]:
    architecture = str((config.get("architectures") or ["?"])[0])
    if architecture.endswith("ForCausalLM"):
        return "text-generation", None
    if str(config.get("model_type")) in ENCODERS and architecture.endswith(("Model", "MaskedLM")):
        return "embedding", None
    modality = modality_of(path, config)
    if modality is not None:
        return "classification", modality
    raise ConversionError(
        f"{path / 'config.json'} has the architecture {architecture!r}, which is not supported",
        fix="Supported are language models (…ForCausalLM), classifiers of texts, images and sounds "
        "(…ForSequenceClassification, …ForImageClassification), and sentence encoders of the types "
        + ", ".join(sorted(ENCODERS)),
    )


def _title(path: Path, config: dict[str, Any]) -> str:
    stated = str(config.get("_name_or_path") or "").rstrip("/").rpartition("/")[2]
    generic = path.name.lower() in ("model", "hf", "checkpoint", "weights")
    return stated if generic and stated else path.resolve().name


def _card_license(path: Path) -> str:
    """Licence from the front matter of the model card."""
    try:
        card = (path / "README.md").read_text(encoding="utf-8", errors="replace")[:20_000]
    except OSError:
        return ""
    front = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license:[ \t]*(\S+)[ \t]*$", front.group(1), re.M) if front else None
    return spdx(found.group(1)) if found else ""
