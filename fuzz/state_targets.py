"""Targets of what a client writes for itself and reads again: its memory and its decisions."""

from __future__ import annotations

import contextlib
import math

from fuzz.common import file
from nearfar.errors import InvalidInput
from sdk.knowledge import Knowledge
from sdk.routing import Predictor, RequestSize, replay
from sdk.routing.memory import MAX_BYTES, recall, remember
from sdk.routing.router import decode_decision
from sdk.routing.types import ROUTES

_SIZES = (
    RequestSize(),
    RequestSize(upload_bytes=1 << 20, download_bytes=1 << 20, input_elements=1 << 20),
    RequestSize(input_tokens=64, max_new_tokens=100, upload_bytes=256),
)


def routing_memory(data: bytes) -> None:
    """What was measured in an earlier run: refused whole, or good for predictions."""
    predictor = Predictor()
    try:
        recall(predictor, data)
    except InvalidInput:
        assert not predictor.models
        assert not predictor.answers
        return
    for route, model in [*predictor.models, *((route, "unknown") for route in ROUTES)]:
        for size in _SIZES:
            found = predictor.predict(route, model, size, now_s=0.0)
            quantiles = found.quantiles()
            if quantiles is not None:
                assert all(math.isfinite(value) and value >= 0 for value in quantiles)
                assert list(quantiles) == sorted(quantiles)
    written = remember(predictor)
    assert len(written) <= MAX_BYTES
    recall(Predictor(), written)


def state_file(data: bytes) -> None:
    """The same as the client does it: a file that is damaged is only a warning, and is replaced."""
    path = file("state.json", data)
    Knowledge(edge=None, link=None, state_file=path).save()
    recall(Predictor(), path.read_bytes())


def decision(data: bytes) -> None:
    """A decision record: refused, or one that can be read, shown and decided again."""
    try:
        record = decode_decision(data)
    except InvalidInput:
        return
    assert decode_decision(record.encode()).encode() == record.encode()
    again = replay(record)
    assert replay(again).encode() == again.encode()
    assert len(again.reason.encode("utf-8", "replace")) <= 256
    for route in (again.route, again.fallback):
        assert route is None or again.verdict.allows(route)
    with contextlib.suppress(OverflowError):
        assert len(again.candidates) == 2
    assert (again.error() is None) == (again.route is not None)
