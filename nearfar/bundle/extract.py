"""A smaller bundle out of a larger one."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from nearfar.bundle.bundle import Bundle
from nearfar.bundle.hashing import Progress
from nearfar.bundle.manifest import FileEntry
from nearfar.bundle.writer import BundleWriter
from nearfar.errors import BundleError


def extract_variant(
    bundle: Bundle,
    variant_id: str,
    target: str | os.PathLike[str],
    *,
    replace: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Write a bundle that holds one variant and the shared files.

    What is copied is verified first. The new bundle is unsigned: its manifest is another one than
    that which was signed. Licence and model card go along, the report of the whole does not.
    `mixed_routes` stays as it is, since it speaks of vectors that other
    devices may have made with other variants.

    Args:
        bundle: The whole.
        variant_id: The variant to keep.
        target: Folder of the new bundle.
        replace: Whether a bundle there may be replaced.
        progress: Called with the number of bytes just checked.

    Returns:
        The new bundle, opened.

    Raises:
        ModelNotFound: There is no such variant.
        BundleError: The bundle is not whole, or the target is taken or cannot be written.
    """
    variant = bundle.variant(variant_id)
    destination = Path(target).absolute()
    if destination.resolve() == bundle.path.resolve():
        raise BundleError(
            f"{destination} is the bundle to extract from", fix="Choose another folder"
        )
    bundle.verify(variant_id, progress=progress)
    kept: list[FileEntry] = [*bundle.manifest.files, *variant.files]
    with BundleWriter(destination, replace=replace) as writer:
        for entry in kept:
            writer.add(bundle.path / entry.path, entry.path)
        texts = {
            name: (bundle.path / name).read_bytes()
            for name in ("README.md", "LICENSE", "NOTICE")
            if (bundle.path / name).is_file() and not (bundle.path / name).is_symlink()
        }
        return writer.finish(
            msgspec.structs.replace(bundle.manifest, variants=(variant,)), beside=lambda _: texts
        )
