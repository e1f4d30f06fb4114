"""Model bundles on disk: the manifest, opening and verifying, the store, the writer."""

from __future__ import annotations

from nearfar.bundle.bundle import Bundle, open_bundle
from nearfar.bundle.manifest import Manifest, Variant
from nearfar.bundle.store import BundleStore
from nearfar.bundle.writer import BundleWriter

__all__ = ["Bundle", "BundleStore", "BundleWriter", "Manifest", "Variant", "open_bundle"]
