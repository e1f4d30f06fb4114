"""What a client shows to be let in, once the channel stands: an API key, or a token and a proof.

A token (a JWT that names a key, RFC 7800) is worth nothing without a signature by that key over a
value that only the two ends of this very channel have. Specification:
docs/reference/secure-channel.md, "Client authentication".
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Protocol

from nearfar.secure.ed25519 import SIGNATURE_BYTES, PrivateKeyFile, PublicKeyText
from nearfar.secure.handshake import export

PROOF_BYTES = SIGNATURE_BYTES

_PROOF_LABEL = b"client proof"
_PROOF_PURPOSE = b"nearfar/1 client proof\x00"


class ClientPublicKey(PublicKeyText):
    """A client's public key as people copy it: ``nfc1:`` and 58 characters of base32."""

    __slots__ = ()

    PREFIX = "nfc1:"
    SUBJECT = "The client's key"
    NOUN = "a client public key"
    FIELD = "key"
    COPY_AGAIN = "Copy it again from the client: `nearfar client-key show FILE`"


class ClientKey(PrivateKeyFile):
    """The private key of one client; it never leaves the client."""

    __slots__ = ("public",)

    HEADER = "nearfar-client-key 1"
    LINE = "public"
    NOUN = "client key"
    FIELD = "key_file"
    HOW_TO_MAKE = "Make one with `nearfar client-key new FILE`"
    POINT_TO = "Point to the file that `nearfar client-key new` wrote"
    AFTER_LOSS = (
        "Make a new one with `nearfar client-key new`, and send the operator its public key"
    )
    BEFORE_REPLACING = "Choose another file; tokens issued for the old key need the old key"

    #: What the operator issues tokens for.
    public: ClientPublicKey

    def __init__(self, seed: bytes) -> None:
        super().__init__(seed)
        self.public = ClientPublicKey(self._public_bytes())

    def _public_text(self) -> str:
        return str(self.public)


def proof_message(exporter: bytes, token: str) -> bytes:
    """What the client's key signs: this channel and this token.

    Args:
        exporter: `ChannelSecrets.exporter` of the channel.
        token: The token beside which the proof is sent.
    """
    token_hash = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
    return _PROOF_PURPOSE + export(exporter, _PROOF_LABEL) + token_hash


class Credentials(Protocol):
    """What a `nearfar.session.ClientSession` authenticates with.

    Attributes:
        token: Sent inside the channel.
    """

    @property
    def token(self) -> str:
        """API key or token."""
        ...

    def prove(self, exporter: bytes) -> bytes:
        """The proof for the channel with this exporter secret; empty for an API key."""
        ...


@dataclass(frozen=True, slots=True)
class ApiKeyCredentials:
    """An API key: whoever has it, is let in."""

    token: str = field(repr=False)

    def prove(self, exporter: bytes) -> bytes:
        return b""


@dataclass(frozen=True, slots=True)
class TokenCredentials:
    """A short-lived token, and the key that it names."""

    token: str = field(repr=False)
    key: ClientKey

    def prove(self, exporter: bytes) -> bytes:
        return self.key.sign(proof_message(exporter, self.token))
