"""Both ends of the handshake, the key schedule's vector, and an attack on every region."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

import pytest

from nearfar.errors import SecurityError
from nearfar.secure import kem
from nearfar.secure.handshake import (
    MAX_HANDSHAKE_MESSAGE_BYTES,
    ChannelSecrets,
    ClientHandshake,
    ServerHandshake,
    derive_secrets,
)
from nearfar.secure.identity import ServerIdentity
from nearfar.secure.keys import MAX_LIFETIME_S, KeyConfiguration, KeyRing
from tests.support.wire import IDENTITY, NOW_S

Tamper = Callable[[bytes], bytes]


def ends() -> tuple[ClientHandshake, ServerHandshake]:
    return ClientHandshake(IDENTITY.pin), ServerHandshake(
        KeyRing(IDENTITY, now_s=NOW_S), now_s=NOW_S
    )


def shake(
    *,
    configuration: Tamper = bytes,
    hello: Tamper = bytes,
    welcome: Tamper = bytes,
) -> tuple[ChannelSecrets, ChannelSecrets]:
    """A whole handshake with something in between."""
    client, server = ends()
    first = configuration(server.configuration.message)
    second = hello(client.receive_configuration(first, now_s=NOW_S))
    third, server_secrets = server.receive_hello(second, now_s=NOW_S)
    return client.receive_welcome(welcome(third)), server_secrets


def flip(position: int) -> Tamper:
    def tamper(message: bytes) -> bytes:
        damaged = bytearray(message)
        damaged[position] ^= 1
        return bytes(damaged)

    return tamper


def test_both_ends_arrive_at_the_same_secrets() -> None:
    at_client, at_server = shake()
    assert at_client == at_server
    values = [at_client.client_traffic, at_client.server_traffic, at_client.exporter]
    values += [at_client.resumption, at_client.confirmation_tag, at_client.transcript_hash]
    assert len(set(values)) == 6
    assert all(len(value) == 32 for value in values)


def test_no_two_handshakes_share_a_secret() -> None:
    first, second = shake()[0], shake()[0]
    assert first.client_traffic != second.client_traffic
    assert first.transcript_hash != second.transcript_hash


def test_secrets_are_not_in_the_repr() -> None:
    secrets, _ = shake()
    text = repr(secrets)
    for name in ("client_traffic", "server_traffic", "exporter", "resumption", "confirmation_tag"):
        assert name not in text


def test_messages_have_the_documented_sizes() -> None:
    client, server = ends()
    hello = client.receive_configuration(server.configuration.message, now_s=NOW_S)
    welcome, _ = server.receive_hello(hello, now_s=NOW_S)
    sizes = len(server.configuration.message), len(hello), len(welcome)
    assert sizes == (1378, 2435, 1205)
    assert max(sizes) < MAX_HANDSHAKE_MESSAGE_BYTES


# Key schedule


def test_key_schedule_vector() -> None:
    """The vector of docs/reference/secure-channel.md."""
    secrets = derive_secrets(b"\x01" * 32, b"\x02" * 32, b"\x03" * 32)
    assert secrets.client_traffic.hex() == VECTOR["client traffic"]
    assert secrets.server_traffic.hex() == VECTOR["server traffic"]
    assert secrets.exporter.hex() == VECTOR["exporter"]
    assert secrets.resumption.hex() == VECTOR["resumption"]
    assert secrets.confirmation_tag.hex() == VECTOR["confirmation tag"]


VECTOR = {
    "client traffic": "cfe634edcc0e9b81954906ac3228a9fd262b990c91dbaffe4522c456618075e1",
    "server traffic": "273a534ec9ff698601ac2ec9ea5df805e9bb64aaa5d5d45d99b3fe32e103defc",
    "exporter": "fc4124a83a46224f91149b11dd363aaf6a305fc9dce2909173421033d59f81d0",
    "resumption": "ce566ba845b4a230feae84895e7fcd0b38635302f69236cef068f251070b0b7a",
    "confirmation tag": "ceb496de8ada32a3b3220464472415d92dc47e90e66da219be3ade96a3acfd57",
}


def test_key_schedule_is_hkdf_over_the_transcript() -> None:
    """RFC 5869 written out with HMAC alone."""
    transcript = b"\x03" * 32
    root = hmac.digest(transcript, b"\x01" * 32 + b"\x02" * 32, "sha256")

    def expand(label: str) -> bytes:
        return hmac.digest(root, b"nearfar/1 " + label.encode() + b"\x01", "sha256")

    secrets = derive_secrets(b"\x01" * 32, b"\x02" * 32, transcript)
    assert secrets.client_traffic == expand("client traffic")
    assert secrets.server_traffic == expand("server traffic")
    assert secrets.exporter == expand("exporter")
    assert secrets.resumption == expand("resumption")
    assert secrets.confirmation_tag == hmac.digest(expand("confirmation"), transcript, "sha256")


def test_transcript_covers_the_three_messages_with_their_lengths() -> None:
    client, server = ends()
    first = server.configuration.message
    second = client.receive_configuration(first, now_s=NOW_S)
    third, secrets = server.receive_hello(second, now_s=NOW_S)
    expected = hashlib.sha256(b"nearfar/1 transcript\x00")
    for message in (first, second, third[:-32]):
        expected.update(len(message).to_bytes(4, "big") + message)
    assert secrets.transcript_hash == expected.digest()


# Attacks: what changes, and nothing gets past it

HELLO_REGIONS = {
    "type": 0,
    "version": 1,
    "key id": 2,
    "suite count": 10,
    "suite": 12,
    "nonce": 15,
    "ephemeral length": 48,
    "ephemeral ML-KEM key": 600,
    "ephemeral X25519 key": 1264,
    "sealed seed's length": 1266,
    "ML-KEM ciphertext": 1300,
    "X25519 encapsulation": 2360,
    "sealed seed": 2400,
    "tag": -1,
}
WELCOME_REGIONS = {
    "type": 0,
    "length": 2,
    "ML-KEM ciphertext": 100,
    "X25519 encapsulation": 1100,
    "sealed seed": 1130,
    "tag": 1170,
    "evidence length": 1172,
    "confirmation tag": 1173,
    "end": -1,
}


@pytest.mark.parametrize("region", HELLO_REGIONS)
def test_no_bit_of_hello_can_be_changed(region: str) -> None:
    with pytest.raises(SecurityError, match="The secure handshake failed"):
        shake(hello=flip(HELLO_REGIONS[region]))


@pytest.mark.parametrize("region", WELCOME_REGIONS)
def test_no_bit_of_welcome_can_be_changed(region: str) -> None:
    with pytest.raises(SecurityError, match="The secure handshake failed"):
        shake(welcome=flip(WELCOME_REGIONS[region]))


def test_no_bit_of_the_configuration_can_be_changed() -> None:
    for position in (0, 5, 20, 100, 1270, -1):
        with pytest.raises(SecurityError):
            shake(configuration=flip(position))


@pytest.mark.parametrize("cut", [0, 1, 13, 1000, 2432])
def test_cut_hello_is_refused(cut: int) -> None:
    with pytest.raises(SecurityError, match="handshake failed"):
        shake(hello=lambda message: message[:cut])


@pytest.mark.parametrize("cut", [0, 1, 3, 1000, 1172, 1204])
def test_cut_welcome_is_refused(cut: int) -> None:
    with pytest.raises(SecurityError, match="handshake failed"):
        shake(welcome=lambda message: message[:cut])


def test_bytes_after_hello_or_welcome_are_refused() -> None:
    with pytest.raises(SecurityError):
        shake(hello=lambda message: message + b"\x00")
    with pytest.raises(SecurityError):
        shake(welcome=lambda message: message + b"\x00")


def test_adding_a_weaker_suite_or_an_older_version_to_hello_is_refused() -> None:
    for tamper in (
        lambda hello: hello[:1] + b"\x00" + hello[2:],
        lambda hello: hello[:10] + b"\x03\x00\x00" + hello[11:],  # suites (0, 1, 2)
        lambda hello: hello[:10] + b"\x01\x00\x00" + hello[15:],  # suite 0 only
        lambda hello: hello[:10] + b"\x00" + hello[15:],  # no suite
    ):
        with pytest.raises(SecurityError, match="handshake failed"):
            shake(hello=tamper)


def test_ends_without_a_common_version_or_suite_part_before_anything_is_sent() -> None:
    _, server = ends()
    for client in (
        ClientHandshake(IDENTITY.pin, versions=(2,)),
        ClientHandshake(IDENTITY.pin, suites=(0x7FFF,)),
    ):
        with pytest.raises(SecurityError, match="share no version or cipher suite") as caught:
            client.receive_configuration(server.configuration.message, now_s=NOW_S)
        assert "Update nearfar" in caught.value.fix


def test_newer_client_meets_an_older_server_at_what_both_speak() -> None:
    _, server = ends()
    client = ClientHandshake(IDENTITY.pin, versions=(2, 1), suites=(0x7FFF, 1))
    hello = client.receive_configuration(server.configuration.message, now_s=NOW_S)
    welcome, secrets = server.receive_hello(hello, now_s=NOW_S)
    assert client.receive_welcome(welcome) == secrets


def test_hello_for_another_configuration_is_refused() -> None:
    client, server = ends()
    _, other = ends()
    hello = client.receive_configuration(other.configuration.message, now_s=NOW_S)
    with pytest.raises(SecurityError, match="handshake failed"):
        server.receive_hello(hello, now_s=NOW_S)
    # Nor does it help to claim the right key id.
    renamed = hello[:2] + server.configuration.key_id + hello[10:]
    with pytest.raises(SecurityError, match="handshake failed"):
        server.receive_hello(renamed, now_s=NOW_S)


def test_hello_after_the_key_expired_is_refused() -> None:
    client, server = ends()
    hello = client.receive_configuration(server.configuration.message, now_s=NOW_S)
    with pytest.raises(SecurityError, match="handshake failed"):
        server.receive_hello(hello, now_s=NOW_S + MAX_LIFETIME_S)


def test_handshake_begun_before_a_rotation_is_finished_after_it() -> None:
    keys = KeyRing(IDENTITY, now_s=NOW_S)
    client, server = ClientHandshake(IDENTITY.pin), ServerHandshake(keys, now_s=NOW_S)
    hello = client.receive_configuration(server.configuration.message, now_s=NOW_S)
    later_s = NOW_S + 13 * 3600
    assert keys.current(later_s) is not server.configuration
    welcome, secrets = server.receive_hello(hello, now_s=later_s)
    assert client.receive_welcome(welcome) == secrets


def test_replayed_hello_yields_other_secrets_that_the_replayer_cannot_have() -> None:
    client, server = ends()
    hello = client.receive_configuration(server.configuration.message, now_s=NOW_S)
    first_welcome, first = server.receive_hello(hello, now_s=NOW_S)
    second_welcome, second = server.receive_hello(hello, now_s=NOW_S)
    assert first.client_traffic != second.client_traffic
    assert first_welcome != second_welcome


def test_welcome_of_another_client_is_refused() -> None:
    client, server = ends()
    client.receive_configuration(server.configuration.message, now_s=NOW_S)
    neighbour = ClientHandshake(IDENTITY.pin)
    hello = neighbour.receive_configuration(server.configuration.message, now_s=NOW_S)
    welcome, _ = server.receive_hello(hello, now_s=NOW_S)
    with pytest.raises(SecurityError, match="handshake failed"):
        client.receive_welcome(welcome)


def test_someone_with_the_public_configuration_only_cannot_answer() -> None:
    """An active attacker relays the real configuration and makes up WELCOME."""
    client, server = ends()
    hello = client.receive_configuration(server.configuration.message, now_s=NOW_S)
    public_key = hello[49 : 49 + kem.PUBLIC_KEY_BYTES]
    transcript = hashlib.sha256(b"nearfar/1 transcript\x00")
    for message in (server.configuration.message, hello):
        transcript.update(len(message).to_bytes(4, "big") + message)
    info = b"nearfar/1 server seed\x00" + transcript.digest()
    sealed = kem.seal(bytes(32), public_key, info)
    assert sealed is not None
    welcome = b"\x03" + len(sealed).to_bytes(2, "big") + sealed + b"\x00\x00"
    transcript.update(len(welcome).to_bytes(4, "big") + welcome)
    guess = derive_secrets(bytes(32), bytes(32), transcript.digest())
    with pytest.raises(SecurityError, match="handshake failed"):
        client.receive_welcome(welcome + guess.confirmation_tag)


def _sealed_hello(server: ServerHandshake, head: bytes) -> bytes:
    """HELLO of a client that follows the protocol in everything but the fields of `head`."""
    transcript = hashlib.sha256(b"nearfar/1 transcript\x00")
    for message in (server.configuration.message, head):
        transcript.update(len(message).to_bytes(4, "big") + message)
    info = b"nearfar/1 client seed\x00" + transcript.digest()
    sealed = kem.seal(bytes(32), server.configuration.public_key, info)
    assert sealed is not None
    return head + len(sealed).to_bytes(2, "big") + sealed


WRONG_HEADS: dict[str, Tamper] = {
    "version that was not offered": lambda head: head[:1] + b"\x02" + head[2:],
    "suite that was not offered": lambda head: head[:10] + b"\x01\x7f\xff" + head[15:],
    "ephemeral key out of range": lambda head: head[:49] + b"\xff" * kem.PUBLIC_KEY_BYTES,
    "ephemeral X25519 key of low order": lambda head: head[:-32] + bytes(32),
}


@pytest.mark.parametrize("name", WRONG_HEADS)
def test_client_that_seals_correctly_but_breaks_a_rule_is_refused(name: str) -> None:
    client, server = ends()
    head = client.receive_configuration(server.configuration.message, now_s=NOW_S)[:1265]
    server.receive_hello(_sealed_hello(server, head), now_s=NOW_S)  # unchanged, it is accepted
    with pytest.raises(SecurityError, match="handshake failed"):
        server.receive_hello(_sealed_hello(server, WRONG_HEADS[name](head)), now_s=NOW_S)


def test_welcome_is_taken_once() -> None:
    client, server = ends()
    hello = client.receive_configuration(server.configuration.message, now_s=NOW_S)
    welcome, _ = server.receive_hello(hello, now_s=NOW_S)
    client.receive_welcome(welcome)
    with pytest.raises(SecurityError):
        client.receive_welcome(welcome)


def test_welcome_before_hello_is_refused() -> None:
    client, _ = ends()
    with pytest.raises(SecurityError):
        client.receive_welcome(bytes(1205))


def test_other_servers_are_refused_before_hello_is_sent() -> None:
    stranger = KeyConfiguration.issue(
        ServerIdentity.generate(),
        kem.KemPrivateKey.generate().public_bytes,
        not_before_s=int(NOW_S),
        lifetime_s=3600,
    )
    client, _ = ends()
    with pytest.raises(SecurityError, match="not the pinned one"):
        client.receive_configuration(stranger.message, now_s=NOW_S)


# Suites


@pytest.mark.parametrize("suites", [(1,), (2,), (2, 1), (1, 2), (0x7FFF, 2)])
def test_both_ends_take_the_clients_first_suite_that_the_server_has(
    suites: tuple[int, ...],
) -> None:
    _, server = ends()
    client = ClientHandshake(IDENTITY.pin, suites=suites)
    hello = client.receive_configuration(server.configuration.message, now_s=NOW_S)
    welcome, secrets = server.receive_hello(hello, now_s=NOW_S)
    assert secrets.suite == next(suite for suite in suites if suite in (1, 2))
    assert client.receive_welcome(welcome) == secrets


def test_swapping_the_clients_suites_on_the_way_is_refused() -> None:
    with pytest.raises(SecurityError, match="handshake failed"):
        shake(hello=lambda hello: hello[:11] + hello[13:15] + hello[11:13] + hello[15:])
