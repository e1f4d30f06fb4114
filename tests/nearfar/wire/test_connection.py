"""Who may say what when, seen from both ends without a channel in between."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.errors import LocalProtocolError, RemoteProtocolError, SecurityError
from nearfar.wire import messages as wire
from nearfar.wire.codec import describe, encode
from nearfar.wire.connection import (
    CROSSINGS,
    TRANSITIONS,
    Connection,
    ConnectionState,
    Role,
    StreamState,
)
from nearfar.wire.limits import Limits
from tests.support.wire import LIMITS, fin, generate, infer, messages, ready, result, resume

EMPTY_DIGEST = hashlib.sha256().digest()


@dataclass
class Ends:
    """Two connections; what one queues is delivered when the test says so."""

    client: Connection
    server: Connection
    at_client: list[wire.Message] = field(default_factory=list)
    at_server: list[wire.Message] = field(default_factory=list)

    @classmethod
    def new(cls, limits: Limits = LIMITS) -> Ends:
        return cls(Connection(Role.CLIENT, limits), Connection(Role.SERVER, limits))

    @classmethod
    def open(cls, limits: Limits = LIMITS) -> Ends:
        ends = cls.new(limits)
        ends.client.send(wire.Auth())
        ends.deliver()
        ends.server.send(ready(limits))
        ends.deliver()
        ends.at_client.clear()
        ends.at_server.clear()
        return ends

    def to_server(self) -> None:
        for data in self.client.data_to_send():
            received = self.server.receive(data)
            self.at_server += [received[0]] if received else []

    def to_client(self) -> None:
        for data in self.server.data_to_send():
            received = self.client.receive(data)
            self.at_client += [received[0]] if received else []

    def deliver(self) -> None:
        self.to_server()
        self.to_client()

    def generating(self, credit: int = 100) -> int:
        stream = self.client.next_stream
        self.client.send(generate(stream, credit))
        self.deliver()
        return stream


def raw(message: wire.Message, *tensors: np.ndarray) -> bytes:
    return b"".join(encode(message, tensors))


def refused(connection: Connection, message: wire.Message) -> str:
    """Text of the error with which a connection refuses the peer's message."""
    with pytest.raises(RemoteProtocolError) as caught:
        connection.receive(raw(message))
    assert connection.state is ConnectionState.CLOSED
    return str(caught.value)


# Opening


def test_connection_opens_with_auth_and_ready() -> None:
    ends = Ends.new()
    ends.client.send(wire.Auth(token="t"))
    ends.deliver()
    assert ends.at_server == [wire.Auth(token="t")]
    assert not ends.client.can_open
    ends.server.send(ready())
    ends.deliver()
    assert ends.client.can_open
    assert ends.client.state is ends.server.state is ConnectionState.OPEN


def test_client_cannot_ask_before_ready() -> None:
    ends = Ends.new()
    with pytest.raises(LocalProtocolError, match="while the connection is new"):
        ends.client.send(infer())
    ends.client.send(wire.Auth())
    with pytest.raises(LocalProtocolError, match="while the connection is authenticating"):
        ends.client.send(infer())


@pytest.mark.parametrize("message", [infer(), wire.Ping(id=1), wire.Cancel(stream=1)])
def test_server_takes_nothing_but_auth_first(message: wire.Message) -> None:
    assert "The client broke the wire protocol" in refused(Ends.new().server, message)


def test_server_takes_nothing_large_before_it_knows_the_client() -> None:
    limits = Limits()
    token = "x" * limits.max_unauthenticated_bytes
    assert "where 65536 are allowed" in refused(Ends.new(limits).server, wire.Auth(token=token))


def test_peers_of_another_protocol_version_are_refused() -> None:
    assert "protocol_version is 2" in refused(Ends.new().server, wire.Auth(protocol_version=2))


@pytest.mark.parametrize("size_bytes", [1, 63, 65])
def test_a_proof_is_a_signature_or_nothing(size_bytes: int) -> None:
    message = wire.Auth(token="a.b.c", proof=bytes(size_bytes))
    assert f"Auth.proof has {size_bytes} bytes" in refused(Ends.new().server, message)


def test_refused_client_learns_why_and_both_ends_are_closed() -> None:
    ends = Ends.new()
    ends.client.send(wire.Auth(token="bad"))
    ends.deliver()
    ends.server.close(SecurityError("The token is unknown", fix="Ask for a new one"))
    ends.deliver()
    assert ends.at_client == [
        wire.Error(
            stream=0, code="security", problem="The token is unknown", fix="Ask for a new one"
        )
    ]
    assert ends.client.state is ends.server.state is ConnectionState.CLOSED


def test_closing_error_is_bounded_and_valid_whatever_its_text() -> None:
    ends = Ends.open()
    ends.server.close(SecurityError("\ud800" + "x" * 10_000_000))
    ends.deliver()
    (error,) = ends.at_client
    assert isinstance(error, wire.Error)
    assert len(error.problem) == 2000


def test_ready_cannot_promise_more_than_the_limits() -> None:
    ends = Ends.new()
    ends.client.send(wire.Auth())
    ends.deliver()
    with pytest.raises(LocalProtocolError, match="promises more"):
        ends.server.send(ready(Limits(max_streams=LIMITS.max_streams + 1)))
    ends.server.send(ready())  # nothing was lost by the mistake


def test_ready_lowers_what_the_client_sends() -> None:
    ends = Ends.new()
    ends.client.send(wire.Auth())
    ends.deliver()
    ends.server.send(
        wire.Ready(protocol_version=1, server="", max_streams=1, max_message_bytes=1000)
    )
    ends.deliver()
    array = np.zeros(1000, np.uint8)
    with pytest.raises(LocalProtocolError, match="up to 1000 bytes"):
        ends.client.send(infer(arrays={"x": array}), [array])
    ends.client.send(infer())
    assert not ends.client.can_open
    with pytest.raises(LocalProtocolError, match="1 streams are open already"):
        ends.client.send(infer(2))


# Requests


def test_streams_are_multiplexed() -> None:
    ends = Ends.open()
    array = np.arange(3, dtype=np.float32)
    ends.client.send(generate(1))
    ends.client.send(infer(2, {"x": array}), [array])
    ends.client.send(wire.ListModels(stream=3))
    ends.deliver()
    assert list(ends.server.open_streams) == [1, 2, 3]
    ends.server.send(wire.Token(stream=1, index=0, text="a"))
    ends.server.send(wire.Models(stream=3, models=()))
    ends.server.send(result(2, {"y": array}), [array])
    ends.server.send(wire.Token(stream=1, index=1, text="é"))
    ends.server.send(fin(1, 2, hashlib.sha256("aé".encode()).digest()))
    ends.deliver()
    assert [type(message).__name__ for message in ends.at_client] == [
        "Token", "Models", "Result", "Token", "Fin",
    ]  # fmt: skip
    assert ends.client.open_streams == ends.server.open_streams == ()


def test_stream_ids_may_skip_but_never_return() -> None:
    ends = Ends.open()
    ends.client.send(infer(5))
    assert ends.client.next_stream == 6
    for stream in (3, 5):
        with pytest.raises(LocalProtocolError):
            ends.client.send(infer(stream))
    ends.deliver()
    assert "stream 3 is ended" in refused(ends.server, infer(3))


def test_ended_stream_cannot_be_used_again() -> None:
    ends = Ends.open()
    ends.client.send(infer(1))
    ends.deliver()
    ends.server.send(result(1))
    ends.deliver()
    for message in (infer(1), wire.Cancel(stream=1)):
        with pytest.raises(LocalProtocolError, match="while stream 1 is ended"):
            ends.client.send(message)
    assert "stream 1 is ended" in refused(ends.client, result(1))


def test_answer_must_fit_the_question() -> None:
    cases: list[tuple[wire.Message, wire.Message]] = [
        (infer(1), wire.Token(stream=1, index=0, text="")),
        (infer(1), wire.Models(stream=1, models=())),
        (generate(1), result(1)),
        (wire.ListModels(stream=1), fin(1, 0, EMPTY_DIGEST)),
    ]
    for question, answer in cases:
        ends = Ends.open()
        ends.client.send(question)
        ends.deliver()
        with pytest.raises(LocalProtocolError, match="not allowed from the server"):
            ends.server.send(answer)
        assert "not allowed from the server" in refused(ends.client, answer)


def test_server_cannot_use_a_stream_nobody_opened() -> None:
    ends = Ends.open()
    assert "stream 7 is idle" in refused(ends.client, result(7))


def test_more_streams_than_allowed_are_refused() -> None:
    ends = Ends.open()
    for stream in range(1, LIMITS.max_streams + 1):
        ends.client.send(infer(stream))
    ends.deliver()
    assert "streams are open already" in refused(ends.server, infer(LIMITS.max_streams + 1))


def test_failed_stream_leaves_the_others_alone() -> None:
    ends = Ends.open()
    ends.client.send(infer(1))
    ends.client.send(infer(2))
    ends.deliver()
    ends.server.send(wire.Error(stream=1, code="engine", problem="It broke"))
    ends.server.send(result(2))
    ends.deliver()
    assert [type(message).__name__ for message in ends.at_client] == ["Error", "Result"]
    assert ends.client.state is ConnectionState.OPEN


# Generation


def test_tokens_are_counted_and_hashed_alike_on_both_ends() -> None:
    ends = Ends.open()
    stream = ends.generating(credit=3)
    for index, text in enumerate(["a", "", "日"]):
        ends.server.send(wire.Token(stream=stream, index=index, text=text))
    ends.deliver()
    for end in (ends.client, ends.server):
        assert end.credit(stream) == 0
        assert end.token_count(stream) == 3
        assert end.digest(stream) == hashlib.sha256("a日".encode()).digest()


@pytest.mark.parametrize("index", [1, 2, 0])
def test_gap_or_repetition_of_tokens_is_refused(index: int) -> None:
    ends = Ends.open()
    stream = ends.generating()
    token = wire.Token(stream=stream, index=index, text="")
    if index == 0:
        ends.server.send(token)
        ends.deliver()
    due = 1 if index == 0 else 0
    with pytest.raises(LocalProtocolError, match=f"token {index} where {due} was due"):
        ends.server.send(token)
    assert f"token {index} where {due} was due" in refused(ends.client, token)


def test_tokens_beyond_the_credit_are_refused_on_both_ends() -> None:
    ends = Ends.open()
    stream = ends.generating(credit=1)
    ends.server.send(wire.Token(stream=stream, index=0, text=""))
    ends.deliver()
    token = wire.Token(stream=stream, index=1, text="")
    with pytest.raises(LocalProtocolError, match="no credit left"):
        ends.server.send(token)
    ends.client.send(wire.Credit(stream=stream, tokens=1))
    ends.deliver()
    ends.server.send(token)
    ends.deliver()
    assert len(ends.at_client) == 2
    extra = wire.Token(stream=stream, index=2, text="")
    assert "no credit left" in refused(ends.client, extra)


def test_credit_cannot_overflow() -> None:
    ends = Ends.open()
    stream = ends.generating(credit=2**31 - 1)
    credit = wire.Credit(stream=stream, tokens=1)
    with pytest.raises(LocalProtocolError, match="more credit"):
        ends.client.send(credit)
    assert "more credit" in refused(ends.server, credit)


@pytest.mark.parametrize(
    ("count", "text", "complaint"),
    [(2, "a", "Fin says 2"), (0, "", "Fin says 0"), (1, "b", "do not match the digest")],
)
def test_fin_that_does_not_match_the_tokens_is_refused(
    count: int, text: str, complaint: str
) -> None:
    ends = Ends.open()
    stream = ends.generating()
    ends.server.send(wire.Token(stream=stream, index=0, text="a"))
    ends.deliver()
    wrong = fin(stream, count, hashlib.sha256(text.encode()).digest())
    with pytest.raises(LocalProtocolError, match=complaint):
        ends.server.send(wrong)
    assert complaint in refused(ends.client, wrong)


# Resuming


def test_a_resumed_stream_goes_on_at_its_index_and_ends_in_the_fin_of_the_whole() -> None:
    before = Ends.open()
    stream = before.generating()
    for index, text in enumerate(["a", "é"]):
        before.server.send(wire.Token(stream=stream, index=index, text=text))
    before.deliver()
    before.client.close()

    after = Ends.open()
    after.client.send(resume(1, next_index=2, credit=2))
    after.client.carry_over(1, before.client.digest_state(stream))  # also when it is closed
    after.deliver()
    after.server.carry_over(1, before.server.digest_state(stream))
    assert after.server.token_count(1) == 2
    assert after.server.credit(1) == 2
    after.server.send(wire.Token(stream=1, index=2, text="日"))
    after.server.send(fin(1, 3, hashlib.sha256("aé日".encode()).digest()))
    after.deliver()
    assert [type(message).__name__ for message in after.at_client] == ["Token", "Fin"]


@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_resumed_stream_has_no_gap_and_no_repetition(index: int) -> None:
    ends = Ends.open()
    ends.client.send(resume(1, next_index=2))
    token = wire.Token(stream=1, index=index, text="")
    assert f"token {index} where 2 was due" in refused(ends.client, token)


def test_a_fin_without_what_came_before_is_refused() -> None:
    ends = Ends.open()
    ends.client.send(resume(1, next_index=1))
    ends.client.carry_over(1, hashlib.sha256(b"a"))
    assert "digest of Fin" in refused(ends.client, fin(1, 1, EMPTY_DIGEST))


def test_a_digest_is_carried_over_only_right_after_resume() -> None:
    ends = Ends.open()
    stream = ends.generating()
    with pytest.raises(LocalProtocolError, match="takes over no digest"):
        ends.server.carry_over(stream, hashlib.sha256())
    ends.client.send(resume(2))
    ends.deliver()
    ends.server.send(wire.Token(stream=2, index=0, text="a"))
    with pytest.raises(LocalProtocolError, match="takes over no digest"):
        ends.server.carry_over(2, hashlib.sha256())
    with pytest.raises(LocalProtocolError, match="is not open"):
        ends.server.carry_over(3, hashlib.sha256())


def test_a_miss_ends_the_stream_and_leaves_the_connection() -> None:
    ends = Ends.open()
    ends.client.send(resume(1))
    ends.deliver()
    ends.server.send(wire.Error(stream=1, code="resume_missed", problem="Too late"))
    ends.deliver()
    assert ends.client.open_streams == ()
    assert ends.client.state is ConnectionState.OPEN


def test_more_than_was_sent_cannot_be_acknowledged() -> None:
    ends = Ends.open()
    stream = ends.generating()
    ends.server.send(wire.Token(stream=stream, index=0, text="a"))
    ends.deliver()
    ends.client.send(wire.Credit(stream=stream, tokens=1, received=1))
    ends.deliver()
    credit = wire.Credit(stream=stream, tokens=1, received=2)
    with pytest.raises(LocalProtocolError, match="had 1 tokens, 2 are acknowledged"):
        ends.client.send(credit)
    assert "2 are acknowledged" in refused(ends.server, credit)


def test_peers_that_know_nothing_of_resumption_are_understood() -> None:
    """New fields are optional: the shorter forms of `Ready` and `Credit` mean what they did."""
    ends = Ends.new()
    ends.client.send(wire.Auth())
    ends.deliver()
    header = msgspec.msgpack.encode([2, 1, "old", 4, 1000, ""])
    size = len(header).to_bytes(4, "little")
    padding = bytes(-(len(header) + 4) % 8)
    message, _ = ends.client.receive(size + header + padding)
    assert message.resume_key == b""
    assert ends.client.can_open


# Cancelling


def test_cancelled_stream_ends_with_the_servers_error() -> None:
    ends = Ends.open()
    stream = ends.generating()
    ends.client.send(wire.Cancel(stream=stream))
    assert stream in ends.client.open_streams
    ends.deliver()
    assert ends.at_server[-1] == wire.Cancel(stream=stream)
    ends.server.send(wire.Error(stream=stream, code="cancelled", problem="Cancelled"))
    ends.deliver()
    assert [type(message).__name__ for message in ends.at_client] == ["Error"]
    assert ends.client.open_streams == ()


def test_tokens_and_fin_under_way_when_cancel_was_sent_are_no_violation() -> None:
    ends = Ends.open()
    stream = ends.generating()
    ends.server.send(wire.Token(stream=stream, index=0, text="a"))
    ends.server.send(fin(stream, 1, hashlib.sha256(b"a").digest()))
    ends.client.send(wire.Cancel(stream=stream))
    ends.to_client()  # the token is swallowed, the end is told
    assert [type(message).__name__ for message in ends.at_client] == ["Fin"]
    ends.at_server.clear()
    ends.to_server()  # the server has ended the stream already
    assert ends.at_server == []
    ends.client.send(infer(stream + 1))
    ends.deliver()
    assert ends.client.state is ends.server.state is ConnectionState.OPEN


def test_result_under_way_when_cancel_was_sent_is_no_violation() -> None:
    ends = Ends.open()
    ends.client.send(infer(1))
    ends.deliver()
    ends.server.send(result(1))
    ends.client.send(wire.Cancel(stream=1))
    ends.deliver()
    assert [type(message).__name__ for message in ends.at_client] == ["Result"]


def test_tokens_of_a_cancelled_stream_are_still_checked() -> None:
    ends = Ends.open()
    stream = ends.generating()
    ends.client.send(wire.Cancel(stream=stream))
    assert "token 5 where 0 was due" in refused(
        ends.client, wire.Token(stream=stream, index=5, text="")
    )


def test_credit_under_way_when_the_stream_ended_is_no_violation() -> None:
    ends = Ends.open()
    stream = ends.generating()
    ends.client.send(wire.Credit(stream=stream, tokens=5))
    ends.server.send(wire.Error(stream=stream, code="engine", problem="It broke"))
    ends.to_server()
    assert ends.server.state is ConnectionState.OPEN


def test_cancelling_twice_or_giving_credit_after_cancelling_is_our_mistake() -> None:
    ends = Ends.open()
    stream = ends.generating()
    ends.client.send(wire.Cancel(stream=stream))
    for message in (wire.Cancel(stream=stream), wire.Credit(stream=stream, tokens=1)):
        with pytest.raises(LocalProtocolError, match="generating, cancelled"):
            ends.client.send(message)


@pytest.mark.parametrize("message", [wire.Cancel(stream=9), wire.Credit(stream=9, tokens=1)])
def test_cancel_or_credit_for_a_stream_never_opened_is_refused(message: wire.Message) -> None:
    assert "stream 9 is idle" in refused(Ends.open().server, message)


# Going away


def test_after_go_away_open_streams_finish_and_new_ones_are_not_opened() -> None:
    ends = Ends.open()
    ends.client.send(infer(1))
    ends.deliver()
    ends.server.send(wire.GoAway(last_stream=1, reason="update"))
    ends.deliver()
    assert not ends.client.can_open
    with pytest.raises(LocalProtocolError, match="going away"):
        ends.client.send(infer(2))
    ends.server.send(result(1))
    ends.deliver()
    assert [type(message).__name__ for message in ends.at_client] == ["GoAway", "Result"]


def test_requests_that_crossed_go_away_are_dropped_on_both_ends() -> None:
    ends = Ends.open()
    ends.client.send(infer(1))
    ends.deliver()
    ends.at_server.clear()
    ends.server.send(wire.GoAway(last_stream=1))
    ends.client.send(generate(2))
    ends.client.send(wire.Credit(stream=2, tokens=1))
    ends.client.send(wire.Cancel(stream=2))
    ends.deliver()
    assert ends.at_server == []
    assert ends.client.open_streams == ends.server.open_streams == (1,)
    assert ends.server.state is ConnectionState.DRAINING


def test_go_away_may_lower_but_not_raise_its_promise_nor_abandon_streams() -> None:
    ends = Ends.open()
    ends.client.send(infer(1))
    ends.deliver()
    with pytest.raises(LocalProtocolError, match="abandons an open stream"):
        ends.server.send(wire.GoAway(last_stream=0))
    ends.server.send(wire.GoAway(last_stream=2**32 - 1))
    ends.server.send(wire.GoAway(last_stream=5))
    with pytest.raises(LocalProtocolError, match="goes up"):
        ends.server.send(wire.GoAway(last_stream=6))
    ends.deliver()
    assert "goes up" in refused(ends.client, wire.GoAway(last_stream=6))


# Ping


def test_ping_is_answered_without_the_caller() -> None:
    ends = Ends.open()
    ends.client.send(wire.Ping(id=7))
    ends.deliver()
    assert ends.at_server == []
    assert ends.at_client == [wire.Pong(id=7)]
    ends.server.send(wire.Ping(id=7))
    ends.to_client()
    ends.to_server()
    assert ends.at_server == [wire.Pong(id=7)]


def test_pong_that_answers_nothing_is_refused() -> None:
    assert "answers no Ping" in refused(Ends.open().client, wire.Pong(id=1))


def test_callers_do_not_send_pong_themselves() -> None:
    with pytest.raises(LocalProtocolError, match="by the connection itself"):
        Ends.open().client.send(wire.Pong(id=1))


def test_unanswered_pings_are_bounded_and_distinct() -> None:
    ends = Ends.open()
    for number in range(64):
        ends.client.send(wire.Ping(id=number))
    for number in (3, 64):
        with pytest.raises(LocalProtocolError, match="Ping"):
            ends.client.send(wire.Ping(id=number))


# The table


def test_every_row_of_the_table_belongs_to_the_messages_a_role_may_send() -> None:
    allowed = {
        Role.CLIENT: set(wire.ClientMessage.__args__),  # type: ignore[attr-defined]
        Role.SERVER: set(wire.ServerMessage.__args__),  # type: ignore[attr-defined]
    }
    said: dict[Role, set[type]] = {Role.CLIENT: set(), Role.SERVER: set()}
    for (role, state, kind), following in TRANSITIONS.items():
        assert kind in allowed[role]
        assert type(state) is type(following)  # a stream's message never moves the connection
        said[role].add(kind)
    assert said == allowed  # and no message is without a row


def test_nothing_leads_out_of_an_ended_stream_or_a_closed_connection() -> None:
    ends = {StreamState.ENDED, ConnectionState.CLOSED}
    assert not [row for row in TRANSITIONS if row[1] in ends]


def test_every_request_can_be_cancelled_and_every_state_can_end() -> None:
    for state in StreamState:
        if state in (StreamState.IDLE, StreamState.ENDED):
            continue
        assert TRANSITIONS[Role.SERVER, state, wire.Error] is StreamState.ENDED
        if "cancelled" not in state.value:
            cancelled = TRANSITIONS[Role.CLIENT, state, wire.Cancel]
            assert cancelled.value == f"{state.value}, cancelled"


def test_what_may_cross_is_never_legal_to_send() -> None:
    assert not CROSSINGS & set(TRANSITIONS)


# Whatever comes

FIELD_PROBLEMS = [
    (wire.Infer(stream=0, request_id=bytes(16), model="", tensors=()), "not allowed"),
    (wire.Infer(stream=2**32, request_id=bytes(16), model="", tensors=()), "stream is"),
    (wire.Infer(stream=-1, request_id=bytes(16), model="", tensors=()), "stream is"),
    (wire.Infer(stream=1, request_id=b"", model="", tensors=()), "request_id has 0 bytes"),
    (wire.Infer(stream=1, request_id=bytes(16), model="", tensors=(), priority=10), "priority"),
    (
        wire.Infer(stream=1, request_id=bytes(16), model="", tensors=(), deadline_ms=float("nan")),
        "duration",
    ),
    (
        wire.Infer(stream=1, request_id=bytes(16), model="", tensors=(), form="text"),
        "one BYTES tensor `input`",
    ),
    (generate(1, credit=-1), "credit is -1"),
    (generate(1, credit=2**31), "credit is"),
    (resume(1, next_index=-1), "next_index is -1"),
    (resume(1, credit=-1), "credit is -1"),
    (msgspec.structs.replace(resume(1), ticket=bytes(31)), "ticket has 31 bytes, not 32"),
    (msgspec.structs.replace(resume(1), request_id=b""), "request_id has 0 bytes"),
    *(
        (msgspec.structs.replace(message, trace=trace), "trace is not")
        for message in (infer(1), generate(1))
        for trace in (b"t" * 23, b"t" * 25, bytes(16) + b"t" * 8, b"t" * 16 + bytes(8))
    ),
]


@pytest.mark.parametrize(("message", "complaint"), FIELD_PROBLEMS)
def test_fields_out_of_range_are_refused_on_both_ends(
    message: wire.Message, complaint: str
) -> None:
    ends = Ends.open()
    with pytest.raises(LocalProtocolError, match=complaint):
        ends.client.send(message)
    assert complaint in refused(ends.server, message)


def test_text_form_takes_one_bytes_tensor_named_input() -> None:
    ends = Ends.open()
    texts = np.array([b"near", b"far"], dtype=object)
    message = wire.Infer(
        stream=1,
        request_id=bytes(16),
        model="m",
        form="text",
        tensors=describe({"input": texts}),
    )
    ends.client.send(message, [texts])
    ends.deliver()
    assert ends.at_server == [message]


def test_our_mistake_changes_nothing() -> None:
    ends = Ends.open()
    array = np.zeros((1 << 20) + 1, np.uint8)
    with pytest.raises(LocalProtocolError, match="up to 1048576 bytes"):
        ends.client.send(infer(arrays={"x": array}), [array])
    assert ends.client.data_to_send() == []
    assert ends.client.next_stream == 1
    ends.client.send(infer(1))


def test_closed_connection_ignores_the_peer_and_sends_nothing() -> None:
    ends = Ends.open()
    ends.server.close()
    assert ends.server.data_to_send() == []
    assert ends.server.receive(raw(infer())) is None
    with pytest.raises(LocalProtocolError, match="connection is closed"):
        ends.server.send(wire.Ping(id=1))


def test_server_tells_the_client_what_it_broke() -> None:
    ends = Ends.open()
    refused(ends.server, result(1))
    ends.to_client()
    (error,) = ends.at_client
    assert isinstance(error, wire.Error)
    assert (error.stream, error.code) == (0, "remote_protocol")
    assert ends.client.state is ConnectionState.CLOSED


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(Role), st.lists(messages, max_size=6))
def test_any_sequence_of_messages_is_followed_or_refused(
    role: Role, sequence: list[tuple[wire.Message, tuple[np.ndarray, ...]]]
) -> None:
    ends = Ends.open()
    if role is Role.CLIENT:
        ends.client.send(generate(1))
        ends.client.send(infer(2))
    connection = ends.client if role is Role.CLIENT else ends.server
    for message, tensors in sequence:
        try:
            connection.receive(raw(message, *tensors))
        except RemoteProtocolError:
            assert connection.state is ConnectionState.CLOSED
    assert len(connection.open_streams) <= LIMITS.max_streams


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["client", "server", "nobody"]), st.integers(0, 9), st.integers(1, 5)
        ),
        max_size=40,
    )
)
def test_two_obedient_ends_never_surprise_each_other(
    steps: list[tuple[str, int, int]],
) -> None:
    """Random walks: whatever our side lets through, the other side accepts, in any timing."""
    ends = Ends.open()
    for hears, action, stream in steps:
        count = ends.server.token_count(stream) if stream in ends.server.open_streams else 0
        digest = ends.server.digest(stream) if stream in ends.server.open_streams else bytes(32)
        choices: list[tuple[Connection, wire.Message]] = [
            (ends.client, infer(ends.client.next_stream)),
            (ends.client, generate(ends.client.next_stream, credit=2)),
            (ends.client, resume(ends.client.next_stream, count, credit=2)),
            (ends.client, wire.Cancel(stream=stream)),
            (ends.client, wire.Credit(stream=stream, tokens=1)),
            (ends.server, wire.Token(stream=stream, index=count, text="a")),
            (ends.server, fin(stream, count, digest)),
            (ends.server, result(stream)),
            (ends.server, wire.Error(stream=stream, code="engine", problem="")),
            (ends.server, wire.GoAway(last_stream=stream)),
        ]
        end, message = choices[action]
        try:
            end.send(message)
        except LocalProtocolError:
            continue
        if hears == "client":
            ends.to_client()
        elif hears == "server":
            ends.to_server()
    for _ in range(2):
        ends.deliver()
    assert ends.client.open_streams == ends.server.open_streams
