"""Fixtures that many tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.standstill import StandstillWatch

ROOT = Path(__file__).resolve().parents[1]

# How long an example takes is the machine's affair: tests prove what comes out, not how fast.
settings.register_profile("nearfar", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nearfar")


_WATCH = StandstillWatch()


def pytest_sessionstart() -> None:
    """Notice from now on when the machine stands still."""
    _WATCH.start()


def pytest_sessionfinish() -> None:
    """End what notices it."""
    _WATCH.close()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What happened before this test does not excuse it."""
    _WATCH.begin()


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
    """Skip GPU tests with the reason where there is no GPU; see `StandstillWatch` for the other."""
    again = pytest.mark.flaky(reruns=2, condition=_WATCH.stood_still)
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and this machine has none")
    has_gpu = _has_gpu()
    for item in items:
        item.add_marker(again)
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(skip)
