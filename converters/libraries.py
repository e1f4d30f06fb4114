"""Importing the heavy libraries: quietly, offline, and with an error that says how to get them."""

from __future__ import annotations

import importlib
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nearfar.errors import ConversionError

#: Conversions fetch nothing, and their progress is reported by themselves.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


def load(name: str) -> Any:
    """Import a library that comes with the `convert` extra.

    Raises:
        ConversionError: It is not installed.
    """
    os.environ.update(OFFLINE)
    try:
        module = importlib.import_module(name)
    except ImportError as exc:
        package = name.partition(".")[0].replace("_", "-")
        raise ConversionError(
            f"This conversion needs the package {package!r}, which cannot be imported ({exc})",
            fix="Install the converters with: pip install 'nearfar[convert]'",
        ) from exc
    if name == "transformers":
        module.utils.logging.disable_progress_bar()
        module.utils.logging.set_verbosity_error()
    if name == "onnxruntime":
        module.set_default_logger_severity(3)  # errors only
    return module


def told_by_onnxruntime(exc: Exception) -> str:
    """What ONNX Runtime says, without status codes and places in its own source."""
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", str(exc))
    text = re.sub(r"Load model from .*? failed:\s*", "", text)
    return re.sub(r"\S+\.(?:cc|h|cpp):\d+ [\w:~<>]+\([^)]*\)\s*", "", text).strip().rstrip(".")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings about their own insides, and what they print about them."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.onnx", "transformers", "onnxruntime.quantization", "onnxscript", "root")
    ]
    before = [(logger, logger.level) for logger in loggers]
    disabled = logging.root.manager.disable
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    logging.disable(logging.WARNING)
    try:
        # ONNX Runtime's calibrators print a line for every input.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        for logger, level in before:
            logger.setLevel(level)


def tool_versions(*names: str) -> dict[str, str]:
    """Installed versions of packages, for the manifest; those not installed are left out."""
    found: dict[str, str] = {}
    for name in ("nearfar", *names):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
