from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.secure.frames import (
    HEADER_BYTES,
    MAX_UNFINISHED,
    MAX_WHOLE_BYTES,
    PIECE_RECORD_BYTES,
    Assembler,
)
from nearfar.secure.outbox import (
    END_BYTES,
    STRICT_RECORD_BYTES,
    STRICT_RUN_TICKS,
    STRICT_TICK_S,
    Outbox,
    Traits,
)
from nearfar.secure.pace import FIRST_BATCH_BYTES, TOKEN_TICK_S
from nearfar.secure.records import OVERHEAD_BYTES, Buffer
from nearfar.secure.shaping import BUCKET_BYTES, Shaping

LIMIT = 1 << 20
LARGE = MAX_WHOLE_BYTES * 3


def item(
    name: str, stream: int = 0, size_bytes: int = 0, **flags: bool
) -> tuple[list[bytes], int, int, Traits]:
    """A message that begins with its name."""
    data = name.encode().ljust(size_bytes, b".")
    return [data], len(data), stream, Traits(**flags)


def outbox(shaping: Shaping = "off") -> Outbox:
    box = Outbox(shaping)
    box.max_unfinished_bytes = LIMIT
    return box


class Reader:
    """The other end: names of the messages in the order in which they are complete."""

    def __init__(self) -> None:
        self._assembler = Assembler()
        self.names: list[str] = []
        self.messages: list[bytes] = []
        self.announced: list[int] = []
        self.announced_before: dict[str, int] = {}
        self.sizes: list[int] = []

    def read(self, plaintext: Buffer) -> None:
        self.sizes.append(len(plaintext))
        for one in self._assembler.feed(bytes(plaintext), max_message_bytes=LIMIT):
            if one.message is not None:
                self.messages.append(bytes(one.message))
                self.names.append(bytes(one.message[:16]).decode().rstrip("."))
                self.announced_before[self.names[-1]] = len(self.announced)
            elif one.announced_stream is not None:
                self.announced.append(one.announced_stream)

    def drain(self, box: Outbox, now_s: float | None = 0.0, **how: bool) -> Reader:
        while (plaintext := box.next(now_s, **how)) is not None:
            self.read(plaintext)
        return self


# Order


def test_short_messages_overtake_a_long_one_between_its_pieces() -> None:
    box, reader = outbox(), Reader()
    box.put(*item("large", 1, LARGE))
    for name in ("a", "b", "c"):
        plaintext = box.next(0.0)
        assert plaintext is not None
        reader.read(plaintext)
        box.put(*item(name, 2))
    assert reader.drain(box).names == ["a", "b", "c", "large"]


def test_of_many_that_fit_into_a_record_few_are_before_a_short_one() -> None:
    box = outbox()
    for number in range(MAX_UNFINISHED + 3):
        box.put(*item(f"{number}", number + 1, MAX_WHOLE_BYTES + 1))
    box.put(*item("ping"))
    names = Reader().drain(box).names
    assert names[: MAX_UNFINISHED + 2][-1] == "ping"
    assert sorted(names[MAX_UNFINISHED + 2 :]) == ["5", "6"]


def test_messages_of_one_stream_keep_their_order() -> None:
    box = outbox()
    box.put(*item("large", 1, LARGE, opens=True))
    box.put(*item("cancel", 1))
    box.put(*item("ping"))
    assert Reader().drain(box).names == ["ping", "large", "cancel"]


def test_request_overtakes_a_long_one_only_after_that_was_announced() -> None:
    box, reader = outbox(), Reader()
    box.put(*item("large", 1, LARGE, opens=True))
    box.put(*item("small", 2, opens=True))
    plaintext = box.next(0.0)
    assert plaintext is not None
    reader.read(plaintext)
    assert reader.announced == [1]
    assert reader.drain(box).names == ["small", "large"]


def test_requests_behind_one_that_cannot_begin_wait_for_it() -> None:
    box, reader = outbox(), Reader()
    for stream in range(1, MAX_UNFINISHED + 2):
        box.put(*item(f"large {stream}", stream, LARGE, opens=True))
    box.put(*item("small", MAX_UNFINISHED + 2, opens=True))
    box.put(*item("ping"))
    reader.drain(box)
    assert reader.announced == [1, 2, 3, 4, 5]
    assert reader.names[0] == "ping"
    assert sorted(reader.names[1:]) == [*(f"large {n}" for n in range(1, 6)), "small"]
    assert reader.announced_before["small"] == 5


def test_no_more_is_begun_than_the_receiver_holds() -> None:
    box, reader = outbox(), Reader()
    for stream in range(1, 12):
        box.put(*item(f"large {stream}", stream, LIMIT // 2))
    assert len(reader.drain(box).names) == 11  # the reader's assembler would refuse more


def test_barrier_overtakes_nothing() -> None:
    box = outbox()
    box.put(*item("large", 1, LARGE))
    box.put(*item("goaway", is_barrier=True))
    box.put(*item("ping"))
    assert Reader().drain(box).names == ["ping", "large", "goaway"]


def test_pieces_can_be_left_to_another_writer() -> None:
    box, reader = outbox(), Reader()
    box.put(*item("large", 1, LARGE))
    box.put(*item("small", 2))
    assert reader.drain(box, bulk=False).names == ["small"]
    assert reader.drain(box).names == ["small", "large"]


def test_callers_array_may_change_after_it_was_queued() -> None:
    box, data = outbox(), bytearray(b"before".ljust(LARGE, b"."))
    box.put([memoryview(data)], LARGE, 1)
    data[:6] = b"after!"
    assert Reader().drain(box).names == ["before"]


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_borrowed_array_may_change_once_it_is_owned(taken: int) -> None:
    box, data = outbox(), bytearray(b"before".ljust(LARGE, b"."))
    box.put([memoryview(data)], LARGE, 1, borrow=True)
    gone = [box.next(None) for _ in range(taken)]
    box.own()
    data[:] = bytes(LARGE)
    reader = Reader()
    for plaintext in gone:
        assert plaintext is not None
        reader.read(plaintext)
    assert reader.drain(box).messages == [b"before".ljust(LARGE, b".")]


SHAPINGS: list[Shaping] = ["off", "balanced", "strict"]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(SHAPINGS),
    st.lists(
        st.tuples(
            st.integers(1, 3),
            st.sampled_from([1, 60, 5000, MAX_WHOLE_BYTES + 1, LARGE]),
            st.booleans(),
        ),
        max_size=25,
    ),
    st.lists(st.integers(0, 3), min_size=25, max_size=25),
)
def test_everything_arrives_once_and_each_stream_in_order(
    shaping: Shaping, messages: list[tuple[int, int, bool]], steps: list[int]
) -> None:
    box, reader, now_s = outbox(shaping), Reader(), 0.0
    sent: dict[int, list[str]] = {1: [], 2: [], 3: []}
    for number, ((stream, size_bytes, is_token), step) in enumerate(
        zip(messages, steps, strict=False)
    ):
        name = f"{stream}:{number}"
        sent[stream].append(name)
        box.put(*item(name, stream, size_bytes, is_paced=is_token))
        now_s += 0.04 * step
        for _ in range(step):
            if (plaintext := box.next(now_s, is_busy=True)) is not None:
                reader.read(plaintext)
    reader.drain(box, None)
    for stream, names in sent.items():
        assert [name for name in reader.names if name.startswith(f"{stream}:")] == names
    assert len(reader.names) == len(messages)


# Sizes


@pytest.mark.parametrize(
    ("shaping", "size_bytes", "padded_bytes"),
    [("off", 10, 18), ("balanced", 10, 128), ("balanced", 121, 256), ("balanced", 5000, 5120)],
)
def test_sizes_of_whole_messages(shaping: Shaping, size_bytes: int, padded_bytes: int) -> None:
    box = outbox(shaping)
    counted_bytes = box.put(*item("x", 0, size_bytes))
    assert Reader().drain(box).sizes == [padded_bytes]
    assert counted_bytes == padded_bytes + OVERHEAD_BYTES


@pytest.mark.parametrize("size_bytes", [100_000, 200_000])
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_long_messages_count_what_their_records_take(shaping: Shaping, size_bytes: int) -> None:
    box = outbox(shaping)
    counted_bytes = box.put(*item("x", 1, size_bytes))
    sizes = Reader().drain(box, None).sizes
    assert counted_bytes == sum(sizes) + OVERHEAD_BYTES * len(sizes)
    if shaping == "strict":
        assert set(sizes) == {STRICT_RECORD_BYTES}
    assert max(sizes) <= PIECE_RECORD_BYTES


# balanced


def answer(box: Outbox, texts: list[str], stream: int = 1) -> None:
    for text in texts:
        box.put(*item(text, stream, is_paced=True))


def test_first_token_leaves_at_once_and_the_others_in_one_record_per_tick() -> None:
    box, reader = outbox("balanced"), Reader()
    answer(box, ["one"])
    assert reader.drain(box, 5.0).names == ["one"]
    answer(box, ["two", "three"])
    assert reader.drain(box, 5.05).names == ["one"]
    assert box.next_flush_s() == pytest.approx(5.0 + TOKEN_TICK_S)
    assert reader.drain(box, 5.1).names == ["one", "two", "three"]
    assert reader.sizes == [BUCKET_BYTES, FIRST_BATCH_BYTES]


def test_tick_without_a_token_looks_like_one_with_some() -> None:
    box, reader = outbox("balanced"), Reader()
    answer(box, ["one"])
    reader.drain(box, 0.0).drain(box, 0.1).drain(box, 0.2)
    assert reader.names == ["one"]
    assert reader.sizes == [BUCKET_BYTES, FIRST_BATCH_BYTES, FIRST_BATCH_BYTES]


def test_paused_answer_falls_silent_and_resumes_at_once() -> None:
    box, reader = outbox("balanced"), Reader()
    answer(box, ["one"])
    now_s = 0.0
    while box.next_flush_s() is not None or now_s == 0.0:
        reader.drain(box, now_s)
        now_s += TOKEN_TICK_S
        assert now_s < 5.0
    count = len(reader.sizes)
    answer(box, ["two"])
    assert reader.drain(box, 60.0).names == ["one", "two"]
    assert len(reader.sizes) == count + 1
    assert box.next_flush_s() == pytest.approx(60.1)


def test_end_of_an_answer_takes_the_last_tokens_along_and_then_it_is_quiet() -> None:
    box, reader = outbox("balanced"), Reader()
    answer(box, ["one"])
    reader.drain(box, 0.0)
    answer(box, ["two"])
    box.put(*item("fin", 1, 200, ends=True))
    assert reader.drain(box, 0.05).names == ["one"]
    assert reader.drain(box, 0.1).names == ["one", "two", "fin"]
    assert reader.sizes == [BUCKET_BYTES, END_BYTES]
    assert box.next_flush_s() is None


def test_missed_ticks_are_not_made_up_for() -> None:
    box, reader = outbox("balanced"), Reader()
    answer(box, ["one"])
    reader.drain(box, 0.0)
    answer(box, ["two"])
    reader.drain(box, 1.234)
    assert len(reader.sizes) == 2
    assert box.next_flush_s() == pytest.approx(1.3)


def test_records_get_longer_when_tokens_pile_up_and_nothing_waits_for_long() -> None:
    box, reader = outbox("balanced"), Reader()
    answer(box, ["first"])
    reader.drain(box, 0.0)
    for tick in range(1, 31):
        answer(box, [f"{tick}.{number}" for number in range(20)])  # 200 tokens a second
        reader.drain(box, tick * TOKEN_TICK_S + 0.001)
    assert reader.names[-1].startswith("30.")
    sizes = list(dict.fromkeys(reader.sizes))
    assert sizes == sorted(sizes)
    assert len(sizes) <= 4


def test_other_messages_do_not_wait_for_a_tick() -> None:
    box, reader = outbox("balanced"), Reader()
    answer(box, ["one"])
    reader.drain(box, 0.0)
    answer(box, ["two"])
    box.put(*item("pong"))
    box.put(*item("result", 2))
    assert reader.drain(box, 0.01).names == ["one", "pong", "result"]


def test_tokens_of_several_answers_share_a_record() -> None:
    box, reader = outbox("balanced"), Reader()
    answer(box, ["a1"], 1)
    answer(box, ["b1"], 2)
    reader.drain(box, 0.0)
    answer(box, ["a2"], 1)
    answer(box, ["b2"], 2)
    assert reader.drain(box, 0.1).names == ["a1", "b1", "a2", "b2"]
    assert len(reader.sizes) == 3


def test_credit_leaves_on_its_own_ticks_and_cancel_does_not_wait_for_them() -> None:
    box, reader = outbox("balanced"), Reader()
    box.answer_began(1)
    reader.drain(box, 0.0)
    box.put(*item("credit", 1, is_paced=True))
    assert reader.drain(box, 0.4).names == []
    assert reader.drain(box, 0.5).names == ["credit"]
    reader.drain(box, 1.0)  # none to grant: looks the same
    assert reader.sizes == [BUCKET_BYTES] * 2
    box.put(*item("more credit", 1, is_paced=True))
    box.put(*item("cancel", 1))
    assert reader.drain(box, 1.1).names == ["credit", "more credit", "cancel"]


def test_credit_for_an_answer_that_ended_is_not_sent() -> None:
    box, reader = outbox("balanced"), Reader()
    box.answer_began(1)
    reader.drain(box, 0.0)
    box.put(*item("credit", 1, is_paced=True))
    box.answer_ended(1)
    assert reader.drain(box, 0.5).sizes == []
    assert box.next_flush_s() is None


# strict


def run(box: Outbox, reader: Reader, start: int, stop: int, *, is_busy: bool) -> list[int]:
    """Records per tick."""
    counts = []
    for tick in range(start, stop):
        before = len(reader.sizes)
        late_s = 0.001 if tick else 0.0
        reader.drain(box, tick * STRICT_TICK_S + late_s, is_busy=is_busy)
        counts.append(len(reader.sizes) - before)
    return counts


def test_one_constant_record_per_tick_whether_there_is_something_or_not() -> None:
    box, reader = outbox("strict"), Reader()
    box.put(*item("request", 1, 9000, opens=True))
    assert run(box, reader, 0, 10, is_busy=True) == [1] * 10
    answer(box, [f"t{number}" for number in range(50)])
    assert run(box, reader, 10, 20, is_busy=True) == [1] * 10
    assert reader.names == ["request", *(f"t{number}" for number in range(50))]
    assert set(reader.sizes) == {STRICT_RECORD_BYTES}


def test_records_go_on_to_the_end_of_a_run_after_the_last_stream_ended() -> None:
    box, reader = outbox("strict"), Reader()
    box.put(*item("request", 1, opens=True))
    counts = run(box, reader, 0, 3, is_busy=True)
    counts += run(box, reader, 3, 3 * STRICT_RUN_TICKS, is_busy=False)
    assert counts == [1] * STRICT_RUN_TICKS + [0] * (2 * STRICT_RUN_TICKS)
    assert box.next_flush_s() is None


def test_message_without_a_stream_leaves_at_once_but_constant() -> None:
    box, reader = outbox("strict"), Reader()
    box.put(*item("ping"))
    assert reader.drain(box, 0.0).names == ["ping"]
    assert reader.sizes == [STRICT_RECORD_BYTES]
    assert box.next_flush_s() is None


def test_neither_tokens_nor_a_long_result_starve() -> None:
    box, reader = outbox("strict"), Reader()
    box.put(*item("large", 1, 40_000))
    for tick in range(60):
        answer(box, [f"t{tick}"], 2)
        run(box, reader, tick, tick + 1, is_busy=True)
    assert "large" in reader.names
    assert reader.names[-1] in ("t58", "t59")


def test_header_and_buckets_are_what_the_documentation_says() -> None:
    assert (HEADER_BYTES, BUCKET_BYTES, END_BYTES, STRICT_RECORD_BYTES) == (8, 128, 512, 4096)
    assert FIRST_BATCH_BYTES == 192
    assert (TOKEN_TICK_S, STRICT_TICK_S, STRICT_RUN_TICKS) == (0.1, 0.05, 32)
