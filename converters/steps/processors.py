"""What a folder's tokenizer, image processor or feature extractor does, as a bundle says it.

What is read is compared with the processor itself on made-up input, so that a kind of processor
that does more than its settings say is refused, and not followed wrongly.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from converters.libraries import load, quiet
from converters.sources.classifier import AUDIO_SETTINGS, IMAGE_SETTINGS
from converters.sources.huggingface import HuggingFaceSource, load_tokenizer, read_json
from converters.steps.raw_samples import feeds_of, made_up
from nearfar.bundle.manifest import AudioPreprocessing, ImagePreprocessing
from nearfar.errors import ConversionError
from nearfar.processing.audio import read_wav

#: Types whose positions begin behind the padding index.
_LATE_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet"})
_USUAL_TOKENS = 512
#: By Pillow's numbers for its filters.
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
#: ConvNeXT's processor cuts nothing from this size on.
_CONVNEXT_WARPS_FROM = 384
#: Of pixels and samples after scaling, which are about as large as 1.
_MAX_ERROR = 1e-3
_MAX_SOUND_S = 30


def text_length(source: HuggingFaceSource) -> int:
    """Tokens that a text classifier sees at most: by its positions, and by its tokenizer."""
    config = source.config
    longest = int(config.get("max_position_embeddings") or _USUAL_TOKENS)
    if config.get("model_type") in _LATE_POSITIONS:
        longest -= 2
    # Tokenizers without a limit state a number of thirty digits.
    return min(longest, int(load_tokenizer(source.path).model_max_length))


def read_image(source: HuggingFaceSource, seed: int) -> ImagePreprocessing:
    """What ``preprocessor_config.json`` says about images.

    Raises:
        ConversionError: It asks for something that bundles cannot say; names file and setting.
    """
    file = source.path / IMAGE_SETTINGS
    load("PIL.Image")
    processor = _loaded(source, "AutoImageProcessor", backend="pil")
    # With the defaults of its kind, which the file may leave out.
    stated = processor.to_dict()
    count = int(source.config.get("num_channels") or 3)
    try:
        spec = _image_of(stated, count)
    except (KeyError, TypeError, ValueError, IndexError) as exc:
        raise ConversionError(
            f"{file} asks for something that a bundle cannot say ({exc})",
            fix="Supported are resizing to a size or to a shorter side, a centre crop, rescaling, "
            "mean and std; else export the model to ONNX and prepare its images yourself",
        ) from exc
    images = load("PIL.Image")
    for data in made_up(spec, seed, 4):
        with images.open(io.BytesIO(data)) as opened:
            image = opened.convert("L" if spec.channels == "L" else "RGB")
        with quiet():
            wanted = processor(images=image, return_tensors="np")["pixel_values"]
        _compare(np.asarray(wanted), feeds_of(data, spec)[spec.input], file, processor)
    return spec


def _image_of(stated: dict[str, Any], count: int) -> ImagePreprocessing:
    if not stated.get("do_resize"):
        raise ValueError("do_resize is off, and images have any size")
    size = stated["size"]
    crop = None
    resize: tuple[int, ...]
    if "shortest_edge" in size:
        side = int(size["shortest_edge"])
        resize = (side,)
        if stated.get("crop_pct") is not None:  # ConvNeXT
            is_warped = side >= _CONVNEXT_WARPS_FROM
            resize = (side, side) if is_warped else (int(side / stated["crop_pct"]),)
            crop = None if is_warped else (side, side)
    else:
        resize = (int(size["height"]), int(size["width"]))
    if stated.get("do_center_crop"):
        crop = (int(stated["crop_size"]["height"]), int(stated["crop_size"]["width"]))
    if crop is None and len(resize) == 1:
        raise ValueError("size is a shorter side, and there is no centre crop")
    if crop is not None and (crop[0] > resize[0] or crop[1] > resize[-1]):
        raise ValueError("crop_size is larger than size")
    is_normal = bool(stated.get("do_normalize"))
    return ImagePreprocessing(
        input="pixel_values",
        resize=resize,
        crop=crop,
        resample=_RESAMPLE[int(stated.get("resample", 2))],  # type: ignore[arg-type]
        scale=float(stated["rescale_factor"]) if stated.get("do_rescale") else 1.0,
        mean=_each(stated["image_mean"] if is_normal else 0.0, count),
        std=_each(stated["image_std"] if is_normal else 1.0, count),
        channels={(3, False): "RGB", (3, True): "BGR", (1, False): "L"}[
            count, bool(stated.get("do_flip_channel_order"))
        ],  # type: ignore[arg-type]
    )


def _each(value: Any, count: int) -> tuple[float, ...]:
    numbers = [value] * count if isinstance(value, (int, float)) else list(value)
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} numbers in image_mean or image_std for {count} channels")
    return tuple(float(number) for number in numbers)


def read_audio(source: HuggingFaceSource, seed: int) -> AudioPreprocessing:
    """What ``preprocessor_config.json`` says about sounds.

    Raises:
        ConversionError: The model does not hear samples; names the file.
    """
    file = source.path / AUDIO_SETTINGS
    read_json(file)
    extractor = _loaded(source, "AutoFeatureExtractor")
    kind = type(extractor).__name__
    if kind != "Wav2Vec2FeatureExtractor" or extractor.feature_size != 1:
        raise ConversionError(
            f"{file} names the feature extractor {kind}, which does more than bundles can say",
            fix="Convert a model that hears samples, with Wav2Vec2FeatureExtractor",
        )
    rate = int(extractor.sampling_rate)
    spec = AudioPreprocessing(
        input="input_values",
        sample_rate_hz=rate,
        normalize=bool(extractor.do_normalize),
        min_samples=_least_samples(source.config),
        max_samples=_MAX_SOUND_S * rate,
    )
    for data in made_up(spec, seed, 2):
        samples, _ = read_wav(data)
        with quiet():
            wanted = extractor(samples, sampling_rate=rate, return_tensors="np")["input_values"]
        _compare(np.asarray(wanted), feeds_of(data, spec)[spec.input], file, extractor)
    return spec


def _least_samples(config: dict[str, Any]) -> int:
    """The shortest sound of which the convolutions leave one frame for the transformer."""
    count = int(config.get("squeeze_factor") or 1)
    kernels, strides = config.get("conv_kernel") or (), config.get("conv_stride") or ()
    for kernel, stride in zip(reversed(kernels), reversed(strides)):  # noqa: B905
        count = (count - 1) * int(stride) + int(kernel)
    return count


def _loaded(source: HuggingFaceSource, factory: str, **options: object) -> Any:
    transformers = load("transformers")
    file = source.path / IMAGE_SETTINGS
    if "auto_map" in read_json(file):
        raise ConversionError(
            f"{file} asks for Python code of its own (auto_map), which is not run",
            fix="Convert a model whose processor is part of transformers",
        )
    try:
        with quiet():
            return getattr(transformers, factory).from_pretrained(
                str(source.path), local_files_only=True, trust_remote_code=False, **options
            )
    except Exception as exc:  # the library's own errors have no common base
        raise ConversionError(
            f"transformers cannot make a processor of {file} "
            f"({str(exc).strip().partition(chr(10))[0]})",
            fix="Copy the file that belongs to the model, or use a newer transformers",
        ) from exc


def _compare(wanted: np.ndarray, found: np.ndarray, file: Any, processor: Any) -> None:
    name = type(processor).__name__.removesuffix("Pil")
    if wanted.shape != found.shape:
        problem = f"shape {list(wanted.shape)} instead of {list(found.shape)}"
    else:
        error = float(np.abs(wanted - found).max())
        if error <= _MAX_ERROR * max(1.0, float(np.abs(wanted).max())):
            return
        problem = f"numbers that differ by up to {error:.2g}"
    raise ConversionError(
        f"{name} of {file} does more than its settings say: it makes {problem}",
        fix="Export the model to ONNX and prepare its input yourself; a bundle cannot do what this "
        "processor does",
    )
