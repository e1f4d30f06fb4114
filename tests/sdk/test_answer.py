"""What a streamed answer keeps and hands over, piece by piece."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nearfar.errors import CloudUnavailable, DeadlineExceeded, EngineError, StreamInterrupted
from nearfar.generation import GenerationChunk, GenerationOptions, Usage
from nearfar.units import Deadline
from nearfar.wire.messages import ModelOffer
from sdk import requests
from sdk.answer import AnswerState, Summary
from sdk.cloud.link import LinkState
from sdk.core import Core
from sdk.edge import EdgeRoute
from sdk.knowledge import Knowledge
from sdk.policy import parse_policy
from sdk.requests import Request
from tests.support.scripted_cloud import STORY
from tests.support.scripted_edge import ScriptedEdge

OPEN = parse_policy('version = 1\n[[rule]]\nid = "open"\nwhen = {}\neffect = "cloud_ok"\n')
SUMMARY = Summary(
    variant="int4", execution_provider="CPU", queue_ms=1.0, prefill_ms=2.0, decode_ms=3.0
)


@pytest.fixture
def state(tmp_path):
    edge = EdgeRoute(tmp_path)
    edge._runtime = ScriptedEdge((STORY,))
    offers = {"story": ModelOffer(manifest=STORY, variant="fp32")}
    link = SimpleNamespace(
        state=LinkState(is_connected=True, offers=offers),
        config=SimpleNamespace(
            name="main", region=None, shaping="balanced", attestation=None, verifier=None
        ),
    )
    core = Core(policy=OPEN, default_sensitivity=None, known=Knowledge(edge=edge, link=link))

    def make(max_new_tokens: int = 10, deadline: Deadline | None = None) -> AnswerState:
        prompt = requests.text_prompt("Once")
        options = GenerationOptions(max_new_tokens=max_new_tokens)
        request = Request(
            method="generate",
            model="story",
            mode="prefer_cloud",
            deadline=deadline or Deadline(),
            prompt=prompt,
            options=options,
            size=requests.prompt_size(prompt, options),
        )
        return AnswerState(core, request, core.decide(request))

    return make


def token(index: int, text: str) -> GenerationChunk:
    return GenerationChunk(index=index, text=text)


def test_pieces_without_text_are_not_shown(state):
    answer = state()
    assert answer.take(token(0, ""), None) is None
    chunk = answer.take(token(1, "é"), None)
    assert (chunk.text, chunk.index, chunk.handover) == ("é", 1, False)


def test_tokens_whose_text_was_held_back_are_made_again_by_the_next_route(state):
    answer = state(max_new_tokens=10)
    answer.take(token(0, "a"), None)
    answer.take(token(1, "b"), None)
    answer.take(token(2, ""), None)
    answer.take(token(3, ""), None)
    answer.fail(CloudUnavailable("gone"))
    assert answer.prompt().answer_so_far == "ab"
    assert answer.options().max_new_tokens == 8
    chunk = answer.take(token(0, "c"), None)
    assert (chunk.index, chunk.handover) == (2, True)


def test_a_route_that_fails_before_any_text_is_no_handover(state):
    answer = state()
    answer.fail(CloudUnavailable("gone"))
    assert answer.prompt().answer_so_far == ""
    assert not answer.take(token(0, "a"), None).handover


def test_the_text_of_the_last_piece_belongs_to_the_answer(state):
    answer = state()
    answer.take(token(0, "a"), None)
    last = GenerationChunk(
        index=2,
        text="b",
        finish_reason="stop",
        usage=Usage(prompt_tokens=4, completion_tokens=2),
    )
    assert answer.take(last, SUMMARY).text == "b"
    assert answer.text == "ab"
    assert answer.finish_reason == "stop"
    assert answer.usage == Usage(prompt_tokens=4, completion_tokens=2)
    assert answer.timings.compute_ms == 5.0


def test_repeated_failure_ends_interrupted_and_keeps_the_text(state):
    answer = state()
    answer.take(token(0, "a"), None)
    answer.fail(CloudUnavailable("gone"))
    with pytest.raises(StreamInterrupted) as caught:
        answer.fail(EngineError("broken"))
    assert caught.value.received_tokens == 1
    assert answer.text == "a"
    assert answer.is_over
    assert answer.finish_reason is None


def test_a_passed_deadline_marks_what_came(state):
    answer = state(deadline=Deadline(0.0001))
    assert answer.take(token(0, "a"), None).text == "a"
    assert answer.finish_reason == "deadline"


def test_a_deadline_that_an_engine_reports_before_any_text_is_exceeded(state):
    answer = state()
    last = GenerationChunk(index=0, text="", finish_reason="deadline")
    with pytest.raises(DeadlineExceeded) as caught:
        answer.take(last, SUMMARY)
    assert caught.value.tried == ("cloud",)
    assert answer.is_over
