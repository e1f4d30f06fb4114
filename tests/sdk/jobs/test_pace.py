"""What becomes of a job whose try failed."""

from __future__ import annotations

import random

import pytest

from nearfar.errors import (
    BundleError,
    CloudUnavailable,
    DeadlineExceeded,
    EngineError,
    InvalidInput,
    ModelNotFound,
    Overloaded,
    PolicyDenied,
    RemoteProtocolError,
    SecurityError,
    StreamInterrupted,
)
from sdk.jobs.pace import FIRST_PAUSE_S, MAX_PAUSE_S, MAX_TRIES, End, Later, Pace, after


@pytest.mark.parametrize("kind", [CloudUnavailable, StreamInterrupted, Overloaded])
def test_weather_is_waited_out_however_long(kind):
    for tries in (0, 100):
        assert after(kind("x"), deferrable=True, tries=tries) == Later(
            counts=False, pause_s=FIRST_PAUSE_S
        )


@pytest.mark.parametrize("kind", [EngineError, DeadlineExceeded, RemoteProtocolError])
def test_other_failures_are_tried_again_with_growing_pauses_and_then_count(kind):
    pauses = []
    for tries in range(MAX_TRIES - 1):
        step = after(kind("x"), deferrable=True, tries=tries)
        assert isinstance(step, Later)
        assert step.counts
        pauses.append(step.pause_s)
    assert pauses == sorted(pauses)
    assert pauses[0] == FIRST_PAUSE_S < pauses[-1] <= MAX_PAUSE_S
    assert after(kind("x"), deferrable=True, tries=MAX_TRIES - 1) == End(status="failed")


@pytest.mark.parametrize("kind", [InvalidInput, ModelNotFound, SecurityError, BundleError])
def test_what_will_not_change_is_not_tried_again(kind):
    assert after(kind("x"), deferrable=True, tries=0) == End(status="failed")


@pytest.mark.parametrize("deferrable", [True, False])
def test_what_policy_forbids_ends_as_denied(deferrable):
    assert after(PolicyDenied("x"), deferrable=deferrable, tries=0) == End(status="denied")


@pytest.mark.parametrize("kind", [CloudUnavailable, EngineError, Overloaded])
def test_a_job_that_may_not_wait_fails_as_a_call_would(kind):
    assert after(kind("x"), deferrable=False, tries=0) == End(status="failed")


def test_a_cloud_that_fails_is_left_alone_longer_and_longer_up_to_a_minute():
    pace = Pace(random.Random(1))
    spans = []
    for _ in range(12):
        pace.failed(100.0)
        assert pace.holds_back(100.0)
        spans.append(pace.until_s - 100.0)
    assert all(0.5 * min(2**n, 60) <= span <= min(2**n, 60) for n, span in enumerate(spans))
    assert not pace.holds_back(pace.until_s)
    assert not pace.holds_back(pace.until_s - 1000.0)  # the clock was set back
    pace.worked()
    assert not pace.holds_back(100.0)
