"""`nearfar cloud …` as a user runs it: processes, exit statuses, signals, output."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jwt
import numpy as np
import pytest

from cloud_runtime.commands import parse_address
from cloud_runtime.serving import load_attester
from cloud_runtime.state import StateDir
from nearfar.bundle.keys import SigningKey
from nearfar.errors import ConfigError, ModelNotFound, SecurityError
from nearfar.secure.credentials import ClientKey
from nearfar.secure.identity import Pin
from tests.cloud_runtime.support import Running, WireClient, make_state, run
from tests.support.tiny import write_tiny_classifier_bundle, write_tiny_tensor_bundle

X = np.ones((1, 4), np.float32)
CANARY = "canary-51c9"


def cloud(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cloud_runtime", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "400", "NO_COLOR": "1", "TERM": "dumb"},
        check=False,
    )


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> StateDir:
    return make_state(tmp_path_factory.mktemp("cloud") / "state")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_tiny_tensor_bundle(root / "tiny")
    write_tiny_classifier_bundle(root / "tiny-classifier")
    return root


class Served:
    """A `serve` process that said it is ready."""

    def __init__(self, process: subprocess.Popen[str], state: StateDir, log: Path) -> None:
        self.process = process
        self.log = log
        assert process.stdout is not None
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        line = process.stdout.readline()
        watchdog.cancel()
        assert line, log.read_text()
        self.ready = json.loads(line)
        self.reach = Running(None, state, self.ready["url"], self.ready["pin"])

    def end(self, *signals: int) -> int:
        for number in signals:
            self.process.send_signal(number)
        return self.process.wait(30)


@contextlib.contextmanager
def serving(store: Path, state: StateDir, log: Path, *options: str) -> Iterator[Served]:
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "cloud_runtime",
                "serve",
                "--ready-json",
                "--models",
                store,
                "--state",
                state.path,
                "--listen",
                "127.0.0.1:0",
                *options,
            ],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        yield Served(process, state, log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_ready_comes_after_the_models_are_loaded_and_says_how_to_connect(store, state, tmp_path):
    with serving(store, state, tmp_path / "log") as server:
        assert server.ready["event"] == "ready"
        assert sorted(server.ready["models"]) == ["tiny", "tiny-classifier"]
        assert server.ready["url"].startswith("wss://127.0.0.1:")
        assert server.ready["url"].endswith("/v1/nearfar")
        assert str(Pin.parse(server.ready["pin"])) == state.pin.read_text().strip()
        before = server.log.read_text()
        assert "tiny: fp32 on CPUExecutionProvider, ready" in before

        async def main() -> None:
            async with WireClient.connect(server.reach) as client:
                result, outputs = await client.infer("tiny", {"x": X})
                assert outputs["y"].shape == (1, 3)
                assert result.variant == "fp32"

        run(main())
        assert "loading" not in server.log.read_text().removeprefix(before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0_and_says_goodbye(store, state, tmp_path, number):
    with serving(store, state, tmp_path / "log") as server:

        async def main() -> None:
            async with WireClient.connect(server.reach) as client:
                await client.infer("tiny", {"x": X})
                server.process.send_signal(number)
                await client.websocket.wait_closed()
                assert client.goaway is not None
                assert client.websocket.close_code == 1001

        run(main())
        assert server.end() == 0
        assert "stopped" in server.log.read_text()


def test_a_key_made_while_it_serves_works_at_once_and_can_be_withdrawn(store, state, tmp_path):
    with serving(store, state, tmp_path / "log") as server:
        token = cloud("key", "add", "late", "--state", state.path).stdout.strip()

        async def main() -> None:
            async with WireClient.connect(server.reach, token=token) as client:
                await client.infer("tiny", {"x": X})
                assert cloud("key", "remove", "late", "--state", state.path).returncode == 0
                await client.websocket.wait_closed()
            with pytest.raises(SecurityError):
                async with WireClient.connect(server.reach, token=token):
                    pass

        run(main())
        assert token not in server.log.read_text()


def test_its_log_shows_what_happened_but_not_what_was_said(store, state, tmp_path):
    with serving(store, state, tmp_path / "log") as server:

        async def main() -> None:
            async with WireClient.connect(server.reach) as client:
                items = np.array([CANARY.encode()], dtype=object)
                await client.infer("tiny-classifier", {"input": items}, form="bytes")
                with pytest.raises(ModelNotFound):
                    await client.infer(CANARY, {"x": X})
                await client.infer("tiny", {"x": np.full((1, 4), 8675309, np.float32)})

        run(main())
        assert server.end(signal.SIGTERM) == 0
        log = server.log.read_text()
        assert "infer model=tiny-classifier" in log
        assert "infer model=tiny " in log
        assert "infer model=- " in log
        assert "model_not_found" in log
        for secret in (CANARY, "8675309", server.reach.token, server.reach.token[4:]):
            assert secret not in log


def test_only_the_chosen_models_are_served(store, state, tmp_path):
    with serving(store, state, tmp_path / "log", "--model", "tiny", "--quiet") as server:
        assert server.ready["models"] == ["tiny"]


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ("no state", 2, "nearfar cloud init"),
        ("no store", 1, "does not exist"),
        ("unknown model", 1, "nobody"),
        ("damaged bundle", 1, "model.onnx"),
        ("unsigned bundle", 1, "is not signed"),
        ("no trusted key", 2, "none.pub"),
        ("port in use", 2, "--port 0"),
        ("bad address", 2, "HOST:PORT"),
        ("unknown shaping", 2, "'balanced'"),
        ("half a certificate", 2, "--certificate-key"),
        ("missing certificate", 2, "none.pem"),
    ],
)
def test_what_keeps_it_from_starting_is_named_with_its_fix(
    store, state, tmp_path, change, status, says
):
    arguments = ["--models", store, "--state", state.path, "--port", "0"]
    with contextlib.ExitStack() as stack:
        if change == "no state":
            arguments[3] = tmp_path / "none"
        elif change == "no store":
            arguments[1] = tmp_path / "none"
        elif change == "unknown model":
            arguments += ["--model", "nobody"]
        elif change == "damaged bundle":
            write_tiny_tensor_bundle(tmp_path / "store" / "tiny")
            model = tmp_path / "store" / "tiny" / "fp32" / "model.onnx"
            model.chmod(0o644)
            data = bytearray(model.read_bytes())
            data[-1] ^= 1
            model.write_bytes(data)
            arguments[1] = tmp_path / "store"
        elif change == "unsigned bundle":
            key = SigningKey.generate().public
            arguments += ["--model", "tiny", "--trusted-key", key]
        elif change == "no trusted key":
            arguments += ["--trusted-key", tmp_path / "none.pub"]
        elif change == "port in use":
            taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            arguments[5] = taken.getsockname()[1]
        elif change == "bad address":
            arguments[4:] = ["--listen", "localhost"]
        elif change == "unknown shaping":
            arguments += ["--min-shaping", "some"]
        elif change == "half a certificate":
            arguments += ["--certificate", state.server_chain]
        else:
            arguments += ["--certificate", tmp_path / "none.pem"]
            arguments += ["--certificate-key", tmp_path / "none.key"]
        done = cloud("serve", *arguments)
    assert done.returncode == status, done.stderr
    assert "error:" in done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_init_makes_a_directory_that_serve_accepts_and_refuses_to_repeat(tmp_path):
    directory = tmp_path / "state"
    done = cloud("init", directory, "--host", "gpu.example.org", "--port", "9443")
    assert done.returncode == 0, done.stderr
    assert "wss://gpu.example.org:9443/v1/nearfar" in (directory / "client.toml").read_text()
    token = (directory / "client-key.txt").read_text().strip()
    assert token not in done.stdout + done.stderr
    again = cloud("init", directory)
    assert again.returncode == 2
    assert "--force" in again.stderr
    assert cloud("init", directory, "--renew-certificate").returncode == 0
    assert (directory / "client-key.txt").read_text().strip() == token


def test_identities_and_keys_are_managed_by_command(tmp_path):
    state = make_state(tmp_path / "state")
    pin = cloud("identity", "show", "--state", state.path).stdout.strip()
    assert pin == state.pin.read_text().strip()
    assert cloud("identity", "new", "--state", state.path).returncode == 2
    new = cloud("identity", "new", "--state", state.path, "--force").stdout.strip()
    assert new == cloud("identity", "show", "--state", state.path).stdout.strip() != pin

    output = tmp_path / "key.txt"
    added = cloud("key", "add", "clinic-2", "--state", state.path, "--output", output)
    assert added.returncode == 0
    assert output.stat().st_mode & 0o777 == 0o600
    assert output.read_text().strip() not in added.stdout + added.stderr
    listed = cloud("key", "list", "--state", state.path).stdout
    assert [line.split()[-1] for line in listed.splitlines()] == ["first", "clinic-2"]
    assert cloud("key", "remove", "clinic-2", "--state", state.path).returncode == 0
    assert "clinic-2" not in cloud("key", "list", "--state", state.path).stdout


def test_an_identity_is_rotated_by_command(tmp_path):
    state = make_state(tmp_path / "state")
    old = state.pin.read_text().strip()
    begun = cloud("identity", "rotate", "--state", state.path, "--overlap-days", 7)
    assert begun.returncode == 0
    assert "nearfar trust add NAME --statement" in begun.stderr
    assert state.pin.read_text().strip() == old
    done = cloud("identity", "rotate", "--state", state.path, "--activate")
    assert done.stdout == begun.stdout
    assert state.pin.read_text() == done.stdout


def test_tokens_are_issued_by_command(tmp_path):
    state = make_state(tmp_path / "state")
    client = ClientKey.generate().public
    order = ("token", "issue", "--tenant", "clinic-2", "--key", client, "--state", state.path)
    missing = cloud(*order)
    assert missing.returncode == 2
    assert "nearfar cloud token init" in missing.stderr
    assert cloud("token", "init", "--state", state.path, "--issuer", "clinic-it").returncode == 0
    token = cloud(*order, "--minutes", 5).stdout.strip()
    claims = jwt.decode(token, options={"verify_signature": False})
    assert (claims["iss"], claims["sub"]) == ("clinic-it", "clinic-2")
    assert claims["aud"] == state.pin.read_text().strip()
    assert claims["exp"] - claims["iat"] == 300
    assert not {"models", "max_priority"} & set(claims)
    limited = cloud(*order, "--model", "chat-*", "--model", "minilm", "--max-priority", 3)
    claims = jwt.decode(limited.stdout.strip(), options={"verify_signature": False})
    assert (claims["models"], claims["max_priority"]) == (["chat-*", "minilm"], 3)
    assert cloud(*order, "--max-priority", 10).returncode == 2
    output = tmp_path / "token.txt"
    for _ in range(2):  # whatever renews it, runs this again and again
        done = cloud(*order, "--output", output)
        assert done.returncode == 0
    assert output.stat().st_mode & 0o777 == 0o600
    assert output.read_text().strip() not in done.stdout + done.stderr
    assert cloud(*order, "--minutes", 11).returncode == 2


@pytest.mark.parametrize(
    ("arguments", "teaches"),
    [
        ([], "client.toml"),
        (["init"], "api-keys.json"),
        (["serve"], "/readyz"),
        (["key", "add"], "only its hash is stored"),
        (["identity", "new"], "Every client must pin"),
        (["identity", "rotate"], "rotation.txt"),
        (["token", "init"], "token-issuers.json"),
        (["token", "issue"], "only the holder of the client's key"),
    ],
)
def test_help_teaches(arguments, teaches):
    done = cloud(*arguments, "--help")
    assert done.returncode == 0
    assert teaches in done.stdout


def test_importing_the_commands_is_light():
    code = (
        "import sys, cloud_runtime.commands\n"
        "heavy = {'numpy', 'onnxruntime', 'websockets', 'cryptography', 'asyncio'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8443", ("127.0.0.1", 8443)),
        ("[::1]:0", ("::1", 0)),
        (":443", ("", 443)),
        ("gpu.example.org:443", ("gpu.example.org", 443)),
    ],
)
def test_addresses_are_read_as_people_write_them(text, address):
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "localhost", "::1", "::1:443", "x:", "x:y", "x:65536", "x:-1"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ConfigError, match="is not an address"):
        parse_address(text)


class _Attester:
    claims = b"measurement"

    def evidence(self, binding: bytes) -> bytes:
        return binding


def test_an_attestation_plug_in_is_named_by_module_and_function():
    attester = load_attester(f"{__name__}:_Attester")
    assert attester.claims == b"measurement"
    assert attester.evidence(b"binding") == b"binding"


@pytest.mark.parametrize(
    "reference", ["", "no_such_module:x", "json:nothing", "json:dumps", "builtins:object", "a b:c"]
)
def test_what_is_no_attester_stops_the_start(reference):
    with pytest.raises(ConfigError, match="cannot be used"):
        load_attester(reference)
