"""API keys, and who may ask this cloud runtime: the holder of a key, or of a token and its key.

A key is 32 random bytes; the file holds only its SHA-256, a name and a date. A fast hash is right
here: unlike a password, 256 random bits cannot be guessed however fast each guess is.

Keys travel inside the secure channel only, so neither a TLS proxy nor a log ever sees one.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import re
import secrets
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cloud_runtime.caller import ANONYMOUS, Caller, NotAdmitted, refusal, stamp_of
from cloud_runtime.state import PRIVATE_MODE, StateDir
from nearfar.errors import ConfigError
from nearfar.files import write_atomically

if TYPE_CHECKING:
    from cloud_runtime.tokens import TokenVerifier

logger = logging.getLogger(__name__)

#: Lets secret scanners (and people) recognise a leaked key for what it is.
KEY_PREFIX = "nfk_"
KEY_BYTES = 32

#: 4 MiB holds some 30,000 keys; a larger file is a mistake.
MAX_FILE_BYTES = 4 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """One accepted key.

    Attributes:
        name: Who holds it; appears in the access log.
        sha256: Lower-case hex digest of the whole key, prefix included.
        created: UTC date and time, ISO 8601.
    """

    name: str
    sha256: str
    created: str


class _KeyFile(msgspec.Struct, frozen=True, kw_only=True):
    version: int = 1
    keys: tuple[ApiKey, ...] = ()


def generate_api_key() -> str:
    """A fresh key: the prefix and 43 characters of base64url."""
    encoded = base64.urlsafe_b64encode(secrets.token_bytes(KEY_BYTES)).rstrip(b"=")
    return KEY_PREFIX + encoded.decode("ascii")


def key_digest(token: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The accepted keys.

    Raises:
        ConfigError: The file is missing, too large or malformed.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(
                f"The API key file {path} is larger than {MAX_FILE_BYTES >> 20} MiB",
                field=str(path),
                fix="Restore it from a backup, or start anew with `nearfar cloud init --force`",
            )
        file = msgspec.json.decode(path.read_bytes(), type=_KeyFile)
    except FileNotFoundError as exc:
        raise ConfigError(
            f"There is no API key file {path}",
            field=str(path),
            fix="Create the state directory with `nearfar cloud init DIR`",
        ) from exc
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"The API key file {path} cannot be read: {exc}",
            field=str(path),
            fix="Repair it, or restore it from a backup",
        ) from exc
    if file.version != 1:
        raise ConfigError(
            f"The API key file {path} has version {file.version}",
            field=str(path),
            fix="Update nearfar: this version reads version 1",
        )
    return file.keys


def write_keys(path: Path, keys: tuple[ApiKey, ...]) -> None:
    """Replace the file in one step, readable by its owner only."""
    data = msgspec.json.format(msgspec.json.encode(_KeyFile(keys=keys)), indent=2) + b"\n"
    write_atomically(path, data, mode=PRIVATE_MODE)


def new_entry(name: str, token: str) -> ApiKey:
    """Entry for the file.

    Raises:
        ConfigError: The name is empty or has characters that would not fit a log line.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot name an API key",
            field="name",
            fix="Use up to 64 letters, digits, dots, dashes, underscores and @, e.g. clinic-2",
        )
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return ApiKey(name=name, sha256=key_digest(token), created=created)


def add_key(state: StateDir, name: str) -> str:
    """Add a key and return it in clear, which is the only time that anybody sees it.

    Raises:
        ConfigError: The name is taken or unfit, or there is no readable key file.
    """
    token = generate_api_key()
    entry = new_entry(name, token)
    with state.locked():
        keys = read_keys(state.api_keys)
        if any(key.name == name for key in keys):
            raise ConfigError(
                f"There is an API key named {name!r} already",
                field="name",
                fix=f"Choose another name, or remove it first: nearfar cloud key remove {name}",
            )
        write_keys(state.api_keys, (*keys, entry))
    return token


def remove_key(state: StateDir, name: str) -> None:
    """Withdraw a key; a running server closes its connections within a second.

    Raises:
        ConfigError: There is no such key.
    """
    with state.locked():
        keys = read_keys(state.api_keys)
        kept = tuple(key for key in keys if key.name != name)
        if len(kept) == len(keys):
            known = ", ".join(key.name for key in keys) or "none"
            raise ConfigError(
                f"There is no API key named {name!r}", field="name", fix=f"Known keys: {known}"
            )
        write_keys(state.api_keys, kept)


class Authenticator:
    """Checks API keys and tokens, and follows their files while the server runs.

    A file that cannot be read admits nobody: errors deny.

    Args:
        path: The key file; `None` only together with `allow_anonymous`.
        allow_anonymous: Whether a client that gives no key at all is let in. A wrong key is
            refused even then, because its owner believes it to be checked.
        tokens: Checks tokens; `None` accepts none.

    Attributes:
        revision: Counts how often the files changed.

    Raises:
        ConfigError: The file is missing or malformed.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        allow_anonymous: bool = False,
        tokens: TokenVerifier | None = None,
    ) -> None:
        self._path = path
        self._allow_anonymous = allow_anonymous
        self._tokens = tokens
        self._stamp = stamp_of(path)
        self._keys = () if path is None else read_keys(path)
        self._key_revision = 0

    @property
    def revision(self) -> int:
        return self._key_revision + (0 if self._tokens is None else self._tokens.revision)

    def authenticate(self, token: str, *, proof: bytes = b"", exporter: bytes = b"") -> Caller:
        """Who the client is; `ANONYMOUS` when it gives nothing, where that is allowed.

        Args:
            token: An API key or a token.
            proof: Beside a token, see `nearfar.secure.credentials.proof_message`.
            exporter: The channel's exporter secret.

        Raises:
            SecurityError: The key is missing, unknown or withdrawn, or anything is wrong with the
                token or its proof. All of them read alike; the cause (`NotAdmitted`) tells which.
        """
        try:
            return self._admit(token, proof, exporter)
        except NotAdmitted as exc:
            raise refusal() from exc

    def _admit(self, token: str, proof: bytes, exporter: bytes) -> Caller:
        self.reload_if_changed()
        if not token and self._allow_anonymous:
            return ANONYMOUS
        if self._tokens is not None and token.count(".") == 2:  # an API key has no dots
            return self._tokens.verify(token, proof=proof, exporter=exporter)
        digest = key_digest(token).encode()
        found = None
        for key in self._keys:  # no early exit: the time taken tells nothing about the entries
            if hmac.compare_digest(key.sha256.encode(), digest):
                found = key
        if found is None:
            raise NotAdmitted("no API key" if not token else "unknown API key")
        return Caller(name=found.name, scope=found.sha256, api_key=found)

    def is_accepted(self, caller: Caller) -> bool:
        """Whether a client that was let in once still would be, apart from its token's age."""
        if caller.issuer is not None:
            return self._tokens is not None and self._tokens.is_accepted(caller.issuer)
        return caller.api_key in self._keys or (caller is ANONYMOUS and self._allow_anonymous)

    def reload_if_changed(self) -> None:
        """Read the files again if they changed."""
        if self._tokens is not None:
            self._tokens.reload_if_changed()
        stamp = stamp_of(self._path)
        if self._path is None or stamp == self._stamp:
            return
        self._stamp = stamp
        self._key_revision += 1
        try:
            self._keys = read_keys(self._path)
        except ConfigError as error:
            self._keys = ()
            logger.error("no client is admitted until this is repaired: %s", error)
        else:
            logger.info("API keys read again: %d accepted", len(self._keys))
