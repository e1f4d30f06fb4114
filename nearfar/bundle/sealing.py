"""Sign a bundle that is there already; what is signed is first found to be whole."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from nearfar.bundle.bundle import UNLISTED_FILES, Bundle, open_bundle, read_signature
from nearfar.bundle.hashing import Progress, sha256_of
from nearfar.bundle.keys import SigningKey
from nearfar.bundle.manifest import FileEntry
from nearfar.bundle.paths import confined_file
from nearfar.bundle.signature import SIGNATURE_NAME, sign, statement
from nearfar.bundle.writer import flush_folder
from nearfar.errors import BundleError


def sign_bundle(
    path: str | os.PathLike[str], key: SigningKey, *, progress: Progress | None = None
) -> Bundle:
    """Verify a bundle and sign it; replaces `signature.json` in one step.

    Signatures of other keys stay if they are over the same files.

    Args:
        path: The bundle's folder.
        key: Who signs.
        progress: Called with the number of bytes just hashed.

    Returns:
        The bundle, opened with the key as the trusted one.

    Raises:
        BundleError: It is not whole, or the signature cannot be written.
    """
    if Path(path).is_file():
        raise BundleError(
            f"{path} is an archive, which is signed as a folder",
            fix="Unpack it, sign the folder, and pack that",
        )
    bundle = open_bundle(path)
    bundle.verify(progress=progress)
    data = signature_of(bundle, key, beside=read_signature(bundle.path))
    # Beside the bundle, not in it: what a killed run leaves there would be an unlisted file.
    temporary = bundle.path.parent / f".{bundle.path.name}.{secrets.token_hex(6)}.signature"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, bundle.path / SIGNATURE_NAME)
        flush_folder(bundle.path)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise BundleError(
            f"The signature of {bundle.path} cannot be written ({exc.strerror})",
            fix="Sign a copy in a folder that you may write to",
        ) from exc
    return open_bundle(bundle.path, trusted_keys=(key.public,))


def signature_of(bundle: Bundle, key: SigningKey, *, beside: bytes | None = None) -> bytes:
    """Contents of `signature.json` for a bundle: every file but `signature.json` is signed.

    Files that the manifest names are signed with the hashes it states; who signs a bundle that was
    not just written verifies it first.
    """
    manifest = bundle.manifest
    entries = [*manifest.files, *(entry for v in manifest.variants for entry in v.files)]
    named = {entry.path for entry in entries}
    for name in sorted(UNLISTED_FILES - {SIGNATURE_NAME} - named):
        if os.path.lexists(bundle.path / name):
            entries.append(_entry(bundle.path, name))
    return sign(statement(entries), key, beside=beside)


def _entry(root: Path, name: str) -> FileEntry:
    file = confined_file(root, name)
    return FileEntry(path=name, size_bytes=file.stat().st_size, sha256=sha256_of(file))
