"""What a server keeps for clients that lost their connection: that, bounded, for a while."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.errors import ResumeMissed
from nearfar.wire.retention import (
    ANSWER_OVERHEAD_BYTES,
    TOKEN_OVERHEAD_BYTES,
    Kept,
    Retention,
    RetentionLimits,
    ticket_for,
)

KEY = ("client", b"i" * 16)
T1, T2, T3 = (bytes([number]) * 32 for number in (1, 2, 3))
TOKEN_BYTES = TOKEN_OVERHEAD_BYTES + 1


def key(client: str, number: int) -> tuple[str, bytes]:
    return client, number.to_bytes(16, "big")


def keeping(count: int, **limits: float) -> tuple[Retention, Kept]:
    """An answer of so many tokens "0" "1" …, whose client is away since second 0."""
    retention = Retention(RetentionLimits(**limits))  # type: ignore[arg-type]
    kept = retention.begin(KEY, b"f", T1)
    for index in range(count):
        retention.add(kept, str(index % 10))
    retention.leave(kept, 0.0, is_running=True)
    return retention, kept


def resume(retention: Retention, ticket: bytes = T1, index: int = 0, **options: object) -> Kept:
    arguments = {"key": KEY, "new_ticket": T2, "now_s": 1.0, **options}
    return retention.resume(
        arguments.pop("key"),
        ticket,
        index,
        **arguments,  # type: ignore[arg-type]
    )


def test_a_ticket_depends_on_the_connection_and_on_the_request() -> None:
    assert ticket_for(T1, b"a" * 16) == ticket_for(T1, b"a" * 16)
    assert len({ticket_for(k, i * 16) for k in (T1, T2) for i in (b"a", b"b")}) == 4
    assert len(ticket_for(T1, b"a" * 16)) == 32


def test_tickets_are_the_published_hmac() -> None:
    # The bytes of docs/reference/wire.md, for implementations in other languages.
    assert ticket_for(bytes(range(32)), bytes(range(16))).hex() == (
        "76215528c9c54edf55984e72f4abda61c4d1a603b824d1653cd71e4c8e3f981d"
    )


@pytest.mark.parametrize("index", [0, 3, 7])
def test_what_is_kept_goes_on_at_any_index_with_the_digest_of_what_came_before(index: int) -> None:
    retention, _ = keeping(7)
    kept = resume(retention, index=index)
    assert "".join(kept.since(index, 100)) == "0123456"[index:]
    assert kept.digest_at(index).digest() == hashlib.sha256(b"0123456"[:index]).digest()


def test_what_is_acknowledged_is_forgotten_and_the_digest_goes_on() -> None:
    retention, kept = keeping(7)
    retention.acknowledge(kept, 4)
    assert (kept.first, kept.next_index) == (4, 7)
    assert retention.size_bytes == kept.size_bytes == ANSWER_OVERHEAD_BYTES + 3 * TOKEN_BYTES
    with pytest.raises(ResumeMissed, match="Token 3 is not kept; 4 to 7 are"):
        resume(retention, index=3)
    assert resume(retention, index=5).digest_at(5).digest() == hashlib.sha256(b"01234").digest()


def test_acknowledging_more_than_there_is_forgets_what_there_is() -> None:
    retention, kept = keeping(2)
    retention.acknowledge(kept, 99)
    assert (kept.first, kept.next_index) == (2, 2)


def test_a_ticket_is_good_once_and_the_next_one_is_that_of_the_new_connection() -> None:
    retention, kept = keeping(3)
    resume(retention)
    retention.leave(kept, 1.0, is_running=True)
    with pytest.raises(ResumeMissed, match="ticket was used before"):
        resume(retention, T1)
    assert resume(retention, T2, new_ticket=T3) is kept


def test_a_wrong_ticket_spoils_nothing() -> None:
    retention, kept = keeping(3)
    with pytest.raises(ResumeMissed):
        resume(retention, T3)
    assert resume(retention, T1) is kept


@pytest.mark.parametrize(
    "other", [("somebody else", KEY[1]), (KEY[0], b"j" * 16)], ids=["client", "request"]
)
def test_a_stolen_ticket_is_worth_nothing_to_another_client_or_for_another_request(other) -> None:
    retention, _ = keeping(3)
    with pytest.raises(ResumeMissed, match="Nothing is kept"):
        resume(retention, key=other)


def test_an_index_beyond_the_end_is_missed() -> None:
    retention, _ = keeping(3)
    with pytest.raises(ResumeMissed, match="Token 4 is not kept"):
        resume(retention, index=4)


def test_what_nobody_came_back_for_expires() -> None:
    retention, kept = keeping(3, keep_s=60.0)
    assert retention.next_expiry_s == 60.0
    assert retention.expire(59.9) == []
    with pytest.raises(ResumeMissed, match="its time has passed"):
        resume(retention, now_s=60.0)
    assert retention.expire(60.0) == [kept]
    assert (len(retention), retention.size_bytes, retention.next_expiry_s) == (0, 0, None)


def test_what_is_read_again_does_not_expire() -> None:
    retention, kept = keeping(3)
    resume(retention)
    assert retention.expire(1e9) == []
    retention.leave(kept, 1e9, is_running=False)
    assert retention.next_expiry_s == 1e9 + 60


def test_an_answer_that_is_read_forgets_its_oldest_tokens_beyond_the_bound() -> None:
    bound = ANSWER_OVERHEAD_BYTES + 5 * TOKEN_BYTES
    retention = Retention(RetentionLimits(answer_bytes=bound))
    kept = retention.begin(KEY, b"f", T1)
    for index in range(100):
        retention.add(kept, str(index % 10))
    assert (kept.first, kept.next_index, kept.size_bytes) == (95, 100, bound)
    assert kept.digest_at(100).digest() == hashlib.sha256(b"0123456789" * 10).digest()


def test_an_answer_that_nobody_reads_is_full_at_the_bound_and_loses_nothing() -> None:
    retention, kept = keeping(4, answer_bytes=ANSWER_OVERHEAD_BYTES + 5 * TOKEN_BYTES)
    assert not retention.is_full(kept)
    retention.add(kept, "x")
    retention.add(kept, "y")
    assert retention.is_full(kept)
    assert kept.first == 0


def test_a_client_beyond_its_bound_loses_its_own_oldest_answer_first() -> None:
    retention = Retention(RetentionLimits(client_bytes=2 * ANSWER_OVERHEAD_BYTES + 200))
    other = retention.begin(key("other", 0), b"f", T1)
    retention.leave(other, 0.0, is_running=False)
    mine = [retention.begin(key("mine", number), b"f", T1) for number in range(2)]
    retention.leave(mine[0], 1.0, is_running=False)
    for _ in range(4):
        retention.add(mine[1], "x")
    assert retention.given_up == [mine[0]]
    assert retention.find(other.key, 2.0) is other
    assert retention.find(mine[1].key, 2.0) is mine[1]


@pytest.mark.parametrize(
    ("limits", "is_running", "left"),
    [
        ({"client_answers": 3}, False, 3),
        ({"total_answers": 5}, False, 5),
        ({"client_running": 2}, True, 2),
        ({"client_running": 2}, False, 10),
        ({"total_bytes": 4 * ANSWER_OVERHEAD_BYTES}, False, 4),
    ],
)
def test_a_client_that_leaves_many_times_keeps_a_bounded_number(limits, is_running, left) -> None:
    retention = Retention(RetentionLimits(**limits))
    for number in range(10):
        kept = retention.begin(key("client", number), b"f", T1)
        retention.leave(kept, float(number), is_running=is_running)
    assert len(retention) == left
    assert [kept.key[1][-1] for kept in retention.given_up] == list(range(10 - left))
    assert retention.find(key("client", 9), 9.0) is not None


_step = st.tuples(
    st.sampled_from(["begin", "add", "leave", "read", "acknowledge", "drop", "expire"]),
    st.sampled_from(["a", "b"]),
    st.integers(0, 3),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(_step, max_size=80))
def test_whatever_happens_sizes_add_up_and_stay_within_the_bounds(steps) -> None:
    limits = RetentionLimits(
        keep_s=5.0, answer_bytes=6700, client_bytes=13000, total_bytes=20000, client_answers=2
    )
    retention = Retention(limits)
    live: dict[tuple[str, bytes], Kept] = {}
    for now_s, (action, client, number, text) in enumerate(steps):
        found = key(client, number)
        kept = live.get(found)
        if action == "begin":
            live[found] = retention.begin(found, b"f", T1)
        elif action == "expire":
            retention.expire(float(now_s))
        elif kept is None:
            continue
        elif action == "add":
            if kept.until_s is None or not retention.is_full(kept):
                retention.add(kept, text)
        elif action == "leave":
            retention.leave(kept, float(now_s), is_running=bool(text))
        elif action == "read" and retention.find(found, float(now_s)) is kept:
            retention.read(kept, T2)
        elif action == "acknowledge":
            retention.acknowledge(kept, len(text))
        elif action == "drop":
            retention.drop(found)
        held = list(retention._answers.values())
        assert all(live[k.key] is k for k in held)
        assert set(retention._clients) == {k.key[0] for k in held}
        assert retention.size_bytes == sum(k.size_bytes for k in held)
        for k in held:
            texts = k.since(k.first, 10**6)
            assert k.size_bytes == ANSWER_OVERHEAD_BYTES + sum(
                len(t.encode()) + TOKEN_OVERHEAD_BYTES for t in texts
            )
        # Beyond the bounds is at most the empty answers that are read, and one last token.
        read = sum(k.until_s is None for k in held)
        slack = read * ANSWER_OVERHEAD_BYTES + 120 + TOKEN_OVERHEAD_BYTES
        assert retention.size_bytes <= limits.total_bytes + slack
