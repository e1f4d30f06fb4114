"""Recorded decisions are decided again, and asked what would have been."""

from __future__ import annotations

import json
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar import cli
from nearfar.errors import DeadlineExceeded, InvalidInput, PolicyDenied
from sdk import Client, Config, parse_policy
from sdk.config import RoutingConfig
from sdk.policy.model import Verdict
from sdk.records import Decided, Finished, Moment, Recorder, RingReader, WhatIf, compare
from sdk.records.commands import replay
from sdk.records.entries import decode_entry, encode_entry
from sdk.routing import (
    MODES,
    OBJECTIVES,
    DecisionInputs,
    Prediction,
    RequestSize,
    RouteState,
    decide,
)
from tests.sdk.records.test_ring import KNOWN
from tests.support.scripted_cloud import STORY, TENSOR, ScriptedCloud
from tests.support.scripted_edge import ScriptedEdge, put_into

POLICY = parse_policy(
    'version = 1\n[[rule]]\nid = "open"\nwhen = { sensitivity = "public" }\neffect = "cloud_ok"\n'
)
X = {"x": np.full((2, 4), 4711.25, np.float32)}
ms = st.floats(0.01, 1e5)
predictions = st.builds(
    lambda p50, spread, network: Prediction(
        basis="measured",
        p50_ms=p50,
        p95_ms=p50 + spread,
        p20_ms=max(0.0, p50 - spread / 3),
        p80_ms=p50 + spread / 2,
        p99_ms=p50 + 2 * spread,
        network_ms=network,
    ),
    ms, ms, ms,
)  # fmt: skip
states = st.builds(
    RouteState,
    obstacle=st.sampled_from(["", "", "", "no_model", "unreachable"]),
    detail=st.text(max_size=80),
    prediction=st.one_of(st.just(Prediction()), predictions),
    quality_rank=st.one_of(st.none(), st.integers(0, 3)),
    ahead=st.integers(0, 5),
)
decisions = st.builds(
    DecisionInputs,
    model=st.text(max_size=60),
    sensitivity=st.text(max_size=40),
    verdict=st.builds(
        Verdict,
        edge=st.booleans(),
        cloud=st.booleans(),
        rule_ids=st.tuples(st.text(max_size=40)),
        reason=st.text(max_size=200),
        policy_hash=st.just("0" * 64),
    ),
    edge=states,
    cloud=states,
    mode=st.sampled_from(MODES),
    objective=st.sampled_from(OBJECTIVES),
    remaining_ms=st.one_of(st.none(), ms),
    failed=st.sampled_from([(), ("edge",), ("cloud",), ("edge", "cloud")]),
    confidence=st.sampled_from([0.95, 0.5, 0.999]),
).map(decide)
MOMENT = Moment(delay_ms=40.0, ms_per_byte=0.001)


def record(decision) -> Decided:
    return Decided(at_s=1.0, decision=decision, moment=MOMENT)


@given(decisions)
def test_every_decision_is_reproduced_from_its_bytes_bit_by_bit(decision):
    again = compare(decode_entry(encode_entry(record(decision))), WhatIf())
    assert again.is_reproduced
    assert again.again.encode() == decision.encode()
    assert again.what_if is None


def test_a_decision_that_the_router_would_not_make_is_noticed():
    made = typical()
    wrong = msgspec.structs.replace(made, route="cloud" if made.route == "edge" else "edge")
    assert not compare(record(wrong), WhatIf()).is_reproduced


def typical(**changes: object):
    verdict = Verdict(edge=True, cloud=True, rule_ids=("r",), reason="it may", policy_hash="0" * 64)
    fields: dict[str, object] = {
        "model": "m",
        "sensitivity": "public",
        "verdict": verdict,
        "edge": RouteState(prediction=Prediction(basis="measured", p50_ms=300.0, p95_ms=400.0)),
        "cloud": RouteState(
            prediction=Prediction(
                basis="measured", p50_ms=190.0, p95_ms=200.0, p99_ms=210.0, network_ms=140.0
            )
        ),
        "size": RequestSize(upload_bytes=90_000, download_bytes=10_000),
        "remaining_ms": 250.0,
    }
    return decide(DecisionInputs(**{**fields, **changes}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("what_if", "network_ms", "route"),
    [
        (WhatIf(deadline_ms=100.0), 140.0, "cloud"),  # neither is in time; this comes closest
        (WhatIf(deadline_ms=math.inf), 140.0, "cloud"),
        (WhatIf(rtt_ms=400.0), 500.0, "edge"),
        (WhatIf(rtt_ms=10.0), 110.0, "cloud"),
        (WhatIf(bandwidth_mbit_per_s=8.0), 140.0, "cloud"),  # 100 kB in 100 ms, as it was
        (WhatIf(bandwidth_mbit_per_s=0.8), 1040.0, "edge"),
        (WhatIf(rtt_ms=5.0, bandwidth_mbit_per_s=80.0), 15.0, "cloud"),
    ],
)
def test_another_link_moves_the_cloud_by_what_it_makes_of_the_network(what_if, network_ms, route):
    old = typical()
    assert old.route == "cloud"
    new = compare(record(old), what_if).what_if
    cloud = new.inputs.cloud.prediction
    assert cloud.network_ms == pytest.approx(network_ms)
    assert cloud.p50_ms == pytest.approx(50.0 + network_ms)
    assert cloud.p95_ms == pytest.approx(60.0 + network_ms)
    assert new.inputs.edge == old.inputs.edge
    if what_if.deadline_ms is None:
        assert new.route == route


def test_a_deadline_or_a_confidence_can_change_the_route():
    fast_cloud = typical(
        edge=RouteState(prediction=Prediction(basis="measured", p50_ms=20.0, p95_ms=400.0))
    )
    assert fast_cloud.route == "cloud"  # the edge is not in time with 95 %
    assert compare(record(fast_cloud), WhatIf(deadline_ms=1000.0)).is_changed
    assert compare(record(fast_cloud), WhatIf(confidence=0.5)).is_changed
    assert not compare(record(fast_cloud), WhatIf(confidence=0.99)).is_changed


def test_what_if_never_opens_what_policy_closed():
    verdict = Verdict(edge=True, cloud=False, rule_ids=("stay",), reason="no", policy_hash="0" * 64)
    kept = typical(verdict=verdict)
    for what_if in (WhatIf(deadline_ms=1.0), WhatIf(rtt_ms=0.0), WhatIf(confidence=0.999)):
        assert compare(record(kept), what_if).what_if.route == "edge"


@pytest.mark.parametrize(
    "fields",
    [
        {"deadline_ms": 0.0}, {"deadline_ms": math.nan}, {"rtt_ms": -1.0}, {"rtt_ms": math.inf},
        {"bandwidth_mbit_per_s": 0.0}, {"confidence": 1.0}, {"confidence": 0.0},
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(fields):
    with pytest.raises(InvalidInput):
        WhatIf(**fields)


# -- with a client -------------------------------------------------------------------------------


@pytest.fixture
def ring(tmp_path):
    return tmp_path / "decisions.ring"


@pytest.fixture
def client(tmp_path, ring):
    (tmp_path / "store").mkdir()
    with (
        ScriptedCloud(tmp_path / "state") as cloud,
        Client(
            Config(routing=RoutingConfig(record=ring)),
            cloud=cloud.config(),
            models=tmp_path / "store",
            policy=POLICY,
            sensitivity="public",
        ) as made,
    ):
        made.device = put_into(made, ScriptedEdge((TENSOR, STORY)))
        yield made


def test_a_client_records_what_it_decides_and_what_came_of_it(client, ring):
    client.infer("tensor", X, mode="edge_only", purpose="4711-purpose", tenant="4711-tenant")
    client.infer("tensor", X, mode="cloud_only")
    client.generate("story", "4711 is my number", max_new_tokens=2, mode="cloud_only").text()
    with pytest.raises(PolicyDenied):
        client.infer("tensor", X, sensitivity="secret")
    client.explain("tensor", feeds=X)  # decides nothing that a request is bound by
    entries = list(RingReader(ring).entries())
    decided = [entry for entry in entries if isinstance(entry, Decided)]
    finished = [entry for entry in entries if isinstance(entry, Finished)]
    assert [d.decision.route for d in decided] == ["edge", "cloud", "cloud", None]
    assert [(f.route, f.model) for f in finished] == [
        ("edge", "tensor"), ("cloud", "tensor"), ("cloud", "story"),
    ]  # fmt: skip
    assert finished[2].tokens == 2
    assert all(compare(d, WhatIf()).is_reproduced for d in decided)


def test_a_repair_is_recorded_as_a_decision_of_its_own(client, ring):
    from nearfar.errors import EngineError

    client.infer("tensor", X, mode="prefer_edge")
    client.device.fail_with = EngineError("broke")
    client.infer("tensor", X, mode="prefer_edge")
    routes = [e.decision.route for e in RingReader(ring).entries() if isinstance(e, Decided)]
    assert routes == ["edge", "edge", "cloud"]


def test_nothing_of_the_content_is_in_the_file(client, ring):
    client.infer("tensor", X, purpose="4711-purpose", tenant="4711-tenant")
    client.generate("story", "4711 is my number", max_new_tokens=2).text()
    with pytest.raises(DeadlineExceeded):
        client.infer("tensor", X, deadline_ms=0.0001)
    data = ring.read_bytes()
    assert len(list(RingReader(ring).entries())) >= 4
    for word in (b"4711-", b"is my number", b"w0 w1", b"e0 e1", X["x"].tobytes()[:8]):
        assert word not in data


def test_a_client_without_a_ring_imports_nothing_of_it(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys, sdk; sdk.Client(models=sys.argv[1]);"
        "print([m for m in sys.modules if m.startswith('sdk.records')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def written(ring):
    recorder = Recorder(ring, KNOWN)
    for decision in (typical(), typical(remaining_ms=None, model="other")):
        recorder.write(record(decision))
    recorder.close()
    return ring


def run(capsys, *arguments: object) -> tuple[int, str]:
    status = cli.run(replay, [str(a) for a in arguments], program="nearfar replay")
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_replay_reports_what_is_reproduced(written, capsys):
    status, text = run(capsys, written)
    assert status == 0
    assert "2 decisions, 2 reproduced bit by bit" in text
    assert "what if" not in text


def test_replay_answers_what_would_have_been(written, capsys):
    status, text = run(capsys, written, "--rtt-ms", 1000)
    assert status == 0
    assert "2 edge" in text
    assert "2 would go elsewhere" in text
    status, text = run(capsys, written, "--bandwidth", 8, "--changed")
    assert "0 would go elsewhere" in text


def test_replay_gives_json(written, capsys):
    status, text = run(capsys, written, "--json", "--deadline-ms", "inf", "--model", "m")
    assert status == 0
    (row,) = [json.loads(line) for line in text.splitlines()]
    assert row["model"] == "m"
    assert row["reproduced"] is True
    assert row["recorded"]["route"] == "cloud"
    assert row["what_if"]["reason"].startswith("cloud: ")
    assert row["inputs"]["cloud"]["prediction"]["p50_ms"] == 190.0
    assert row["inputs"]["remaining_ms"] == 250.0


def test_replay_fails_when_a_decision_is_not_reproduced(ring, capsys):
    recorder = Recorder(ring, KNOWN)
    recorder.write(record(msgspec.structs.replace(typical(), reason="cloud: because")))
    recorder.close()
    status, text = run(capsys, ring)
    assert status == 1
    assert "not reproduced" in text


def test_replay_names_what_it_cannot_read(tmp_path, capsys):
    (tmp_path / "x").write_text("no ring")
    assert run(capsys, tmp_path / "x")[0] == 2
    assert run(capsys, tmp_path / "none")[0] == 2


@pytest.mark.parametrize("arguments", [("--changed",), ("--rtt-ms", "-1"), ("--last", "-1")])
def test_replay_refuses_what_cannot_be_meant(written, capsys, arguments):
    assert run(capsys, written, *arguments)[0] == 2
