"""Open a bundle and hand out its files, each only after its hash was found right."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from nearfar.bundle.checks import manifest_problems
from nearfar.bundle.hashing import Progress, sha256_of
from nearfar.bundle.manifest import (
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    Variant,
    decode_manifest,
)
from nearfar.bundle.paths import MANIFEST_NAME, confined_file, walk_files
from nearfar.bundle.signature import MAX_SIGNATURE_BYTES, SIGNATURE_NAME, Signed
from nearfar.errors import BundleError, ModelNotFound, SecurityError

if TYPE_CHECKING:
    from nearfar.bundle.keys import PublicKey

#: Read before anything is known about the bundle, so bounded. Real manifests are 2-20 KiB.
MAX_MANIFEST_BYTES = 4 << 20

#: Files for people that lie beside a finished bundle; no engine opens them.
UNLISTED_FILES = frozenset(
    {MANIFEST_NAME, SIGNATURE_NAME, "README.md", "LICENSE", "NOTICE", "report.html", "report.json"}
)


class _SchemaVersion(msgspec.Struct):
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class Bundle:
    """One opened bundle. Immutable and thread-safe.

    Attributes:
        path: The bundle's folder, absolute.
        manifest: What it says about itself.
        signed: What a trusted key vouches for; `None` when no key was asked for.
    """

    path: Path
    manifest: Manifest
    signed: Signed | None = None

    def variant(self, variant_id: str) -> Variant:
        """The variant with that id.

        Raises:
            ModelNotFound: There is none; the error lists those there are.
        """
        found = self.manifest.variant(variant_id)
        if found is None:
            known = ", ".join(variant.id for variant in self.manifest.variants)
            raise ModelNotFound(
                f"Model {self.manifest.name!r} {self.manifest.version} has no variant "
                f"{variant_id!r}",
                fix=f"Choose one of: {known}",
            )
        return found

    def verify(self, variant_id: str | None = None, *, progress: Progress | None = None) -> None:
        """Check the SHA-256 of files, and that no unlisted file lies among them.

        Hashes are remembered while a file keeps its path, inode, size and times, so a second call
        is cheap.

        Args:
            variant_id: Check the shared files and this variant only; `None` checks everything.
            progress: Called with the number of bytes just checked.

        Raises:
            BundleError: A file is missing, differs, or is not named in the manifest.
            SecurityError: A file beside the model's is not the one that was signed.
            ModelNotFound: There is no such variant.
        """
        if variant_id is None:
            variants: tuple[Variant, ...] = self.manifest.variants
        else:
            variants = (self.variant(variant_id),)
        self._refuse_unlisted("" if variant_id is None else None, variants)
        for entry in self._files(variants):
            self._verified(entry, progress)
        if variant_id is None and self.signed is not None:
            self._verify_beside(self.signed)

    def size_bytes(self, variant_id: str | None = None) -> int:
        """How many bytes `verify` with the same argument has to hash."""
        variants = self.manifest.variants if variant_id is None else (self.variant(variant_id),)
        return sum(entry.size_bytes for entry in self._files(variants))

    def shared_file(self, path: str) -> Path:
        """A shared file such as the tokenizer, verified before it is returned.

        Raises:
            BundleError: The manifest's `files` do not name it, or it is not what they say.
        """
        for entry in self.manifest.files:
            if entry.path == path:
                return self._verified(entry, None)
        raise BundleError(
            f"Bundle {self.path} has no shared file {path!r}",
            fix="Convert the model again; `nearfar bundle inspect` lists what is there",
        )

    def variant_entry(self, variant: Variant) -> Path:
        """What an engine opens: a file, or a folder. All of the variant's files are verified.

        Raises:
            BundleError: A file is missing, differs, or an unlisted one lies in the entry folder.
        """
        self._refuse_unlisted(None, (variant,))
        for entry in variant.files:
            self._verified(entry, None)
        return self.path.joinpath(*variant.entry.split("/"))

    def _files(self, variants: Iterable[Variant]) -> list[FileEntry]:
        return [
            *self.manifest.files,
            *(entry for variant in variants for entry in variant.files),
        ]

    def _verified(self, entry: FileEntry, progress: Progress | None) -> Path:
        path = _sized_file(self.path, entry)
        if sha256_of(path, progress) != entry.sha256:
            raise BundleError(
                f"File {entry.path!r} of bundle {self.path} does not have the SHA-256 that "
                f"{MANIFEST_NAME} states",
                fix="It is damaged or was altered: copy the bundle again or convert again",
            )
        return path

    def _verify_beside(self, signed: Signed) -> None:
        """The files that no engine opens (README.md, report.html) are signed as well."""
        for path in UNLISTED_FILES - {MANIFEST_NAME, SIGNATURE_NAME}:
            entry = signed.files.get(path)
            if entry is not None:
                self._verified(entry, None)
            elif os.path.lexists(self.path / path):
                raise SecurityError(
                    f"File {path!r} of bundle {self.path} is not covered by its signature",
                    fix="Remove it, or sign the bundle again",
                )

    def _refuse_unlisted(self, root: str | None, variants: Iterable[Variant]) -> None:
        # An engine that opens a folder reads whatever it finds there, so the folder must hold
        # nothing that was not hashed.
        named = {entry.path for entry in self._files(self.manifest.variants)}
        folders = [root] if root is not None else [v.entry for v in variants]
        for folder in folders:
            location = self.path / folder if folder else self.path
            if not location.is_dir():
                continue
            for path in walk_files(location, f"{folder}/" if folder else ""):
                if path not in named and path not in UNLISTED_FILES:
                    raise BundleError(
                        f"File {path!r} of bundle {self.path} is not named in {MANIFEST_NAME}",
                        fix="Remove it, or convert the model again",
                    )


def open_bundle(
    path: str | os.PathLike[str], *, trusted_keys: Sequence[PublicKey] | None = None
) -> Bundle:
    """Open the bundle in a folder, or in one ``.nfb`` file (see `nearfar.bundle.archive`).

    Reads and checks the manifest, then that every file exists inside the folder with its size.
    Contents are hashed later, before they are used: see `Bundle.verify`.

    Args:
        path: The bundle's folder or file.
        trusted_keys: When given, one of them must have signed the bundle; that is checked before
            the manifest is parsed. `None` opens unsigned bundles too.

    Raises:
        BundleError: No bundle there, or it is not what its manifest says; names file and field.
        SecurityError: It is not signed by a trusted key.
    """
    root = Path(path).absolute()
    if root.suffix == ".nfb" and root.is_file():
        from nearfar.bundle.archive import open_archive

        return open_archive(root, trusted_keys=trusted_keys)
    manifest, signed = read_manifest(root, trusted_keys)
    bundle = Bundle(root, manifest, signed)
    for entry in bundle._files(manifest.variants):
        _sized_file(root, entry)
    return bundle


def read_manifest(
    root: Path, trusted_keys: Sequence[PublicKey] | None = None
) -> tuple[Manifest, Signed | None]:
    """Read and check `manifest.json` of the bundle in `root`; of no other file but the signature.

    With `trusted_keys` it is parsed only after one of them was found to have signed it.

    Raises:
        BundleError: Missing, too large, not JSON, of an unknown schema version, or inconsistent.
        SecurityError: No trusted key signed this manifest and the files it names.
    """
    data = _read_manifest_file(root)
    if trusted_keys is None:
        return _parse(root / MANIFEST_NAME, data), None
    from nearfar.bundle.signature import check, check_entries

    signature = read_signature(root)
    if signature is None:
        raise SecurityError(
            f"Bundle {root} is not signed, and trusted keys are required here",
            fix="Sign it with `nearfar bundle sign`, or get a signed one from who made it",
        )
    signed = check(signature, data, trusted_keys, str(root))
    manifest = _parse(root / MANIFEST_NAME, data)
    entries = [*manifest.files, *(entry for v in manifest.variants for entry in v.files)]
    check_entries(signed, entries, str(root))
    return manifest, signed


def read_signature(root: Path) -> bytes | None:
    """Contents of `signature.json` of the bundle in `root`, or `None` when it is unsigned.

    Raises:
        BundleError: It cannot be read, or is too large.
    """
    if not os.path.lexists(root / SIGNATURE_NAME):
        return None
    return _read_bounded(root / SIGNATURE_NAME, MAX_SIGNATURE_BYTES)


def _read_manifest_file(root: Path) -> bytes:
    return _read_bounded(root / MANIFEST_NAME, MAX_MANIFEST_BYTES)


def _parse(file: Path, data: bytes) -> Manifest:
    try:
        schema_version = msgspec.json.decode(data, type=_SchemaVersion).schema_version
        if schema_version != SCHEMA_VERSION:
            raise BundleError(
                f"{file} has schema_version {schema_version}; this program reads {SCHEMA_VERSION}",
                fix="Update nearfar, or convert the model again with this version",
            )
        manifest = decode_manifest(data)
    except msgspec.ValidationError as exc:
        problem, _, field = str(exc).partition(" - at ")
        where = field.strip("`").removeprefix("$").lstrip(".") or "the top level"
        raise BundleError(
            f"{file}: field {where}: {problem}",
            fix="Correct the manifest, or convert the model again",
        ) from exc
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise BundleError(
            f"{file} is not valid JSON ({exc})",
            fix="It is damaged: copy the bundle again or convert again",
        ) from exc
    for field, problem in manifest_problems(manifest):
        raise BundleError(
            f"{file}: field {field}: {problem}",
            fix="Correct the manifest, or convert the model again",
        )
    return manifest


def _read_bounded(file: Path, limit_bytes: int) -> bytes:
    try:
        if not file.parent.is_dir():
            raise BundleError(
                f"There is no bundle folder at {file.parent}",
                fix="Check the path, or make the bundle with `nearfar convert`",
            )
        # Non-blocking, so that a named pipe in the place of the file cannot hold us up.
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{file} is not a regular file", fix="Convert the model again")
            data = stream.read(limit_bytes + 1)
    except FileNotFoundError as exc:
        raise BundleError(
            f"{file.parent} is not a bundle: it has no {file.name}",
            fix="Check the path, or make the bundle with `nearfar convert`",
        ) from exc
    except (OSError, ValueError) as exc:
        raise BundleError(f"{file} cannot be read ({exc})", fix="Check its permissions") from exc
    if len(data) > limit_bytes:
        raise BundleError(
            f"{file} is larger than {limit_bytes} bytes",
            fix="This file is a few kilobytes in a bundle; this is not one",
        )
    return data


def _sized_file(root: Path, entry: FileEntry) -> Path:
    path = confined_file(root, entry.path)
    size_bytes = os.stat(path).st_size
    if size_bytes != entry.size_bytes:
        raise BundleError(
            f"File {entry.path!r} of bundle {root} has {size_bytes} bytes; {MANIFEST_NAME} states "
            f"{entry.size_bytes}",
            fix="It is incomplete or was altered: copy the bundle again or convert again",
        )
    return path
