"""A bundle as one file, ``NAME.nfb``: an uncompressed ZIP. Format: docs/reference/bundle.md.

An archive is input from outside: names, sizes and signature are checked before a byte is written,
and nothing in it is ever decompressed.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nearfar.bundle.bundle import (
    MAX_MANIFEST_BYTES,
    UNLISTED_FILES,
    Bundle,
    open_bundle,
    read_manifest,
)
from nearfar.bundle.hashing import Progress, sha256_of
from nearfar.bundle.paths import MANIFEST_NAME, path_problem
from nearfar.bundle.signature import MAX_SIGNATURE_BYTES, SIGNATURE_NAME
from nearfar.bundle.writer import check_target, flush, flush_folder
from nearfar.errors import BundleError

if TYPE_CHECKING:
    from nearfar.bundle.keys import PublicKey

SUFFIX = ".nfb"

#: What every member carries, so that the same bundle is always the same archive.
_DATE = (1980, 1, 1, 0, 0, 0)
_MODE = stat.S_IFREG | 0o644
_CHUNK_BYTES = 1 << 20
_AGAIN = "Get the archive again from who made it, or make it with `nearfar bundle pack`"


def pack(
    bundle: Bundle, target: str | os.PathLike[str], *, progress: Progress | None = None
) -> Path:
    """Write a bundle as one file; the same bundle always gives the same bytes.

    The bundle is verified first; its signature goes along.

    Raises:
        BundleError: The bundle is not whole, or the target exists or cannot be written.
    """
    target = Path(target).absolute()
    if os.path.lexists(target):
        raise BundleError(f"{target} exists already", fix="Choose another name, or remove it")
    bundle.verify(progress=progress)
    manifest = bundle.manifest
    named = {e.path for e in manifest.files} | {e.path for v in manifest.variants for e in v.files}
    beside = {name for name in UNLISTED_FILES if os.path.lexists(bundle.path / name)}
    first = [MANIFEST_NAME, SIGNATURE_NAME]
    paths = [name for name in first if name in beside] + sorted((named | beside) - set(first))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    try:
        with zipfile.ZipFile(temporary, "x", zipfile.ZIP_STORED) as archive:
            for path in paths:
                info = zipfile.ZipInfo(path, _DATE)
                info.create_system = 3  # Unix, wherever it is made
                info.external_attr = _MODE << 16
                info.file_size = (bundle.path / path).stat().st_size
                with archive.open(info, "w") as member, (bundle.path / path).open("rb") as file:
                    shutil.copyfileobj(file, member, _CHUNK_BYTES)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.rename(temporary, target)
        flush_folder(target.parent)
    except OSError as exc:
        raise BundleError(
            f"{target} cannot be written ({exc.strerror})",
            fix="Choose a folder you may write to, on a disk with room",
        ) from exc
    finally:
        temporary.unlink(missing_ok=True)
    return target


def unpack(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    trusted_keys: Sequence[PublicKey] | None = None,
) -> Bundle:
    """Write an archive's bundle into a folder, verified; there is a whole one afterwards or none.

    Args:
        source: The archive.
        target: Folder to make.
        trusted_keys: When given, one of them must have signed; checked before the rest is read.

    Raises:
        BundleError: Not an archive, not what its manifest says, or the target is taken.
        SecurityError: No trusted key signed it.
    """
    source, target = Path(source).absolute(), Path(target).absolute()
    check_target(target, replace=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(
                prefix=f".{target.name}.unpacking-", dir=target.parent
            ) as folder,
            zipfile.ZipFile(source) as archive,
        ):
            root = Path(folder) / "bundle"
            root.mkdir()
            _extract(archive, root, source, trusted_keys)
            open_bundle(root, trusted_keys=trusted_keys).verify()
            flush(root)
            os.rename(root, target)
        flush_folder(target.parent)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as exc:
        raise BundleError(f"{source} is not a bundle archive ({exc})", fix=_AGAIN) from exc
    except OSError as exc:
        raise BundleError(
            f"{source} cannot be unpacked into {target} ({exc.strerror})",
            fix="Check the path, its permissions, and room on the disk",
        ) from exc
    return open_bundle(target, trusted_keys=trusted_keys)


def open_archive(
    source: str | os.PathLike[str],
    *,
    trusted_keys: Sequence[PublicKey] | None = None,
    cache: Path | None = None,
) -> Bundle:
    """Open an archive, unpacked once into a cache folder that is named by its SHA-256.

    Args:
        source: The archive.
        trusted_keys: As in `unpack`.
        cache: Where unpacked bundles are kept; by default ``~/.cache/nearfar/bundles``.

    Raises:
        BundleError, SecurityError: As `unpack`.
    """
    root = cache if cache is not None else default_cache()
    place = root / sha256_of(Path(source))
    if not (place / MANIFEST_NAME).is_file():
        try:
            return unpack(source, place, trusted_keys=trusted_keys)
        except BundleError:
            # Another process may have been faster; what it unpacked is checked like any bundle.
            if not (place / MANIFEST_NAME).is_file():
                raise
    return open_bundle(place, trusted_keys=trusted_keys)


def default_cache() -> Path:
    """``nearfar/bundles`` in the user's cache folder (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "nearfar" / "bundles"


def _extract(
    archive: zipfile.ZipFile,
    root: Path,
    source: Path,
    trusted_keys: Sequence[PublicKey] | None,
) -> None:
    members = _members(archive, source)
    for name, limit in ((MANIFEST_NAME, MAX_MANIFEST_BYTES), (SIGNATURE_NAME, MAX_SIGNATURE_BYTES)):
        if name in members:
            if members[name].file_size > limit:
                raise BundleError(f"{name} in {source} is larger than {limit} bytes", fix=_AGAIN)
            _write(archive, members[name], root)
    manifest, signed = read_manifest(root, trusted_keys)
    entries = [*manifest.files, *(entry for v in manifest.variants for entry in v.files)]
    wanted = {entry.path: entry.size_bytes for entry in entries}
    for name in members:
        if name in UNLISTED_FILES and (signed is None or name in signed.files):
            wanted.setdefault(name, members[name].file_size)
    wanted.pop(SIGNATURE_NAME, None)
    for name, member in members.items():
        if name not in (MANIFEST_NAME, SIGNATURE_NAME) and wanted.get(name) != member.file_size:
            raise BundleError(
                f"{name!r} in {source} is not named in {MANIFEST_NAME} with that size", fix=_AGAIN
            )
    for name in wanted:
        if name not in members:
            raise BundleError(f"{name!r} is missing in {source}", fix=_AGAIN)
        if name != MANIFEST_NAME:
            _write(archive, members[name], root)


def _members(archive: zipfile.ZipFile, source: Path) -> dict[str, zipfile.ZipInfo]:
    found: dict[str, zipfile.ZipInfo] = {}
    total = 0
    for info in archive.infolist():
        problem = path_problem(info.filename)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if problem is None and kind not in (0, stat.S_IFREG):
            problem = "is not a regular file"
        if problem is None and info.compress_type != zipfile.ZIP_STORED:
            problem = "is compressed, which a bundle's files never are"
        if problem is None and (info.flag_bits & 1 or info.file_size != info.compress_size):
            problem = "is encrypted, or has two sizes"
        if problem is None and info.filename.casefold() in found:
            problem = "is there twice"
        if problem is not None:
            raise BundleError(f"{info.filename!r} in {source} {problem}", fix=_AGAIN)
        found[info.filename.casefold()] = info
        total += info.file_size
    # Members that overlap would make a small file large.
    if total > source.stat().st_size:
        raise BundleError(f"{source} states more than it can hold", fix=_AGAIN)
    return {info.filename: info for info in found.values()}


def _write(archive: zipfile.ZipFile, info: zipfile.ZipInfo, root: Path) -> None:
    place = root.joinpath(*info.filename.split("/"))
    place.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(info) as member, place.open("xb") as file:
        shutil.copyfileobj(member, file, _CHUNK_BYTES)
