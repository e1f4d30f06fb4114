"""Attacks on the way to a connection, one test each: the name is the attack."""

from __future__ import annotations

import pytest

from nearfar.errors import SecurityError
from nearfar.secure import kem
from nearfar.secure.handshake import (
    SEALED_SEED_BYTES,
    ClientHandshake,
    ServerHandshake,
)
from nearfar.secure.identity import ServerIdentity
from nearfar.secure.keys import MAX_LIFETIME_S, KeyConfiguration, KeyRing
from nearfar.session import ClientSession, ServerSession
from tests.attacks.middle import (
    CONFIGURATION,
    HELLO,
    WELCOME,
    Middle,
    assert_dead,
    flipped,
    new_client,
    new_server,
    only,
    refusal,
)
from tests.support.wire import IDENTITY, LIMITS, NOW_S

OTHER = ServerIdentity(bytes(range(1, 33)))
KEY_ID = slice(2, 10)  # of HELLO


def first_message(session) -> bytes:
    (message,) = session.data_to_send()
    return message


def hello_to(server) -> bytes:
    """A good HELLO of a new client; the server has seen nothing yet."""
    client = new_client()
    client.receive(first_message(server), now_s=NOW_S)
    return first_message(client)


def assert_refused(server, hello: bytes, *, now_s: float = NOW_S) -> None:
    with pytest.raises(SecurityError, match="handshake failed"):
        server.receive(hello, now_s=now_s)
    assert_dead(server)


def test_without_an_attack_the_same_hello_is_answered() -> None:
    server = new_server()
    server.receive(hello_to(server), now_s=NOW_S)
    assert first_message(server)[0] == WELCOME


# Who is there


def test_server_with_another_identity_than_the_pinned_one() -> None:
    client = ClientSession(pin=OTHER.pin, token="t", limits=LIMITS, now_s=NOW_S)
    with pytest.raises(SecurityError, match="not the pinned one"):
        client.receive(first_message(new_server()), now_s=NOW_S)
    assert_dead(client)


def test_key_configuration_of_another_identity_that_claims_the_pinned_one() -> None:
    key = kem.KemPrivateKey.generate()
    forged = KeyConfiguration.issue(
        OTHER, key.public_bytes, not_before_s=int(NOW_S) - 10, lifetime_s=3600
    ).message
    claimed = forged.replace(OTHER.pin.public_key, IDENTITY.pin.public_key)
    assert claimed != forged
    client = new_client()
    with pytest.raises(SecurityError, match="not signed by the pinned identity"):
        client.receive(claimed, now_s=NOW_S)
    assert_dead(client)


def test_own_key_put_into_a_configuration_that_the_identity_signed() -> None:
    own = kem.KemPrivateKey.generate().public_bytes
    configuration = first_message(new_server())
    public_key = KeyConfiguration.parse(configuration).public_key
    client = new_client()
    with pytest.raises(SecurityError, match="not signed"):
        client.receive(configuration.replace(public_key, own), now_s=NOW_S)
    assert_dead(client)


def test_signature_of_the_identity_taken_from_another_configuration() -> None:
    one, other = first_message(new_server()), first_message(new_server())
    client = new_client()
    with pytest.raises(SecurityError, match="not signed"):
        client.receive(one[:-64] + other[-64:], now_s=NOW_S)


def test_relaying_the_real_configuration_without_its_private_key() -> None:
    """An impostor repeats what a real server says and makes up WELCOME for itself."""
    impostor, victim = new_server(OTHER), new_client()
    victim.receive(first_message(new_server()), now_s=NOW_S)
    hello = first_message(victim)
    with pytest.raises(SecurityError):
        impostor.receive(hello, now_s=NOW_S)
    lookalike = Middle.connected().sent_to_client[1]  # a WELCOME, made for somebody else
    with pytest.raises(SecurityError, match="handshake failed"):
        victim.receive(lookalike, now_s=NOW_S)
    assert_dead(victim)


# When


def test_configuration_that_has_expired() -> None:
    client = new_client()
    with pytest.raises(SecurityError, match="has expired"):
        client.receive(first_message(new_server()), now_s=NOW_S + MAX_LIFETIME_S)
    assert_dead(client)


def test_configuration_from_the_future() -> None:
    client = new_client()
    with pytest.raises(SecurityError, match="not valid yet"):
        client.receive(first_message(new_server()), now_s=NOW_S - MAX_LIFETIME_S)
    assert_dead(client)


def test_configuration_that_the_identity_signed_for_a_year() -> None:
    """A thief of the identity key cannot make a key that lives on after it was replaced."""
    key = kem.KemPrivateKey.generate()
    forever = KeyConfiguration.issue(
        IDENTITY, key.public_bytes, not_before_s=int(NOW_S) - 10, lifetime_s=365 * 86400
    )
    with pytest.raises(SecurityError, match="not within 86400 s"):
        new_client().receive(forever.message, now_s=NOW_S)


def test_key_used_after_it_expired() -> None:
    server = new_server()
    assert_refused(server, hello_to(server), now_s=NOW_S + MAX_LIFETIME_S)


def test_expired_key_used_on_a_new_connection() -> None:
    keys = KeyRing(IDENTITY, now_s=NOW_S)
    old = ServerHandshake(keys, now_s=NOW_S)
    hello = ClientHandshake(IDENTITY.pin).receive_configuration(
        old.configuration.message, now_s=NOW_S
    )
    later_s = NOW_S + MAX_LIFETIME_S
    for server in (old, ServerHandshake(keys, now_s=later_s)):
        with pytest.raises(SecurityError, match="handshake failed"):
            server.receive_hello(hello, now_s=later_s)


# Which key


def test_unknown_key_id() -> None:
    server = new_server()
    hello = bytearray(hello_to(server))
    hello[KEY_ID] = bytes(8)
    assert_refused(server, bytes(hello))


def test_key_id_of_an_older_configuration_that_is_still_valid() -> None:
    """A HELLO must be for the configuration of its own connection."""
    keys = KeyRing(IDENTITY, now_s=NOW_S)
    older = ServerHandshake(keys, now_s=NOW_S)
    client = ClientHandshake(IDENTITY.pin)
    hello = client.receive_configuration(older.configuration.message, now_s=NOW_S)
    later_s = NOW_S + MAX_LIFETIME_S / 2
    newer = ServerHandshake(keys, now_s=later_s)
    assert newer.configuration.key_id != older.configuration.key_id
    with pytest.raises(SecurityError, match="handshake failed"):
        newer.receive_hello(hello, now_s=later_s)
    older.receive_hello(hello, now_s=later_s)  # on its own connection it is answered


def test_right_key_id_claimed_for_a_seed_sealed_to_another_key() -> None:
    server, other = new_server(), new_server()
    hello = bytearray(hello_to(other))
    hello[KEY_ID] = KeyConfiguration.parse(first_message(server)).key_id
    assert_refused(server, bytes(hello))


# Downgrade


def test_downgrade_of_the_version_in_the_configuration() -> None:
    def strip(configuration: bytes) -> bytes:
        return configuration[:1] + b"\x01\x00" + configuration[3:]

    refusal(to_client=only(CONFIGURATION, strip))


def test_downgrade_of_the_version_in_hello() -> None:
    refusal(to_server=only(HELLO, lambda hello: hello[:1] + b"\x00" + hello[2:]))


def test_downgrade_of_the_suites_in_the_configuration() -> None:
    configuration = KeyConfiguration.parse(first_message(new_server()))
    count = len(configuration.suites)
    suites = bytes([count]) + b"".join(s.to_bytes(2, "big") for s in configuration.suites)
    position = configuration.message.index(suites, 18)

    for weaker in (b"\x01\x00\x00", b"\x01\x7f\xff"):
        refusal(
            to_client=only(
                CONFIGURATION,
                lambda message, weaker=weaker: (
                    message[:position] + weaker + message[position + len(suites) :]
                ),
            )
        )


def test_downgrade_of_the_suites_in_hello() -> None:
    def suites_of(hello: bytes) -> int:
        return 11 + 2 * hello[10]

    for weaker in (b"\x01\x00\x00", b"\x01\x7f\xff", b"\x00"):
        refusal(
            to_server=only(
                HELLO,
                lambda hello, weaker=weaker: hello[:10] + weaker + hello[suites_of(hello) :],
            )
        )


def test_reordering_of_the_suites_in_hello() -> None:
    """Also a choice that both ends allow must be the client's own."""
    server = ServerHandshake(KeyRing(IDENTITY, now_s=NOW_S), now_s=NOW_S)
    offered = (*server.configuration.suites, 0x7FFF)
    client = ClientHandshake(IDENTITY.pin, suites=offered)
    hello = client.receive_configuration(server.configuration.message, now_s=NOW_S)
    end = 11 + 2 * len(offered)
    turned = b"".join(suite.to_bytes(2, "big") for suite in reversed(offered))
    assert hello[11:end] != turned
    with pytest.raises(SecurityError, match="handshake failed"):
        server.receive_hello(hello[:11] + turned + hello[end:], now_s=NOW_S)


# Nonces, reflection, replay


def test_nonce_chosen_by_someone_else() -> None:
    def choose(hello: bytes) -> bytes:
        start = 11 + 2 * hello[10]
        return hello[:start] + bytes(32) + hello[start + 32 :]

    refusal(to_server=only(HELLO, choose))


def test_ephemeral_key_chosen_by_someone_else() -> None:
    """With the server's seed sealed to him, the attacker would know half of every secret."""
    own = kem.KemPrivateKey.generate().public_bytes

    def choose(hello: bytes) -> bytes:
        end = len(hello) - 2 - SEALED_SEED_BYTES
        return hello[: end - len(own)] + own + hello[end:]

    refusal(to_server=only(HELLO, choose))


def test_reflection_of_hello_to_the_client() -> None:
    client, server = new_client(), new_server()
    client.receive(first_message(server), now_s=NOW_S)
    with pytest.raises(SecurityError, match="handshake failed"):
        client.receive(first_message(client), now_s=NOW_S)
    assert_dead(client)


def test_reflection_of_the_configuration_to_the_server() -> None:
    server = new_server()
    assert_refused(server, first_message(server))


def test_welcome_meant_for_another_client() -> None:
    client, server = new_client(), new_server()
    client.receive(first_message(server), now_s=NOW_S)
    client.data_to_send()
    with pytest.raises(SecurityError, match="handshake failed"):
        client.receive(Middle.connected().sent_to_client[1], now_s=NOW_S)
    assert_dead(client)


def test_replay_of_a_whole_recorded_connection_to_the_server() -> None:
    """The same key configuration is still in use, so HELLO is answered; but nothing else opens."""
    keys = KeyRing(IDENTITY, now_s=NOW_S)
    first = ServerSession(keys=keys, limits=LIMITS, now_s=NOW_S)
    client = new_client()
    client.receive(first_message(first), now_s=NOW_S)
    hello = first_message(client)
    first.receive(hello, now_s=NOW_S)
    client.receive(first_message(first), now_s=NOW_S)
    login = first_message(client)
    assert first.receive(login, now_s=NOW_S)  # the recorded connection was a good one

    second = ServerSession(keys=keys, limits=LIMITS, now_s=NOW_S)
    second.data_to_send()
    second.receive(hello, now_s=NOW_S)
    second.data_to_send()
    with pytest.raises(SecurityError, match="channel failed"):
        second.receive(login, now_s=NOW_S)
    assert_dead(second)


def test_replay_of_a_whole_recorded_connection_to_the_client() -> None:
    recorded = Middle.connected().sent_to_client
    client = new_client()
    client.receive(recorded[0], now_s=NOW_S)
    client.data_to_send()
    with pytest.raises(SecurityError, match="handshake failed"):
        client.receive(recorded[1], now_s=NOW_S)
    assert_dead(client)


# Damage


@pytest.mark.parametrize(
    ("kind", "direction"),
    [(CONFIGURATION, "to_client"), (HELLO, "to_server"), (WELCOME, "to_client")],
    ids=["configuration", "hello", "welcome"],
)
def test_bit_flip_anywhere_in_the_handshake(kind: int, direction: str) -> None:
    """Every byte of the first 64 and the last 64, and every 61st between them."""
    sent = Middle.connected()
    messages = sent.sent_to_server + sent.sent_to_client
    (length,) = {len(message) for message in messages if message[0] == kind}
    positions = {*range(64), *range(64, length, 61), *range(length - 64, length)}
    for position in sorted(positions):
        flip = only(kind, lambda message, at=position: flipped(message, at, 1 << at % 8))
        refusal(**{direction: flip})


@pytest.mark.parametrize("kept", [0, 1, 2, 100, -1])
@pytest.mark.parametrize(
    ("kind", "direction"),
    [(CONFIGURATION, "to_client"), (HELLO, "to_server"), (WELCOME, "to_client")],
    ids=["configuration", "hello", "welcome"],
)
def test_truncation_of_the_handshake(kind: int, direction: str, kept: int) -> None:
    refusal(**{direction: only(kind, lambda message: message[:kept])})


def test_record_before_the_handshake_is_over() -> None:
    record = Middle.connected().sent_to_server[-1]
    server = new_server()
    server.data_to_send()
    assert_refused(server, record)


def test_client_that_stays_silent_about_its_token_until_the_server_is_proven() -> None:
    """Someone in the middle who changes WELCOME gets not one byte of the login."""
    middle = Middle.new()
    middle.to_client = only(WELCOME, lambda message: flipped(message, -1))
    with pytest.raises(SecurityError):
        middle.pair.exchange()
    assert [message[0] for message in middle.sent_to_server] == [HELLO]
    assert middle.pair.client.data_to_send() == []
