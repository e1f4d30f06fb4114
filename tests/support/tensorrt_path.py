"""Where the stand-in for TensorRT lies, for children that import it by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "fake_tensorrt"


def use_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have building children load the stand-in."""
    monkeypatch.setenv("PYTHONPATH", str(FOLDER))
    monkeypatch.setenv("NEARFAR_TENSORRT_PYTHON", sys.executable)
