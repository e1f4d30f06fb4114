"""A real server on loopback: who is let in, how many, and what plain HTTP is told."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from types import SimpleNamespace

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from cloud_runtime import auth
from cloud_runtime.server import _address_of
from cloud_runtime.settings import ServerSettings
from nearfar.errors import SecurityError
from nearfar.secure.identity import ServerIdentity
from tests.cloud_runtime.asking import X, http_status, raw_websocket, refusal
from tests.cloud_runtime.support import (
    ScriptedModel,
    WireClient,
    make_state,
    run,
    running,
    served,
    until,
)


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


def test_health_readiness_and_unknown_paths(state):
    async def main() -> None:
        async with running(served(ScriptedModel()), state) as server:
            get = lambda path: asyncio.to_thread(http_status, server, path)  # noqa: E731
            assert (await get("/healthz")).startswith("HTTP/1.1 200")
            assert (await get("/readyz")).endswith("\n\nready\n")
            assert (await get("/v2/models")).startswith("HTTP/1.1 404")
            assert (await get("/v1/nearfar")).startswith("HTTP/1.1 426")

    run(main())
