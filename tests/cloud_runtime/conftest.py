"""What most tests of the cloud runtime share, and do not change."""

from __future__ import annotations

import pytest

from cloud_runtime.state import StateDir
from nearfar.bundle import BundleStore
from tests.cloud_runtime.support import make_state
from tests.support.tiny import write_tiny_classifier_bundle, write_tiny_tensor_bundle


@pytest.fixture(scope="session")
def state(tmp_path_factory) -> StateDir:
    """Shared by tests that do not change it."""
    return make_state(tmp_path_factory.mktemp("cloud") / "state")


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> BundleStore:
    root = tmp_path_factory.mktemp("store")
    write_tiny_tensor_bundle(root / "tiny")
    write_tiny_classifier_bundle(root / "tiny-classifier")
    return BundleStore(root)
