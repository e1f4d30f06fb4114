"""A client with a token and its key, over a real websocket: let in, refused alike, told to go."""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec
import pytest

from cloud_runtime import tokens
from cloud_runtime.settings import ServerSettings
from nearfar.errors import NearfarError, SecurityError
from nearfar.generation import GenerationOptions, Prompt
from nearfar.secure.credentials import ClientKey
from nearfar.units import Deadline
from sdk.cloud.egress import Permit
from sdk.cloud.link import CloudLink
from sdk.config import CloudConfig
from sdk.policy import Verdict
from tests.cloud_runtime.support import ScriptedModel, make_state, run, running, served, until

ALLOWED = Verdict(edge=True, cloud=True, rule_ids=("r",), reason="ok", policy_hash="h")


@pytest.fixture
def state(tmp_path):
    state = make_state(tmp_path / "state")
    tokens.init_issuer(state)
    return state


@pytest.fixture
def key(tmp_path) -> ClientKey:
    key = ClientKey.generate()
    key.save(tmp_path / "client.key")
    return key


def config(server, tmp_path, **changes) -> CloudConfig:
    fields = {
        "url": server.url,
        "identity": server.pin,
        "ca_file": server.state.ca_certificate,
        "key_file": tmp_path / "client.key",
        "token_file": tmp_path / "token.txt",
    }
    return CloudConfig(**{**fields, **changes})


def issue(server, key: ClientKey, **changes) -> str:
    return tokens.issue(
        server.state,
        **{"tenant": "clinic-2", "client_key": key.public, "audience": server.pin, **changes},
    )


async def models_of(cloud: CloudConfig) -> set[str]:
    link = CloudLink(cloud)
    try:
        return set((await link.connect(Deadline.after_ms(20_000))).offers or ())
    finally:
        await link.close()


def with_server(state, scenario, settings: ServerSettings | None = None) -> None:
    async def main() -> None:
        async with running(served(ScriptedModel()), state, settings, with_tokens=True) as server:
            await scenario(server)

    run(main())


def test_a_token_from_a_file_lets_its_key_in(state, key, tmp_path, caplog):
    caplog.set_level(logging.INFO)

    async def scenario(server) -> None:
        token = issue(server, key)
        path = tmp_path / "token.txt"
        path.write_text(token)
        path.chmod(0o600)
        assert await models_of(config(server, tmp_path)) == {"scripted"}
        assert "open key=token:clinic-2" in caplog.text
        assert token.split(".")[2] not in caplog.text

    with_server(state, scenario)


@pytest.mark.parametrize("kind", ["coroutine function", "function", "function with an awaitable"])
def test_a_token_provider_is_asked_for_every_connection(state, key, tmp_path, kind):
    asked: list[int] = []

    async def scenario(server) -> None:
        def give() -> str:
            asked.append(1)
            return issue(server, key)

        async def give_later() -> str:
            return give()

        provider = {
            "coroutine function": give_later,
            "function": give,
            "function with an awaitable": lambda: give_later(),
        }[kind]
        cloud = config(server, tmp_path, token_file=None, token_provider=provider)
        await models_of(cloud)
        await models_of(cloud)

    with_server(state, scenario)
    assert len(asked) == 2


def test_a_provider_may_give_an_api_key_when_there_is_no_key_file(state, tmp_path):
    async def scenario(server) -> None:
        cloud = config(
            server, tmp_path, token_file=None, key_file=None, token_provider=lambda: server.token
        )
        assert await models_of(cloud) == {"scripted"}

    with_server(state, scenario)


def test_every_wrong_token_is_refused_alike_and_the_log_says_why(state, key, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    thief = ClientKey.generate()

    async def scenario(server) -> None:
        wrong = {
            "proof is not by": issue(server, thief),
            "ExpiredSignatureError": issue(server, key, now_s=time.time() - 3600),
            "InvalidAudienceError": issue(server, key, audience="nf1:other"),
            "no issuer that is known": issue(server, key)[:-8] + "AAAAAAAA",
            "unknown API key": "nfk_wrong",
        }
        texts = set()
        for reason, token in wrong.items():
            cloud = config(
                server, tmp_path, token_file=None, token_provider=lambda text=token: text
            )
            with pytest.raises(SecurityError) as caught:
                await models_of(cloud)
            texts.add(str(caught.value))
            assert reason in caplog.text
            assert token not in caplog.text
        assert len(texts) == 1

    with_server(state, scenario)


def test_a_provider_that_fails_is_an_unavailable_cloud_that_does_not_quote_it(state, tmp_path):
    async def scenario(server) -> None:
        def broken() -> str:
            raise OSError("token=very-secret")

        cloud = config(server, tmp_path, token_file=None, key_file=None, token_provider=broken)
        with pytest.raises(NearfarError, match="token_provider") as caught:
            await models_of(cloud)
        assert caught.value.retryable
        assert "very-secret" not in str(caught.value)
        cloud = config(
            server, tmp_path, token_file=None, key_file=None, token_provider=lambda: None
        )
        with pytest.raises(NearfarError, match="NoneType, not str"):
            await models_of(cloud)

    with_server(state, scenario)


def test_a_connection_outlives_its_token_only_until_its_answers_are_complete(state, key, tmp_path):
    """The server says go, the open answer ends well, and the next request brings a new token."""
    asked: list[str] = []

    async def scenario(server) -> None:
        def give() -> str:
            asked.append(issue(server, key))
            return asked[-1]

        cloud = config(server, tmp_path, token_file=None, token_provider=give)
        link = CloudLink(cloud)
        deadline = Deadline.after_ms(20_000)
        stream = await link.generate(
            Permit(ALLOWED, "scripted"), model="scripted", prompt=Prompt(text="x"),
            options=GenerationOptions(max_new_tokens=20), deadline=deadline,
        )  # fmt: skip
        (connection,) = server.server.connections
        connection.key = msgspec.structs.replace(connection.key, expires_s=time.time())
        texts = []
        while stream.fin is None:
            texts += [token.text for token in await stream.tokens(deadline)]
        assert len(texts) == 21
        await until(lambda: not server.server.connections)
        await link.refresh(deadline)
        await link.close()

    async def main() -> None:
        settings = ServerSettings(key_check_s=0.05)
        model = ScriptedModel(task="text-generation", token_s=0.02)
        async with running(served(model), state, settings, with_tokens=True) as server:
            await scenario(server)

    run(main())
    assert len(asked) == 2


def test_the_connections_of_a_withdrawn_issuer_end(state, key, tmp_path):
    async def scenario(server) -> None:
        cloud = config(server, tmp_path, token_file=None, token_provider=lambda: issue(server, key))
        link = CloudLink(cloud)
        await link.connect(Deadline.after_ms(20_000))
        state.token_issuers.write_text('{"version": 1, "issuers": []}')
        await until(lambda: not link.state.is_connected)
        await asyncio.sleep(0)
        await link.close()

    with_server(state, scenario, ServerSettings(key_check_s=0.05))
