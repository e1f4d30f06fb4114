"""Attacks on an established connection, one test each: the name is the attack."""

from __future__ import annotations

import pytest

from nearfar.errors import SecurityError
from nearfar.secure.records import OVERHEAD_BYTES
from nearfar.wire import messages as wire
from nearfar.wire.codec import encode
from tests.attacks.middle import Middle, flipped

GENERIC = "The secure channel failed and was closed"


@pytest.fixture
def middle() -> Middle:
    return Middle.connected()


def pings(middle: Middle, count: int = 3) -> list[bytes]:
    return [middle.say(wire.Ping(id=number)) for number in range(count)]


def test_without_an_attack_the_same_records_are_taken(middle: Middle) -> None:
    for record in pings(middle):
        middle.inject_to_server(record)
    assert middle.inject_to_server(middle.say(wire.ListModels(stream=1)))
    assert not middle.pair.server.is_closed


def test_replay_of_a_record(middle: Middle) -> None:
    (record,) = pings(middle, 1)
    middle.assert_server_refuses(record, record)


def test_replay_of_a_record_much_later(middle: Middle) -> None:
    records = pings(middle, 40)
    middle.assert_server_refuses(*records, records[0])


def test_replay_of_an_answer_to_the_client(middle: Middle) -> None:
    record = middle.answer(wire.Ping(id=1))
    middle.assert_client_refuses(record, record)


def test_replay_of_the_first_record_that_logs_the_client_in() -> None:
    middle = Middle.connected()
    login = middle.sent_to_server[1]  # after HELLO
    middle.assert_server_refuses(login)


def test_reordering_of_records(middle: Middle) -> None:
    first, second, _ = pings(middle)
    assert first != second
    middle.assert_server_refuses(second)


def test_reordering_with_rewritten_sequence_numbers(middle: Middle) -> None:
    first, second, _ = pings(middle)
    header_bytes = OVERHEAD_BYTES - 16
    middle.assert_server_refuses(first[:header_bytes] + second[header_bytes:])


def test_dropping_of_a_record(middle: Middle) -> None:
    first, _, third = pings(middle)
    middle.assert_server_refuses(first, third)


def test_splice_of_a_record_from_another_session_of_the_same_client_and_server(
    middle: Middle,
) -> None:
    other = Middle.connected()
    middle.assert_server_refuses(other.say(wire.Ping(id=0)))


def test_splice_of_a_record_from_another_session_to_the_client(middle: Middle) -> None:
    other = Middle.connected()
    middle.assert_client_refuses(other.answer(wire.Ping(id=0)))


def test_reflection_of_the_clients_own_record(middle: Middle) -> None:
    middle.assert_client_refuses(middle.say(wire.Ping(id=0)))


def test_reflection_of_the_servers_own_record(middle: Middle) -> None:
    middle.assert_server_refuses(middle.answer(wire.Ping(id=0)))


def test_truncation_of_a_record_at_every_length() -> None:
    length = len(Middle.connected().say(wire.Ping(id=0)))
    for size in range(length):
        middle = Middle.connected()
        record = middle.say(wire.Ping(id=0))
        middle.assert_server_refuses(record[:size])


def test_bit_flip_at_every_byte_of_a_record() -> None:
    length = len(Middle.connected().say(wire.Ping(id=0)))
    for position in range(length):
        middle = Middle.connected()
        record = middle.say(wire.Ping(id=0))
        middle.assert_server_refuses(flipped(record, position, 1 << position % 8))


def test_bytes_appended_to_a_record(middle: Middle) -> None:
    (record,) = pings(middle, 1)
    middle.assert_server_refuses(record + b"\x00")


def test_two_records_glued_into_one(middle: Middle) -> None:
    first, second, _ = pings(middle)
    middle.assert_server_refuses(first + second)


def test_one_record_cut_into_two(middle: Middle) -> None:
    (record,) = pings(middle, 1)
    middle.assert_server_refuses(record[: len(record) // 2])


def test_plaintext_instead_of_a_record(middle: Middle) -> None:
    middle.assert_server_refuses(b"".join(encode(wire.Ping(id=1))))


def test_second_handshake_on_an_open_connection(middle: Middle) -> None:
    hello = middle.sent_to_server[0]
    middle.assert_server_refuses(hello)


def test_second_key_configuration_on_an_open_connection(middle: Middle) -> None:
    configuration = middle.sent_to_client[0]
    middle.assert_client_refuses(configuration)


def test_record_that_claims_a_later_epoch(middle: Middle) -> None:
    (record,) = pings(middle, 1)
    middle.assert_server_refuses(record[:4] + b"\x01" + record[5:])


def test_retry_after_a_failed_forgery(middle: Middle) -> None:
    """One wrong guess is all: the honest record that follows is not opened either."""
    (record,) = pings(middle, 1)
    middle.assert_server_refuses(flipped(record, -1))
    with pytest.raises(SecurityError, match=GENERIC):
        middle.inject_to_server(record)


def test_telling_failures_apart(middle: Middle) -> None:
    """An attacker who sees our errors learns nothing about which check failed."""
    texts = set()
    for attack in (
        lambda record: flipped(record, 0),
        lambda record: flipped(record, 4),
        lambda record: flipped(record, 12),
        lambda record: flipped(record, -1),
        lambda record: record[:-1],
        lambda record: b"",
    ):
        middle = Middle.connected()
        (record,) = pings(middle, 1)
        with pytest.raises(SecurityError, match=GENERIC) as caught:
            middle.inject_to_server(attack(record))
        texts.add((str(caught.value), repr(caught.value.__cause__)))
    assert len(texts) == 1
