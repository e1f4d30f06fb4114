"""Hedged streams: the client, a scripted device and a scripted cloud."""

from __future__ import annotations

import asyncio
import time

import pytest

from nearfar.errors import DeadlineExceeded, EngineError, StreamInterrupted
from nearfar.wire import messages as wire
from sdk import AsyncClient
from sdk.routing.hedging import HedgePlan
from tests.support.scripted_cloud import STORY, TENSOR, tell
from tests.support.scripted_edge import ScriptedEdge, put_into
from tests.support.two_routes import POLICY, hang


def learn_story(client) -> None:
    for mode in ("cloud_only", "edge_only") * 8:
        client.generate("story", "once", max_new_tokens=3, mode=mode).text()


def test_the_device_begins_an_answer_that_a_silent_cloud_does_not(both, cloud):
    learn_story(both)
    cloud.behaviour = hang
    stream = both.generate(
        "story", "once", max_new_tokens=4, mode="prefer_cloud", deadline_ms=20_000
    )
    chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == "e0 e1 e2 e3 "
    assert not any(chunk.handover for chunk in chunks)
    assert {chunk.route for chunk in chunks} == {"edge"}
    assert stream.route.name == "edge"
    assert "the edge began first" in stream.route.hedge
    assert stream.finish_reason == "length"
    assert stream.timings.ttft_ms < 5000
    cloud.wait_for(wire.Cancel)


def test_a_cloud_that_begins_meanwhile_is_kept_and_the_device_is_stopped(both, cloud):
    learn_story(both)
    before = len(both.device.calls)

    def late(session, message, tensors):
        while len(both.device.calls) == before:
            yield 0.002
        yield from tell(session, message, 4)

    both.device.pause_s = 0.5
    cloud.behaviour = late
    stream = both.generate(
        "story", "once", max_new_tokens=4, mode="prefer_cloud", deadline_ms=20_000
    )
    assert {chunk.route for chunk in stream} == {"cloud"}
    assert "the cloud began first" in stream.route.hedge
    assert stream.finish_reason == "length"


def test_an_answer_that_has_begun_is_not_hedged(both, cloud, monkeypatch):
    learn_story(both)
    planned = HedgePlan(first="cloud", other="edge", after_ms=900.0, why="a test says so")
    monkeypatch.setattr("sdk.answer.plan", lambda decision: planned)
    monkeypatch.setattr("sdk.stalls.PAUSE_MARGIN_MS", 60_000.0)  # nor taken for stalled
    before = len(both.device.calls)

    def slow(session, message, tensors):
        session.send(wire.Token(stream=message.stream, index=0, text="c0 "))
        yield 30

    cloud.behaviour = slow
    stream = both.generate("story", "once", max_new_tokens=4, mode="prefer_cloud", deadline_ms=1500)
    assert [chunk.text for chunk in stream] == ["c0 "]
    assert stream.finish_reason == "deadline"
    assert len(both.device.calls) == before
    assert stream.route.hedge == ""


@pytest.mark.parametrize("deadline_ms", [None, 60_000.0])
def test_a_cloud_that_falls_silent_in_an_answer_is_left_and_the_device_goes_on(
    both, cloud, deadline_ms
):
    learn_story(both)

    def stuck(session, message, tensors):
        for index in range(2):
            session.send(wire.Token(stream=message.stream, index=index, text=f"c{index} "))
        yield 30

    cloud.behaviour = stuck
    stream = both.generate(
        "story", "once", max_new_tokens=4, mode="prefer_cloud", deadline_ms=deadline_ms
    )
    chunks = list(stream)
    assert [chunk.text for chunk in chunks] == ["c0 ", "c1 ", "e0 ", "e1 "]
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
    assert [chunk.handover for chunk in chunks] == [False, False, True, False]
    assert both.device.calls[-1][2].answer_so_far == "c0 c1 "
    assert both._known.endpoints[0].breaker_of("story").failures == 1
    cloud.wait_for(wire.Cancel)


def test_a_silent_cloud_is_waited_for_where_nobody_else_may_go_on(both, cloud):
    learn_story(both)

    def late(session, message, tensors):
        session.send(wire.Token(stream=message.stream, index=0, text="c0 "))
        yield 1.0  # longer than any pause so far, by more than is taken for a stall
        session.send(wire.Token(stream=message.stream, index=1, text="c1 "))
        yield 30

    cloud.behaviour = late
    stream = both.generate("story", "once", max_new_tokens=4, mode="cloud_only")
    assert [next(stream).text, next(stream).text] == ["c0 ", "c1 "]
    stream.close()


def test_a_device_that_breaks_after_it_outran_the_cloud_is_repaired_or_told(both, cloud):
    learn_story(both)
    cloud.behaviour = hang
    both.device.cut_after = 2
    both.device.fail_with = EngineError("it broke")
    stream = both.generate("story", "once", max_new_tokens=4, mode="prefer_cloud", deadline_ms=3000)
    with pytest.raises(StreamInterrupted, match="it broke"):
        stream.text()
    assert stream.partial_text == "e0 e1 "


def test_an_answer_without_text_is_no_success(both, cloud):
    cloud.behaviour = lambda session, message, tensors: tell(session, message, 0)
    stream = both.generate("story", "once", max_new_tokens=4, mode="prefer_cloud")
    assert stream.text() == "e0 e1 e2 e3 "
    assert stream.route.path == "cloud → edge"
    with pytest.raises(EngineError, match="empty answer"):
        both.generate("story", "once", max_new_tokens=4, mode="cloud_only").text()


def test_async_streams_are_hedged_alike(cloud, tmp_path):
    async def run() -> None:
        (tmp_path / "store").mkdir()
        async with AsyncClient(
            cloud=cloud.config(), models=tmp_path / "store", policy=POLICY, sensitivity="public"
        ) as client:
            device = put_into(client, ScriptedEdge((TENSOR, STORY)))
            for mode in ("cloud_only", "edge_only") * 8:
                await (await client.generate("story", "x", max_new_tokens=3, mode=mode)).text()
            cloud.behaviour = hang
            ask = {"max_new_tokens": 4, "mode": "prefer_cloud", "deadline_ms": 20_000}
            stream = await client.generate("story", "x", **ask)
            assert await stream.text() == "e0 e1 e2 e3 "
            assert "the edge began first" in stream.route.hedge
            before = len(device.calls)

            def late(session, message, tensors):
                while len(device.calls) == before:
                    yield 0.002
                yield from tell(session, message, 4)

            for _ in range(30):
                client._core.hedging.request()
            client._known.endpoints[0].answered("tensor", time.monotonic())
            device.pause_s = 0.5
            cloud.behaviour = late
            stream = await client.generate("story", "x", **ask)
            await stream.text()
            assert stream.route.name == "cloud"
            assert "the cloud began first" in stream.route.hedge

    asyncio.run(run())


# -- streamed answers that the device is late with -------------------------------------------------

LATE_DEVICE = HedgePlan(first="edge", other="cloud", after_ms=30.0, why="a test says so")
STORY_HERE = {"max_new_tokens": 4, "mode": "prefer_edge", "deadline_ms": 20_000}


def test_the_cloud_begins_an_answer_that_the_device_is_late_with(both, cloud, monkeypatch):
    learn_story(both)
    monkeypatch.setattr("sdk.answer.plan", lambda decision: LATE_DEVICE)
    both.device.pause_s = 4.0
    started_s = time.monotonic()
    stream = both.generate("story", "once", **STORY_HERE)
    chunks = list(stream)
    assert time.monotonic() - started_s < 3.5  # the device was not waited for
    assert both.device.answering == 1
    assert "".join(chunk.text for chunk in chunks) == "w0 w1 w2 w3 "
    assert {chunk.route for chunk in chunks} == {"cloud"}
    assert not any(chunk.handover for chunk in chunks)
    assert "the cloud was started as well: the edge had not answered" in stream.route.hedge
    assert "the cloud began first" in stream.route.hedge
    assert stream.bytes_sent > 0
    ends_s = time.monotonic() + 10.0
    while both.device.answering:
        assert time.monotonic() < ends_s, "the device was not told to stop"
        time.sleep(0.01)


def test_a_device_that_begins_meanwhile_is_kept_and_the_cloud_is_stopped(both, cloud, monkeypatch):
    learn_story(both)
    monkeypatch.setattr("sdk.answer.plan", lambda decision: LATE_DEVICE)
    cloud.behaviour = hang
    both.device.pause_s = 0.3
    stream = both.generate("story", "once", **STORY_HERE)
    assert stream.text() == "e0 e1 e2 e3 "
    assert "the edge began first" in stream.route.hedge
    assert stream.route.name == "edge"
    cloud.wait_for(wire.Cancel)


def test_a_device_that_breaks_while_the_cloud_is_asked_leaves_the_answer_to_it(
    both, cloud, monkeypatch
):
    learn_story(both)
    monkeypatch.setattr("sdk.answer.plan", lambda decision: LATE_DEVICE)
    before = len(cloud.saw(wire.Generate))
    broke_s = []

    def after_the_device(session, message, tensors):
        while not broke_s:
            yield 0.005
        yield 0.05
        yield from tell(session, message, 4)

    def breaks(*_: object, **__: object):
        while len(cloud.saw(wire.Generate)) == before:
            time.sleep(0.005)
        broke_s.append(time.monotonic())
        raise EngineError("it broke")

    cloud.behaviour = after_the_device
    monkeypatch.setattr(both.device, "generate", breaks)
    stream = both.generate("story", "once", **STORY_HERE)
    assert stream.text() == "w0 w1 w2 w3 "
    assert stream.route.path == "edge → cloud"
    assert len(cloud.saw(wire.Generate)) == before + 1  # the one that was under way


def test_a_cloud_that_refuses_leaves_the_device_at_work(both, cloud, monkeypatch):
    learn_story(both)
    monkeypatch.setattr("sdk.answer.plan", lambda decision: LATE_DEVICE)
    cloud.behaviour = lambda session, message, tensors: tell(session, message, 0)
    both.device.pause_s = 0.3
    stream = both.generate("story", "once", **STORY_HERE)
    assert stream.text() == "e0 e1 e2 e3 "
    assert stream.route.name == "edge"


def test_personal_text_is_never_sent_because_the_device_is_late(both, cloud, monkeypatch):
    learn_story(both)
    monkeypatch.setattr("sdk.answer.plan", lambda decision: LATE_DEVICE)
    before = len(cloud.saw(wire.Generate))
    both.device.pause_s = 0.2
    stream = both.generate(
        "story", "once", max_new_tokens=2, sensitivity="personal", deadline_ms=20_000
    )
    assert stream.text() == "e0 e1 "
    assert stream.route.hedge == ""
    assert len(cloud.saw(wire.Generate)) == before


def test_the_deadline_is_heard_while_the_device_reads_a_prompt(both):
    learn_story(both)
    both.device.pause_s = 3.0
    started_s = time.monotonic()
    stream = both.generate("story", "once", max_new_tokens=4, mode="edge_only", deadline_ms=300)
    with pytest.raises(DeadlineExceeded) as caught:
        stream.text()
    assert time.monotonic() - started_s < 2.0
    assert caught.value.tried == ("edge",)


def test_a_handover_that_comes_too_late_keeps_the_text_so_far(both, cloud):
    learn_story(both)

    def breaks(session, message, tensors):
        session.send(wire.Token(stream=message.stream, index=0, text="w0 "))
        yield 0.05
        session.send(wire.Error(stream=message.stream, code="engine", problem="it broke"))

    cloud.behaviour = breaks
    both.device.pause_s = 3.0
    started_s = time.monotonic()
    stream = both.generate("story", "once", max_new_tokens=4, mode="prefer_cloud", deadline_ms=900)
    assert stream.text() == "w0 "
    assert stream.finish_reason == "deadline"
    assert time.monotonic() - started_s < 2.5

    async def run() -> None:
        async with AsyncClient(
            cloud=cloud.config(), models=both._edge.store, policy=POLICY, sensitivity="public"
        ) as client:
            put_into(client, both.device)
            answer = await client.generate(
                "story", "once", max_new_tokens=4, mode="prefer_cloud", deadline_ms=900
            )
            assert await answer.text() == "w0 "
            assert answer.finish_reason == "deadline"

    asyncio.run(run())


def test_async_streams_that_the_device_is_late_with_are_hedged_alike(cloud, tmp_path, monkeypatch):
    async def run() -> None:
        (tmp_path / "store").mkdir()
        async with AsyncClient(
            cloud=cloud.config(), models=tmp_path / "store", policy=POLICY, sensitivity="public"
        ) as client:
            device = put_into(client, ScriptedEdge((TENSOR, STORY)))
            for mode in ("cloud_only", "edge_only") * 8:
                await (await client.generate("story", "x", max_new_tokens=3, mode=mode)).text()
            monkeypatch.setattr("sdk.answer.plan", lambda decision: LATE_DEVICE)
            device.pause_s = 1.0
            stream = await client.generate("story", "x", **STORY_HERE)
            assert await stream.text() == "w0 w1 w2 w3 "
            assert "the cloud began first" in stream.route.hedge
            cloud.behaviour = hang
            device.pause_s = 0.1
            for _ in range(30):
                client._core.hedging.request()  # earns the next one
            stream = await client.generate("story", "x", **STORY_HERE)
            assert await stream.text() == "e0 e1 e2 e3 "
            assert "the edge began first" in stream.route.hedge
            device.pause_s = 3.0
            started_s = time.monotonic()
            stream = await client.generate(
                "story", "x", max_new_tokens=4, mode="edge_only", deadline_ms=200
            )
            with pytest.raises(DeadlineExceeded):
                await stream.text()
            assert time.monotonic() - started_s < 2.5

    asyncio.run(run())
