"""The fuzz targets on their seeds and on damaged seeds, without a fuzzer."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import channel_targets, corpus, state_targets, targets, trust_targets
from nearfar.secure.keys import KeyConfiguration

ROOT = Path(__file__).resolve().parents[1]
DAMAGED = 60


@pytest.mark.parametrize("name", targets.TARGETS)
def test_target_takes_its_seeds_and_damaged_ones(name: str) -> None:
    target = targets.TARGETS[name]
    seeds = corpus.seeds(name)
    assert seeds
    generator = random.Random(name)
    for seed in generator.sample(seeds, min(40, len(seeds))):
        target(seed)
    for _ in range(DAMAGED):
        damaged = bytearray(generator.choice(seeds))
        for _ in range(generator.randint(1, 4)):
            if damaged:
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        target(bytes(damaged[: generator.randint(0, len(damaged))]))
        target(bytes(damaged))


def test_every_target_has_seeds_and_every_seed_a_target() -> None:
    assert set(corpus.SEEDS) == set(targets.TARGETS)


def test_an_error_that_is_not_documented_gets_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a fuzzer sees it: a target must not swallow what it does not expect."""

    def broken(*_: object, **__: object) -> None:
        raise KeyError("bug")

    for name, place in (
        ("codec", "decode"),
        ("policy", "parse_policy"),
        ("config", "parse_config"),
        ("manifest", "read_manifest"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(targets, place, broken)
            with pytest.raises(KeyError):
                targets.TARGETS[name](corpus.seeds(name)[0])
    for name, module, place in (
        ("token", trust_targets.TokenVerifier, "verify"),
        ("issuers", trust_targets, "read_issuers"),
        ("key_configuration", trust_targets.KeyConfiguration, "parse"),
        ("key_ring", trust_targets.KeyRing, "current"),
        ("public_key", trust_targets.PublicKey, "parse"),
        ("rotation", trust_targets.RotationStatement, "parse"),
        ("trust_file", trust_targets.store, "read_trust"),
        ("signature", trust_targets.bundle_signature, "check"),
        ("routing_memory", state_targets, "recall"),
        ("state_file", state_targets, "Knowledge"),
        ("decision", state_targets, "decode_decision"),
        ("frames", targets.frame_layout.Assembler, "feed"),
        ("policy_cases", targets, "parse_cases"),
        ("websocket", channel_targets.DirectConnection, "_read"),
        ("pieces_of_messages", channel_targets.Pieces, "take"),
        ("outbox", channel_targets.queue.Outbox, "next"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, place, broken)
            with pytest.raises(KeyError):
                targets.TARGETS[name](corpus.seeds(name)[0])
    monkeypatch.setitem(trust_targets._READERS, b"I", broken)
    with pytest.raises(KeyError):
        targets.TARGETS["key_file"](corpus.seeds("key_file")[0])
    monkeypatch.setattr("nearfar.wire.connection.decode", broken)
    for name in ("connection_server", "connection_client", "connection_new"):
        with pytest.raises(KeyError):
            targets.TARGETS[name](corpus.seeds(name)[0])


def test_good_handshakes_get_far_enough() -> None:
    """Signed by the harness, a configuration is answered with HELLO."""
    client = targets.new_client()
    (configuration,) = targets.new_server().data_to_send()
    client.receive(configuration, now_s=targets.NOW_S)
    assert client.data_to_send()


def test_pieces_take_what_joined_gives() -> None:
    messages = [b"", b"one", bytes(300)]
    assert list(targets.pieces(targets.joined(*messages))) == messages
    assert list(targets.pieces(b"\x05\x00ab")) == [b"ab"]


def test_replay_runs_one_input(tmp_path: Path) -> None:
    good = tmp_path / "input"
    good.write_bytes(corpus.seeds("pin")[0])
    command = [sys.executable, "-m", "fuzz", "--replay", "pin", str(good)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "is taken well" in done.stdout


def test_seeds_of_the_files_are_good_ones() -> None:
    """From a file that is refused at its first key a fuzzer gets nowhere."""
    for seed in corpus.seeds("manifest"):
        (targets._directory() / "manifest.json").write_bytes(seed)
        manifest, _ = targets.read_manifest(targets._directory())
        assert manifest.name == "tiny"
    policies, configs = corpus.seeds("policy"), corpus.seeds("config")
    assert targets.parse_policy(policies[0].decode()).rules
    assert targets.parse_config(configs[0].decode(), base=targets._directory()).cloud


def test_what_the_harness_signs_gets_behind_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of the flawed ones some are refused there."""
    came: dict[str, list[bool]] = {}

    def watched(name: str, module: object, place: str) -> None:
        real = getattr(module, place)

        def call(*args: object, **kwargs: object) -> object:
            came.setdefault(name, []).append(False)
            result = real(*args, **kwargs)
            came[name][-1] = True
            return result

        monkeypatch.setattr(module, place, call)

    watched("token", trust_targets.TokenVerifier, "verify")
    watched("key_configuration", KeyConfiguration, "verify")
    watched("rotation", trust_targets.store, "adopt")
    watched("signature", trust_targets.bundle_signature, "check")
    for name in ("token", "key_configuration", "rotation", "signature"):
        for seed in corpus.seeds(name):
            if seed[:1] == b"S":
                targets.TARGETS[name](seed)
        assert set(came[name]) == {True, False}
