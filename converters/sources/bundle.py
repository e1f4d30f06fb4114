"""A finished bundle as a source: more variants are made of its full-precision one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from converters.sources.base import Source
from nearfar.bundle import Bundle, open_bundle
from nearfar.bundle.hashing import sha256_of
from nearfar.bundle.manifest import Variant
from nearfar.bundle.paths import MANIFEST_NAME
from nearfar.errors import ConversionError


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleSource(Source):
    """A bundle that variants shall be added to.

    Attributes:
        bundle: The opened bundle; its files are checked when they are used.
        full: The variant that others are made of.
    """

    bundle: Bundle
    full: Variant

    @property
    def label(self) -> str:
        return self.bundle.manifest.lineage.source or self.bundle.manifest.name

    @property
    def default_name(self) -> str:
        return self.bundle.manifest.name

    def sha256(self) -> str:
        """Of the source that the bundle was made of."""
        return self.bundle.manifest.lineage.source_sha256

    def digest(self) -> str:
        """SHA-256 of the manifest, which has the hashes of everything else."""
        return sha256_of(self.path / MANIFEST_NAME)


def open_bundle_source(path: Path) -> BundleSource:
    """Open a bundle and find the variant that others can be made of.

    Raises:
        BundleError: It is not a sound bundle.
        ConversionError: It has no FP32 variant for ONNX Runtime.
    """
    bundle = open_bundle(path)
    manifest = bundle.manifest
    full = next(
        (one for one in manifest.variants
         if one.engine == "onnxruntime" and one.precision == "fp32" and one.entry != one.id),
        None,
    )  # fmt: skip
    if full is None:
        kind = "language models" if manifest.task == "text-generation" else "bundles without FP32"
        raise ConversionError(
            f"No variant can be added to {path}: it has no FP32 variant for ONNX Runtime",
            fix=f"Convert from the source with all variants at once; {kind} need that",
        )
    return BundleSource(
        path=path,
        title=manifest.name,
        license=manifest.license,
        bundle=bundle,
        full=full,
    )
