"""Client, proxy that terminates TLS, cloud runtime: what the proxy, logs, errors and files hold."""

from __future__ import annotations

import asyncio
import base64
import gc
import logging
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nearfar.errors import NearfarError
from nearfar.generation import GenerationChunk, Usage
from nearfar.secure.identity import ServerIdentity
from sdk import Client, CloudConfig, parse_policy
from tests.attacks.terminator import Terminator
from tests.cloud_runtime.support import Running, ScriptedModel, make_state, run, running, served

PROMPT = "41d7-prompt-canary"
ANSWER = "9b02-answer-canary"
TENSOR = "c6f1-tensor-cana"  # 16 bytes: four FP32 numbers
TEXT = "77aa-text-canary"
FAULT = "03be-fault-canary"
CANARIES = (PROMPT, ANSWER, TENSOR, TEXT, FAULT)

POLICY = parse_policy(
    """
version = 1
[[rule]]
id = "open"
when = { sensitivity = "public" }
effect = "cloud_ok"
"""
)


class Storyteller(ScriptedModel):
    """Answers with a canary, token by token and in one piece."""

    def generate(self, prompt, options, cancel=None) -> Iterator[GenerationChunk]:
        if self.error:
            raise self.error
        said = prompt.text or prompt.messages[-1].content
        for index, text in enumerate((said, ANSWER, *ANSWER)):
            yield GenerationChunk(index=index, text=text)
        usage = Usage(prompt_tokens=1, completion_tokens=2)
        yield GenerationChunk(index=2 + len(ANSWER), text="", finish_reason="stop", usage=usage)


def disguises(canary: str) -> set[bytes]:
    """The ways in which bytes get into logs, headers and files."""
    plain = canary.encode()
    forms = {plain, plain[::-1], plain.hex().encode(), plain.hex().upper().encode()}
    forms |= {plain.upper(), canary.encode("utf-16-le"), canary.encode("utf-16-be")}
    forms.add(" ".join(f"{byte:02x}" for byte in plain).encode())
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for shift in range(3):
            # What is the same whatever stands before and after.
            inner = encode(bytes(shift) + plain)
            forms.add(inner[(0, 2, 3)[shift] : (shift + len(plain)) * 8 // 6])
    (number,) = np.frombuffer(plain[:4], np.float32)  # as the text of an array shows it
    return forms | {str(number).encode(), repr(float(number)).encode()}


def found(haystack: bytes, secrets: tuple[str, ...]) -> list[str]:
    return [secret for secret in secrets if any(form in haystack for form in disguises(secret))]


def test_the_search_finds_what_is_there() -> None:
    for form in disguises(PROMPT):
        assert found(b"\x00\x17" + form + b"\xff", CANARIES) == [PROMPT]
    for shift in range(4):
        hidden = base64.b64encode(b"xyzw"[:shift] + PROMPT.encode() + b"zz")
        assert found(hidden, CANARIES) == [PROMPT]
    assert found(b"nothing", CANARIES) == []


def chain_of(error: BaseException) -> str:
    """An error and everything behind it, as a report or a debugger would show it."""
    parts, waiting, met = [], [error], set()
    while waiting:
        current = waiting.pop()
        if id(current) in met:
            continue
        met.add(id(current))
        parts += [str(current), repr(current), repr(current.args), repr(vars(current))]
        # Without source lines: those of this very test name the canaries.
        parts += [repr(frame.name) for frame in traceback.extract_tb(current.__traceback__)]
        waiting += [e for e in (current.__cause__, current.__context__) if e is not None]
    return "\n".join(parts)


def use(config: CloudConfig) -> tuple[list[BaseException], str]:
    """An app: requests that work and requests that fail. Its errors, and what it was told."""
    errors: list[BaseException] = []
    tensor = np.frombuffer(TENSOR.encode(), np.float32).reshape(1, 4)
    with Client(cloud=config, policy=POLICY, sensitivity="public") as client:
        result = client.infer("tensor", {"x": tensor})
        assert result.outputs["y"].tobytes() == TENSOR.encode()
        answer = client.generate("story", PROMPT, max_new_tokens=50).text()
        assert answer == PROMPT + ANSWER + ANSWER
        chat = client.chat("story", [{"role": "user", "content": PROMPT}], max_new_tokens=50)
        assert chat.text() == answer
        for attempt in (
            lambda: client.infer("broken", {"x": tensor}),
            lambda: client.generate("broken-story", PROMPT, max_new_tokens=5).text(),
            lambda: client.infer("tensor", {"x": tensor.astype(np.float64)}),
            lambda: client.infer("tensor", {"z": tensor, "x": tensor}),
            lambda: client.embed("tensor", [TEXT]),
        ):
            with pytest.raises(NearfarError) as caught:
                attempt()
            errors.append(caught.value)
        told = repr(client) + repr(config) + str(client.explain("tensor", feeds={"x": tensor}))
    return errors, told


def log_text(records: list[logging.LogRecord]) -> str:
    formatter = logging.Formatter("%(name)s %(message)s")
    return "\n".join(formatter.format(record) + repr(record.args) for record in records)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Temporary files of this process go there."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


def test_canaries_are_nowhere_but_at_the_two_ends(
    tmp_path: Path, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    models = served(
        ScriptedModel("tensor"),
        Storyteller("story", task="text-generation"),
        ScriptedModel("broken", error=ValueError(FAULT)),
        Storyteller("broken-story", task="text-generation", error=KeyError(FAULT)),
    )
    state = make_state(tmp_path / "cloud")
    proxy_state = make_state(tmp_path / "proxy")  # a CA and a certificate of its own

    async def main() -> tuple[Terminator, list[BaseException], str, str]:
        async with running(models, state) as server:
            proxy = Terminator(proxy_state, port_of(server), state.ca_certificate)
            async with proxy.listening():
                config = CloudConfig(
                    url=f"wss://localhost:{proxy.port}/v1/nearfar",
                    identity=server.pin,
                    credentials=f"file:{state.client_key}",
                    ca_file=proxy_state.ca_certificate,  # the proxy's: TLS hides nothing from it
                )
                errors, told = await asyncio.to_thread(use, config)
            return proxy, errors, told, server.token

    proxy, errors, told, token = run(main())
    gc.collect()
    secrets = (*CANARIES, token, token.partition("_")[2])

    # The proxy did see plaintext of TLS, of both directions.
    assert proxy.from_client.startswith(b"GET /v1/nearfar HTTP/1.1\r\n")
    assert proxy.from_server.startswith(b"HTTP/1.1 101 ")
    assert len(proxy.seen) > 8000
    assert found(proxy.seen, secrets) == []

    logged = log_text(caplog.records)
    assert "cloud_runtime.access" in logged
    assert "unexpected ValueError" in logged
    assert found(logged.encode(), secrets) == []

    assert len(errors) == 5
    for error in errors:
        assert found(chain_of(error).encode(), secrets) == []
    assert found(told.encode(), secrets) == []

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for path in files:
        secrets_here = CANARIES if path == state.client_key else secrets
        assert found(path.read_bytes(), secrets_here) == [], path


def test_proxy_cannot_pass_itself_off_as_the_server(tmp_path: Path) -> None:
    """With a runtime of its own behind its certificate it gets no token and no request."""
    state, other = make_state(tmp_path / "cloud"), make_state(tmp_path / "proxy")

    async def main() -> tuple[NearfarError, Running, Terminator]:
        model = ScriptedModel("tensor")
        async with running(served(model), other) as impostor:
            proxy = Terminator(other, port_of(impostor), other.ca_certificate)
            async with proxy.listening():
                config = CloudConfig(
                    url=f"wss://localhost:{proxy.port}/v1/nearfar",
                    identity=str(ServerIdentity.load(state.identity).pin),
                    credentials=f"file:{state.client_key}",
                    ca_file=other.ca_certificate,
                )

                def ask() -> NearfarError:
                    with (
                        Client(cloud=config, policy=POLICY, sensitivity="public") as client,
                        pytest.raises(NearfarError) as caught,
                    ):
                        client.infer("tensor", {"x": np.zeros((1, 4), np.float32)})
                    return caught.value

                error = await asyncio.to_thread(ask)
            assert model.runs == 0
            return error, impostor, proxy

    error, _, proxy = run(main())
    assert error.code == "security"
    assert "not the pinned one" in str(error)
    # After the HTTP request the client sent nothing but, at most, the frame that closes.
    request, _, rest = bytes(proxy.from_client).partition(b"\r\n\r\n")
    assert request.startswith(b"GET /v1/nearfar ")
    assert len(rest) < 150


def port_of(server: Running) -> int:
    return int(server.url.rpartition(":")[2].partition("/")[0])
