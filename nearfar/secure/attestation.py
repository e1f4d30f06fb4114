"""Attestation as a plug-in: evidence about the server's machine, bound to one handshake.

nearfar brings no attester and no verifier of its own: the channel is encrypted and pinned, and
attested only where the operator and the client both install a real plug-in for their hardware.
Specification: docs/reference/secure-channel.md, "Attestation".
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

#: Holds a TDX or SEV-SNP report with its certificate chain, and must fit a u16.
MAX_EVIDENCE_BYTES = 16 * 1024
HASH_BYTES = 32
#: Attestation hash of a server that sends no evidence.
NO_ATTESTATION = bytes(HASH_BYTES)

_CLAIMS_PURPOSE = b"nearfar/1 attestation claims\x00"
_BINDING_PURPOSE = b"nearfar/1 attestation binding\x00"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestedFacts:
    """What valid evidence shows.

    Attributes:
        claims: The claims it proves, byte for byte the `Attester.claims` of an honest server.
        summary: For people and logs.
    """

    claims: bytes
    summary: str = ""


class Attester(Protocol):
    """The server's half of a plug-in.

    Attributes:
        claims: What its evidence will show, in the plug-in's own encoding (for example the
            expected measurement); the same for every connection. Its hash is signed by the
            identity, as part of each key configuration.
    """

    @property
    def claims(self) -> bytes:
        """What the evidence will show."""
        ...

    def evidence(self, binding: bytes) -> bytes:
        """Fresh evidence over a binding; called once per connection, on the event loop.

        Args:
            binding: 32 bytes that the evidence must vouch for (TDX, SNP: the report data).

        Returns:
            1 to 16384 bytes.
        """
        ...


class Verifier(Protocol):
    """The client's half of a plug-in."""

    def verify(self, evidence: bytes, binding: bytes) -> AttestedFacts:
        """Check evidence: its chain of trust, its claims, and that it vouches for `binding`.

        Raises:
            SecurityError: The evidence is not good enough.
        """
        ...


def claims_hash(claims: bytes) -> bytes:
    """The attestation hash of a key configuration."""
    return hashlib.sha256(_CLAIMS_PURPOSE + claims).digest()


def binding_of(configuration_message: bytes, client_nonce: bytes) -> bytes:
    """What evidence must vouch for: this key configuration, asked for with this nonce.

    The nonce is the client's, so that old evidence is of no use; the configuration holds the key
    that the channel is made with, so that evidence of another machine is not, either.
    """
    configuration_hash = hashlib.sha256(configuration_message).digest()
    return hashlib.sha256(_BINDING_PURPOSE + configuration_hash + client_nonce).digest()
