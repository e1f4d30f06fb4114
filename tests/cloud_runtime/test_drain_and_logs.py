"""A real server on loopback: how it ends, and what it writes down."""

from __future__ import annotations

import asyncio
import logging

import numpy as np
import pytest
from websockets.exceptions import InvalidStatus

from cloud_runtime.settings import ServerSettings
from nearfar.errors import CloudUnavailable, NearfarError
from nearfar.generation import Prompt
from nearfar.wire.messages import GoAway
from tests.cloud_runtime.asking import CANARY, chat, http_status, raw_websocket, refusal
from tests.cloud_runtime.support import ScriptedModel, WireClient, run, running, served, until


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
