"""Seeds of the targets that read what a client wrote for itself."""

from __future__ import annotations

from collections.abc import Iterator

from sdk.policy.model import Requirement, Verdict
from sdk.routing import Observation, Predictor, RequestSize
from sdk.routing.memory import remember
from sdk.routing.router import decide
from sdk.routing.types import DecisionInputs, Prediction, RouteState


def memories() -> Iterator[bytes]:
    """Of a fresh predictor, and of one that saw both routes, a link and a chat."""
    predictor = Predictor()
    yield remember(predictor)
    for second in range(4):
        size = RequestSize(upload_bytes=1000 << second, input_elements=64)
        seen = Observation(total_ms=30 + second % 3, compute_ms=5)
        predictor.observe("cloud", "m", size, seen, now_s=second)
        predictor.observe("edge", "m", size, Observation(total_ms=9, compute_ms=9), now_s=second)
        answer = Observation(
            total_ms=400, prefill_ms=200, decode_ms=200, completion_tokens=11, finished=True
        )
        chat = RequestSize(input_tokens=64, max_new_tokens=100)
        predictor.observe("edge", "chat", chat, answer, now_s=second)
        predictor.observe_round_trip(20.0 + second, now_s=second)
        yield remember(predictor)


def decisions() -> Iterator[bytes]:
    """Each kind of verdict, obstacle, objective and deadline."""
    fast = RouteState(prediction=Prediction(basis="measured", p50_ms=20.0, p95_ms=30.0))
    slow = RouteState(
        prediction=Prediction(basis="seeded", p50_ms=200.0, p95_ms=300.0, ttft_ms=50.0),
        quality_rank=0,
        ahead=2,
    )
    unknown, away = RouteState(), RouteState(obstacle="unreachable", detail="until 12:00")
    for edge, cloud in ((fast, slow), (slow, fast), (unknown, slow), (away, away), (fast, away)):
        for allowed in ((True, True), (True, False), (False, True), (False, False)):
            for remaining_ms in (None, 25.0):
                verdict = Verdict(
                    edge=allowed[0], cloud=allowed[1], rule_ids=("r1",), reason="a rule says so",
                    policy_hash="0" * 16, require=Requirement(region=("eu",)),
                )  # fmt: skip
                yield decide(
                    DecisionInputs(
                        model="m", sensitivity="internal", verdict=verdict, edge=edge, cloud=cloud,
                        objective="quality" if remaining_ms is None else "latency",
                        remaining_ms=remaining_ms,
                    )
                ).encode()  # fmt: skip
