from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.errors import InvalidInput
from sdk.routing import Observation, Predictor, RequestSize
from sdk.routing.memory import MAX_BYTES, MAX_MODELS, recall, remember

SMALL = RequestSize(upload_bytes=1_000, input_elements=64)
CHAT = RequestSize(input_tokens=64, max_new_tokens=100)


def learned() -> Predictor:
    predictor = Predictor()
    for second in range(40):
        seen = Observation(total_ms=30 + second % 3, compute_ms=5)
        predictor.observe("cloud", "m", SMALL, seen, now_s=second)
        predictor.observe("edge", "m", SMALL, Observation(total_ms=9, compute_ms=9), now_s=second)
        answer = Observation(
            total_ms=400, prefill_ms=200, decode_ms=200, completion_tokens=11, finished=True
        )
        predictor.observe("edge", "chat", CHAT, answer, now_s=second)
    return predictor


def test_what_was_measured_is_the_seed_of_the_next_run() -> None:
    before, after = learned(), Predictor()
    recall(after, remember(before))
    for route, model, size in (("cloud", "m", SMALL), ("edge", "m", SMALL), ("edge", "chat", CHAT)):
        old = before.predict(route, model, size, now_s=39)  # type: ignore[arg-type]
        new = after.predict(route, model, size, now_s=0)  # type: ignore[arg-type]
        assert (old.basis, new.basis) == ("measured", "seeded")
        assert new.p50_ms == pytest.approx(old.p50_ms, rel=0.1)
        assert new.p95_ms == pytest.approx(old.p95_ms, rel=0.1)


def test_another_run_on_a_slower_machine_is_believed_after_three_answers() -> None:
    after = Predictor()
    recall(after, remember(learned()))
    for second in range(3):
        after.observe("edge", "m", SMALL, Observation(total_ms=90, compute_ms=90), now_s=second)
    found = after.predict("edge", "m", SMALL, now_s=2)
    assert found.basis == "measured"
    assert found.p50_ms == pytest.approx(90, rel=0.2)


def test_what_is_kept_is_small_however_many_models_there_are() -> None:
    predictor = Predictor()
    for model in range(3 * MAX_MODELS):
        for call in range(100):
            size = RequestSize(input_elements=2 ** (call % 40))
            seen = Observation(total_ms=9, compute_ms=9.123456789 + call)
            predictor.observe("edge", f"m{model}", size, seen, now_s=call)
    text = remember(predictor)
    assert len(text) < MAX_BYTES
    recall(Predictor(), text)


def test_how_much_clocks_matter_is_kept_across_restarts() -> None:
    predictor = learned()
    for call in range(20):  # a device at half its clocks that is hardly slower
        predictor.sense(0.5)
        seen = Observation(total_ms=11, compute_ms=11)
        predictor.observe("edge", "m", SMALL, seen, now_s=50 + call)
    bend = predictor.models["edge", "m"].compute.bend
    assert bend < 0.5
    again = Predictor()
    recall(again, remember(predictor))
    assert again.models["edge", "m"].compute.bend == pytest.approx(bend)
    assert again.models["edge", "m"].prefill.bend == 1.0


def test_a_file_of_version_1_knows_nothing_of_clocks_and_pauses_and_is_read() -> None:
    kept = json.loads(remember(learned()))
    kept["format_version"] = 1
    for model in kept["models"]:
        del model["pause"]
        for estimate in ("load", "compute", "prefill", "per_token"):
            del model[estimate]["bend"]
    again = Predictor()
    recall(again, json.dumps(kept).encode())
    assert again.predict("edge", "m", SMALL, now_s=0).basis == "seeded"
    assert all(model.compute.bend == 1.0 for model in again.models.values())


@pytest.mark.parametrize("bend", ["-0.1", "1.6", "null", "NaN"])
def test_a_bend_that_nobody_wrote_is_refused(bend: str) -> None:
    text = remember(learned()).decode().replace('"bend":1.0', f'"bend":{bend}', 1)
    with pytest.raises(InvalidInput):
        recall(Predictor(), text.encode())


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b" " * (MAX_BYTES + 1),
        b'{"format_version": 3, "models": [], "answers": {}, "link": null}',
        b'{"format_version": 1, "models": [], "answers": {"m": [-1]}, "link": null}',
        b'{"format_version": 1, "models": [], "answers": {}, "link": {"delay_ms": 0, '
        b'"ms_per_byte": 1, "errors": []}}',
        b'{"format_version": 1, "models": [], "answers": {}, "link": {"delay_ms": 1e400, '
        b'"ms_per_byte": 1, "errors": []}}',
    ],
)  # fmt: skip
def test_anything_else_is_refused_and_changes_nothing(text: bytes) -> None:
    predictor = learned()
    before = predictor.predict("cloud", "m", SMALL, now_s=39)
    with pytest.raises(InvalidInput, match="not what the router remembers"):
        recall(predictor, text)
    assert predictor.predict("cloud", "m", SMALL, now_s=39) == before


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(text: bytes) -> None:
    with pytest.raises(InvalidInput):
        recall(Predictor(), text)
