"""Model bundles on disk: the manifest, opening and verifying, the store, the writer.

Names are imported when they are first used: a client that only asks the cloud needs the manifest
and nothing else of this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nearfar.bundle.bundle import Bundle, open_bundle
    from nearfar.bundle.manifest import Manifest, Variant
    from nearfar.bundle.store import BundleStore
    from nearfar.bundle.writer import BundleWriter

_HOME = {
    "Bundle": "bundle",
    "BundleStore": "store",
    "BundleWriter": "writer",
    "Manifest": "manifest",
    "Variant": "manifest",
    "open_bundle": "bundle",
}

__all__ = ["Bundle", "BundleStore", "BundleWriter", "Manifest", "Variant", "open_bundle"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
