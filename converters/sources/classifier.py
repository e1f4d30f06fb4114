"""Classifiers as Hugging Face folders: which they are, what their classes are called.

Nothing is loaded here, so that a plan or an error costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from nearfar.errors import ConversionError

Modality = Literal["text", "image", "audio"]

#: Encoders whose classifiers were exported and compared; those that read the last token of a
#: padded text (GPT, Llama) are refused by name.
TEXT_TYPES = frozenset(
    {
        "bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "albert", "electra", "camembert",
        "deberta-v2", "modernbert",
    }
)  # fmt: skip
#: Their classifiers of sounds are called …ForSequenceClassification; they hear the samples.
WAVEFORM_TYPES = frozenset(
    {"wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio", "sew", "sew-d"}
)
#: These see a spectrogram, which something outside the model computes.
_SPECTROGRAM_TYPES = frozenset({"audio-spectrogram-transformer", "whisper", "wav2vec2-bert"})

_SEQUENCE, _IMAGE, _AUDIO = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForAudioClassification",
)
IMAGE_SETTINGS = AUDIO_SETTINGS = "preprocessor_config.json"


def modality_of(path: Path, config: Mapping[str, Any]) -> Modality | None:
    """What a classifier is given; `None` where the architecture is no classifier.

    Raises:
        ConversionError: It is one that cannot be converted; names it.
    """
    architecture = str((config.get("architectures") or ["?"])[0])
    kind = str(config.get("model_type"))
    if architecture.endswith(_IMAGE):
        return "image"
    if not architecture.endswith((_SEQUENCE, _AUDIO)):
        return None
    if kind in WAVEFORM_TYPES:
        return "audio"
    if kind in _SPECTROGRAM_TYPES or architecture.endswith(_AUDIO):
        raise ConversionError(
            f"{path / 'config.json'} has the architecture {architecture!r}, which sees "
            "spectrograms and not samples: what computes them cannot be carried along",
            fix="Convert a model that hears samples ("
            + ", ".join(sorted(WAVEFORM_TYPES))
            + "), or export this one to ONNX and give it spectrograms as tensors",
        )
    if kind in TEXT_TYPES:
        return "text"
    raise ConversionError(
        f"{path / 'config.json'} has the architecture {architecture!r} of the type {kind!r}, which "
        "is not supported",
        fix="Supported are classifiers of the types "
        + ", ".join(sorted(TEXT_TYPES | WAVEFORM_TYPES)),
    )


def check_classifier(path: Path, config: Mapping[str, Any], modality: Modality) -> None:
    """Refuse what no bundle can be made of, before the weights are read.

    Raises:
        ConversionError: Names the file, and what to do.
    """
    labels_of(path, config)
    if config.get("problem_type") == "regression":
        raise ConversionError(
            f"{path / 'config.json'} says problem_type 'regression': the model gives a number, and "
            "no classes",
            fix="Export it to ONNX and convert that with --task tensor",
        )
    settings = path / IMAGE_SETTINGS
    if modality != "text" and not settings.is_file():
        what = "how images become pixels" if modality == "image" else "which samples it hears"
        raise ConversionError(
            f"Folder {path} has no {settings.name}, which says {what}",
            fix="Copy it from the model, or write it with save_pretrained of the model's processor",
        )


def labels_of(path: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes, by ``id2label``; transformers leaves out two that nobody named.

    Raises:
        ConversionError: Ids are not 0 and up, or there is one class only.
    """
    stated = config.get("id2label")
    if stated is None:
        stated = {str(number): f"LABEL_{number}" for number in range(2)}
    file = path / "config.json"
    fix = "Number the classes from 0, as the outputs of the head are"
    if not isinstance(stated, Mapping):
        raise ConversionError(f"{file}: id2label is no object", fix=fix)
    wanted = [str(number) for number in range(len(stated))]
    missing = [key for key in wanted if key not in stated]
    if missing:
        raise ConversionError(
            f"{file}: id2label has {len(stated)} names, and none for {missing[0]}", fix=fix
        )
    if len(stated) < 2:
        raise ConversionError(
            f"{file}: id2label names {len(stated)} class: the model gives a number, and no choice",
            fix="Export it to ONNX and convert that with --task tensor",
        )
    return tuple(str(stated[key]) for key in wanted)


def is_multi_label(config: Mapping[str, Any]) -> bool:
    """Whether any number of classes may be true of one input."""
    return config.get("problem_type") == "multi_label_classification"
