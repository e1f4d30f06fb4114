"""What a token allows: held against every request, and against what is listed."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from cloud_runtime import tokens
from cloud_runtime.caller import ANONYMOUS, Caller, permit, permit_model, visible
from cloud_runtime.state import StateDir
from nearfar.errors import ModelNotFound, NearfarError, SecurityError
from nearfar.secure.credentials import ClientKey, TokenCredentials
from tests.cloud_runtime.support import ScriptedModel, WireClient, make_state, run, running, served

KEY = ClientKey(bytes(range(32)))
ID = b"i" * 16
X = {"x": np.zeros((1, 4), np.float32)}


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> StateDir:
    state = make_state(tmp_path_factory.mktemp("cloud") / "state")
    tokens.init_issuer(state)
    return state


def connect(server, **limits):
    """A connection with a token of these limits; always of the same client."""
    token = tokens.issue(
        server.state, tenant="clinic-2", client_key=KEY.public, audience=server.pin, **limits
    )
    return WireClient.connect(server, credentials=TokenCredentials(token, KEY))


def with_server(state, scenario) -> None:
    async def main() -> None:
        models = served(
            ScriptedModel("chat-small", task="text-generation", token_s=0.001),
            ScriptedModel("chat-large", task="text-generation"),
            ScriptedModel("tables"),
        )
        async with running(models, state, with_tokens=True) as server:
            await scenario(server)

    run(main())


async def names_of(client: WireClient) -> set[str]:
    return {offer.manifest.name for offer in (await client.models()).models}


async def failure(answer) -> NearfarError:
    with pytest.raises(NearfarError) as caught:
        await answer
    return caught.value


@pytest.mark.parametrize(
    ("models", "listed"),
    [
        (None, {"chat-small", "chat-large", "tables"}),
        (["tables"], {"tables"}),
        (["chat-*"], {"chat-small", "chat-large"}),
        (["chat-?mall", "Tables"], {"chat-small"}),
        (["*"], {"chat-small", "chat-large", "tables"}),
        (["other"], set()),
        ([], set()),
    ],
)
def test_only_allowed_models_are_listed_and_answer(state, models, listed):
    async def scenario(server) -> None:
        async with connect(server, models=models) as client:
            assert await names_of(client) == listed
            for name in ("chat-small", "chat-large", "tables"):
                if name == "tables":
                    answer = client.infer(name, X)
                else:
                    answer = client.collect(await client.start_generate(name, tokens=2))
                if name in listed:
                    await answer
                else:
                    error = await failure(answer)
                    assert type(error) is SecurityError
                    assert "claim models does not allow" in error.problem
                    assert not error.retryable

    with_server(state, scenario)


def test_a_refusal_does_not_tell_whether_there_is_such_a_model(state):
    async def scenario(server) -> None:
        async with connect(server, models=["tables"]) as client:
            there = await failure(client.infer("chat-large", X))
            nowhere = await failure(client.infer("chat-least", X))
            assert str(there) == str(nowhere).replace("least", "large")
        async with connect(server, models=["chat-*"]) as client:
            assert isinstance(await failure(client.infer("chat-least", X)), ModelNotFound)

    with_server(state, scenario)


@pytest.mark.parametrize("limit", [0, 3, 9])
def test_priority_is_limited(state, limit):
    async def scenario(server) -> None:
        async with connect(server, max_priority=limit) as client:
            await client.infer("tables", X, priority=limit)
            stream = await client.start_generate("chat-large", tokens=1, priority=limit)
            await client.collect(stream)
            if limit == 9:
                return
            stream = await client.start_generate("chat-large", tokens=1, priority=limit + 1)
            for answer in (client.collect(stream), client.infer("tables", X, priority=9)):
                error = await failure(answer)
                assert type(error) is SecurityError
                assert f"claim max_priority allows priorities up to {limit}" in error.problem
                assert f"priority={limit} or lower" in error.fix

    with_server(state, scenario)


def test_a_cut_answer_goes_on_only_with_a_token_that_allows_its_model(state):
    async def scenario(server) -> None:
        async with connect(server) as client:
            stream = await client.start_generate("chat-small", tokens=40, request_id=ID)
            lost = await client.lose(stream, ID, 3)
        async with connect(server, models=["tables"]) as client:
            error = await failure(client.collect(await client.start_resume(lost)))
            assert "claim models does not allow" in error.problem
            # Nor by asking for the same again, which would take the answer over.
            again = await client.start_generate("chat-small", tokens=40, request_id=ID)
            assert type(await failure(client.collect(again))) is SecurityError
        async with connect(server, models=["chat-small"]) as client:  # the ticket is still good
            answer = await client.collect(await client.start_resume(lost))
            assert len(lost.texts) + len(answer.texts) == 41

    with_server(state, scenario)


def test_a_refused_request_does_not_end_the_connection_and_leaves_only_its_code_in_the_log(
    state, caplog
):
    caplog.set_level(logging.INFO)

    async def scenario(server) -> None:
        async with connect(server, models=["tables"]) as client:
            await failure(client.infer("secret-project", X))
            await client.infer("tables", X)
        assert "security" in caplog.text
        assert "secret-project" not in caplog.text

    with_server(state, scenario)


def test_callers_without_limits_are_not_limited_and_nobody_is_refused():
    assert ANONYMOUS.may_use("anything")
    assert Caller(name="n", scope="s").may_use("anything")
    assert not Caller(name="n", scope="s", models=()).may_use("anything")
    for ask in (lambda: permit(None, None), lambda: permit_model(None, "m"),
                lambda: visible(None, ())):  # fmt: skip
        with pytest.raises(SecurityError):
            ask()
