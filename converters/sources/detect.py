"""Recognise what kind of model a path is."""

from __future__ import annotations

from pathlib import Path

from converters.sources.base import Source
from nearfar.bundle.paths import MANIFEST_NAME
from nearfar.errors import ConversionError

#: Formats that are Python pickles: loading one runs whatever code is in it.
_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})

_SUPPORTED = (
    "a GGUF file, a Hugging Face folder with safetensors, an ONNX file, a bundle, or "
    "package.module:factory"
)


def open_source(
    path: Path,
    *,
    inputs: str | None = None,
    axes: str | None = None,
    allow_pickle: bool = False,
) -> Source:
    """Recognise and check a model.

    Args:
        path: A file or a folder, or ``package.module:factory``.
        inputs: Example inputs of a PyTorch module; see `torch_module.open_torch`.
        axes: Its free sizes.
        allow_pickle: Take a folder's weights that exist as pickles only.

    Raises:
        ConversionError: Nothing there, not a model, damaged, of an unsafe or unsupported kind.
    """
    from converters.sources.torch_module import is_spec

    if is_spec(path):
        from converters.sources.torch_module import open_torch

        return open_torch(str(path), inputs, axes)
    if inputs is not None or axes is not None:
        raise ConversionError(
            f"--inputs and --axes are for PyTorch modules, and {path} is none",
            fix="Leave them out, or give the model as package.module:factory",
        )
    if not path.exists():
        raise ConversionError(
            f"There is no model at {path}", fix=f"Check the path; it must be {_SUPPORTED}"
        )
    if path.is_dir() and (path / MANIFEST_NAME).is_file():
        from converters.sources.bundle import open_bundle_source

        return open_bundle_source(path)
    if path.is_dir():
        from converters.sources.huggingface import open_huggingface

        return open_huggingface(path, allow_pickle=allow_pickle)
    if not path.is_file():
        raise ConversionError(f"{path} is not a regular file", fix=f"Give {_SUPPORTED}")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as exc:
        raise ConversionError(
            f"{path} cannot be read ({exc.strerror})", fix="Check its permissions"
        ) from exc
    suffix = path.suffix.lower()
    if magic == b"GGUF":
        from converters.sources.gguf import open_gguf

        return open_gguf(path)
    if suffix in _PICKLES:
        raise ConversionError(
            f"{path} is a pickle, and loading it would run whatever code is in it",
            fix="Save the model as safetensors (model.save_pretrained) and convert that folder",
        )
    if suffix == ".onnx":
        from converters.sources.onnx_file import open_onnx

        return open_onnx(path)
    if suffix == ".safetensors":
        raise ConversionError(
            f"{path} holds weights only, without the model's configuration",
            fix="Give the folder that has config.json and the tokenizer beside it",
        )
    if suffix == ".gguf":
        raise ConversionError(
            f"{path} is not a GGUF file: it does not begin with GGUF",
            fix="It is damaged or not fully downloaded; fetch it again",
        )
    raise ConversionError(f"{path} is not a model that can be converted", fix=f"Give {_SUPPORTED}")
