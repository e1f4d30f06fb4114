"""The state directory of a cloud runtime: which files are in it, and how they are written.

Secrets are created with mode 0600 from their first byte on, and every file is replaced in one step,
so that a reader (a running server notices changed API keys) never sees half a file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nearfar.errors import ConfigError

PRIVATE_MODE = 0o600
PUBLIC_MODE = 0o644


@dataclass(frozen=True, slots=True)
class StateDir:
    """Names of everything that ``nearfar cloud`` keeps.

    Attributes:
        path: The directory.
    """

    path: Path

    @property
    def ca_certificate(self) -> Path:
        """Certificate of the development CA; clients trust it."""
        return self.path / "ca.pem"

    @property
    def server_chain(self) -> Path:
        """Server certificate, then the CA's."""
        return self.path / "server.pem"

    @property
    def server_key(self) -> Path:
        """Private TLS key of the server; secret."""
        return self.path / "server.key"

    @property
    def identity(self) -> Path:
        """Ed25519 identity that clients pin; secret."""
        return self.path / "identity.key"

    @property
    def next_identity(self) -> Path:
        """The identity that will follow, while clients learn of it; secret."""
        return self.path / "identity-next.key"

    @property
    def rotation(self) -> Path:
        """Statement with which clients move their trust to the next identity."""
        return self.path / "rotation.txt"

    @property
    def pin(self) -> Path:
        """What clients put into ``identity = …``."""
        return self.path / "pin.txt"

    @property
    def api_keys(self) -> Path:
        """Hashes of the accepted API keys."""
        return self.path / "api-keys.json"

    @property
    def token_key(self) -> Path:
        """Private key that signs tokens, PEM; secret. May live on another machine."""
        return self.path / "token-signing.key"

    @property
    def token_issuers(self) -> Path:
        """Public keys of those who may issue tokens."""
        return self.path / "token-issuers.json"

    @property
    def client_key(self) -> Path:
        """The first API key in clear, to be carried to the client; secret."""
        return self.path / "client-key.txt"

    @property
    def client_config(self) -> Path:
        """Snippet for the client's nearfar.toml."""
        return self.path / "client.toml"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other writers out while a file is read, changed and written back.

        Raises:
            ConfigError: There is no such directory.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as exc:
            raise ConfigError(
                f"There is no state directory {self.path}",
                field="state",
                fix=f"Create it with: nearfar cloud init {self.path}",
            ) from exc
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
