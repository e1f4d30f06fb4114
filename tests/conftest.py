"""Fixtures that many tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

# How long an example takes is the machine's affair: tests prove what comes out, not how fast.
settings.register_profile("nearfar", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nearfar")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quickstart workspace whose ``models`` folder holds the real models.

    Converted once with the quickstart's own code (minutes on the first run, nothing later).
    NEARFAR_WORKSPACE names another workspace; NEARFAR_TEST_BUNDLES a store made elsewhere.
    """
    from sdk.quickstart.models import ensure_bundles

    ready = os.environ.get("NEARFAR_TEST_BUNDLES")
    if ready:
        workspace = tmp_path_factory.mktemp("workspace")
        (workspace / "models").symlink_to(Path(ready).resolve())
        return workspace
    workspace = Path(os.environ.get("NEARFAR_WORKSPACE", ROOT / ".nearfar")).resolve()
    ensure_bundles(workspace, progress=lambda model, step: print(f"{model.bundle}: {step}"))
    return workspace


@pytest.fixture(scope="session")
def bundles_dir(workspace: Path) -> Path:
    """Store with the real models: assistant, minilm, file-type."""
    return workspace / "models"


def _has_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or Path("/etc/nv_tegra_release").exists()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests with the reason where there is no GPU."""
    if _has_gpu():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
