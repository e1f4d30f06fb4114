"""Attestation with a mock plug-in: bound to one handshake, demanded where a verifier is set."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from nearfar.errors import SecurityError
from nearfar.secure import attestation
from nearfar.secure.attestation import MAX_EVIDENCE_BYTES, AttestedFacts
from nearfar.secure.handshake import (
    MAX_HANDSHAKE_MESSAGE_BYTES,
    MAX_HELLO_BYTES,
    ClientHandshake,
    ServerHandshake,
)
from nearfar.secure.keys import KeyConfiguration, KeyRing
from nearfar.session import ClientSession, ServerSession
from tests.support.wire import IDENTITY, NOW_S

MACHINE_KEY = b"the mock's hardware key"
CLAIMS = b"measurement 7"


class MockAttester:
    """Signs claims and binding with a key that only this test's verifier trusts."""

    def __init__(self, claims: bytes = CLAIMS, key: bytes = MACHINE_KEY) -> None:
        self.claims = claims
        self.proves = claims
        self.key = key
        self.bindings: list[bytes] = []
        self.replay: bytes | None = None

    def evidence(self, binding: bytes) -> bytes:
        self.bindings.append(binding)
        made = hmac.digest(self.key, self.proves + binding, "sha256") + self.proves
        return self.replay or made


class MockVerifier:
    def verify(self, evidence: bytes, binding: bytes) -> AttestedFacts:
        tag, claims = evidence[:32], evidence[32:]
        if not hmac.compare_digest(tag, hmac.digest(MACHINE_KEY, claims + binding, "sha256")):
            raise SecurityError("The evidence is not of this machine and this connection")
        return AttestedFacts(claims=claims, summary="mock")


def shake(
    attester: MockAttester | None, *, verifier: MockVerifier | None = None, tamper=bytes
) -> ClientHandshake:
    """A whole handshake; `tamper` changes WELCOME on its way."""
    keys = KeyRing(IDENTITY, now_s=NOW_S, attester=attester)
    client = ClientHandshake(IDENTITY.pin, verifier=verifier)
    server = ServerHandshake(keys, now_s=NOW_S)
    hello = client.receive_configuration(server.configuration.message, now_s=NOW_S)
    welcome, secrets = server.receive_hello(hello, now_s=NOW_S)
    assert client.receive_welcome(tamper(welcome)) == secrets
    return client


def test_a_client_with_a_verifier_learns_what_the_evidence_shows() -> None:
    client = shake(MockAttester(), verifier=MockVerifier())
    assert client.attested == AttestedFacts(claims=CLAIMS, summary="mock")


def test_a_client_without_a_verifier_takes_an_attesting_server_unjudged() -> None:
    assert shake(MockAttester(key=b"anything")).attested is None


def test_a_client_with_a_verifier_refuses_a_server_that_attests_nothing() -> None:
    with pytest.raises(SecurityError, match="attests nothing"):
        shake(None, verifier=MockVerifier())


def test_evidence_of_another_machine_is_refused() -> None:
    with pytest.raises(SecurityError, match="not of this machine"):
        shake(MockAttester(key=b"another"), verifier=MockVerifier())


def test_evidence_replayed_from_another_connection_is_refused() -> None:
    """The binding holds the client's own nonce, so that the server cannot choose it."""
    attester = MockAttester()
    shake(attester, verifier=MockVerifier())
    attester.replay = hmac.digest(MACHINE_KEY, CLAIMS + attester.bindings[0], "sha256") + CLAIMS
    with pytest.raises(SecurityError, match="this connection"):
        shake(attester, verifier=MockVerifier())


def test_evidence_of_other_claims_than_the_identity_signed_is_refused() -> None:
    attester = MockAttester()
    attester.proves = b"measurement 8"
    with pytest.raises(SecurityError, match="other than what its identity signed"):
        shake(attester, verifier=MockVerifier())


def test_evidence_cannot_be_taken_out_put_in_or_changed() -> None:
    def without(welcome: bytes) -> bytes:
        return welcome[:1171] + b"\x00\x00" + welcome[-32:]

    def flipped(welcome: bytes) -> bytes:
        return welcome[:1180] + bytes([welcome[1180] ^ 1]) + welcome[1181:]

    def added(welcome: bytes) -> bytes:
        return welcome[:1171] + b"\x00\x01x" + welcome[-32:]

    for attester, tamper in ((MockAttester(), without), (MockAttester(), flipped), (None, added)):
        with pytest.raises(SecurityError, match="handshake failed"):
            shake(attester, tamper=tamper)


def test_a_server_that_promised_evidence_must_send_it() -> None:
    for size_bytes in (0, MAX_EVIDENCE_BYTES + 1):
        attester = MockAttester()
        attester.evidence = lambda _, size=size_bytes: bytes(size)  # type: ignore[method-assign]
        with pytest.raises(SecurityError, match="handshake failed"):
            shake(attester)


def test_a_configuration_without_promise_does_not_excuse_evidence(monkeypatch) -> None:
    """A server whose code is wrong, not an attacker: the tag holds, the rule does not."""
    monkeypatch.setattr(attestation, "claims_hash", lambda _: attestation.NO_ATTESTATION)
    with pytest.raises(SecurityError, match="handshake failed"):
        shake(MockAttester())


def test_the_binding_is_over_configuration_and_the_clients_nonce() -> None:
    attester = MockAttester()
    keys = KeyRing(IDENTITY, now_s=NOW_S, attester=attester)
    server = ServerHandshake(keys, now_s=NOW_S)
    message = server.configuration.message
    hello = ClientHandshake(IDENTITY.pin).receive_configuration(message, now_s=NOW_S)
    server.receive_hello(hello, now_s=NOW_S)
    expected = (
        b"nearfar/1 attestation binding\x00" + hashlib.sha256(message).digest() + hello[15:47]
    )
    assert attester.bindings == [hashlib.sha256(expected).digest()]


def test_the_attestation_hash_stands_in_the_configuration_where_it_is_documented() -> None:
    keys = KeyRing(IDENTITY, now_s=NOW_S, attester=MockAttester())
    message = keys.current(NOW_S).message
    expected = hashlib.sha256(b"nearfar/1 attestation claims\x00" + CLAIMS).digest()
    assert message[1250:1282] == expected
    assert KeyConfiguration.parse(message).attestation_hash == expected
    plain = KeyRing(IDENTITY, now_s=NOW_S).current(NOW_S)
    assert plain.message[1250:1282] == plain.attestation_hash == bytes(32)


def test_sessions_carry_evidence_up_to_its_limit_and_no_longer_hello() -> None:
    attester = MockAttester()
    attester.evidence = lambda _: bytes(MAX_EVIDENCE_BYTES)  # type: ignore[method-assign]
    keys = KeyRing(IDENTITY, now_s=NOW_S, attester=attester)
    server = ServerSession(keys=keys, now_s=NOW_S)
    client = ClientSession(pin=IDENTITY.pin, token="t", now_s=NOW_S)
    client.receive(server.data_to_send()[0], now_s=NOW_S)
    server.receive(client.data_to_send()[0], now_s=NOW_S)
    (welcome,) = server.data_to_send()
    assert MAX_EVIDENCE_BYTES < len(welcome) <= MAX_HANDSHAKE_MESSAGE_BYTES
    client.receive(welcome, now_s=NOW_S)
    assert client.data_to_send()  # Auth
    with pytest.raises(SecurityError):
        ServerSession(keys=keys, now_s=NOW_S).receive(bytes(MAX_HELLO_BYTES + 1), now_s=NOW_S)
