"""A client's key, and its proof over one channel."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from nearfar.errors import ConfigError, SecurityError
from nearfar.secure.credentials import (
    ApiKeyCredentials,
    ClientKey,
    ClientPublicKey,
    TokenCredentials,
    proof_message,
)
from nearfar.secure.handshake import export
from nearfar.secure.identity import Pin, ServerIdentity
from nearfar.secure.keys import KeyRing
from nearfar.session import ClientSession, ServerSession
from nearfar.wire import messages as wire
from tests.support.wire import IDENTITY, NOW_S, Pair

KEY = ClientKey(bytes(range(32)))
EXPORTER = b"\x05" * 32


def pair(credentials=None, token: str = "") -> Pair:
    return Pair(
        ClientSession(pin=IDENTITY.pin, token=token, credentials=credentials, now_s=NOW_S),
        ServerSession(keys=KeyRing(IDENTITY, now_s=NOW_S), now_s=NOW_S),
    )


def test_the_proof_vector_of_the_specification() -> None:
    assert export(EXPORTER, b"client proof").hex() == VECTOR["exported"]
    assert proof_message(EXPORTER, "token").hex() == (
        b"nearfar/1 client proof\x00".hex() + VECTOR["exported"] + VECTOR["token hash"]
    )
    assert TokenCredentials("token", KEY).prove(EXPORTER).hex() == VECTOR["proof"]


VECTOR = {
    "exported": "92a8490a8a277edc87257645170f99ec8c8a0c01761695696f8edd7692d9d697",
    "token hash": "3c469e9d6c5875d37a43f353d4f88e61fcf812c66eee3457465a40b0da4153e0",
    "proof": (
        "bf43099b5d896ad9fd21a9c2ef86b9788577054b4991d7684efb86712ba6969a"
        "da0a93010e83227aff1508b5c49e3825ca5ed34ba67bef5636a2c66a312e5608"
    ),
}


def test_an_exported_value_is_hkdf_expand_of_the_exporter_secret() -> None:
    """RFC 5869 written out with HMAC alone."""
    info = b"nearfar/1 export label\x01"
    assert export(EXPORTER, b"label") == hmac.digest(EXPORTER, info, "sha256")
    assert hashlib.sha256(b"token").hexdigest() == VECTOR["token hash"]


def test_auth_carries_token_and_a_proof_for_this_very_channel() -> None:
    ends = pair(TokenCredentials("a.b.c", KEY))
    ends.exchange()
    (received,) = ends.at_server
    auth = received.message
    assert isinstance(auth, wire.Auth)
    assert auth.token == "a.b.c"
    message = proof_message(ends.server.exporter, "a.b.c")
    assert KEY.public.verifies(auth.proof, message)
    other = pair(TokenCredentials("a.b.c", KEY))
    other.exchange()
    assert not KEY.public.verifies(auth.proof, proof_message(other.server.exporter, "a.b.c"))


@pytest.mark.parametrize("credentials", [None, ApiKeyCredentials("nfk_x")])
def test_an_api_key_goes_alone(credentials) -> None:
    ends = pair(credentials, token="nfk_x")
    ends.exchange()
    assert [received.message for received in ends.at_server] == [wire.Auth(token="nfk_x")]


def test_the_exporter_goes_with_the_channel() -> None:
    ends = pair(token="t")
    ends.exchange()
    assert len(ends.server.exporter) == 32
    ends.server.close()
    assert ends.server.exporter == b""


def test_tokens_are_not_in_the_repr() -> None:
    assert "secret" not in repr(TokenCredentials("secret", KEY))
    assert "secret" not in repr(ApiKeyCredentials("secret"))
    assert bytes(range(32)).hex()[:8] not in repr(KEY)


def test_a_client_key_survives_its_file_and_is_private(tmp_path) -> None:
    path = tmp_path / "client.key"
    KEY.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert ClientKey.load(path).public == KEY.public
    path.chmod(0o640)
    with pytest.raises(SecurityError, match="chmod 600"):
        ClientKey.load(path)
    with pytest.raises(ConfigError, match="nearfar client-key new"):
        ClientKey.load(tmp_path / "none.key")


def test_a_client_key_and_a_servers_identity_are_not_taken_for_each_other(tmp_path) -> None:
    IDENTITY.save(tmp_path / "identity.key")
    KEY.save(tmp_path / "client.key")
    with pytest.raises(ConfigError, match="not a nearfar client key file"):
        ClientKey.load(tmp_path / "identity.key")
    with pytest.raises(ConfigError, match="not a nearfar identity file"):
        ServerIdentity.load(tmp_path / "client.key")
    with pytest.raises(ConfigError, match="not a client public key: it does not start with nfc1:"):
        ClientPublicKey.parse(str(IDENTITY.pin))
    with pytest.raises(ConfigError, match="not a pin"):
        Pin.parse(str(KEY.public))
    assert ClientPublicKey.parse(str(KEY.public)) == KEY.public
    assert Pin(KEY.public.public_key) != KEY.public
