"""The file of decisions: bounded, whole, content-free, and readable while it is written."""

from __future__ import annotations

import stat
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.errors import InvalidInput
from sdk.policy.model import Verdict
from sdk.records import Decided, Finished, Recorder, RingReader
from sdk.records.entries import decode_entry, encode_entry
from sdk.records.ring import HEADER_BYTES, SLOT_BYTES
from sdk.routing import DecisionInputs, Observation, Prediction, RouteState, decide
from sdk.routing.predictor import Predictor

KNOWN = SimpleNamespace(predictor=Predictor(), endpoint=lambda name: None)


def decision(model: str = "m", **fields: object):
    verdict = Verdict(edge=True, cloud=True, rule_ids=("r",), reason="it may", policy_hash="0" * 64)
    return decide(
        DecisionInputs(
            model=model,
            sensitivity="public",
            verdict=verdict,
            edge=RouteState(prediction=Prediction(basis="measured", p50_ms=5.0, p95_ms=9.0)),
            cloud=RouteState(),
            **fields,  # type: ignore[arg-type]
        )
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "decisions.ring"


def recorder(path, slots: int = 8) -> Recorder:
    return Recorder(path, KNOWN, slots=slots)


def models(reader: RingReader) -> list[str]:
    return [entry.decision.inputs.model for entry in reader.entries()]


def test_what_was_written_is_read_in_order(path):
    made = recorder(path)
    for number in range(3):
        made.decided(decision(f"m{number}"))
    made.finished("edge", "m2", Observation(total_ms=7.5, queue_ms=1.0, completion_tokens=4))
    made.close()
    first, *_, last = RingReader(path).entries()
    assert first.decision == decision("m0")
    assert first.moment.breaker == "closed"
    assert (last.route, last.model, last.total_ms, last.queue_ms, last.tokens) == (
        "edge", "m2", 7.5, 1.0, 4,
    )  # fmt: skip


def test_the_oldest_make_room_and_the_file_does_not_grow(path):
    made = recorder(path)
    for number in range(29):
        made.decided(decision(f"m{number}"))
    assert models(RingReader(path)) == [f"m{number}" for number in range(21, 29)]
    assert path.stat().st_size <= HEADER_BYTES + 8 * SLOT_BYTES
    made.close()


def test_a_reader_goes_on_where_it_was(path):
    made = recorder(path)
    made.decided(decision("a"))
    reader = RingReader(path)
    assert models(reader) == ["a"]
    assert models(reader) == []
    made.decided(decision("b"))
    assert models(reader) == ["b"]
    for number in range(20):
        made.decided(decision(f"m{number}"))
    assert models(reader) == [f"m{number}" for number in range(12, 20)]
    made.close()


def test_a_ring_is_gone_on_with_after_a_restart_with_the_size_it_has(path):
    for name in ("a", "b"):
        made = recorder(path, slots=8)
        made.decided(decision(name))
        made.close()
    again = recorder(path, slots=99)
    again.decided(decision("c"))
    again.close()
    assert models(RingReader(path)) == ["a", "b", "c"]


def test_the_file_is_for_its_owner(path):
    made = recorder(path)
    made.decided(decision())
    made.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_damaged_record_is_left_out_and_counted(path):
    made = recorder(path)
    for number in range(4):
        made.decided(decision(f"m{number}"))
    made.close()
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + SLOT_BYTES + 40] ^= 1
    path.write_bytes(data)
    reader = RingReader(path)
    assert models(reader) == ["m0", "m2", "m3"]
    assert reader.damaged == 1


@given(st.binary(max_size=3000))
def test_any_bytes_are_read_or_named(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "x"
    path.write_bytes(data)
    with pytest.raises(InvalidInput):
        RingReader(path)
    header = b"nfring1\0" + SLOT_BYTES.to_bytes(4, "little") + (8).to_bytes(4, "little")
    path.write_bytes(header.ljust(HEADER_BYTES, b"\x01") + data)
    assert list(RingReader(path).entries()) == []


@given(st.binary(max_size=200))
def test_any_entry_is_decoded_or_named(data):
    try:
        entry = decode_entry(data)
    except InvalidInput:
        return
    assert encode_entry(entry)


def test_a_missing_file_is_named_with_the_setting_that_makes_it(path):
    with pytest.raises(InvalidInput, match="cannot be read") as caught:
        RingReader(path)
    assert "record" in caught.value.fix


def test_threads_lose_no_record(path):
    made = recorder(path, slots=400)
    threads = [
        threading.Thread(target=lambda n=n: [made.decided(decision(f"{n}")) for _ in range(25)])
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made.close()
    found = models(RingReader(path))
    assert {name: found.count(name) for name in found} == {str(n): 25 for n in range(8)}


def test_two_processes_lose_no_record(path):
    code = (
        "import sys; from pathlib import Path; from tests.sdk.records.test_ring import *\n"
        "made = recorder(Path(sys.argv[1]), 400)\n"
        "for _ in range(100): made.decided(decision(sys.argv[2]))\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("a", "b")
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    found = models(RingReader(path))
    assert (found.count("a"), found.count("b")) == (100, 100)


def test_what_cannot_be_written_is_said_once_and_never_raised(tmp_path, caplog):
    made = recorder(tmp_path)  # a directory
    for _ in range(3):
        made.decided(decision())
    made.close()
    assert caplog.text.count("are not recorded") == 1


def test_a_file_of_another_kind_is_not_overwritten(path, caplog):
    path.write_bytes(b"something else" * 20)
    made = recorder(path)
    made.decided(decision())
    made.close()
    assert path.read_bytes() == b"something else" * 20
    assert "are not recorded" in caplog.text


def test_the_largest_decision_fits():
    verdict = Verdict(
        edge=True, cloud=True, rule_ids=("r" * 71,), reason="é" * 500, policy_hash="0" * 64
    )
    prediction = Prediction(
        basis="measured", p50_ms=1 / 3, p95_ms=1 / 3, ttft_ms=1 / 3, ms_per_token=1 / 3,
        queue_ms=1 / 3, network_ms=1 / 3, load_ms=1 / 3, p20_ms=1 / 3, p80_ms=1 / 3, p99_ms=1 / 3,
    )  # fmt: skip
    state = RouteState(detail="é" * 99, prediction=prediction, ahead=1 << 40, quality_rank=1 << 40)
    largest = decide(
        DecisionInputs(
            model="é" * 99, sensitivity="é" * 99, verdict=verdict, edge=state, cloud=state,
            remaining_ms=1 / 3, failed=("edge", "cloud"), confidence=1 / 3,
        )
    )  # fmt: skip
    moment = Decided(
        at_s=1 / 3,
        decision=largest,
        moment=decided_moment(),
    )
    assert len(largest.encode()) <= 1024
    assert len(encode_entry(moment)) <= 1024 + 64
    finished = Finished(at_s=1 / 3, route="cloud", model="é" * 64, total_ms=1 / 3, tokens=1 << 60)
    assert len(encode_entry(finished)) < 256


def decided_moment():
    from sdk.records import Moment

    return Moment(delay_ms=1 / 3, ms_per_byte=1 / 3, breaker="half_open", failures=1 << 40)
