"""Traffic recorded today, keys stolen later: what the thief can open, and what stays closed."""

from __future__ import annotations

import gc
import hashlib
from dataclasses import dataclass, field

import numpy as np
import pytest

from nearfar.errors import SecurityError
from nearfar.secure import kem
from nearfar.secure.handshake import SEALED_SEED_BYTES, derive_secrets
from nearfar.secure.keys import MAX_LIFETIME_S, KeyConfiguration, KeyRing
from nearfar.secure.records import RecordOpener
from nearfar.session import ClientSession, ServerSession
from nearfar.wire import messages as wire
from tests.attacks.middle import CONFIGURATION, HELLO, WELCOME, Middle
from tests.support.wire import IDENTITY, LIMITS, NOW_S, Pair, fin, generate, infer, ready, result

CANARY = "canary-5e1f"
TAG_BYTES = 32


@dataclass
class Recording:
    """All that crossed the network in a session, and the ring that served it."""

    middle: Middle
    keys: KeyRing
    generated: list[kem.KemPrivateKey] = field(default_factory=list)

    def message(self, kind: int) -> bytes:
        sent = self.middle.sent_to_client + self.middle.sent_to_server
        return next(message for message in sent if message[0] == kind)

    @property
    def configuration(self) -> KeyConfiguration:
        return KeyConfiguration.parse(self.message(CONFIGURATION))

    @property
    def everything(self) -> bytes:
        return b"".join(self.middle.sent_to_client + self.middle.sent_to_server)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    """A whole session: handshake, login, tensors, a streamed answer, goodbye."""
    generated: list[kem.KemPrivateKey] = []
    generate_key = kem.KemPrivateKey.generate
    with monkeypatch.context() as patched:

        def spy() -> kem.KemPrivateKey:
            generated.append(generate_key())
            return generated[-1]

        patched.setattr(kem.KemPrivateKey, "generate", spy)
        keys = KeyRing(IDENTITY, now_s=NOW_S)
        pair = Pair(
            ClientSession(pin=IDENTITY.pin, token=CANARY, limits=LIMITS, now_s=NOW_S),
            ServerSession(keys=keys, limits=LIMITS, now_s=NOW_S),
        )
        middle = Middle(pair)
        pair.exchange()
        pair.server.send(ready())
        pair.exchange()
        x = {"x": np.frombuffer(CANARY.encode(), np.uint8)}
        pair.client.send(infer(1, x), tuple(x.values()))
        pair.exchange()
        pair.server.send(result(1, x), tuple(x.values()))
        pair.client.send(generate(2))
        pair.exchange()
        pair.server.send(wire.Token(stream=2, index=0, text=CANARY))
        pair.server.send(fin(2, 1, hashlib.sha256(CANARY.encode()).digest()))
        pair.exchange()
        pair.server.close()
        pair.client.close()
    kinds = [type(received.message).__name__ for received in pair.at_client]
    assert kinds == ["Ready", "Result", "Token", "Fin"]
    return Recording(middle, keys, generated)


def _transcript(*messages: bytes) -> bytes:
    digest = hashlib.sha256(b"nearfar/1 transcript\x00")
    for message in messages:
        digest.update(len(message).to_bytes(4, "big") + message)
    return digest.digest()


def steal(recording: Recording, keys: list[kem.KemPrivateKey]) -> dict[str, bytes]:
    """Everything that someone with these private keys gets out of the recording.

    He knows the specification, and tries each key on each sealed seed.
    """
    configuration, hello = recording.message(CONFIGURATION), recording.message(HELLO)
    welcome = recording.message(WELCOME)
    sealed_client_seed = hello[-SEALED_SEED_BYTES:]
    head = hello[: -SEALED_SEED_BYTES - 2]
    sealed_server_seed = welcome[3 : 3 + SEALED_SEED_BYTES]
    client_info = b"nearfar/1 client seed\x00" + _transcript(configuration, head)
    server_info = b"nearfar/1 server seed\x00" + _transcript(configuration, hello)
    loot: dict[str, bytes] = {}
    for key in keys:
        if (seed := key.open(sealed_client_seed, client_info)) is not None:
            loot["client seed"] = seed
        if (seed := key.open(sealed_server_seed, server_info)) is not None:
            loot["server seed"] = seed
    # A seed that he does not have he can only guess; zeros are as good a guess as any.
    transcript = _transcript(configuration, hello, welcome[:-TAG_BYTES])
    secrets = derive_secrets(
        loot.get("client seed", bytes(32)), loot.get("server seed", bytes(32)), transcript
    )
    for name, secret, sent in (
        ("to server", secrets.client_traffic, recording.middle.sent_to_server[1:]),
        ("to client", secrets.server_traffic, recording.middle.sent_to_client[2:]),
    ):
        opener = RecordOpener(secret)
        try:
            loot[name] = b"".join(opener.open(record)[1] for record in sent)
        except SecurityError:
            continue
    return loot


def held(ring: KeyRing, public_keys: list[bytes]) -> list[kem.KemPrivateKey]:
    """Every private key the ring still gives for any of the public keys it ever signed."""
    ids = [hashlib.sha256(public_key).digest()[:8] for public_key in public_keys]
    found = [ring.private_key(key_id, NOW_S + MAX_LIFETIME_S) for key_id in ids]
    return [key for key in found if key is not None]


def test_nothing_of_the_session_is_visible_on_the_network(recording: Recording) -> None:
    assert CANARY.encode() not in recording.everything
    assert CANARY.encode("utf-16-le") not in recording.everything


def test_the_recording_opens_with_the_ephemeral_keys_of_both_ends(recording: Recording) -> None:
    """The control: with all keys of that day the thief's method does work."""
    loot = steal(recording, recording.generated)
    assert loot["to server"].count(CANARY.encode()) == 2  # token and tensor
    assert loot["to client"].count(CANARY.encode()) == 2  # tensor and answer


def test_identity_key_and_key_ring_stolen_after_expiry_decrypt_nothing(
    recording: Recording,
) -> None:
    public_key = recording.configuration.public_key
    recording.generated.clear()  # the ends have forgotten theirs; so must this test
    ring = recording.keys
    late_s = NOW_S + MAX_LIFETIME_S
    newest = ring.current(late_s)  # the server goes on working
    assert ring.private_key(recording.configuration.key_id, late_s) is None
    stolen = held(ring, [public_key, newest.public_key])
    assert len(stolen) == len(ring) == 1
    # The identity key is an Ed25519 key: it opens nothing, so what helps is the ring alone.
    assert steal(recording, stolen) == {}


def test_expired_private_key_is_gone_from_memory(recording: Recording) -> None:
    public_key = recording.configuration.public_key
    recording.generated.clear()

    def alive() -> bool:
        gc.collect()
        return any(
            isinstance(found, kem.KemPrivateKey) and found.public_bytes == public_key
            for found in gc.get_objects()
        )

    assert alive()
    recording.keys.current(NOW_S + MAX_LIFETIME_S)
    assert not alive()


def test_ephemeral_private_key_is_gone_from_memory_when_the_handshake_is_over(
    recording: Recording,
) -> None:
    hello = recording.message(HELLO)
    ephemeral = hello[-SEALED_SEED_BYTES - 2 - kem.PUBLIC_KEY_BYTES : -SEALED_SEED_BYTES - 2]
    assert any(key.public_bytes == ephemeral for key in recording.generated)
    recording.generated.clear()
    gc.collect()
    assert not any(
        isinstance(found, kem.KemPrivateKey) and found.public_bytes == ephemeral
        for found in gc.get_objects()
    )


def test_configuration_key_stolen_while_valid_does_not_open_what_was_recorded(
    recording: Recording,
) -> None:
    """It gives the client's seed; the server's is sealed to a key the client has forgotten."""
    key = recording.keys.private_key(recording.configuration.key_id, NOW_S + 60)
    assert key is not None
    loot = steal(recording, [key])
    assert set(loot) == {"client seed"}
