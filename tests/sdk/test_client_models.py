"""The main job on the real models: answers, embeddings, and a cloud killed in the middle of one."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from nearfar.errors import InvalidInput, StreamInterrupted
from sdk import AsyncClient, Client, CloudConfig
from sdk.quickstart.cloud_process import CloudProcess
from tests.support.two_routes import POLICY

pytestmark = pytest.mark.models

QUESTION = [{"role": "user", "content": "What is the capital of Germany?"}]


@pytest.fixture(scope="module")
def cloud(tmp_path_factory, bundles_dir):
    root = tmp_path_factory.mktemp("cloud")
    process = CloudProcess(state=root / "state", models=bundles_dir, log=root / "cloud.log")
    process.provision()
    process.start()
    yield process
    process.stop()


def far(cloud: CloudProcess) -> CloudConfig:
    return CloudConfig(
        url=cloud.url,
        identity=cloud.pin,
        credentials=f"file:{cloud.state / 'client-key.txt'}",
        ca_file=cloud.state / "ca.pem",
    )


@pytest.fixture(scope="module")
def client(cloud, bundles_dir):
    with Client(
        cloud=far(cloud), models=bundles_dir, policy=POLICY, sensitivity="public"
    ) as opened:
        yield opened


@pytest.mark.parametrize("mode", ["edge_only", "cloud_only"])
def test_the_assistant_answers_on_both_routes(client, mode):
    stream = client.chat("assistant", QUESTION, max_new_tokens=24, mode=mode)
    assert "Berlin" in stream.text()
    assert stream.finish_reason in ("stop", "length")
    assert stream.usage.prompt_tokens > 5
    assert 0 < stream.timings.ttft_ms <= stream.timings.total_ms
    assert (stream.bytes_sent > 0) == (mode == "cloud_only")


@pytest.mark.parametrize("mode", ["edge_only", "cloud_only"])
def test_sentences_that_mean_the_same_are_near(cloud, bundles_dir, mode):
    texts = ["A cat sits on the mat.", "There is a cat on the rug.", "Stocks fell sharply today."]
    # A client of its own: one client keeps to one variant unless the bundle lets them be mixed.
    with Client(
        cloud=far(cloud), models=bundles_dir, policy=POLICY, sensitivity="public"
    ) as client:
        vectors = client.embed("minilm", texts, mode=mode).vectors
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3


def test_a_prompt_longer_than_the_context_is_refused_on_both_routes(client):
    for mode in ("edge_only", "cloud_only"):
        with pytest.raises(InvalidInput):
            client.generate("assistant", "word " * 20_000, mode=mode).text()


def test_stop_strings_end_an_answer(client):
    stream = client.generate(
        "assistant", "1, 2, 3, 4,", max_new_tokens=30, stop=["7"], mode="edge_only"
    )
    assert "7" not in stream.text()
    assert stream.finish_reason == "stop_string"


def test_closing_a_stream_frees_the_device_at_once(client):
    stream = client.generate("assistant", "Once upon a time", max_new_tokens=400, mode="edge_only")
    next(stream)
    stream.close()
    assert stream.finish_reason == "cancelled"
    answer = client.chat(
        "assistant", QUESTION, max_new_tokens=8, mode="edge_only", deadline_ms=20_000
    )
    assert answer.text()


def test_a_cloud_killed_in_the_middle_gives_a_whole_answer_or_a_typed_error(client, cloud):
    stream = client.generate(
        "assistant", "Once upon a time", max_new_tokens=120, mode="prefer_cloud"
    )
    chunks = []
    try:
        for chunk in stream:
            chunks.append(chunk)
            if len(chunks) == 8:
                cloud.kill()
    finally:
        cloud.start()
    assert {c.route for c in chunks} == {"cloud", "edge"}
    assert sum(c.handover for c in chunks) == 1
    assert stream.route.path == "cloud → edge"
    assert stream.finish_reason in ("stop", "length")
    assert stream.text() == "".join(c.text for c in chunks)
    if stream.finish_reason == "length":
        assert stream.usage.completion_tokens == 120


def test_a_cloud_killed_in_the_middle_without_a_device_is_an_interrupted_stream(cloud):
    with Client(cloud=far(cloud), policy=POLICY, sensitivity="public") as client:
        stream = client.generate("assistant", "Once upon a time", max_new_tokens=200)
        for _ in range(5):
            next(stream)
        cloud.kill()
        try:
            with pytest.raises(StreamInterrupted) as caught:
                stream.text()
        finally:
            cloud.start()
        assert caught.value.received_tokens >= 5
        assert stream.finish_reason is None


def test_an_async_client_streams_from_both_routes_at_once(cloud, bundles_dir):
    async def body():
        async with AsyncClient(
            cloud=far(cloud), models=bundles_dir, policy=POLICY, sensitivity="public"
        ) as client:

            async def ask(mode: str) -> str:
                stream = await client.chat("assistant", QUESTION, max_new_tokens=12, mode=mode)
                return await stream.text()

            return await asyncio.gather(ask("edge_only"), ask("cloud_only"))

    answers = asyncio.run(asyncio.wait_for(body(), 120))
    assert all("Berlin" in answer for answer in answers)
