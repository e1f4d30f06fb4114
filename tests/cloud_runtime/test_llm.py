"""The real language model, streamed from a real cloud runtime process."""

from __future__ import annotations

import asyncio
import signal

import pytest

from nearfar.bundle import BundleStore
from nearfar.engines.base import SessionOptions
from nearfar.engines.model import LoadedModel
from nearfar.errors import Cancelled, InvalidInput
from nearfar.generation import ChatMessage, GenerationOptions, Prompt
from tests.cloud_runtime.support import WireClient, make_state, run
from tests.cloud_runtime.test_commands import serving

pytestmark = pytest.mark.models

PROMPT = Prompt(messages=(ChatMessage(role="user", content="What is the capital of Germany?"),))


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return make_state(tmp_path_factory.mktemp("cloud") / "state")


def test_a_streamed_answer_equals_the_local_greedy_one(bundles_dir, state, tmp_path):
    with serving(bundles_dir, state, tmp_path / "log", "--model", "assistant") as server:

        async def main():
            async with WireClient.connect(server.reach) as client:
                stream = await client.start_generate("assistant", tokens=24, prompt=PROMPT)
                return await client.collect(stream)

        answer = run(main(), 240)
        assert server.end(signal.SIGTERM) == 0

    bundle = BundleStore(bundles_dir).open("assistant")
    local = LoadedModel(bundle, answer.fin.variant, SessionOptions())
    chunks = list(local.generate(PROMPT, GenerationOptions(max_new_tokens=24)))
    assert answer.text == "".join(chunk.text for chunk in chunks)
    assert "Berlin" in answer.text
    assert answer.fin.usage == chunks[-1].usage
    assert answer.fin.finish_reason == chunks[-1].finish_reason


def test_sigterm_lets_an_open_answer_finish_and_a_second_sigint_does_not(
    bundles_dir, state, tmp_path
):
    with serving(bundles_dir, state, tmp_path / "log", "--model", "assistant") as server:

        async def main() -> None:
            async with WireClient.connect(server.reach) as client:
                stream = await client.start_generate("assistant", tokens=16, prompt=PROMPT)
                await client.next(stream)
                server.process.send_signal(signal.SIGTERM)
                answer = await client.collect(stream)
                assert answer.fin.finish_reason in ("stop", "length")
                assert client.goaway is not None

        run(main(), 240)
        assert server.end() == 0

    with serving(bundles_dir, state, tmp_path / "log", "--model", "assistant") as server:

        async def interrupt() -> None:
            async with WireClient.connect(server.reach) as client:
                stream = await client.start_generate("assistant", tokens=2000, prompt=PROMPT)
                await client.next(stream)
                server.process.send_signal(signal.SIGINT)
                while client.goaway is None:
                    await asyncio.sleep(0.01)
                server.process.send_signal(signal.SIGINT)
                await client.websocket.wait_closed()

        run(interrupt(), 240)
        assert server.process.wait(30) == 130


def test_a_prompt_longer_than_the_context_is_refused_and_a_cancelled_answer_ends(
    bundles_dir, state, tmp_path
):
    with serving(bundles_dir, state, tmp_path / "log", "--model", "assistant") as server:

        async def main() -> None:
            async with WireClient.connect(server.reach) as client:
                stream = await client.start_generate("assistant", tokens=8, text="word " * 20_000)
                with pytest.raises(InvalidInput, match="context"):
                    await client.collect(stream)
                stream = await client.start_generate("assistant", tokens=2000, text="Once upon")
                await client.next(stream)
                await client.cancel(stream)
                with pytest.raises(Cancelled):
                    await client.collect(stream)

        run(main(), 240)
