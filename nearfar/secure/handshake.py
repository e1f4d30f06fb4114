"""The handshake's two ends: key configuration -> HELLO -> WELCOME -> traffic secrets.

A key-encapsulation form of Noise NK: the server proves itself by opening a seed sealed to the key
its pinned identity signed; the client stays anonymous until it speaks inside the channel. Layouts
and key schedule: docs/reference/secure-channel.md.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from nearfar.errors import SecurityError
from nearfar.secure import attestation, kem
from nearfar.secure.encoding import MalformedError, Reader, list_of, sized
from nearfar.secure.identity import Pin
from nearfar.secure.keys import (
    SUITE_XWING_AES256GCM,
    SUPPORTED_VERSIONS,
    KeyConfiguration,
    KeyRing,
    preferred_suites,
)

TYPE_HELLO = 2
TYPE_WELCOME = 3

#: What a server takes; HELLO with two suites is 2435 bytes.
MAX_HELLO_BYTES = 4096
#: What a client takes: WELCOME with the longest evidence, and room.
MAX_HANDSHAKE_MESSAGE_BYTES = 4096 + attestation.MAX_EVIDENCE_BYTES

SEED_BYTES = 32
NONCE_BYTES = 32
TAG_BYTES = 32
SEALED_SEED_BYTES = SEED_BYTES + kem.OVERHEAD_BYTES

_CLIENT_SEED = b"nearfar/1 client seed\x00"
_SERVER_SEED = b"nearfar/1 server seed\x00"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelSecrets:
    """What a finished handshake yields, the same on both ends; never printed.

    Attributes:
        client_traffic: Secret of the direction client to server.
        server_traffic: Secret of the direction server to client.
        exporter: For binding other proofs to this channel.
        resumption: For resuming after a reconnect.
        transcript_hash: SHA-256 over everything both ends said; public.
        suite: Cipher suite of the records.
    """

    client_traffic: bytes = field(repr=False)
    server_traffic: bytes = field(repr=False)
    exporter: bytes = field(repr=False)
    resumption: bytes = field(repr=False)
    confirmation_tag: bytes = field(repr=False)
    transcript_hash: bytes
    suite: int = SUITE_XWING_AES256GCM


def derive_secrets(
    client_seed: bytes,
    server_seed: bytes,
    transcript: bytes,
    *,
    suite: int = SUITE_XWING_AES256GCM,
) -> ChannelSecrets:
    """The key schedule (HKDF-SHA256, RFC 5869).

    Args:
        client_seed: 32 bytes.
        server_seed: 32 bytes.
        transcript: Transcript hash, 32 bytes; it covers the suites both ends offered.
        suite: The chosen one.
    """
    root = HKDF.extract(hashes.SHA256(), transcript, client_seed + server_seed)

    def expand(label: bytes) -> bytes:
        return HKDFExpand(hashes.SHA256(), 32, b"nearfar/1 " + label).derive(root)

    return ChannelSecrets(
        client_traffic=expand(b"client traffic"),
        server_traffic=expand(b"server traffic"),
        exporter=expand(b"exporter"),
        resumption=expand(b"resumption"),
        confirmation_tag=hmac.digest(expand(b"confirmation"), transcript, "sha256"),
        transcript_hash=transcript,
        suite=suite,
    )


def export(exporter: bytes, label: bytes) -> bytes:
    """A value that only the two ends of this channel have, for one purpose.

    Args:
        exporter: `ChannelSecrets.exporter`.
        label: The purpose; one value for each.

    Returns:
        32 bytes.
    """
    return HKDFExpand(hashes.SHA256(), 32, b"nearfar/1 export " + label).derive(exporter)


class _Transcript:
    """SHA-256 over a name and counted byte strings, so that no two sequences look alike."""

    __slots__ = ("_hash",)

    def __init__(self, *messages: bytes) -> None:
        self._hash = hashlib.sha256(b"nearfar/1 transcript\x00")
        for message in messages:
            self.add(message)

    def add(self, message: bytes) -> None:
        self._hash.update(len(message).to_bytes(4, "big"))
        self._hash.update(message)

    def digest(self) -> bytes:
        return self._hash.digest()


def handshake_failed() -> SecurityError:
    """The one error for every handshake failure that is not about trust or clocks."""
    return SecurityError(
        "The secure handshake failed",
        fix="Reconnect; if it fails again, something between client and server alters the traffic",
    )


class ClientHandshake:
    """The client's end; good for one connection.

    Args:
        pin: The identity the server must have, or those of which it must have one (during a
            rotation).
        versions: Channel versions to speak, best first.
        suites: Cipher suites to speak, best first; by default as this machine is fast at them.
        verifier: Checks the server's evidence; with one, a server without evidence is refused.

    Attributes:
        attested: What the evidence showed; `None` before WELCOME, and without a verifier.
    """

    def __init__(
        self,
        pin: Pin | Sequence[Pin],
        *,
        versions: tuple[int, ...] = SUPPORTED_VERSIONS,
        suites: tuple[int, ...] | None = None,
        verifier: attestation.Verifier | None = None,
    ) -> None:
        self._pins = (pin,) if isinstance(pin, Pin) else tuple(pin)
        self._verifier = verifier
        self.attested: attestation.AttestedFacts | None = None
        self._attestation_hash = attestation.NO_ATTESTATION
        self._binding = b""
        self._versions = versions
        self._suites = preferred_suites() if suites is None else suites
        self._suite = self._suites[0]
        self._ephemeral: kem.KemPrivateKey | None = None
        self._client_seed = b""
        self._transcript = _Transcript()

    def receive_configuration(self, message: bytes, *, now_s: float) -> bytes:
        """Check the server's key configuration and answer with HELLO.

        Raises:
            SecurityError: Identity, signature, validity, version or suite does not fit.
        """
        configuration = KeyConfiguration.parse(message)
        named = configuration.identity
        pin = next((pin for pin in self._pins if pin.accepts(named)), self._pins[0])
        configuration.verify(pin, now_s=now_s)
        attests = configuration.attestation_hash != attestation.NO_ATTESTATION
        if self._verifier is not None and not attests:
            raise SecurityError(
                "The server attests nothing, and this client demands attestation",
                fix="Ask the operator to serve with an attester, or connect without a verifier",
            )
        version = _first_common(self._versions, configuration.versions)
        suite = _first_common(self._suites, configuration.suites)
        if version is None or suite is None:
            raise SecurityError(
                "Client and server share no version or cipher suite of the secure channel: the "
                f"server speaks versions {configuration.versions}, suites {configuration.suites}; "
                f"this client versions {self._versions}, suites {self._suites}",
                fix="Update nearfar on the older side",
            )
        ephemeral = kem.KemPrivateKey.generate()
        seed = os.urandom(SEED_BYTES)
        nonce = os.urandom(NONCE_BYTES)
        head = b"".join(
            (
                bytes([TYPE_HELLO, version]),
                configuration.key_id,
                list_of(self._suites, 2),
                nonce,
                sized(ephemeral.public_bytes),
            )
        )
        info = _CLIENT_SEED + _Transcript(message, head).digest()
        sealed = kem.seal(seed, configuration.public_key, info, keep_key=True)
        if sealed is None:
            raise handshake_failed()
        hello = head + sized(sealed)
        self._transcript = _Transcript(message, hello)
        self._ephemeral, self._client_seed, self._suite = ephemeral, seed, suite
        self._attestation_hash = configuration.attestation_hash
        self._binding = attestation.binding_of(message, nonce)
        return hello

    def receive_welcome(self, message: bytes) -> ChannelSecrets:
        """Check the server's proof; the ephemeral key and the seeds are forgotten.

        Raises:
            SecurityError: Anything differs from what an honest server sends.
        """
        ephemeral, self._ephemeral = self._ephemeral, None
        client_seed, self._client_seed = self._client_seed, b""
        if ephemeral is None:
            raise handshake_failed()
        reader = Reader(message)
        try:
            reader.expect(bytes([TYPE_WELCOME]))
            sealed = reader.sized(SEALED_SEED_BYTES)
            evidence = reader.counted(attestation.MAX_EVIDENCE_BYTES)
            head = message[: reader.position]
            tag = reader.take(TAG_BYTES)
            reader.finish()
        except MalformedError:
            raise handshake_failed() from None
        server_seed = ephemeral.open(sealed, _SERVER_SEED + self._transcript.digest())
        if server_seed is None or len(server_seed) != SEED_BYTES:
            raise handshake_failed()
        self._transcript.add(head)
        secrets = derive_secrets(
            client_seed, server_seed, self._transcript.digest(), suite=self._suite
        )
        if not hmac.compare_digest(tag, secrets.confirmation_tag):
            raise handshake_failed()
        self._check_evidence(evidence)
        return secrets

    def _check_evidence(self, evidence: bytes) -> None:
        """After the tag, so that what is judged came from the pinned server."""
        promised = self._attestation_hash
        if bool(evidence) != (promised != attestation.NO_ATTESTATION):
            raise handshake_failed()
        if self._verifier is None:
            return
        facts = self._verifier.verify(evidence, self._binding)
        if attestation.claims_hash(facts.claims) != promised:
            raise SecurityError(
                "The server's evidence shows something other than what its identity signed",
                fix="Tell the operator: the server and its attestation do not belong together",
            )
        self.attested = facts


class ServerHandshake:
    """The server's end; good for one connection.

    Args:
        keys: Where the configuration comes from.
        now_s: Wall clock.

    Attributes:
        configuration: To be sent first.
    """

    def __init__(self, keys: KeyRing, *, now_s: float) -> None:
        self._keys = keys
        self.configuration = keys.current(now_s)

    def receive_hello(self, message: bytes, *, now_s: float) -> tuple[bytes, ChannelSecrets]:
        """Open the client's seed and answer with WELCOME.

        Raises:
            SecurityError: The message is malformed, for another or an expired key, or altered.
        """
        configuration = self.configuration
        reader = Reader(message)
        try:
            reader.expect(bytes([TYPE_HELLO]))
            version = reader.unsigned(1)
            reader.expect(configuration.key_id)
            suites = reader.list_of(2)
            nonce = reader.take(NONCE_BYTES)
            client_key = reader.sized(kem.PUBLIC_KEY_BYTES)
            head = message[: reader.position]
            sealed = reader.sized(SEALED_SEED_BYTES)
            reader.finish()
        except MalformedError:
            raise handshake_failed() from None
        private_key = self._keys.private_key(configuration.key_id, now_s)
        suite = _first_common(suites, configuration.suites)
        if version not in configuration.versions or suite is None or private_key is None:
            raise handshake_failed()
        info = _CLIENT_SEED + _Transcript(configuration.message, head).digest()
        client_seed = private_key.open(sealed, info)
        if client_seed is None or len(client_seed) != SEED_BYTES:
            raise handshake_failed()
        transcript = _Transcript(configuration.message, message)
        server_seed = os.urandom(SEED_BYTES)
        sealed = kem.seal(server_seed, client_key, _SERVER_SEED + transcript.digest()) or b""
        if not sealed:
            raise handshake_failed()
        evidence = self._evidence(attestation.binding_of(configuration.message, nonce))
        welcome = bytes([TYPE_WELCOME]) + sized(sealed) + sized(evidence)
        transcript.add(welcome)
        secrets = derive_secrets(client_seed, server_seed, transcript.digest(), suite=suite)
        return welcome + secrets.confirmation_tag, secrets

    def _evidence(self, binding: bytes) -> bytes:
        attester = self._keys.attester
        if attester is None:
            return b""
        evidence = attester.evidence(binding)
        if not 0 < len(evidence) <= attestation.MAX_EVIDENCE_BYTES:
            raise handshake_failed()
        return evidence


def _first_common(preferred: tuple[int, ...], offered: tuple[int, ...]) -> int | None:
    """The first of `preferred` that is offered: the one choice both ends arrive at."""
    return next((item for item in preferred if item in offered), None)
