"""Answers outlive connections: nothing lost, nothing twice, one run, and bounded for the server."""

from __future__ import annotations

import asyncio
import os

import numpy as np
import pytest

from cloud_runtime import auth
from cloud_runtime.relay import AHEAD_TOKENS
from cloud_runtime.settings import ServerSettings
from cloud_runtime.state import StateDir
from nearfar.errors import Cancelled, EngineError, InvalidInput, ResumeMissed
from nearfar.wire.messages import Token
from nearfar.wire.retention import RetentionLimits
from tests.cloud_runtime.support import (
    Lost,
    ScriptedModel,
    WireClient,
    make_state,
    run,
    running,
    served,
    until,
)

ID = b"i" * 16
TOKENS = 40
WHOLE = "".join(f"t{index} " for index in range(TOKENS)) + "end"


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> StateDir:
    return make_state(tmp_path_factory.mktemp("cloud") / "state")


def chat(**options) -> ScriptedModel:
    return ScriptedModel("chat", task="text-generation", **options)


def answers_of(server):
    return server.server._services.answers


async def lose_after(server, count: int, *, tokens: int = TOKENS, **options) -> Lost:
    """Begin an answer, read so many tokens, and cut the connection."""
    async with WireClient.connect(server) as client:
        stream = await client.start_generate("chat", tokens=tokens, request_id=ID, **options)
        return await client.lose(stream, ID, count)


@pytest.mark.parametrize("count", [1, 7, TOKENS + 1])
def test_an_answer_goes_on_at_the_next_token_and_ends_in_the_same_fin(state, count):
    async def main() -> None:
        model = chat(token_s=0.001)
        async with running(served(model), state) as server:
            lost = await lose_after(server, count)
            async with WireClient.connect(server) as client:
                answer = await client.collect(await client.start_resume(lost))
        assert "".join(lost.texts) + answer.text == WHOLE
        assert answer.fin.count == TOKENS + 1  # the session has checked the digest of the whole
        assert answer.fin.usage.completion_tokens == TOKENS
        assert model.runs == 1
        assert model.tokens == TOKENS

    run(main())


def test_an_answer_may_be_cut_again_and_again(state):
    async def main() -> None:
        model = chat(token_s=0.001)
        async with running(served(model), state) as server:
            lost = await lose_after(server, 3)
            for _ in range(5):
                async with WireClient.connect(server) as client:
                    again = await client.lose(await client.start_resume(lost), ID, 4)
                    lost = Lost(ID, again.key, [*lost.texts, *again.texts])
            async with WireClient.connect(server) as client:
                answer = await client.collect(await client.start_resume(lost))
        assert "".join(lost.texts) + answer.text == WHOLE
        assert (model.runs, model.tokens) == (1, TOKENS)

    run(main())


def test_an_answer_moves_while_its_old_connection_seems_alive(state):
    """After a change of network the server learns of the dead connection last."""

    async def main() -> None:
        model = chat()
        model.hold.set()
        async with (
            running(served(model), state) as server,
            WireClient.connect(server) as old,
            WireClient.connect(server) as new,
        ):
            first = await old.start_generate("chat", tokens=TOKENS, request_id=ID)
            await until(lambda: model.running)
            lost = Lost(ID, old.ready.resume_key, [])
            second = await new.start_resume(lost)
            with pytest.raises(Cancelled, match="another connection"):
                await old.collect(first)
            model.hold.clear()
            assert (await new.collect(second)).text == WHOLE
            await old.models()  # the old connection is as good as before
        assert model.runs == 1

    run(main())


def test_a_resumed_answer_keeps_to_the_new_credit(state):
    async def main() -> None:
        async with running(served(chat()), state) as server:
            lost = await lose_after(server, 2)
            await asyncio.sleep(0.05)  # all of it is there by now
            async with WireClient.connect(server) as client:
                stream = await client.start_resume(lost, credit=3)
                texts = [(await client.next(stream))[0].text for _ in range(3)]
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(client.next(stream), 0.1)
                await client.grant(stream, 1000)
                rest = await client.collect(stream)
        assert "".join([*lost.texts, *texts]) + rest.text == WHOLE

    run(main())


def test_cancelling_a_resumed_answer_frees_its_slot(state):
    async def main() -> None:
        model = chat(token_s=0.002)
        async with running(served(model), state) as server:
            lost = await lose_after(server, 2, tokens=100_000)
            async with WireClient.connect(server) as client:
                stream = await client.start_resume(lost, credit=0)
                await client.cancel(stream)
                with pytest.raises(Cancelled):
                    await client.collect(stream)
                await until(lambda: not model.running)
            assert len(answers_of(server).retention) == 0

    run(main())


# Misses.


async def missed(server, lost: Lost, match: str, **options) -> None:
    token = options.pop("token", None)
    async with WireClient.connect(server, token=token) as client:
        stream = await client.start_resume(lost, **options)
        with pytest.raises(ResumeMissed, match=match):
            await client.next(stream)
        await client.models()  # a miss costs the stream, not the connection


def test_after_the_time_has_passed_nothing_is_kept_and_the_slot_is_free(state):
    settings = ServerSettings(retention=RetentionLimits(keep_s=0.1))

    async def main() -> None:
        model = chat(token_s=0.002)
        async with running(served(model), state, settings) as server:
            lost = await lose_after(server, 3, tokens=100_000)
            await until(lambda: not model.running)
            await missed(server, lost, "its time has passed")
            assert answers_of(server).retention.size_bytes == 0

    run(main())


def test_wrong_tickets_clients_requests_and_indices_are_refused_and_spoil_nothing(tmp_path):
    state = make_state(tmp_path / "state")

    async def main() -> None:
        model = chat(token_s=0.001)
        async with running(served(model), state) as server:
            other = auth.add_key(state, "other")
            lost = await lose_after(server, 3)
            await missed(server, lost, "ticket", key=os.urandom(32))
            await missed(server, lost, "Nothing is kept", token=other)
            await missed(server, Lost(b"j" * 16, lost.key, lost.texts), "Nothing is kept")
            await missed(server, lost, "Token 1000000 is not kept", next_index=1_000_000)
            async with WireClient.connect(server) as client:
                answer = await client.collect(await client.start_resume(lost))
            assert "".join(lost.texts) + answer.text == WHOLE
            await missed(server, lost, "ticket was used before")
        assert model.runs == 1

    run(main())


def test_clients_without_a_key_get_no_resume_key_and_leave_nothing_behind(state):
    async def main() -> None:
        model = chat(token_s=0.002)
        async with running(served(model), state, allow_anonymous=True) as server:
            async with WireClient.connect(server, token="") as client:
                assert client.ready.resume_key == b""
                stream = await client.start_generate("chat", tokens=100_000)
                await client.next(stream)
                client.websocket.transport.abort()
            await until(lambda: not model.running)
            assert len(answers_of(server).retention) == 0

    run(main())


def test_a_client_that_says_goodbye_wants_no_more(state):
    async def main() -> None:
        model = chat(token_s=0.002)
        async with running(served(model), state) as server:
            async with WireClient.connect(server) as client:
                await client.next(await client.start_generate("chat", tokens=100_000))
            await until(lambda: not model.running)
            assert len(answers_of(server).retention) == 0

    run(main())


def test_an_error_while_the_client_was_away_is_told_to_it(state):
    async def main() -> None:
        model = chat(error=EngineError("the engine broke"), token_s=0.05)
        async with running(served(model), state) as server:
            lost = await lose_after(server, 1)
            await until(lambda: not model.running)
            async with WireClient.connect(server) as client:
                stream = await client.start_resume(lost)
                texts = [(await client.next(stream))[0].text for _ in range(2)]
                assert texts == ["t1 ", "t2 "]
                with pytest.raises(EngineError, match="the engine broke"):
                    await client.next(stream)

    run(main())


# Repetitions.


def test_a_repeated_generate_joins_the_first_and_never_runs_twice(state):
    async def main() -> None:
        model = chat(token_s=0.001)
        async with running(served(model), state) as server:
            await lose_after(server, 5)
            for _ in range(2):  # while it runs or after it; then surely after it
                async with WireClient.connect(server) as client:
                    stream = await client.start_generate("chat", tokens=TOKENS, request_id=ID)
                    assert (await client.collect(stream)).text == WHOLE
        assert model.runs == 1

    run(main())


def test_a_repeated_generate_whose_beginning_was_acknowledged_is_a_miss(state):
    async def main() -> None:
        model = chat(token_s=0.001)
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            stream = await client.start_generate("chat", tokens=TOKENS, request_id=ID)
            for _ in range(5):
                await client.next(stream)
            await client.grant(stream, 5, received=5)
            await client.collect(stream)
            again = await client.start_generate("chat", tokens=TOKENS, request_id=ID)
            with pytest.raises(ResumeMissed, match="beginning is not kept"):
                await client.next(again)
        assert model.runs == 1

    run(main())


def test_the_id_of_another_generate_is_an_error_and_a_failed_one_is_tried_anew(state):
    async def main() -> None:
        model = chat(token_s=0.001)
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            await client.collect(await client.start_generate("chat", tokens=3, request_id=ID))
            with pytest.raises(InvalidInput, match="another request"):
                await client.collect(await client.start_generate("chat", tokens=4, request_id=ID))
            other = b"o" * 16
            model.error = EngineError("broke")
            with pytest.raises(EngineError):
                await client.collect(
                    await client.start_generate("chat", tokens=9, request_id=other)
                )
            model.error = None
            await client.collect(await client.start_generate("chat", tokens=9, request_id=other))
        assert model.runs == 3

    run(main())


def test_a_repeated_infer_on_another_connection_shares_the_run(state):
    async def main() -> None:
        model = ScriptedModel(delay_s=0.1)
        x = {"x": np.ones((1, 4), np.float32)}
        async with (
            running(served(model), state) as server,
            WireClient.connect(server) as one,
            WireClient.connect(server) as two,
        ):
            results = await asyncio.gather(
                one.infer("scripted", x, request_id=ID), two.infer("scripted", x, request_id=ID)
            )
            await two.infer("scripted", x, request_id=ID)
        assert all(np.array_equal(outputs["y"], x["x"]) for _, outputs in results)
        assert model.runs == 1

    run(main())


# Bounds.


def test_an_absent_clients_answer_pauses_at_the_bound_and_then_goes_on(state):
    settings = ServerSettings(retention=RetentionLimits(answer_bytes=10_000))
    tokens = 2000

    async def main() -> None:
        model = chat()
        async with running(served(model), state, settings) as server:
            lost = await lose_after(server, 3, tokens=tokens)
            held = -1
            while held != model.tokens:
                held = model.tokens
                await asyncio.sleep(0.1)
            assert held < 10_000 // 64 + 64 + AHEAD_TOKENS
            assert answers_of(server).retention.size_bytes < 12_000
            async with WireClient.connect(server) as client:
                stream = await client.start_resume(lost, credit=tokens)
                answer = await client.collect(stream)
        assert len(lost.texts) + len(answer.texts) == tokens + 1
        assert model.runs == 1

    run(main())


def test_a_client_that_opens_and_leaves_many_times_costs_bounded_memory_and_slots(state):
    limits = RetentionLimits(client_running=2, client_bytes=30_000, answer_bytes=20_000)
    settings = ServerSettings(retention=limits)

    async def main() -> None:
        model = chat(token_s=0.0005)
        async with running(served(model, slots=8), state, settings) as server:
            retention = answers_of(server).retention
            for _ in range(12):
                async with WireClient.connect(server) as client:
                    stream = await client.start_generate("chat", tokens=100_000)
                    await client.next(stream)
                    client.websocket.transport.abort()
                assert retention.size_bytes < 45_000
            await until(lambda: model.running <= 2)
            assert len(retention) <= 2

    run(main())


def test_a_client_that_never_acknowledges_is_answered_all_the_same(state):
    settings = ServerSettings(retention=RetentionLimits(answer_bytes=8_000))

    async def main() -> None:
        async with (
            running(served(chat()), state, settings) as server,
            WireClient.connect(server) as client,
        ):
            answer = await client.collect(await client.start_generate("chat", tokens=900))
            assert len(answer.texts) == 901
            assert answers_of(server).retention.size_bytes <= 8_000

    run(main())


def test_acknowledged_tokens_are_forgotten_at_once(state):
    async def main() -> None:
        model = chat(token_s=0.001)
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            stream = await client.start_generate("chat", tokens=100_000, request_id=ID)
            for count in range(1, 60):
                message, _ = await client.next(stream)
                assert isinstance(message, Token)
                await client.grant(stream, 1, received=count)
            (kept,) = answers_of(server).retention._answers.values()
            await until(lambda: kept.first >= 59)

    run(main())


def test_drain_keeps_nothing_for_those_who_are_away(state):
    async def main() -> None:
        model = chat(token_s=0.002)
        async with running(served(model), state) as server:
            await lose_after(server, 2, tokens=100_000)
            assert model.running
            await server.server.drain()
            await until(lambda: not model.running)

    run(main())
