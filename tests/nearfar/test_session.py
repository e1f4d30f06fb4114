"""Channel and wire protocol joined: whole conversations, and what an attacker can do to them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.errors import (
    ConfigError,
    LocalProtocolError,
    Overloaded,
    RemoteProtocolError,
    SecurityError,
)
from nearfar.secure.frames import HEADER_BYTES
from nearfar.secure.identity import ServerIdentity
from nearfar.secure.keys import MAX_LIFETIME_S, KeyRing
from nearfar.secure.outbox import PLAIN
from nearfar.secure.records import OVERHEAD_BYTES, RecordSealer
from nearfar.session import TRAITS, ClientSession, ServerSession, max_sealed_bytes
from nearfar.wire import messages as wire
from nearfar.wire.codec import encode
from nearfar.wire.connection import Outgoing
from nearfar.wire.limits import Limits
from tests.support.wire import (
    IDENTITY,
    LIMITS,
    NOW_S,
    Pair,
    fin,
    generate,
    infer,
    messages,
    ready,
    result,
    resume,
)

KEYS = KeyRing(IDENTITY, now_s=NOW_S)


def new_client(limits: Limits = LIMITS) -> ClientSession:
    return ClientSession(pin=str(IDENTITY.pin), token="t", limits=limits, now_s=NOW_S)


def new_server(limits: Limits = LIMITS) -> ServerSession:
    return ServerSession(keys=KEYS, limits=limits, now_s=NOW_S)


def smuggle(session: ClientSession, message: wire.Message) -> None:
    """Queue a message past the rules of the sender's own side."""
    parts = encode(message)
    size_bytes = sum(len(part) for part in parts)
    session._connection.outgoing.append(Outgoing(message, parts, size_bytes))
    session._flush_connection()


# Conversations


def test_handshake_then_auth_then_ready() -> None:
    pair = Pair.new()
    pair.exchange()
    assert [received.message for received in pair.at_server] == [wire.Auth(token="t")]
    assert not pair.client.is_ready
    assert not pair.server.is_ready
    pair.server.send(ready())
    assert pair.server.is_ready
    pair.exchange()
    assert pair.client.is_ready
    assert [received.message for received in pair.at_client] == [ready()]


def test_handshake_takes_one_round_trip_after_the_configuration() -> None:
    client, server = new_client(), new_server()
    (configuration,) = server.data_to_send()
    client.receive(configuration, now_s=NOW_S)
    (hello,) = client.data_to_send()
    server.receive(hello, now_s=NOW_S)
    (welcome,) = server.data_to_send()
    client.receive(welcome, now_s=NOW_S)
    (auth,) = client.data_to_send()
    assert len(server.receive(auth, now_s=NOW_S)) == 1


def test_inference_carries_tensors_both_ways() -> None:
    pair = Pair.connected()
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    stream = pair.client.next_stream
    sent_bytes = pair.client.send(infer(stream, {"x": array}), [array])
    pair.exchange()
    (received,) = pair.at_server
    assert received.size_bytes == sent_bytes
    assert np.array_equal(received.tensors[0], array)
    assert not received.tensors[0].flags.writeable
    pair.server.send(result(stream, {"y": array * 2}), [array * 2])
    pair.exchange()
    assert np.array_equal(pair.at_client[0].tensors[0], array * 2)
    assert pair.client.open_streams == ()


def test_generation_streams_tokens_within_credit_and_ends_with_a_digest() -> None:
    pair = Pair.connected()
    stream = pair.client.next_stream
    pair.client.send(generate(stream, credit=2))
    pair.exchange()
    for index, text in enumerate("ab"):
        pair.server.send(wire.Token(stream=stream, index=index, text=text))
    assert pair.server.credit(stream) == 0
    pair.exchange()
    pair.client.send(wire.Credit(stream=stream, tokens=5))
    pair.exchange()
    assert pair.server.credit(stream) == 5
    assert pair.server.token_count(stream) == 2
    assert pair.server.digest(stream) == hashlib.sha256(b"ab").digest()
    pair.server.send(fin(stream, pair.server.token_count(stream), pair.server.digest(stream)))
    pair.exchange()
    assert [type(received.message).__name__ for received in pair.at_client] == [
        "Token", "Token", "Fin",
    ]  # fmt: skip
    assert not pair.client.is_open(stream)
    with pytest.raises(LocalProtocolError, match="is not open"):
        pair.server.credit(stream)


def test_ping_is_answered_and_seen_by_the_sender_only() -> None:
    pair = Pair.connected()
    pair.server.send(wire.Ping(id=1))
    pair.exchange()
    assert pair.at_client == []
    assert [received.message for received in pair.at_server] == [wire.Pong(id=1)]


def test_sealed_size_is_plaintext_plus_headers_and_tag() -> None:
    pair = Pair.connected()
    message = wire.Ping(id=1)
    plaintext = b"".join(encode(message))
    assert OVERHEAD_BYTES + HEADER_BYTES == 37
    assert pair.client.send(message) == len(plaintext) + 37


@settings(deadline=None, max_examples=50)
@given(messages)
def test_nothing_of_a_message_is_visible_outside(
    case: tuple[wire.Message, tuple[np.ndarray, ...]],
) -> None:
    message, tensors = case
    pair = Pair.connected()
    plaintext = b"".join(encode(message, tensors))
    try:
        pair.client.send(message, tensors)
    except LocalProtocolError:
        return
    (record,) = pair.client.data_to_send()
    assert len(record) == len(plaintext) + HEADER_BYTES + OVERHEAD_BYTES
    assert plaintext[:16] not in record


# Pieces


LARGE = np.arange(40_000, dtype=np.float64)  # 320 KB: two pieces


@pytest.mark.parametrize(
    ("message", "opens"),
    [
        (wire.ListModels(stream=1), True),
        (infer(), True),
        (generate(), True),
        (resume(), True),
        (wire.Cancel(stream=1), False),
        (wire.Ping(id=1), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_messages_that_open_a_stream_are_queued_as_such(message: wire.Message, opens: bool) -> None:
    assert TRAITS.get(type(message), PLAIN).opens is opens


def test_ping_and_short_request_overtake_a_long_one() -> None:
    pair = Pair.connected()
    pair.client.send(infer(1, {"x": LARGE}), [LARGE])
    first = pair.client.next_to_send()
    assert first is not None
    pair.client.send(infer(2))
    pair.client.send(wire.Ping(id=1))
    pair.at_server += pair.server.receive(first, now_s=NOW_S)
    second = pair.client.next_to_send()
    assert second is not None
    pair.at_server += pair.server.receive(second, now_s=NOW_S)
    assert [message.message.stream for message in pair.at_server] == [2]  # type: ignore[union-attr]
    pair.exchange()
    assert [message.message.stream for message in pair.at_server] == [2, 1]  # type: ignore[union-attr]
    assert np.array_equal(pair.at_server[1].tensors[0], LARGE)
    assert [type(message.message) for message in pair.at_client] == [wire.Pong]
    for stream in (1, 2):
        pair.server.send(result(stream, {"y": LARGE}), [LARGE])
    pair.exchange()
    assert all(np.array_equal(one.tensors[0], LARGE) for one in pair.at_client[1:])
    assert pair.client.open_streams == pair.server.open_streams == ()


def test_cancel_waits_for_the_rest_of_its_own_request() -> None:
    pair = Pair.connected()
    pair.client.send(infer(1, {"x": LARGE}), [LARGE])
    pair.client.send(wire.Cancel(stream=1))
    pair.exchange()
    assert [type(one.message) for one in pair.at_server] == [wire.Infer, wire.Cancel]


def test_array_may_change_once_it_was_sent() -> None:
    pair = Pair.connected()
    array = LARGE.copy()
    pair.client.send(infer(1, {"x": array}), [array])
    array[:] = -1
    pair.exchange()
    assert np.array_equal(pair.at_server[0].tensors[0], LARGE)


def test_long_and_short_messages_have_aligned_tensors() -> None:
    for array in (LARGE, LARGE[:10]):
        pair = Pair.connected()
        pair.client.send(infer(1, {"x": array}), [array])
        pair.exchange()
        assert pair.at_server[0].tensors[0].flags.aligned


def test_message_for_another_stream_than_announced_is_refused() -> None:
    pair = Pair.connected()
    parts = encode(infer(3, {"x": LARGE}), [LARGE])
    size_bytes = sum(len(part) for part in parts)
    pair.client._outbox.max_unfinished_bytes = size_bytes
    pair.client._outbox.put(parts, size_bytes, 1)
    with pytest.raises(RemoteProtocolError, match="announced for stream 1"):
        pair.to_server()


def test_stream_that_was_announced_cannot_be_opened_twice() -> None:
    pair = Pair.connected()
    pair.client.send(infer(1, {"x": LARGE}), [LARGE])
    pair.exchange()
    smuggle(pair.client, infer(1))
    with pytest.raises(RemoteProtocolError, match="Infer is not allowed"):
        pair.to_server()


def test_server_holds_no_more_than_one_longest_message_of_a_client_that_never_ends() -> None:
    pair = Pair.connected()
    sealer = pair.client._sealer
    assert isinstance(sealer, RecordSealer)

    def flood() -> None:
        for number in range(100):
            head = (2 << 24 | number).to_bytes(4, "big") + (9).to_bytes(4, "big")
            body = number.to_bytes(4, "big") + (1 << 18).to_bytes(4, "big") + b"x"
            pair.server.receive(sealer.seal(16, head + body), now_s=NOW_S)

    with pytest.raises(RemoteProtocolError, match="too many messages are unfinished"):
        flood()
    assert pair.server._assembler.held_bytes <= LIMITS.max_message_bytes


# Ending


def test_refused_client_gets_the_error_and_both_are_closed() -> None:
    pair = Pair.new()
    pair.exchange()
    pair.server.close(SecurityError("The token is unknown", fix="Ask for a new one"))
    assert pair.server.is_closed
    pair.exchange()
    error = pair.at_client[-1].message
    assert isinstance(error, wire.Error)
    assert (error.stream, error.code, error.fix) == (0, "security", "Ask for a new one")
    assert pair.client.is_closed
    assert not pair.client.is_ready


def test_closing_before_the_handshake_says_nothing() -> None:
    server = new_server()
    server.data_to_send()
    server.close(Overloaded("Too many connections"))
    assert server.is_closed
    assert server.data_to_send() == []


def test_closing_twice_says_it_once() -> None:
    pair = Pair.connected()
    pair.server.close(Overloaded("Busy"))
    pair.server.close(Overloaded("Busy"))
    assert len(pair.server.data_to_send()) == 1


def test_closed_session_ignores_the_peer_and_refuses_to_send() -> None:
    pair = Pair.connected()
    pair.client.send(infer())
    (record,) = pair.client.data_to_send()
    pair.server.close()
    assert pair.server.receive(record, now_s=NOW_S) == []
    with pytest.raises(LocalProtocolError, match="the session is closed"):
        pair.server.send(wire.Ping(id=1))


def test_failed_session_stays_failed() -> None:
    pair = Pair.connected()
    pair.client.send(infer(1))
    (first,) = pair.client.data_to_send()
    pair.client.send(infer(2))
    (second,) = pair.client.data_to_send()
    for record in (second, first, second):
        with pytest.raises(SecurityError, match="channel failed"):
            pair.server.receive(record, now_s=NOW_S)
    assert pair.server.is_closed
    assert pair.server.data_to_send() == []  # an attacker learns nothing from us


def test_short_messages_that_wait_share_a_record() -> None:
    pair = Pair.connected()
    sizes = [pair.client.send(infer(number)) for number in (1, 2, 3)]
    (record,) = pair.client.data_to_send()
    received = pair.server.receive(record, now_s=NOW_S)
    assert [one.message.stream for one in received] == [1, 2, 3]
    assert len(record) < sum(sizes)


def test_server_tells_a_client_that_breaks_the_rules() -> None:
    pair = Pair.connected()
    smuggle(pair.client, result(1))
    (record,) = pair.client.data_to_send()
    with pytest.raises(RemoteProtocolError, match="The client broke the wire protocol"):
        pair.server.receive(record, now_s=NOW_S)
    assert pair.server.is_closed
    pair.to_client()
    error = pair.at_client[-1].message
    assert isinstance(error, wire.Error)
    assert error.code == "remote_protocol"


def test_sending_before_the_handshake_is_our_mistake() -> None:
    with pytest.raises(LocalProtocolError, match="before the handshake"):
        new_client().send(infer())


@pytest.mark.parametrize(
    ("token", "problem"), [("x" * 70_000, "65536 are allowed"), ("\ud800", "valid Unicode")]
)
def test_impossible_tokens_are_refused_at_once(token: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        ClientSession(pin=IDENTITY.pin, token=token, now_s=NOW_S)
    assert token[:5] not in str(caught.value)


def test_pin_that_does_not_parse_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="not a pin"):
        ClientSession(pin="nf1:short", token="t", now_s=NOW_S)


# Attacks on the connection: each does its worst and must end in a typed error


def _handshake_message(data: bytes, server: bool) -> None:
    session = new_server() if server else new_client()
    session.receive(data, now_s=NOW_S)


def _wrong_pin() -> None:
    client = ClientSession(pin=ServerIdentity.generate().pin, token="t", now_s=NOW_S)
    client.receive(new_server().data_to_send()[0], now_s=NOW_S)


def _expired_configuration() -> None:
    (configuration,) = new_server().data_to_send()
    new_client().receive(configuration, now_s=NOW_S + MAX_LIFETIME_S)


def _hello_after_expiry() -> None:
    client, server = new_client(), new_server()
    client.receive(server.data_to_send()[0], now_s=NOW_S)
    server.receive(client.data_to_send()[0], now_s=NOW_S + MAX_LIFETIME_S)


def _changed_hello(change: Callable[[bytes], bytes]) -> Callable[[], None]:
    def attack() -> None:
        client, server = new_client(), new_server()
        client.receive(server.data_to_send()[0], now_s=NOW_S)
        server.receive(change(client.data_to_send()[0]), now_s=NOW_S)

    return attack


def _changed_configuration(position: int) -> Callable[[], None]:
    def attack() -> None:
        configuration = bytearray(new_server().data_to_send()[0])
        configuration[position] ^= 1
        new_client().receive(bytes(configuration), now_s=NOW_S)

    return attack


def _record_attack(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[], None]:
    """Three pings of the client, changed on their way."""

    def attack() -> None:
        pair = Pair.connected()
        records = []
        for number in range(3):
            pair.client.send(wire.Ping(id=number))
            records += pair.client.data_to_send()
        for record in change(records):
            pair.server.receive(record, now_s=NOW_S)

    return attack


def _splice() -> None:
    """A record of one session is put into another session of the same client and server."""
    one, other = Pair.connected(), Pair.connected()
    one.client.send(wire.Ping(id=1))
    for record in one.client.data_to_send():
        other.server.receive(record, now_s=NOW_S)


def _reflection() -> None:
    """The client's own record comes back to it."""
    pair = Pair.connected()
    pair.client.send(wire.Ping(id=1))
    for record in pair.client.data_to_send():
        pair.client.receive(record, now_s=NOW_S)


def _replayed_handshake() -> None:
    """A recorded client is played to the server again; its Auth must not be accepted."""
    client, server = new_client(), new_server()
    client.receive(server.data_to_send()[0], now_s=NOW_S)
    (hello,) = client.data_to_send()
    server.receive(hello, now_s=NOW_S)
    client.receive(server.data_to_send()[0], now_s=NOW_S)
    (auth,) = client.data_to_send()
    server.receive(auth, now_s=NOW_S)
    second = new_server()
    second.receive(hello, now_s=NOW_S)
    second.receive(auth, now_s=NOW_S)


def _second_hello() -> None:
    pair = Pair.new()
    pair.to_client()
    (hello,) = pair.client.data_to_send()
    pair.server.receive(hello, now_s=NOW_S)
    pair.server.receive(hello, now_s=NOW_S)


def _unencrypted_message() -> None:
    pair = Pair.connected()
    pair.server.receive(b"".join(encode(wire.Ping(id=1))), now_s=NOW_S)


ATTACKS: dict[str, Callable[[], None]] = {
    "wrong pin": _wrong_pin,
    "expired configuration": _expired_configuration,
    "hello after the key expired": _hello_after_expiry,
    "downgraded version in the configuration": _changed_configuration(2),
    "downgraded suite in the configuration": _changed_configuration(29),
    "swapped key in the configuration": _changed_configuration(600),
    "downgraded version in hello": _changed_hello(lambda m: m[:1] + b"\x00" + m[2:]),
    "downgraded suite in hello": _changed_hello(lambda m: m[:11] + b"\x00\x00" + m[13:]),
    "unknown key id": _changed_hello(lambda m: m[:2] + bytes(8) + m[10:]),
    "changed nonce": _changed_hello(lambda m: m[:15] + bytes(32) + m[47:]),
    "handshake message too long": lambda: _handshake_message(bytes(5000), server=True),
    "nothing where hello belongs": lambda: _handshake_message(b"", server=True),
    "nothing where the configuration belongs": lambda: _handshake_message(b"", server=False),
    "replayed handshake": _replayed_handshake,
    "second hello": _second_hello,
    "replayed record": _record_attack(lambda r: [r[0], r[0]]),
    "reordered records": _record_attack(lambda r: [r[1], r[0]]),
    "dropped record": _record_attack(lambda r: [r[0], r[2]]),
    "joined records": _record_attack(lambda r: [r[0] + r[1]]),
    "halved record": _record_attack(lambda r: [r[0][:20], r[0][20:]]),
    "cut record": _record_attack(lambda r: [r[0][:-1]]),
    "longer record": _record_attack(lambda r: [r[0] + b"\x00"]),
    "flipped type": _record_attack(lambda r: [bytes([r[0][0] ^ 1]) + r[0][1:]]),
    "flipped ciphertext": _record_attack(lambda r: [r[0][:15] + b"?" + r[0][16:]]),
    "spliced record": _splice,
    "reflected record": _reflection,
    "unencrypted message": _unencrypted_message,
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_ends_in_a_security_error(name: str) -> None:
    with pytest.raises(SecurityError):
        ATTACKS[name]()


def test_record_attacks_without_a_change_would_succeed() -> None:
    _record_attack(lambda records: records)()
    _changed_hello(bytes)()


def test_auth_reaches_nobody_but_the_holder_of_the_pinned_identity() -> None:
    """With another server the client never comes to the point of sending its token."""
    client = new_client()
    impostor = ServerSession(keys=KeyRing(ServerIdentity.generate(), now_s=NOW_S), now_s=NOW_S)
    with pytest.raises(SecurityError):
        client.receive(impostor.data_to_send()[0], now_s=NOW_S)
    assert client.data_to_send() == []


# Bounds


def test_oversized_record_is_refused_before_it_is_decrypted() -> None:
    pair = Pair.connected()
    with pytest.raises(RemoteProtocolError, match="are allowed"):
        pair.server.receive(bytes(max_sealed_bytes(LIMITS) + 1), now_s=NOW_S)


def test_largest_message_fits_exactly() -> None:
    pair = Pair.connected()
    empty = np.zeros(0, np.uint8)
    overhead = sum(len(part) for part in encode(infer(arrays={"x": empty}), [empty])) + 16
    array = np.zeros((LIMITS.max_message_bytes - overhead) // 8 * 8, np.uint8)
    assert pair.client.send(infer(arrays={"x": array}), [array]) > LIMITS.max_message_bytes
    records = pair.client.data_to_send()
    assert max(map(len, records)) <= max_sealed_bytes(LIMITS)
    for record in records:
        pair.at_server += pair.server.receive(record, now_s=NOW_S)
    assert pair.at_server[0].tensors[0].nbytes == array.nbytes


def test_unauthenticated_client_cannot_send_much() -> None:
    pair = Pair.new()
    pair.exchange()
    with pytest.raises(RemoteProtocolError, match="are allowed"):
        pair.server.receive(bytes(LIMITS.max_unauthenticated_bytes + 5000), now_s=NOW_S)


def test_client_that_pings_without_reading_is_cut_off() -> None:
    pair = Pair.connected()

    def flood() -> None:
        for number in range(LIMITS.max_unsent_replies + 1):
            smuggle(pair.client, wire.Ping(id=number))
            pair.to_server()

    with pytest.raises(RemoteProtocolError, match="pings without"):
        flood()


def test_pings_are_no_flood_when_the_answers_are_sent() -> None:
    pair = Pair.connected()
    for number in range(LIMITS.max_unsent_replies * 2):
        pair.client.send(wire.Ping(id=number))
        pair.exchange()
    assert len(pair.at_client) == LIMITS.max_unsent_replies * 2


def test_records_of_an_unknown_type_are_refused() -> None:
    pair = Pair.connected()
    sealer = pair.client._sealer
    assert isinstance(sealer, RecordSealer)
    record = sealer.seal(17, b"".join(encode(wire.Ping(id=1))))
    with pytest.raises(RemoteProtocolError, match="unknown type 17"):
        pair.server.receive(record, now_s=NOW_S)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 3), st.lists(st.binary(max_size=300), min_size=1, max_size=3))
def test_any_bytes_in_any_phase_give_a_typed_error(phase: int, data: list[bytes]) -> None:
    pair = Pair.new()
    if phase >= 1:
        pair.to_client()
    if phase >= 2:
        pair.to_server()
    if phase >= 3:
        pair = Pair.connected()
    for session in (pair.client, pair.server):
        for piece in data:
            with pytest.raises((SecurityError, RemoteProtocolError)):
                session.receive(piece, now_s=NOW_S)
        assert session.is_closed


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 4), st.data())
def test_any_damage_to_any_message_gives_a_security_error(step: int, data: st.DataObject) -> None:
    pair = Pair.new()
    for _ in range(step // 2):
        pair.to_client()
        pair.to_server()
    if step % 2:
        pair.to_client()
    sender, receiver = (pair.client, pair.server) if step % 2 else (pair.server, pair.client)
    if step == 4:
        pair.server.send(ready())
    (message,) = sender.data_to_send()
    damaged = bytearray(message)
    damaged[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SecurityError):
        receiver.receive(bytes(damaged), now_s=NOW_S)
