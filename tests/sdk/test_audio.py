"""Signals heard piece by piece through the client: state, failures, both kinds of clients."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from nearfar.errors import CloudUnavailable, InvalidInput, ModelNotFound
from sdk import AsyncClient, Client
from tests.support import tiny

pytest.importorskip("onnxruntime")

SIGNAL = np.sin(np.arange(30)).astype(np.float32)


def levels(signal: np.ndarray, window: int = 4, context: int = 2) -> list[float]:
    """What `tiny.stream_model` says, computed by hand."""
    padded = np.concatenate([np.zeros(context), signal])
    found, state = [], 0.0
    for start in range(0, len(signal) - window + 1, window):
        state = state / 2 + float(np.abs(padded[start : start + window + context]).mean())
        found.append(state)
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    tiny.write_tiny_stream_bundle(path / "ear")
    tiny.write_tiny_tensor_bundle(path / "tiny", task="tensor")
    return path


@pytest.fixture
def client(store):
    with Client(models=store) as opened:
        yield opened


def test_every_full_window_is_answered_with_what_was_heard_before(client):
    stream = client.stream_audio("ear", sample_rate_hz=8)
    assert stream.feed(SIGNAL[:3]) == []
    answers = stream.feed(SIGNAL[3:18]) + stream.feed(SIGNAL[18:])
    np.testing.assert_allclose([a.score for a in answers], levels(SIGNAL), rtol=1e-5)
    assert [(a.start_s, a.end_s) for a in answers[:2]] == [(0.0, 0.5), (0.5, 1.0)]
    assert all(str(a.route).startswith("edge") and a.result.variant == "fp32" for a in answers)
    assert stream.position_s == 3.5
    (last,) = stream.finish()
    padded = np.concatenate([SIGNAL, np.zeros(2)])
    assert last.score == pytest.approx(levels(padded)[-1], rel=1e-5)
    assert stream.state["state"] == np.float32(last.score)
    assert stream.finish() == []


def test_a_reset_stream_knows_nothing_of_the_past(client):
    stream = client.stream_audio("ear", sample_rate_hz=8)
    first = stream.feed(SIGNAL[:8])
    stream.reset()
    again = stream.feed(SIGNAL[:8])
    assert [a.score for a in first] == [a.score for a in again]
    assert again[0].start_s == 0


def test_a_failed_window_is_answered_later_and_nothing_is_lost(client, monkeypatch):
    stream = client.stream_audio("ear", sample_rate_hz=8)
    infer, calls = client.infer, []

    def third_fails(model, feeds, **options):
        calls.append(options)
        if len(calls) == 3:
            raise CloudUnavailable("gone", fix="wait")
        return infer(model, feeds, **options)

    monkeypatch.setattr(client, "infer", third_fails)
    with pytest.raises(CloudUnavailable):
        stream.feed(SIGNAL)
    answers = stream.feed(b"")
    np.testing.assert_allclose([a.score for a in answers], levels(SIGNAL), rtol=1e-5)
    assert [a.start_s for a in answers] == [0.5 * n for n in range(7)]


def test_options_go_with_every_window(client):
    stream = client.stream_audio("ear", sample_rate_hz=16, mode="edge_only", deadline_ms=60_000)
    answers = stream.feed(SIGNAL)
    np.testing.assert_allclose([a.score for a in answers], levels(SIGNAL, 8, 4), rtol=1e-5)
    with pytest.raises(InvalidInput, match="mode"):
        client.stream_audio("ear", sample_rate_hz=8, mode="nowhere")


def test_state_may_also_be_carried_by_hand(client):
    feeds = {
        "x": np.concatenate([np.zeros(2, np.float32), SIGNAL[:4]])[None],
        "state": np.zeros((1, 1), np.float32),
        "sr": np.array(8, np.int64),
    }
    outputs = client.infer("ear", feeds).outputs
    assert outputs["level"] == outputs["stateN"] == np.float32(levels(SIGNAL)[0])


def test_what_cannot_be_streamed_is_said_at_once(client):
    with pytest.raises(InvalidInput, match="takes no signal"):
        client.stream_audio("tiny")
    with pytest.raises(InvalidInput, match="8, 16 Hz"):
        client.stream_audio("ear", sample_rate_hz=44_100)
    with pytest.raises(ModelNotFound, match="ear"):
        client.stream_audio("nose")
    with pytest.raises(InvalidInput) as caught:
        client.embed("ear", ["text"])
    assert caught.value.field == "model"


def test_the_asynchronous_client_hears_the_same(store):
    async def heard() -> list[float]:
        async with AsyncClient(models=store) as client:
            stream = await client.stream_audio("ear", sample_rate_hz=8)
            answers = await stream.feed(SIGNAL)
            answers += await stream.finish()
            return [answer.score for answer in answers]

    padded = np.concatenate([SIGNAL, np.zeros(2)])
    np.testing.assert_allclose(asyncio.run(heard()), levels(padded), rtol=1e-5)


def test_more_numbers_than_one_are_no_score(client):
    stream = client.stream_audio("ear", sample_rate_hz=8)
    (answer,) = stream.feed(SIGNAL[:4])
    answer.outputs["other"] = np.zeros(3)
    with pytest.raises(InvalidInput, match="more than one number"):
        _ = answer.score
