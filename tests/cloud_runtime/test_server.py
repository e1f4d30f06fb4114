"""A real server on loopback: requests, refusals, cancellation, deadlines, limits, drain."""

from __future__ import annotations

import asyncio
import datetime
import logging
import socket
import ssl
import time
from types import SimpleNamespace

import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from cloud_runtime import auth
from cloud_runtime.models import ServedModels
from cloud_runtime.server import _address_of
from cloud_runtime.settings import ServerSettings
from cloud_runtime.state import StateDir
from nearfar.bundle import BundleStore
from nearfar.errors import (
    Cancelled,
    CloudUnavailable,
    DeadlineExceeded,
    EngineError,
    InvalidInput,
    ModelNotFound,
    NearfarError,
    Overloaded,
    SecurityError,
)
from nearfar.generation import Prompt
from nearfar.secure.identity import ServerIdentity
from nearfar.session import Limits
from nearfar.wire.messages import Cancel, GoAway, ListModels, Result, Token
from nearfar.wire.retention import RetentionLimits
from tests.cloud_runtime.support import (
    ScriptedModel,
    WireClient,
    client_tls,
    make_state,
    run,
    running,
    served,
    until,
)
from tests.support.tiny import (
    TENSOR_WEIGHTS,
    write_tiny_classifier_bundle,
    write_tiny_tensor_bundle,
)

X = np.arange(8, dtype=np.float32).reshape(2, 4)
CANARY = "canary-7f3a"


@pytest.fixture(scope="session")
def state(tmp_path_factory) -> StateDir:
    """Shared by tests that do not change it."""
    return make_state(tmp_path_factory.mktemp("cloud") / "state")


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> BundleStore:
    root = tmp_path_factory.mktemp("store")
    write_tiny_tensor_bundle(root / "tiny")
    write_tiny_classifier_bundle(root / "tiny-classifier")
    return BundleStore(root)


def chat(**options) -> ScriptedModel:
    return ScriptedModel("chat", task="text-generation", **options)


# Answers.


def test_infer_on_a_real_bundle_equals_the_local_result(state, store):
    async def main() -> None:
        async with (
            running(ServedModels.load(store), state) as server,
            WireClient.connect(server) as client,
        ):
            result, outputs = await client.infer("tiny", {"x": X})
        scores = X @ TENSOR_WEIGHTS
        expected = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(outputs["y"], expected, rtol=1e-5)
        assert result.variant == "fp32"
        assert result.execution_provider == "CPUExecutionProvider"
        assert result.compute_ms > 0
        assert result.queue_ms >= 0

    run(main())


def test_raw_bytes_are_preprocessed_by_the_server(state, store):
    async def main() -> None:
        async with (
            running(ServedModels.load(store), state) as server,
            WireClient.connect(server) as client,
        ):
            items = np.array([b"plain text " * 9, bytes([200, 201]) * 50], dtype=object)
            _, outputs = await client.infer("tiny-classifier", {"input": items}, form="bytes")
        assert outputs["scores"].argmax(axis=1).tolist() == [0, 1]

    run(main())


def test_models_are_offered_with_the_variant_that_runs_here(state, store):
    async def main() -> None:
        async with (
            running(ServedModels.load(store), state) as server,
            WireClient.connect(server) as client,
        ):
            offers = {offer.manifest.name: offer for offer in (await client.models()).models}
        assert set(offers) == {"tiny", "tiny-classifier"}
        assert offers["tiny"].variant == "fp32"
        assert [variant.id for variant in offers["tiny"].manifest.variants] == ["fp32"]
        assert offers["tiny"].queue_ms == 0

    run(main())


def test_an_answer_is_streamed_token_by_token_with_its_account(state):
    async def main() -> None:
        async with (
            running(served(chat(token_s=0.002)), state) as server,
            WireClient.connect(server) as client,
        ):
            answer = await client.collect(await client.start_generate("chat", tokens=20))
        assert answer.text == "".join(f"t{index} " for index in range(20)) + "end"
        assert answer.fin.count == 21  # the last one is what the stop-string check held back
        assert answer.fin.finish_reason == "length"
        assert answer.fin.usage.completion_tokens == 20
        assert answer.fin.prefill_ms >= 2
        assert answer.fin.decode_ms >= 19 * 2

    run(main())


def test_many_streams_share_one_connection_and_never_mix(state):
    async def main() -> None:
        models = served(chat(token_s=0.001), ScriptedModel(), slots=8, max_waiting=64)
        async with running(models, state) as server, WireClient.connect(server) as client:
            lengths = range(1, 25)
            streams = [await client.start_generate("chat", tokens=count) for count in lengths]
            results = await asyncio.gather(
                *(
                    client.infer("scripted", {"x": np.full((1, 4), k, np.float32)})
                    for k in range(30)
                )
            )
            answers = await asyncio.gather(*(client.collect(stream) for stream in streams))
        assert [outputs["y"][0, 0] for _, outputs in results] == list(range(30))
        for count, answer in zip(lengths, answers, strict=True):
            assert answer.text == "".join(f"t{index} " for index in range(count)) + "end"

    run(main())


def test_tokens_wait_for_credit(state):
    async def main() -> None:
        async with running(served(chat()), state) as server, WireClient.connect(server) as client:
            stream = await client.start_generate("chat", tokens=6, credit=2)
            for expected in ("t0 ", "t1 "):
                message, _ = await client.next(stream)
                assert message.text == expected
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.next(stream), 0.1)
            await client.grant(stream, 100)
            rest = await client.collect(stream)
            assert rest.text == "t2 t3 t4 t5 end"

    run(main())


def test_an_answer_of_no_credit_at_all_starts_with_the_first_credit(state):
    async def main() -> None:
        async with running(served(chat()), state) as server, WireClient.connect(server) as client:
            stream = await client.start_generate("chat", tokens=2, credit=0)
            await asyncio.sleep(0.05)
            await client.grant(stream, 10)
            assert (await client.collect(stream)).text == "t0 t1 end"

    run(main())


# Refusals at the door.


async def refusal(server, **options) -> NearfarError:
    with pytest.raises(NearfarError) as caught:
        async with WireClient.connect(server, **options):
            pass
    return caught.value


@pytest.mark.parametrize("token", ["", "nfk_wrong", "x" * 5000])
def test_a_client_without_an_accepted_key_gets_a_security_error(state, token):
    async def main() -> None:
        async with running(served(ScriptedModel()), state) as server:
            error = await refusal(server, token=token)
            assert isinstance(error, SecurityError)
            assert "API key or token is missing or not accepted" in error.problem
            async with WireClient.connect(server) as client:
                await client.infer("scripted", {"x": X})

    run(main())


def test_a_client_that_pins_another_identity_refuses_the_server(state):
    async def main() -> None:
        async with running(served(ScriptedModel()), state) as server:
            error = await refusal(server, pin=str(ServerIdentity.generate().pin))
            assert isinstance(error, SecurityError)

    run(main())


def test_a_client_refuses_an_expired_certificate(tmp_path):
    now = datetime.datetime.now(datetime.timezone.utc)
    expired = make_state(
        tmp_path / "state",
        not_before=now - datetime.timedelta(days=2),
        validity=datetime.timedelta(days=1),
    )

    async def main() -> None:
        async with running(served(ScriptedModel()), expired) as server:
            with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
                async with WireClient.connect(server):
                    pass

    run(main())


def test_older_tls_is_refused(state):
    async def main() -> None:
        async with running(served(ScriptedModel()), state) as server:
            context = ssl.create_default_context(cafile=str(state.ca_certificate))
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            with pytest.raises((ssl.SSLError, ConnectionError)):
                async with connect(server.url, ssl=context, proxy=None):
                    pass

    run(main())


def test_anonymous_clients_are_let_in_only_where_allowed(state):
    async def main() -> None:
        async with (
            running(served(ScriptedModel()), state, allow_anonymous=True) as server,
            WireClient.connect(server, token="") as client,
        ):
            await client.infer("scripted", {"x": X})

    run(main())


def test_withdrawing_a_key_ends_its_open_connections_without_a_restart(tmp_path):
    state = make_state(tmp_path / "state")

    async def main() -> None:
        settings = ServerSettings(key_check_s=0.02)
        async with running(served(ScriptedModel()), state, settings) as server:
            token = auth.add_key(state, "second")
            async with (
                WireClient.connect(server) as first,
                WireClient.connect(server, token=token) as second,
            ):
                await second.infer("scripted", {"x": X})
                auth.remove_key(state, "second")
                await second.websocket.wait_closed()
                await first.infer("scripted", {"x": X})
            assert isinstance(await refusal(server, token=token), SecurityError)

    run(main())


# Requests that cannot be answered.


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model": "nobody"}, "nobody"),
        ({"model": "scripted", "version": "9.9.9"}, "9.9.9"),
        ({"model": "scripted", "variant": "int2"}, "int2"),
    ],
)
def test_an_unknown_model_version_or_variant_is_named(state, options, named):
    async def main() -> None:
        async with (
            running(served(ScriptedModel()), state) as server,
            WireClient.connect(server) as client,
        ):
            with pytest.raises(ModelNotFound, match=named):
                await client.infer(arrays={"x": X}, **options)
            await client.infer("scripted", {"x": X})

    run(main())


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"x": X.astype(np.float64)}, "x"),
        ({"x": X[:, :3]}, "x"),
        ({"z": X}, "z|x"),
        ({}, "x"),
    ],
)
def test_a_wrong_dtype_shape_or_name_is_invalid_input(state, store, arrays, named):
    async def main() -> None:
        async with (
            running(ServedModels.load(store), state) as server,
            WireClient.connect(server) as client,
        ):
            with pytest.raises(InvalidInput, match=named):
                await client.infer("tiny", arrays)
            await client.infer("tiny", {"x": X})

    run(main())


@pytest.mark.parametrize("form", ["text", "bytes"])
def test_raw_items_reach_the_model_as_what_they_are(state, form):
    async def main() -> None:
        async with (
            running(served(ScriptedModel()), state) as server,
            WireClient.connect(server) as client,
        ):
            items = np.array(["né".encode(), b"", b"abc"], dtype=object)
            _, outputs = await client.infer("scripted", {"input": items}, form=form)
            assert outputs["y"].tolist() == [2 if form == "text" else 3, 0, 3]

    run(main())


def test_texts_must_be_utf8(state):
    async def main() -> None:
        async with (
            running(served(ScriptedModel()), state) as server,
            WireClient.connect(server) as client,
        ):
            items = np.array([b"\xff\xfe"], dtype=object)
            with pytest.raises(InvalidInput, match="UTF-8"):
                await client.infer("scripted", {"input": items}, form="text")

    run(main())


def test_generate_and_infer_each_need_a_model_of_their_kind(state):
    async def main() -> None:
        async with (
            running(served(chat(), ScriptedModel()), state) as server,
            WireClient.connect(server) as client,
        ):
            with pytest.raises(InvalidInput, match="generates text"):
                await client.infer("chat", {"x": X})
            with pytest.raises(InvalidInput, match="not for text"):
                await client.collect(await client.start_generate("scripted", tokens=1))

    run(main())


def test_a_result_too_large_to_send_is_an_error_and_not_a_cut(state):
    settings = ServerSettings(limits=Limits(max_message_bytes=100_000))

    class Growing(ScriptedModel):
        def infer(self, feeds):
            return {"y": np.zeros(1 << 20, np.uint8)}

    async def main() -> None:
        async with (
            running(served(Growing()), state, settings) as server,
            WireClient.connect(server) as client,
        ):
            with pytest.raises(InvalidInput, match="result cannot be sent"):
                await client.infer("scripted", {"x": X})

    run(main())


def test_an_engine_failure_mid_answer_ends_it_with_an_error(state):
    async def main() -> None:
        model = chat(error=EngineError("the engine broke", fix="Repair it"))
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            stream = await client.start_generate("chat", tokens=10)
            for _ in range(3):
                message, _ = await client.next(stream)
                assert isinstance(message, Token)
            with pytest.raises(EngineError, match="the engine broke"):
                await client.next(stream)

    run(main())


# Cancel, deadline, load.


def test_cancelling_a_running_answer_frees_its_slot(state):
    async def main() -> None:
        model = chat(token_s=0.002)
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            stream = await client.start_generate("chat", tokens=100_000)
            await client.next(stream)
            await client.cancel(stream)
            with pytest.raises(Cancelled):
                await client.collect(stream)
            short = await client.collect(await client.start_generate("chat", tokens=3))
            assert short.fin.count == 4
        assert model.tokens < 1000

    run(main())


def test_a_cancel_right_behind_its_request_is_not_lost(state):
    async def main() -> None:
        model = chat(token_s=0.002)
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            for _ in range(5):
                stream = await client.start_generate("chat", tokens=100_000)
                await client.cancel(stream)
                with pytest.raises(Cancelled):
                    await client.collect(stream)
            await until(lambda: not model.running)

    run(main())


def test_a_cancelled_waiting_request_never_runs(state):
    async def main() -> None:
        model = ScriptedModel()
        model.hold.set()
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            first = await client.start_infer("scripted", {"x": X})
            await until(lambda: model.running)
            second = await client.start_infer("scripted", {"x": X})
            await client.cancel(second)
            with pytest.raises(Cancelled):
                await client.next(second)
            model.hold.clear()
            await client.next(first)
            await client.infer("scripted", {"x": X})
        assert model.runs == 2

    run(main())


@pytest.mark.parametrize("keep_s", [0.0, 0.2])
def test_a_client_that_vanishes_frees_its_slot_when_retention_ends(state, keep_s):
    settings = ServerSettings(retention=RetentionLimits(keep_s=keep_s))

    async def main() -> None:
        model = chat(token_s=0.002)
        async with running(served(model), state, settings) as server:
            async with WireClient.connect(server) as client:
                await client.next(await client.start_generate("chat", tokens=100_000))
                client.websocket.transport.abort()
            await until(lambda: not model.running)
            async with WireClient.connect(server) as client:
                await client.collect(await client.start_generate("chat", tokens=2))

    run(main())


def test_a_deadline_that_passes_in_the_queue_is_reported_in_time(state):
    async def main() -> None:
        model = ScriptedModel()
        model.hold.set()
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            first = await client.start_infer("scripted", {"x": X})
            await until(lambda: model.running)
            started_s = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await client.infer("scripted", {"x": X}, deadline_ms=80.0)
            assert 0.06 < time.monotonic() - started_s < 2.0
            model.hold.clear()
            await client.next(first)
        assert model.runs == 1

    run(main())


def test_a_deadline_that_passes_in_the_engine_is_reported_in_time(state):
    async def main() -> None:
        model = ScriptedModel()
        model.hold.set()
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            with pytest.raises(DeadlineExceeded):
                await client.infer("scripted", {"x": X}, deadline_ms=50.0)
            assert model.running
            model.hold.clear()

    run(main())


def test_a_deadline_that_passes_mid_answer_ends_it_and_frees_the_slot(state):
    async def main() -> None:
        model = chat(token_s=0.005)
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            stream = await client.start_generate("chat", tokens=100_000, deadline_ms=100.0)
            message, _ = await client.next(stream)
            assert message.text == "t0 "
            with pytest.raises(DeadlineExceeded):
                await client.collect(stream)
            await until(lambda: not model.running)

    run(main())


def test_a_deadline_already_passed_runs_nothing(state):
    async def main() -> None:
        model = ScriptedModel()
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            with pytest.raises(DeadlineExceeded):
                await client.infer("scripted", {"x": X}, deadline_ms=0.0)
        assert model.runs == 0

    run(main())


def test_more_requests_than_may_wait_are_told_to_come_back(state):
    async def main() -> None:
        model = ScriptedModel()
        model.hold.set()
        models = served(model, max_waiting=2)
        async with running(models, state) as server, WireClient.connect(server) as client:
            streams = [await client.start_infer("scripted", {"x": X}) for _ in range(3)]
            with pytest.raises(Overloaded, match="run or wait already"):
                await client.infer("scripted", {"x": X})
            model.hold.clear()
            for stream in streams:
                await client.next(stream)
            await client.infer("scripted", {"x": X})

    run(main())


def test_urgent_requests_go_before_those_that_can_wait(state):
    async def main() -> None:
        model, told = chat(), []
        model.hold.set()
        async with running(served(model), state) as server, WireClient.connect(server) as client:

            async def ask(priority: int) -> None:
                stream = await client.start_generate("chat", tokens=1, priority=priority)
                await client.collect(stream)
                told.append(priority)

            first = asyncio.create_task(ask(5))
            await until(lambda: model.running)
            executor = server.server._services.models.get("chat").executor
            others = []
            for waiting, priority in enumerate((0, 5, 9), 1):
                others.append(asyncio.create_task(ask(priority)))
                await until(lambda waiting=waiting: executor._gate.state().waiting == waiting)
            model.hold.clear()
            await asyncio.gather(first, *others)
        assert told == [5, 9, 5, 0]

    run(main())


def test_a_repeated_request_is_computed_once(state):
    async def main() -> None:
        model = ScriptedModel(delay_s=0.05)
        async with running(served(model), state) as server:
            request_id = b"i" * 16
            async with WireClient.connect(server) as client:
                await client.start_infer("scripted", {"x": X}, request_id=request_id)
                await until(lambda: model.running)
                client.websocket.transport.abort()
            async with WireClient.connect(server) as client:
                _, outputs = await client.infer("scripted", {"x": X}, request_id=request_id)
                np.testing.assert_array_equal(outputs["y"], X)
                await client.infer("scripted", {"x": X}, request_id=request_id)
        assert model.runs == 1

    run(main())


# Misbehaviour.


async def raw_websocket(server):
    return await connect(server.url, ssl=client_tls(server.state), compression=None, proxy=None)


@pytest.mark.parametrize("data", [b"", b"\x00", b"\xff" * 5000, b"\x02" + b"\x00" * 2400])
def test_malformed_frames_close_the_connection_but_not_the_server(state, data):
    async def main() -> None:
        async with running(served(ScriptedModel()), state) as server:
            websocket = await raw_websocket(server)
            await websocket.recv()
            await websocket.send(data)
            with pytest.raises(ConnectionClosed):
                await websocket.recv()
            async with WireClient.connect(server) as client:
                await client.infer("scripted", {"x": X})

    run(main())


def test_a_record_that_was_changed_on_the_way_closes_the_connection(state):
    async def main() -> None:
        async with running(served(ScriptedModel()), state) as server:
            async with WireClient.connect(server) as client:
                client.session.send(ListModels(stream=client.session.next_stream))
                (record,) = client.session.data_to_send()
                await client.websocket.send(record[:-1] + bytes([record[-1] ^ 1]))
                await client.websocket.wait_closed()
            async with WireClient.connect(server) as client:
                await client.infer("scripted", {"x": X})

    run(main())


def test_text_frames_are_refused(state):
    async def main() -> None:
        async with running(served(ScriptedModel()), state) as server:
            websocket = await raw_websocket(server)
            await websocket.recv()
            await websocket.send("hello")
            with pytest.raises(ConnectionClosed) as caught:
                await websocket.recv()
            assert caught.value.rcvd.code == 1003

    run(main())


def test_a_slow_handshake_is_dropped(state):
    settings = ServerSettings(handshake_timeout_s=0.2)

    async def main() -> None:
        async with running(served(ScriptedModel()), state, settings) as server:
            started_s = time.monotonic()
            websocket = await raw_websocket(server)
            await websocket.recv()
            with pytest.raises(ConnectionClosed):
                await websocket.recv()
            assert time.monotonic() - started_s < 5

    run(main())


def test_an_admitted_client_may_stay_silent_longer_than_the_handshake_may_take(state):
    settings = ServerSettings(handshake_timeout_s=0.5)

    async def main() -> None:
        async with (
            running(served(ScriptedModel()), state, settings) as server,
            WireClient.connect(server) as client,
        ):
            await asyncio.sleep(0.8)
            await client.infer("scripted", {"x": X})

    run(main())


def test_a_message_that_trickles_in_is_dropped(state):
    settings = ServerSettings(message_timeout_s=0.2)

    async def fragments():
        while True:
            yield b"\x00"
            await asyncio.sleep(0.02)

    async def main() -> None:
        async with running(served(ScriptedModel()), state, settings) as server:
            websocket = await raw_websocket(server)
            await websocket.recv()
            with pytest.raises(ConnectionClosed):
                await websocket.send(fragments())

    run(main())


def test_an_admitted_client_that_trickles_is_dropped_though_it_answers_pings(state, caplog):
    caplog.set_level(logging.INFO, logger="cloud_runtime.access")
    settings = ServerSettings(message_timeout_s=0.5, ping_interval_s=0.05, ping_timeout_s=0.3)

    async def fragments():
        while True:
            yield b"\x00"
            await asyncio.sleep(0.02)

    async def main() -> None:
        async with running(served(ScriptedModel()), state, settings) as server:
            async with WireClient.connect(server) as client:
                with pytest.raises(ConnectionClosed):
                    await client.websocket.send(fragments())
            await until(lambda: not server.server.connections)
        assert "(message took too long)" in caplog.text

    run(main())


def test_a_stranger_cannot_make_the_server_hold_large_messages(state):
    async def main() -> None:
        async with running(served(ScriptedModel()), state) as server:
            websocket = await raw_websocket(server)
            await websocket.recv()
            with pytest.raises(ConnectionClosed):  # noqa: PT012 (whichever notices first)
                await websocket.send(b"\x00" * (8 << 20))
                await websocket.recv()

    run(main())


def test_a_client_that_never_reads_is_dropped_and_frees_its_slot(state):
    settings = ServerSettings(write_timeout_s=0.3)

    class Large(ScriptedModel):
        def infer(self, feeds):
            self.runs += 1
            return {"y": np.zeros(15 << 20, np.uint8)}

    async def main() -> None:
        model = Large()
        async with running(served(model), state, settings) as server:
            async with WireClient.connect(server) as client:
                client.websocket.transport.pause_reading()
                for _ in range(4):
                    await client.start_infer("scripted", {"x": X})
                await until(lambda: not server.server.connections)
                client.websocket.transport.abort()
            async with WireClient.connect(server) as client:
                await client.infer("scripted", {"x": X})

    run(main())


def test_requests_wait_while_their_client_does_not_read_and_can_be_cancelled(state):
    class Large(ScriptedModel):
        def infer(self, feeds):
            self.runs += 1
            return {"y": np.zeros(15 << 20, np.uint8)}

    async def main() -> None:
        model = Large()
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            # Much less than an answer, whatever this machine's buffers grow to.
            socket_ = client.websocket.transport.get_extra_info("socket")
            socket_.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            client.websocket.transport.pause_reading()
            await client.start_infer("scripted", {"x": X})
            (connection,) = server.server.connections
            await until(lambda: not connection._transport.is_writable)
            streams = [await client.start_infer("scripted", {"x": X}) for _ in range(3)]
            await until(lambda: len(connection._streams) == 3)
            await client.send(Cancel(stream=streams[0]))
            await until(lambda: connection._streams[streams[0]].aborted is not None)
            assert model.runs == 1
            client.websocket.transport.resume_reading()
            for stream in streams[1:]:
                message, _ = await client.next(stream)
                assert isinstance(message, Result)
            assert model.runs == 3

    run(main())


def test_connections_beyond_the_limit_get_503(state):
    settings = ServerSettings(max_connections=1)

    async def main() -> None:
        async with running(served(ScriptedModel()), state, settings) as server:
            async with WireClient.connect(server):
                with pytest.raises(InvalidStatus) as caught:
                    await raw_websocket(server)
                assert caught.value.response.status_code == 503
            await until(lambda: not server.server.connections)
            async with WireClient.connect(server):
                pass

    run(main())


def test_one_address_cannot_take_all_places_with_handshakes(state):
    settings = ServerSettings(max_strangers_per_address=2, handshake_timeout_s=30.0)

    async def main() -> None:
        async with running(served(ScriptedModel()), state, settings) as server:
            async with WireClient.connect(server), WireClient.connect(server):
                # Those who were admitted do not count.
                strangers = [await raw_websocket(server) for _ in range(2)]
                with pytest.raises(InvalidStatus) as caught:
                    await raw_websocket(server)
                assert caught.value.response.status_code == 503
                for stranger in strangers:
                    stranger.transport.abort()
            await until(lambda: not server.server.connections)
            async with WireClient.connect(server) as client:
                await client.infer("scripted", {"x": X})

    run(main())


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        (("192.0.2.7", 1), "192.0.2.7"),
        (("2001:db8:0:1::7", 1, 0, 0), "2001:db8:0:1::/64"),
        (("fe80::1%eth0", 1, 0, 2), "fe80::/64"),
        (("::ffff:192.0.2.7", 1, 0, 0), "::ffff:192.0.2.7"),
        (None, ""),
    ],
)
def test_hosts_of_one_ipv6_network_count_as_one_address(remote, address):
    assert _address_of(SimpleNamespace(remote_address=remote)) == address


# HTTP.


def http_status(server, path: str) -> str:
    """Status line and body of a plain GET, as a load balancer would send it."""
    host, port = server.url.removeprefix("wss://").partition("/")[0].rsplit(":", 1)
    with (
        socket.create_connection((host, int(port)), 5) as plain,
        client_tls(server.state).wrap_socket(plain, server_hostname=host) as secure,
    ):
        secure.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        answer = b""
        while data := secure.recv(4096):
            answer += data
    return answer.decode().replace("\r\n", "\n")


def test_health_readiness_and_unknown_paths(state):
    async def main() -> None:
        async with running(served(ScriptedModel()), state) as server:
            get = lambda path: asyncio.to_thread(http_status, server, path)  # noqa: E731
            assert (await get("/healthz")).startswith("HTTP/1.1 200")
            assert (await get("/readyz")).endswith("\n\nready\n")
            assert (await get("/v2/models")).startswith("HTTP/1.1 404")
            assert (await get("/v1/nearfar")).startswith("HTTP/1.1 426")

    run(main())


# Drain.


def test_drain_finishes_open_answers_and_takes_no_new_ones(state):
    async def main() -> None:
        model = chat()
        model.hold.set()
        async with (
            running(served(model), state) as server,
            WireClient.connect(server) as client,
            WireClient.connect(server) as idle,
        ):
            stream = await client.start_generate("chat", tokens=5)
            await until(lambda: model.running)
            draining = asyncio.create_task(server.server.drain())
            await until(lambda: client.goaway)
            assert client.goaway == GoAway(last_stream=stream, reason="shutdown")
            assert not client.session.can_open
            await idle.websocket.wait_closed()
            readiness = await asyncio.to_thread(http_status, server, "/readyz")
            assert readiness.startswith("HTTP/1.1 503")
            with pytest.raises(InvalidStatus):
                await raw_websocket(server)
            model.hold.clear()
            answer = await client.collect(stream)
            assert answer.fin.count == 6
            await draining
            await client.websocket.wait_closed()

    run(main())


def test_drain_cuts_what_takes_too_long_and_the_client_notices(state):
    settings = ServerSettings(drain_s=0.2)

    async def main() -> None:
        model = chat(token_s=0.01)
        async with (
            running(served(model), state, settings) as server,
            WireClient.connect(server) as client,
        ):
            stream = await client.start_generate("chat", tokens=100_000)
            await client.next(stream)
            await server.server.drain()
            await server.server.close()
            with pytest.raises(CloudUnavailable):
                await client.collect(stream)
            await until(lambda: not model.running)

    run(main())


# Logs.


def test_logs_hold_no_prompt_no_tensor_no_key_and_no_text_of_exceptions(state, caplog):
    caplog.set_level(logging.DEBUG)
    number = np.full((1, 4), 8675309.0, np.float32)

    async def main() -> None:
        models = served(
            chat(),
            ScriptedModel(),
            ScriptedModel("broken", error=ValueError(f"bad value {CANARY}")),
            ScriptedModel("broken-chat", task="text-generation", error=KeyError(CANARY)),
        )
        async with running(models, state) as server:
            token = server.token
            async with WireClient.connect(server) as client:
                stream = await client.start_generate("chat", tokens=2, prompt=Prompt(text=CANARY))
                await client.collect(stream)
                await client.infer("scripted", {"x": number})
                items = np.array([CANARY.encode()], dtype=object)
                await client.infer("scripted", {"input": items}, form="text")
                for model in ("broken", CANARY):
                    with pytest.raises(NearfarError):
                        await client.infer(model, {"x": number})
                with pytest.raises(NearfarError) as caught:
                    await client.collect(await client.start_generate("broken-chat", tokens=9))
                assert caught.value.code == "internal"
                assert CANARY not in str(caught.value)
            await refusal(server, token=CANARY)
        # The client's own library logs too, in this process; what matters is the server's.
        text = "\n".join(
            record.getMessage() + (record.exc_text or "")
            for record in caplog.records
            if not record.name.startswith("websockets.client")
        )
        assert "model=chat" in text
        assert "unexpected ValueError" in text
        assert "unexpected KeyError" in text
        for secret in (CANARY, "8675309", token, token[4:], "t0 t1"):
            assert secret not in text

    run(main())


# Shaped traffic


@pytest.mark.parametrize("shaping", ["balanced", "strict"])
def test_shaped_answers_and_long_results_are_complete(state, shaping):
    settings = ServerSettings(min_shaping=shaping)

    class Long(ScriptedModel):
        def infer(self, feeds):
            return {"y": np.arange(100_000, dtype=np.uint8)}

    async def main() -> None:
        async with (
            running(served(chat(), Long()), state, settings) as server,
            WireClient.connect(server) as client,
        ):
            assert client.ready.shaping == shaping
            _, outputs = await client.infer("scripted", {"x": X})
            assert np.array_equal(outputs["y"], np.arange(100_000, dtype=np.uint8))
            answers = [
                client.collect(await client.start_generate("chat", tokens=count))
                for count in (1, 8, 30)
            ]
            for count, answer in zip((1, 8, 30), await asyncio.gather(*answers), strict=True):
                assert len(answer.texts) == count + 1

    run(main())


def test_shaped_answer_that_ends_while_the_server_drains_is_complete(state):
    settings = ServerSettings(min_shaping="balanced")

    async def main() -> None:
        async with (
            running(served(chat()), state, settings) as server,
            WireClient.connect(server) as client,
        ):
            stream = await client.start_generate("chat", tokens=5)
            await client.next(stream)
            draining = asyncio.create_task(server.server.drain())
            answer = await client.collect(stream)
            assert answer.fin.count == 6
            await draining

    run(main())
