"""What jobs look like on disk: each value sealed by AES-256-GCM under a key of its own.

    sealed = 0x01 ‖ nonce ‖ GCM(store key, row key) ‖ nonce ‖ GCM(row key, value)

Both seals have ``"nearfar jobs 1" ‖ store id ‖ job id ‖ kind`` as associated data, so that a value
cannot be moved to another job, to another column or into another database. Keys and nonces are
random. A row key seals one value, so the store key never meets the content itself, and seals no
more than 2^32 row keys: as many random nonces as NIST SP 800-38D, section 8.3, allows for one key.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nearfar.errors import ConfigError, SecurityError
from nearfar.files import write_atomically

KEY_BYTES = 32
_VERSION = b"\x01"
_NONCE_BYTES = 12
_WRAPPED_BYTES = KEY_BYTES + 16
_LABEL = b"nearfar jobs 1"
#: What sealing adds to a value.
OVERHEAD_BYTES = 1 + _NONCE_BYTES + _WRAPPED_BYTES + _NONCE_BYTES + 16


class Vault:
    """Seals and opens the values of one store. Thread-safe.

    Args:
        key: The store's key, `KEY_BYTES`.
        store_id: 16 random bytes of the database.
    """

    def __init__(self, key: bytes, store_id: bytes) -> None:
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise ConfigError(
                "The key of the jobs does not have 32 bytes",
                field="key",
                fix="Give 32 random bytes, or leave it out for a key file",
            )
        self._key = AESGCM(key)
        self._store_id = store_id

    def seal(self, value: bytes, job_id: str, kind: str) -> bytes:
        """Encrypt a value for one column of one job."""
        bound = self._bound(job_id, kind)
        row_key = os.urandom(KEY_BYTES)
        outer, inner = os.urandom(_NONCE_BYTES), os.urandom(_NONCE_BYTES)
        wrapped = self._key.encrypt(outer, row_key, bound)
        return b"".join(
            (_VERSION, outer, wrapped, inner, AESGCM(row_key).encrypt(inner, value, bound))
        )

    def open(self, sealed: bytes, job_id: str, kind: str) -> bytes:
        """Decrypt a value of one column of one job.

        Raises:
            SecurityError: It was changed or moved, or the key is another one.
        """
        bound = self._bound(job_id, kind)
        try:
            if sealed[:1] != _VERSION or len(sealed) < OVERHEAD_BYTES:
                raise InvalidTag
            body = 1 + _NONCE_BYTES + _WRAPPED_BYTES
            row_key = self._key.decrypt(
                sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES : body], bound
            )
            inner = sealed[body : body + _NONCE_BYTES]
            return AESGCM(row_key).decrypt(inner, sealed[body + _NONCE_BYTES :], bound)
        except InvalidTag:
            raise SecurityError(
                "A value in the queue of jobs cannot be opened: it was changed, or the key is not "
                "the one it was written with",
                fix="Restore the key file, or remove the queue and its key and submit again",
            ) from None

    def _bound(self, job_id: str, kind: str) -> bytes:
        return b"\0".join((_LABEL, self._store_id, job_id.encode(), kind.encode()))


def store_key(path: Path, given: bytes | Callable[[], bytes] | None, *, may_create: bool) -> bytes:
    """The key of a store.

    Args:
        path: Key file.
        given: What the app gave instead, which wins.
        may_create: Make the key file when there is none. Only right for a store without jobs: a
            fresh key opens none of them.

    Raises:
        ConfigError: There is no key file, or it does not hold a key.
        SecurityError: Others can read the key file.
    """
    if given is not None:
        return given() if callable(given) else given
    if may_create and not path.exists():
        fresh = path.with_name(f".{path.name}.{os.getpid()}.fresh")
        try:
            write_atomically(fresh, os.urandom(KEY_BYTES), mode=0o600)
            # If another process was quicker, its key counts.
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)
            _sync(path.parent)  # a power loss must not leave jobs without their key
        except OSError as exc:
            raise ConfigError(
                f"The key file {path} cannot be written ({exc.strerror})",
                field="key_file",
                fix="Check the directory and its permissions",
            ) from exc
        finally:
            fresh.unlink(missing_ok=True)
    return _read_key(path)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_key(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as exc:
        raise ConfigError(
            f"The key of the jobs, {path}, cannot be read ({exc.strerror})",
            field="key_file",
            fix="Restore it; without it the jobs cannot be read, and the queue must be removed",
        ) from exc
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(file.fileno())
        if stat.S_IMODE(facts.st_mode) & 0o077 or facts.st_uid not in (os.geteuid(), 0):
            raise SecurityError(
                f"The key of the jobs, {path}, can be read by others",
                fix="chmod 600, and consider what it protected as known to them",
            )
        key = file.read(KEY_BYTES + 1)
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"{path} does not hold a key of {KEY_BYTES} bytes",
            field="key_file",
            fix="Restore it; without it the jobs cannot be read, and the queue must be removed",
        )
    return key
