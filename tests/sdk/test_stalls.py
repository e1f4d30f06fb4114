"""What silence is suspicious, from what is known of answers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nearfar.generation import GenerationOptions, Prompt
from nearfar.units import Deadline
from sdk.requests import Request, prompt_size
from sdk.routing import Observation, Predictor, RequestSize
from sdk.stalls import COLD_MS, DEVICE_MARGIN_MS, PAUSE_MARGIN_MS, patience, pause_limit_s

PROMPT, OPTIONS = Prompt(text="The tide"), GenerationOptions(max_new_tokens=32)
BATCH = Request(
    method="infer",
    model="m",
    deadline=Deadline(),
    feeds={},
    size=RequestSize(input_elements=64, upload_bytes=256),
)
TEXT = Request(
    method="generate",
    model="m",
    deadline=Deadline(),
    prompt=PROMPT,
    options=OPTIONS,
    size=prompt_size(PROMPT, OPTIONS),
)


def knowing(predictor: Predictor) -> SimpleNamespace:
    return SimpleNamespace(
        predictor=predictor,
        size=lambda request: request.size,
        predictor_of=lambda decision, route: predictor,
    )


def answered(route="edge", *, request=BATCH, times: int = 20) -> Predictor:
    predictor = Predictor()
    for second in range(times):
        if request is BATCH:
            seen = Observation(total_ms=20, compute_ms=20)
        else:
            seen = Observation(
                total_ms=500, prefill_ms=100, decode_ms=310, completion_tokens=32, pause_ms=30
            )
        predictor.observe(route, "m", request.size, seen, now_s=second)
    return predictor


def test_before_anything_is_known_silence_is_noticed_below_a_second_and_a_half():
    for request in (BATCH, TEXT):
        found = patience(knowing(Predictor()), request)
        assert found.is_cold
        assert found.first_s == found.token_s == COLD_MS / 1000 < 1.5


def test_what_was_measured_is_suspicious_well_beyond_it_and_within_half_a_second():
    found = patience(knowing(answered()), BATCH)
    assert not found.is_cold
    margins = DEVICE_MARGIN_MS / 1000, PAUSE_MARGIN_MS / 1000
    assert 0.020 + margins[0] <= found.first_s <= 0.020 + margins[1] + 0.005 < 0.5


def test_sizes_that_nobody_has_seen_are_not_known_well():
    known = knowing(answered())
    large = Request(
        method="infer",
        model="m",
        deadline=Deadline(),
        feeds={},
        size=RequestSize(input_elements=64_000),
    )
    found = patience(known, large)
    assert found.is_cold
    assert found.first_s >= COLD_MS / 1000


def test_prompts_and_tokens_are_known_apart():
    found = patience(knowing(answered(request=TEXT)), TEXT)
    assert not found.is_cold
    assert 0.300 <= found.first_s <= 0.600
    assert 0.230 <= found.token_s <= 0.530


def test_an_answer_that_goes_on_is_read_like_a_prompt():
    known = knowing(answered(request=TEXT))
    long = patience(known, TEXT, so_far="and so it went on and on " * 100)
    assert long.is_cold
    assert long.first_s > patience(known, TEXT).first_s


def test_a_silent_cloud_is_left_only_where_somebody_else_may_go_on():
    known = knowing(answered("cloud", request=TEXT))
    assert pause_limit_s(known, TEXT, SimpleNamespace(fallback=None)) is None
    limit_s = pause_limit_s(known, TEXT, SimpleNamespace(fallback="edge"))
    assert limit_s == pytest.approx((30 + PAUSE_MARGIN_MS) / 1000, rel=0.3)
    few = knowing(answered("cloud", request=TEXT, times=2))
    assert pause_limit_s(few, TEXT, SimpleNamespace(fallback="edge")) == COLD_MS / 1000
