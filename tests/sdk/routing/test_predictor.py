from __future__ import annotations

import random

import pytest

from nearfar.bundle.manifest import LatencyFigure
from sdk.routing import Observation, Predictor, RequestSize, Route
from sdk.routing.estimates import SHAPE_HALF_LIFE_S

SMALL = RequestSize(upload_bytes=1_000, input_elements=64)
CHAT = RequestSize(input_tokens=64, max_new_tokens=100, upload_bytes=400)


def figure(p50_ms: float, *, ms_per_token: float | None = None) -> LatencyFigure:
    return LatencyFigure(
        machine="m", execution_provider="CPUExecutionProvider", p50_ms=p50_ms,
        p99_ms=p50_ms * 1.5, calls=50, ms_per_token=ms_per_token, input_tokens=64,
    )  # fmt: skip


def compute(ms: float, **more: float) -> Observation:
    return Observation(total_ms=more.pop("total_ms", ms), compute_ms=ms, **more)


def test_nothing_known_is_said_to_be_unknown() -> None:
    found = Predictor().predict("edge", "minilm", SMALL, now_s=0)
    assert (found.basis, found.p50_ms, found.p95_ms) == ("unknown", None, None)


def test_a_seed_is_used_until_answers_come_and_named_as_such() -> None:
    predictor = Predictor()
    predictor.seed("edge", "minilm", [figure(10)])
    seeded = predictor.predict("edge", "minilm", SMALL, now_s=0)
    assert (seeded.basis, seeded.p50_ms) == ("seeded", 10)
    assert seeded.p95_ms is not None
    assert 10 < seeded.p95_ms < 15
    for second in range(10):
        predictor.observe("edge", "minilm", SMALL, compute(40), now_s=second)
    measured = predictor.predict("edge", "minilm", SMALL, now_s=10)
    assert measured.basis == "measured"
    assert measured.p50_ms == pytest.approx(40, rel=0.1)


def test_a_seed_scales_with_the_elements_of_the_input() -> None:
    predictor = Predictor()
    predictor.seed("edge", "minilm", [figure(10)])
    wide = RequestSize(upload_bytes=1_000, input_elements=640)
    assert predictor.predict("edge", "minilm", wide, now_s=0).p50_ms == 100


def test_long_byte_strings_cost_no_more_than_short_ones_of_equal_features() -> None:
    predictor = Predictor()
    for second in range(5):
        short = RequestSize(upload_bytes=24, input_elements=2048)
        predictor.observe("edge", "file-type", short, compute(6), now_s=second)
    long = RequestSize(upload_bytes=2_000_000, input_elements=2048)
    assert predictor.predict("edge", "file-type", long, now_s=5).p50_ms == pytest.approx(6)


def test_a_seed_without_figures_knows_nothing() -> None:
    predictor = Predictor()
    predictor.seed("edge", "minilm", [])
    assert predictor.predict("edge", "minilm", SMALL, now_s=0).basis == "unknown"


def test_p50_and_p95_hold_on_noisy_latencies() -> None:
    rng = random.Random(7)
    predictor = Predictor()
    below50 = below95 = 0
    calls = 2000
    for call in range(calls):
        value = rng.gauss(50, 8)
        found = predictor.predict("edge", "m", SMALL, now_s=call)
        if found.p50_ms is not None and found.p95_ms is not None:
            below50 += value <= found.p50_ms
            below95 += value <= found.p95_ms
        predictor.observe("edge", "m", SMALL, compute(value), now_s=call)
    assert 0.45 < below50 / calls < 0.55
    assert 0.88 < below95 / calls < 0.98


@pytest.mark.parametrize("factor", [0.1, 0.5, 2, 10])
def test_a_jump_is_learned_within_three_answers(factor: float) -> None:
    rng = random.Random(1)
    predictor = Predictor()
    for call in range(50):
        predictor.observe("edge", "m", SMALL, compute(rng.gauss(10, 0.3)), now_s=call)
    for call in range(3):
        predictor.observe("edge", "m", SMALL, compute(rng.gauss(10, 0.3) * factor), now_s=50 + call)
    found = predictor.predict("edge", "m", SMALL, now_s=52)
    assert found.p50_ms == pytest.approx(10 * factor, rel=0.15)


def test_a_request_that_is_overdue_says_so_before_it_is_answered() -> None:
    predictor = Predictor()
    for call in range(30):
        predictor.observe("cloud", "m", SMALL, cloud_call(25), now_s=call)
    before = predictor.predict("cloud", "m", SMALL, now_s=30)
    ticket = predictor.start("cloud", "m", SMALL, before, now_s=30)
    assert predictor.predict("cloud", "m", SMALL, now_s=30.01).p50_ms == pytest.approx(
        before.p50_ms, rel=0.1
    )
    assert predictor.predict("cloud", "m", SMALL, now_s=31).p50_ms > 500
    predictor.stop(ticket, now_s=31)
    assert predictor.predict("cloud", "m", SMALL, now_s=31).p50_ms == pytest.approx(25, rel=0.1)


@pytest.mark.parametrize("route", ["edge", "cloud"])
def test_a_request_that_was_given_up_counts_as_slow(route: Route) -> None:
    predictor = Predictor()
    for call in range(30):
        predictor.observe(route, "m", SMALL, cloud_call(25), now_s=call)
    before = predictor.predict(route, "m", SMALL, now_s=30)
    for second in range(3):
        ticket = predictor.start(route, "m", SMALL, before, now_s=30 + second)
        predictor.stop(ticket, now_s=30.5 + second)
        predictor.observe_late(ticket, now_s=30.5 + second)
    after = predictor.predict(route, "m", SMALL, now_s=33)
    assert before.p50_ms is not None
    assert after.p50_ms is not None
    assert after.p50_ms > 3 * before.p50_ms


def test_a_request_that_was_given_up_early_says_nothing() -> None:
    predictor = Predictor()
    for call in range(30):
        predictor.observe("cloud", "m", SMALL, cloud_call(25), now_s=call)
    before = predictor.predict("cloud", "m", SMALL, now_s=30)
    ticket = predictor.start("cloud", "m", SMALL, before, now_s=30)
    predictor.stop(ticket, now_s=30.001)
    predictor.observe_late(ticket, now_s=30.001)
    after = predictor.predict("cloud", "m", SMALL, now_s=30.1)
    assert after.p99_ms == pytest.approx(before.p99_ms, rel=0.01)


def test_uploads_under_way_delay_those_after_them() -> None:
    large = RequestSize(upload_bytes=1_000_000)
    predictor = Predictor()
    predictor.seed("cloud", "m", [figure(5)])
    for call in range(20):
        predictor.observe("cloud", "m", large, cloud_call(525), now_s=call)
    alone = predictor.predict("cloud", "m", large, now_s=20)
    ticket = predictor.start("cloud", "m", large, alone, now_s=20)
    behind = predictor.predict("cloud", "m", large, now_s=20)
    assert alone.p50_ms is not None
    assert behind.p50_ms is not None
    assert behind.p50_ms > 1.7 * alone.p50_ms
    half = predictor.predict("cloud", "m", large, now_s=20.25)
    assert half.p50_ms is not None
    assert alone.p50_ms < half.p50_ms < behind.p50_ms
    predictor.stop(ticket, now_s=20.3)
    assert predictor.predict("cloud", "m", large, now_s=20.3).p50_ms == pytest.approx(
        alone.p50_ms, rel=0.02
    )


def test_the_probability_of_being_in_time_holds_on_noisy_answers() -> None:
    rng = random.Random(3)
    predictor = Predictor()
    promised = kept = 0.0
    for call in range(3000):
        value, limit = rng.lognormvariate(4, 0.3), rng.uniform(40, 90)
        found = predictor.predict("edge", "m", SMALL, now_s=call)
        if call > 50:
            promised += found.probability_in_time(limit)
            kept += value <= limit
        predictor.observe("edge", "m", SMALL, compute(value), now_s=call)
    assert promised / 2950 == pytest.approx(kept / 2950, abs=0.05)


def test_forecasts_that_miss_the_clouds_queue_widen_the_prediction() -> None:
    rng = random.Random(5)
    calm, crowded = Predictor(), Predictor()
    for call in range(60):
        for predictor, queue_ms in ((calm, 0.0), (crowded, rng.choice([0.0, 0.0, 200.0]))):
            found = predictor.predict("cloud", "m", SMALL, now_s=call)
            ticket = predictor.start("cloud", "m", SMALL, found, now_s=call)
            predictor.stop(ticket, now_s=call + 0.1)
            seen = cloud_call(25 + queue_ms, queue_ms)
            predictor.observe("cloud", "m", SMALL, seen, now_s=call + 0.1, ticket=ticket)
    assert calm.predict("cloud", "m", SMALL, now_s=90).p95_ms < 50
    assert crowded.predict("cloud", "m", SMALL, now_s=90).p95_ms > 150


def test_queue_and_load_come_on_top() -> None:
    predictor = Predictor()
    predictor.seed("edge", "m", [figure(10)], size_bytes=100_000_000)
    found = predictor.predict("edge", "m", SMALL, now_s=0, queue_ms=500, loaded=False)
    assert found.p50_ms == pytest.approx(10 + 500 + 400)
    assert (found.queue_ms, found.load_ms) == (500, 400)
    assert found.service_ms == pytest.approx(10)
    predictor.observe("edge", "m", SMALL, compute(10, load_ms=1200), now_s=0)
    again = predictor.predict("edge", "m", SMALL, now_s=0, loaded=False)
    assert again.load_ms == pytest.approx(800)


def test_text_generation_depends_on_prompt_and_answer_length() -> None:
    predictor = Predictor()
    predictor.seed("edge", "assistant", [figure(200, ms_per_token=20)])
    found = predictor.predict("edge", "assistant", CHAT, now_s=0)
    assert found.ttft_ms == pytest.approx(200)
    assert found.ms_per_token == 20
    assert found.p50_ms == pytest.approx(200 + 99 * 20)
    longer = RequestSize(input_tokens=640, max_new_tokens=100)
    assert predictor.predict("edge", "assistant", longer, now_s=0).ttft_ms == pytest.approx(2000)


def test_the_length_of_answers_is_learned_from_complete_ones() -> None:
    predictor = Predictor()
    predictor.seed("edge", "assistant", [figure(200, ms_per_token=20)])

    def answer(tokens: int, *, finished: bool = True) -> None:
        seen = Observation(
            total_ms=200 + 20 * (tokens - 1), prefill_ms=200, decode_ms=20 * (tokens - 1),
            completion_tokens=tokens, finished=finished,
        )  # fmt: skip
        predictor.observe("edge", "assistant", CHAT, seen, now_s=0)

    for _ in range(5):
        answer(2, finished=False)
    cut = predictor.predict("edge", "assistant", CHAT, now_s=0)
    assert cut.p50_ms == pytest.approx(200 + 99 * 20)
    for _ in range(5):
        answer(11)
    found = predictor.predict("edge", "assistant", CHAT, now_s=0)
    assert found.p50_ms == pytest.approx(200 + 10 * 20)
    tiny = RequestSize(input_tokens=64, max_new_tokens=1)
    assert predictor.predict("edge", "assistant", tiny, now_s=0).p50_ms == pytest.approx(200)


def test_an_answer_that_its_limit_cut_would_have_been_longer() -> None:
    predictor = Predictor()
    predictor.seed("edge", "assistant", [figure(200, ms_per_token=20)])
    short = RequestSize(input_tokens=64, max_new_tokens=12)
    for _ in range(5):
        seen = Observation(
            total_ms=420, prefill_ms=200, decode_ms=220, completion_tokens=12, finished=True
        )
        predictor.observe("edge", "assistant", short, seen, now_s=0)
    again = predictor.predict("edge", "assistant", short, now_s=0)
    assert again.p50_ms == pytest.approx(200 + 11 * 20)
    # Asked for a hundred, it will not stop at twelve.
    longer = predictor.predict("edge", "assistant", CHAT, now_s=0)
    assert longer.p50_ms == pytest.approx(200 + 99 * 20)


def cloud_call(total_ms: float, queue_ms: float = 0.0) -> Observation:
    return Observation(total_ms=total_ms, compute_ms=5, queue_ms=queue_ms)


def test_the_link_is_learned_from_round_trips_and_large_transfers() -> None:
    predictor = Predictor()
    predictor.seed("cloud", "m", [figure(5)])
    assert predictor.predict("cloud", "m", SMALL, now_s=0).network_ms > 50
    for call in range(10):
        predictor.observe("cloud", "m", SMALL, cloud_call(25), now_s=call)
    found = predictor.predict("cloud", "m", SMALL, now_s=10)
    assert found.basis == "measured"
    assert found.network_ms == pytest.approx(20, abs=2)
    large = RequestSize(upload_bytes=1_000_000)
    for call in range(20):
        predictor.observe("cloud", "m", large, cloud_call(125), now_s=10 + call)
    found = predictor.predict("cloud", "m", large, now_s=30)
    assert found.network_ms == pytest.approx(120, rel=0.1)
    assert predictor.predict("cloud", "m", SMALL, now_s=30).network_ms < 25


@pytest.mark.parametrize(("before_ms", "after_ms"), [(1, 60), (25, 60), (25, 250), (250, 25)])
def test_a_round_trip_that_jumps_is_learned_within_three_answers(before_ms, after_ms) -> None:
    rng = random.Random(1)
    small, large = RequestSize(upload_bytes=200), RequestSize(upload_bytes=150_000)
    predictor = Predictor()
    for call in range(50):
        seen = cloud_call(before_ms * rng.gauss(1, 0.03) + 5)
        predictor.observe("cloud", "m", small, seen, now_s=0.3 * call)
    for call in range(3):
        seen = cloud_call(after_ms * rng.gauss(1, 0.03) + 5)
        predictor.observe("cloud", "m", small, seen, now_s=15 + 0.3 * call)
    found = predictor.predict("cloud", "m", small, now_s=16)
    assert found.network_ms == pytest.approx(after_ms, rel=0.35)
    # Which says nothing of the bandwidth: 150 kB take 120 ms more, as was assumed.
    assert predictor.predict("cloud", "m", large, now_s=16).network_ms < 2 * after_ms + 250


def test_one_long_round_trip_is_an_accident() -> None:
    predictor = Predictor()
    small = RequestSize(upload_bytes=200)
    for call in range(60):
        predictor.observe("cloud", "m", small, cloud_call(1000 if call == 40 else 25), now_s=call)
    assert predictor.predict("cloud", "m", small, now_s=60).network_ms == pytest.approx(20, rel=0.1)


def test_a_small_first_answer_that_is_slow_does_not_tell_the_bandwidth() -> None:
    predictor = Predictor()
    predictor.observe_round_trip(1, now_s=0)
    for call in range(3):
        predictor.observe("cloud", "m", RequestSize(upload_bytes=64), cloud_call(905), now_s=call)
    large = predictor.predict("cloud", "m", RequestSize(upload_bytes=150_000), now_s=3)
    assert large.network_ms < 3000


def test_a_ping_measures_the_round_trip() -> None:
    predictor = Predictor()
    predictor.seed("cloud", "m", [figure(5)])
    predictor.observe_round_trip(7, now_s=0)
    assert predictor.predict("cloud", "m", RequestSize(), now_s=0).network_ms == pytest.approx(7)


def test_a_reported_queue_counts_and_is_forgotten_within_seconds() -> None:
    predictor = Predictor()
    predictor.seed("cloud", "m", [figure(5)])
    predictor.report_queue("m", 800, now_s=10)
    assert predictor.predict("cloud", "m", SMALL, now_s=10).queue_ms == 800
    assert predictor.predict("cloud", "m", SMALL, now_s=11.5).queue_ms == pytest.approx(400)
    assert predictor.predict("cloud", "m", SMALL, now_s=20).queue_ms < 10
    assert predictor.predict("cloud", "m", SMALL, now_s=200).queue_ms == 0


def test_a_bad_estimate_that_nobody_confirms_returns_to_its_seed() -> None:
    predictor = Predictor()
    predictor.seed("cloud", "m", [figure(5)])
    predictor.observe_round_trip(10, now_s=0)
    for call in range(9):
        predictor.observe("cloud", "m", SMALL, compute(3000, total_ms=3010), now_s=call)
    bad = predictor.predict("cloud", "m", SMALL, now_s=9).p50_ms
    later = predictor.predict("cloud", "m", SMALL, now_s=9 + 8 * SHAPE_HALF_LIFE_S).p50_ms
    assert bad is not None
    assert later is not None
    assert bad > 2500
    assert later < 50


def test_requests_in_a_row_without_an_answer_make_the_next_one_less_likely() -> None:
    predictor = Predictor()
    for call in range(20):
        predictor.observe("cloud", "m", SMALL, cloud_call(25), now_s=call)
    silences = []
    for _ in range(4):
        expected = predictor.predict("cloud", "m", SMALL, now_s=20)
        silences.append(expected.silence)
        ticket = predictor.start("cloud", "m", SMALL, expected, now_s=20)
        predictor.stop(ticket, now_s=20)
        predictor.observe_late(ticket, now_s=20)
    assert silences == [0.0, 0.04, 0.5, 0.65]
    assert predictor.predict("cloud", "m", SMALL, now_s=25).silence == pytest.approx(0.4)
    predictor.observe("cloud", "m", SMALL, cloud_call(25), now_s=26)
    assert predictor.predict("cloud", "m", SMALL, now_s=26).silence == 0.0


def test_the_edge_is_never_held_to_be_silent() -> None:
    predictor = Predictor()
    predictor.observe("edge", "m", SMALL, compute(10), now_s=0)
    expected = predictor.predict("edge", "m", SMALL, now_s=0)
    for _ in range(3):
        predictor.observe_late(predictor.start("edge", "m", SMALL, expected, now_s=0), now_s=1)
    assert predictor.predict("edge", "m", SMALL, now_s=1).silence == 0.0


def test_who_comes_after_a_late_request_waits_as_long_as_that_one_is_late() -> None:
    predictor = Predictor()
    predictor.seed("cloud", "m", [figure(5)])
    predictor.observe_round_trip(20, now_s=0)
    before = predictor.predict("cloud", "m", SMALL, now_s=1)
    assert before.p50_ms is not None
    ticket = predictor.start("cloud", "m", SMALL, before, now_s=1)
    during = predictor.predict("cloud", "m", SMALL, now_s=1.3)
    assert during.p50_ms is not None
    assert during.p50_ms >= before.p50_ms + 200
    predictor.stop(ticket, now_s=1.3)
    after = predictor.predict("cloud", "m", SMALL, now_s=1.3)
    assert after.p50_ms == pytest.approx(before.p50_ms, rel=0.1)


def test_a_call_that_overruns_on_the_device_delays_those_behind_it() -> None:
    predictor = Predictor()
    predictor.seed("edge", "m", [figure(100)])
    usual = predictor.predict("edge", "m", SMALL, now_s=0, queue_ms=0)
    assert usual.p50_ms is not None
    predictor.start("edge", "m", SMALL, usual, now_s=0)
    in_time = predictor.predict("edge", "m", SMALL, now_s=0.05, queue_ms=50)
    overrun = predictor.predict("edge", "m", SMALL, now_s=0.3, queue_ms=75)
    assert in_time.p50_ms is not None
    assert overrun.p50_ms is not None
    assert in_time.p50_ms == pytest.approx(usual.p50_ms + 50)
    assert overrun.p50_ms > 3 * usual.p50_ms


def test_the_next_call_on_the_device_is_not_blamed_for_its_wait() -> None:
    predictor = Predictor()
    predictor.seed("edge", "m", [figure(100)])
    usual = predictor.predict("edge", "m", SMALL, now_s=0, queue_ms=0)
    assert usual.p50_ms is not None
    first = predictor.start("edge", "m", SMALL, usual, now_s=0)
    predictor.start("edge", "m", SMALL, usual, now_s=0)
    predictor.stop(first, now_s=0.1)
    behind = predictor.predict("edge", "m", SMALL, now_s=0.15, queue_ms=50)
    assert behind.p50_ms == pytest.approx(usual.p50_ms + 50)


def test_answers_that_never_come_make_the_tail_fat_and_those_just_late_make_it_thin() -> None:
    exponents = []
    for is_cut in (True, False):
        predictor = Predictor()
        predictor.seed("cloud", "m", [figure(5)])
        predictor.observe_round_trip(20, now_s=0)
        for call in range(8):
            now_s = 20.0 * call
            expected = predictor.predict("cloud", "m", SMALL, now_s=now_s)
            ticket = predictor.start("cloud", "m", SMALL, expected, now_s=now_s)
            assert expected.p95_ms is not None
            took_ms = expected.p95_ms * (4.0 if is_cut else 1.1)
            end_s = now_s + took_ms / 1000.0
            predictor.stop(ticket, now_s=end_s)
            if is_cut:
                predictor.observe_late(ticket, now_s=end_s)
            else:
                seen = compute(5, total_ms=took_ms)
                predictor.observe("cloud", "m", SMALL, seen, now_s=end_s, ticket=ticket)
        exponents.append(predictor.predict("cloud", "m", SMALL, now_s=200).tail)
    assert exponents[0] < 1.0 < 1.5 < exponents[1]


def test_the_first_transfer_says_what_the_bandwidth_is() -> None:
    predictor = Predictor()
    predictor.seed("cloud", "m", [figure(5)])
    predictor.observe_round_trip(30, now_s=0)
    big = RequestSize(upload_bytes=25_000, input_elements=25_000)
    predictor.observe("cloud", "m", big, compute(5, total_ms=5 + 30 + 200), now_s=1)
    link = predictor.link
    assert link.ms_per_byte == pytest.approx(200 / 25_000)
    assert link.level.at(1) == 1.0
    assert link.level.errors.count == 0
    predictor.observe("cloud", "m", big, compute(5, total_ms=5 + 30 + 200), now_s=2)
    assert link.level.errors.values[-1] == pytest.approx(1.0, rel=0.01)
