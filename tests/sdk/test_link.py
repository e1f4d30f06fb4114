"""The link to the cloud against a real, scripted server on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socket
import time

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from nearfar.errors import (
    Cancelled,
    CloudUnavailable,
    ConfigError,
    DeadlineExceeded,
    InvalidInput,
    NearfarError,
    Overloaded,
    RemoteProtocolError,
    SecurityError,
    StreamInterrupted,
)
from nearfar.generation import GenerationOptions, Prompt
from nearfar.secure.identity import ServerIdentity
from nearfar.units import Deadline
from nearfar.wire import messages as wire
from sdk.cloud import link as link_module
from sdk.cloud.connection import CREDIT_TOKENS
from sdk.cloud.egress import Permit
from sdk.cloud.link import CloudLink
from sdk.policy import Verdict
from tests.support.scripted_cloud import ScriptedCloud, answer_infer, tell

ALLOWED = Verdict(edge=True, cloud=True, rule_ids=("r",), reason="ok", policy_hash="h")
X = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}


@pytest.fixture
def cloud(tmp_path):
    with ScriptedCloud(tmp_path / "state") as server:
        yield server


def run(coroutine):
    """Run with a limit, so that a lost message fails a test instead of hanging it."""

    async def limited():
        result = await asyncio.wait_for(coroutine, 20)
        await asyncio.sleep(0)  # let tasks that are done be forgotten
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"left behind: {left}"
        return result

    return asyncio.run(limited())


def with_link(config, use):
    async def body():
        link = CloudLink(config)
        try:
            return await use(link)
        finally:
            await link.close()

    return run(body())


async def infer(link, *, deadline=Deadline(), tensors=X):  # noqa: B008 (frozen)
    return await link.infer(
        Permit(ALLOWED, "tensor"),
        model="tensor",
        form="tensors",
        tensors=tensors,
        deadline=deadline,
    )


async def begin_story(link, *, tokens=20, deadline=Deadline()):  # noqa: B008 (frozen)
    return await link.generate(
        Permit(ALLOWED, "story"),
        model="story",
        prompt=Prompt(text="Once"),
        options=GenerationOptions(max_new_tokens=tokens),
        deadline=deadline,
    )


async def read(stream, deadline=Deadline()):  # noqa: B008 (frozen)
    texts = []
    while True:
        batch = await stream.tokens(deadline)
        if not batch:
            return texts
        texts += [token.text for token in batch]


def test_tensors_go_there_and_come_back(cloud):
    async def use(link):
        reply = await infer(link)
        assert link.state.is_connected
        assert link.state.rtt_ms > 0
        assert set(link.state.offers) == {"tensor", "embedder", "story"}
        return reply

    reply = with_link(cloud.config(), use)
    assert np.array_equal(reply.outputs["y"], X["x"])
    assert reply.outputs["y"].flags.writeable


def test_nothing_is_opened_before_the_first_request(cloud):
    async def use(link):
        return link.state

    assert not with_link(cloud.config(), use).is_connected
    assert cloud.connections == 0


def test_requests_that_start_together_share_one_connection(cloud):
    async def use(link):
        return await asyncio.gather(*(infer(link) for _ in range(8)))

    assert len(with_link(cloud.config(), use)) == 8
    assert cloud.connections == 1


def test_a_link_reconnects_after_the_connection_was_lost(cloud):
    async def use(link):
        await infer(link)
        cloud.cut_all()
        while link.state.is_connected:
            await asyncio.sleep(0.005)
        await infer(link)

    with_link(cloud.config(), use)
    assert cloud.connections == 2


def test_a_request_that_is_open_when_the_connection_breaks_fails_typed(cloud):
    def hang(session, message, tensors):
        yield 30

    cloud.behaviour = hang

    async def use(link):
        task = asyncio.ensure_future(infer(link))
        await asyncio.to_thread(cloud.wait_for, wire.Infer)
        await asyncio.to_thread(cloud.cut_all)
        with pytest.raises(CloudUnavailable):
            await task

    with_link(cloud.config(), use)


def test_a_stream_that_ends_without_its_fin_is_interrupted_and_says_how_far_it_came(cloud):
    cloud.behaviour = lambda s, m, t: tell(s, m, 20, cut_after=7)

    async def use(link):
        stream = await begin_story(link)
        with pytest.raises(StreamInterrupted) as caught:
            await read(stream)
        assert caught.value.received_tokens == 7

    with_link(cloud.config(), use)


def test_a_reader_that_does_not_read_holds_the_server_back(cloud):
    async def use(link):
        stream = await begin_story(link, tokens=400)
        await stream.tokens(Deadline())
        await asyncio.sleep(0.3)
        held_at = stream.received_tokens
        rest = await read(stream)
        return held_at, len(rest)

    held_at, rest = with_link(cloud.config(), use)
    assert held_at <= CREDIT_TOKENS
    assert rest > 300
    assert cloud.saw(wire.Credit)


def test_a_deadline_ends_the_wait_and_tells_the_server_to_stop(cloud):
    def hang(session, message, tensors):
        yield 30

    cloud.behaviour = hang

    async def use(link):
        await link.connect(Deadline())
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded) as caught:
            await infer(link, deadline=Deadline.after_ms(150))
        assert time.monotonic() - started < 5.0
        assert caught.value.tried == ("cloud",)
        await asyncio.to_thread(cloud.wait_for, wire.Cancel)

    with_link(cloud.config(), use)
    assert 0 < cloud.saw(wire.Infer)[0].deadline_ms <= 150


def test_cancelling_the_task_cancels_the_request(cloud):
    def hang(session, message, tensors):
        yield 30

    cloud.behaviour = hang

    async def use(link):
        task = asyncio.ensure_future(infer(link))
        await asyncio.to_thread(cloud.wait_for, wire.Infer)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(cloud.wait_for, wire.Cancel)
        cloud.behaviour = answer_infer
        await infer(link)  # the connection is as good as before

    with_link(cloud.config(), use)
    assert cloud.connections == 1


def test_the_servers_own_error_comes_as_its_class(cloud):
    def refuse(session, message, tensors):
        session.send(
            wire.Error(stream=message.stream, code="overloaded", problem="Full", fix="Later")
        )
        yield 0

    cloud.behaviour = refuse

    async def use(link):
        with pytest.raises(Overloaded, match="Full"):
            await infer(link)

    with_link(cloud.config(), use)


def test_more_requests_than_the_server_allows_wait_in_line(cloud):
    async def use(link):
        return await asyncio.gather(*(infer(link) for _ in range(50)))

    assert len(with_link(cloud.config(), use)) == 50
    assert cloud.connections == 1


def test_waiting_in_line_ends_with_the_deadline_or_with_the_connection(cloud):
    def hang(session, message, tensors):
        yield 30

    cloud.behaviour = hang

    async def use(link):
        await link.connect(Deadline())
        tasks = [asyncio.ensure_future(infer(link)) for _ in range(8)]
        await asyncio.to_thread(cloud.wait_for, wire.Infer, 8)
        with pytest.raises(DeadlineExceeded):
            await infer(link, deadline=Deadline.after_ms(100))
        late = asyncio.ensure_future(infer(link))
        await asyncio.sleep(0.05)
        cloud.behaviour = answer_infer
        await asyncio.to_thread(cloud.cut_all)
        await late  # on a new connection
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, CloudUnavailable) for result in results)

    with_link(cloud.config(), use)


def test_a_server_that_goes_away_is_left_for_a_new_connection(cloud):
    def leave(session, message, tensors):
        yield from answer_infer(session, message, tensors)
        session.send(wire.GoAway(last_stream=message.stream, reason="restart"))

    cloud.behaviour = leave

    async def use(link):
        await infer(link)
        await asyncio.sleep(0.05)
        await infer(link)

    with_link(cloud.config(), use)
    assert cloud.connections == 2


def test_closing_the_link_fails_what_is_open(cloud):
    def hang(session, message, tensors):
        yield 30

    cloud.behaviour = hang

    async def body():
        link = CloudLink(cloud.config())
        task = asyncio.ensure_future(infer(link))
        await asyncio.to_thread(cloud.wait_for, wire.Infer)
        await link.close()
        with pytest.raises(Cancelled):
            await task
        with pytest.raises(InvalidInput, match="closed"):
            await infer(link)

    run(body())


# -- who may be trusted ------------------------------------------------------------------------


def connect_error(config) -> NearfarError:
    async def use(link):
        with pytest.raises(NearfarError) as caught:
            await link.connect(Deadline())
        return caught.value

    return with_link(config, use)


def test_a_wrong_pin_is_a_security_error_and_no_credentials_leave(cloud):
    error = connect_error(cloud.config(identity=str(ServerIdentity.generate().pin)))
    assert type(error) is SecurityError
    assert error.fix
    assert cloud.saw(wire.Auth) == []


def test_an_expired_certificate_is_a_security_error(tmp_path):
    long_ago = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=30)
    with ScriptedCloud(
        tmp_path / "old", not_before=long_ago, validity=datetime.timedelta(days=1)
    ) as cloud:
        error = connect_error(cloud.config())
    assert type(error) is SecurityError
    assert "expired" in error.problem


def test_a_certificate_of_another_host_is_a_security_error(tmp_path):
    from cloud_runtime.provision import provision
    from cloud_runtime.state import StateDir

    provision(StateDir(tmp_path / "other"), ("elsewhere.example",))
    with ScriptedCloud(tmp_path / "other") as cloud:
        error = connect_error(cloud.config())
    assert type(error) is SecurityError
    assert "another host" in error.problem


def test_an_unknown_certificate_authority_is_a_security_error(cloud):
    error = connect_error(cloud.config(ca_file=None))
    assert type(error) is SecurityError
    assert "ca_file" in error.fix


def test_a_refused_key_is_a_security_error(cloud):
    cloud.refuse_auth = True
    assert type(connect_error(cloud.config())) is SecurityError


def test_a_missing_ca_file_names_the_file(cloud, tmp_path):
    error = connect_error(cloud.config(ca_file=tmp_path / "none.pem"))
    assert type(error) is ConfigError
    assert "none.pem" in error.problem


# -- what cannot be reached --------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_port_where_nothing_listens_is_noticed_at_once(cloud):
    started = time.monotonic()
    error = connect_error(cloud.config(url=f"wss://localhost:{free_port()}/v1/nearfar"))
    assert type(error) is CloudUnavailable
    assert time.monotonic() - started < 5.0


def test_a_server_that_accepts_and_says_nothing_is_given_up(cloud, monkeypatch):
    monkeypatch.setattr(link_module, "CONNECT_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"wss://127.0.0.1:{mute.getsockname()[1]}/v1/nearfar"
        error = connect_error(cloud.config(url=url))
    assert type(error) is CloudUnavailable


def test_a_deadline_shorter_than_connecting_is_exceeded_in_time(cloud):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"wss://127.0.0.1:{mute.getsockname()[1]}/v1/nearfar"

        async def use(link):
            started = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await link.connect(Deadline.after_ms(100))
            assert time.monotonic() - started < 5.0

        with_link(cloud.config(url=url), use)


def test_a_peer_that_speaks_nonsense_inside_the_websocket_is_refused(cloud, tmp_path):
    import ssl

    from websockets.asyncio.server import serve

    async def body():
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(cloud.state.server_chain, cloud.state.server_key)

        async def babble(socket_):
            await socket_.send(b"\x00" * 100)
            await socket_.wait_closed()

        async with serve(babble, "127.0.0.1", 0, ssl=tls) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            link = CloudLink(cloud.config(url=f"wss://localhost:{port}/v1/nearfar"))
            with pytest.raises((SecurityError, RemoteProtocolError)):
                await link.connect(Deadline())
            await link.close()

    run(body())


def test_a_cloud_that_trickles_a_message_is_left(cloud, monkeypatch):
    import ssl

    from websockets.asyncio.server import serve

    from sdk.cloud import connection as connection_module

    monkeypatch.setattr(connection_module, "_MESSAGE_TIMEOUT_S", 0.2)

    async def body():
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(cloud.state.server_chain, cloud.state.server_key)

        async def fragments():
            while True:
                yield b"\x00"
                await asyncio.sleep(0.02)

        async def trickle(socket_):
            with contextlib.suppress(ConnectionClosed):
                await socket_.send(fragments())

        async with serve(trickle, "127.0.0.1", 0, ssl=tls, ping_interval=0.05) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            link = CloudLink(cloud.config(url=f"wss://localhost:{port}/v1/nearfar"))
            started = time.monotonic()
            with pytest.raises(CloudUnavailable, match="too slowly"):
                await link.connect(Deadline())
            assert time.monotonic() - started < 3.0
            await link.close()

    run(body())
