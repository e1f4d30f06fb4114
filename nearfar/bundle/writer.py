"""Write a bundle so that at its path there is, at every moment, a whole bundle or none.

Everything is made in a hidden sibling folder, hashed, flushed to disk and renamed into place. An
existing bundle is exchanged in one step where the kernel can do so (Linux `renameat2`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from nearfar.bundle.bundle import UNLISTED_FILES, Bundle, open_bundle
from nearfar.bundle.checks import manifest_problems
from nearfar.bundle.hashing import Progress, sha256_of
from nearfar.bundle.manifest import FileEntry, Manifest, encode_manifest
from nearfar.bundle.paths import MANIFEST_NAME, path_problem, walk_files
from nearfar.bundle.signature import SIGNATURE_NAME
from nearfar.errors import BundleError

if TYPE_CHECKING:
    from nearfar.bundle.keys import SigningKey

logger = logging.getLogger(__name__)

#: A left-over folder younger than this may belong to a writer that is just starting.
_STALE_AFTER_S = 60.0
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class BundleWriter:
    """Builds one bundle; use as a context manager.

    ``with BundleWriter(path) as writer:`` put files under `writer.folder`: a variant's own files
    in a sub-folder with the variant's id, shared files anywhere else; then call `finish`. Leaving
    the block without `finish`, by an error or by Ctrl-C, removes everything.

    Args:
        path: Where the bundle shall be. Its parent is made if needed.
        replace: Whether a bundle that is already there may be replaced.

    Attributes:
        folder: The temporary folder, valid inside the block.

    Raises:
        BundleError: (on entering) `path` is taken by something that may not be replaced.
    """

    def __init__(self, path: str | os.PathLike[str], *, replace: bool = True) -> None:
        self.path = Path(path).absolute()
        self._replace = replace
        self._prefix = f".{self.path.name}.writing-"
        self.folder = self.path.parent / (self._prefix + secrets.token_hex(6))
        self._lock: int | None = None
        self._finished = False

    def __enter__(self) -> BundleWriter:
        check_target(self.path, replace=self._replace)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            self.folder.mkdir()
            self._lock = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            self._discard()
            raise BundleError(
                f"Bundle {self.path} cannot be written ({exc.strerror})",
                fix="Choose a folder you may write to, on a disk with room",
            ) from exc
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._discard()

    def file(self, path: str) -> Path:
        """Place for a new file in the bundle; its folders are made.

        Raises:
            BundleError: `path` is not one a bundle may name.
        """
        problem = path_problem(path)
        if problem is not None or path in (MANIFEST_NAME, SIGNATURE_NAME):
            raise BundleError(
                f"Path {path!r} {problem or 'is written at the end'}",
                fix="Use a relative path with '/' between the parts",
            )
        target = self.folder.joinpath(*path.split("/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def add(self, source: str | os.PathLike[str], path: str) -> Path:
        """Copy a file into the bundle under `path`; returns where it now is."""
        target = self.file(path)
        shutil.copyfile(source, target)
        return target

    def finish(
        self,
        manifest: Manifest,
        *,
        progress: Progress | None = None,
        signing_key: SigningKey | None = None,
        beside: Callable[[Manifest], Mapping[str, bytes]] | None = None,
    ) -> Bundle:
        """Hash what is in the folder, write the manifest, put the bundle in place.

        Args:
            manifest: Everything but the files: `files` of the manifest and of its variants are
                filled in here, from what lies in the folder.
            progress: Called with the number of bytes just hashed.
            signing_key: Signs the bundle; `None` leaves it unsigned.
            beside: Given the complete manifest, makes files for people (`UNLISTED_FILES`), which
                the manifest does not name and the signature covers.

        Returns:
            The bundle at its final path, opened.

        Raises:
            BundleError: The manifest does not fit the files, or the disk refused.
        """
        if self._finished or self._lock is None:
            raise BundleError("The bundle is already finished", fix="Use a new BundleWriter")
        complete = self._with_files(manifest, progress)
        for field, problem in manifest_problems(complete):
            raise BundleError(f"Manifest of {self.path}: field {field}: {problem}")
        try:
            (self.folder / MANIFEST_NAME).write_bytes(encode_manifest(complete))
            for name, data in (beside(complete) if beside is not None else {}).items():
                assert name in UNLISTED_FILES, name
                (self.folder / name).write_bytes(data)
            bundle = open_bundle(self.folder)
            if signing_key is not None:
                from nearfar.bundle.sealing import signature_of

                (self.folder / SIGNATURE_NAME).write_bytes(signature_of(bundle, signing_key))
            flush(self.folder)
            self._put_in_place()
            flush_folder(self.path.parent)
        except OSError as exc:
            raise BundleError(
                f"Bundle {self.path} cannot be written ({exc.strerror})",
                fix="Choose a folder you may write to, on a disk with room",
            ) from exc
        self._finished = True
        return open_bundle(self.path)

    def draft(self, manifest: Manifest) -> Bundle:
        """What the bundle would be with what now lies in the folder, to run it before `finish`.

        Raises:
            BundleError: A file in the folder cannot be part of a bundle.
        """
        return Bundle(self.folder, self._with_files(manifest, None))

    def _with_files(self, manifest: Manifest, progress: Progress | None) -> Manifest:
        by_owner: dict[str, list[FileEntry]] = {variant.id: [] for variant in manifest.variants}
        shared: list[FileEntry] = []
        for path in walk_files(self.folder):
            file = self.folder / path
            if file.is_symlink() or not file.is_file():
                raise BundleError(
                    f"{path!r} in the new bundle is not a regular file",
                    fix="Copy the file itself into the bundle, not a link to it",
                )
            entry = FileEntry(
                path=path, size_bytes=file.stat().st_size, sha256=sha256_of(file, progress)
            )
            by_owner.get(path.split("/", 1)[0], shared).append(entry)
        variants = tuple(
            msgspec.structs.replace(variant, files=tuple(by_owner[variant.id]))
            for variant in manifest.variants
        )
        return msgspec.structs.replace(manifest, files=tuple(shared), variants=variants)

    def _put_in_place(self) -> None:
        check_target(self.path, replace=self._replace)
        if not self.path.exists():
            os.rename(self.folder, self.path)
            return
        if not _exchange(self.folder, self.path):
            # No exchange on this file system: for a moment there is no bundle, never half a one.
            aside = self.path.parent / (self._prefix + secrets.token_hex(6))
            os.rename(self.path, aside)
            try:
                os.rename(self.folder, self.path)
            except BaseException:
                os.rename(aside, self.path)
                raise
            os.rename(aside, self.folder)
        # What was exchanged is the old bundle, now under the temporary name: `_discard` removes it.

    def _discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _remove_stale(self) -> None:
        """Remove what a killed writer left behind; a living one holds a lock on its folder."""
        for entry in list(os.scandir(self.path.parent)):
            if not entry.name.startswith(self._prefix) or not entry.is_dir(follow_symlinks=False):
                continue
            if time.time() - entry.stat(follow_symlinks=False).st_mtime < _STALE_AFTER_S:
                continue
            descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry.path, ignore_errors=True)
                logger.info("removed left-over folder %s", entry.name)
            except BlockingIOError:
                continue
            finally:
                os.close(descriptor)


def check_target(path: Path, *, replace: bool) -> None:
    """Refuse to write a bundle over anything but a bundle or an empty folder.

    Raises:
        BundleError: `path` is taken.
    """
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise BundleError(f"{path} exists and is not a folder", fix="Choose another path")
    is_bundle = (path / MANIFEST_NAME).is_file()
    if not is_bundle and any(path.iterdir()):
        raise BundleError(
            f"Folder {path} exists and is not a bundle",
            fix="Choose another path; nearfar replaces only bundles and empty folders",
        )
    if is_bundle and not replace:
        raise BundleError(
            f"There is a bundle at {path} already",
            fix="Choose another path, or allow replacing it (--force)",
        )


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; `False` where kernel or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done = renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)
    )
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code))


def flush(folder: Path) -> None:
    """Have the disk hold every file below `folder`, and the folders themselves."""
    for path in walk_files(folder):
        with open(folder / path, "rb") as file:
            os.fsync(file.fileno())
    for parent, _, _ in os.walk(folder):
        flush_folder(Path(parent))


def flush_folder(folder: Path) -> None:
    """Have the disk hold the names in `folder`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
