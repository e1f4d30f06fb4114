"""What the predictor knows, as a small JSON text: kept across restarts, free of content.

Shapes, recent errors, by how much clocks matter, lengths of answers and the link are kept; how slow
things were just then is not, since it is over by the time that anybody reads it.

Files of version 1, which know nothing of clocks and pauses, are read as well.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from nearfar.errors import InvalidInput
from sdk.routing.estimates import MOST_BEND, WINDOW, Recent, SizedLatency
from sdk.routing.predictor import ModelLatency, Predictor
from sdk.routing.types import Route

#: A device has few models; more than this are not written, and not read.
MAX_MODELS = 64
#: A text that is longer was not written by `remember`.
MAX_BYTES = 1024 * 1024

_Amount = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e12)]
_Power = Annotated[int, msgspec.Meta(ge=0, le=64)]
_Recents = Annotated[list[_Amount], msgspec.Meta(max_length=WINDOW)]


class _Estimate(msgspec.Struct, forbid_unknown_fields=True):
    # (power of two, mean size, mean value)
    points: Annotated[list[tuple[_Power, _Amount, _Positive]], msgspec.Meta(max_length=65)]
    errors: _Recents
    # Since version 2; a file of version 1 says nothing of it.
    bend: Annotated[float, msgspec.Meta(ge=0, le=MOST_BEND)] = 1.0


class _Model(msgspec.Struct, forbid_unknown_fields=True):
    route: Route
    model: Annotated[str, msgspec.Meta(max_length=256)]
    load: _Estimate
    compute: _Estimate
    prefill: _Estimate
    per_token: _Estimate
    pause: _Estimate | None = None  # since version 2


class _Link(msgspec.Struct, forbid_unknown_fields=True):
    delay_ms: _Positive
    ms_per_byte: _Positive
    errors: _Recents


class _Memory(msgspec.Struct, forbid_unknown_fields=True):
    format_version: Literal[1, 2]
    models: Annotated[list[_Model], msgspec.Meta(max_length=MAX_MODELS)]
    answers: Annotated[dict[str, _Recents], msgspec.Meta(max_length=MAX_MODELS)]
    link: _Link | None


def remember(predictor: Predictor) -> bytes:
    """What the predictor has measured, as JSON of at most `MAX_BYTES`."""
    models = [
        _Model(
            route=route,
            model=model,
            load=_estimate(latency.load),
            compute=_estimate(latency.compute),
            prefill=_estimate(latency.prefill),
            per_token=_estimate(latency.per_token),
            pause=_estimate(latency.pause),
        )
        for (route, model), latency in tuple(predictor.models.items())
        if len(model) <= 256 and (latency.compute.is_measured or latency.prefill.is_measured)
    ]
    link = predictor.link
    memory = _Memory(
        format_version=2,
        models=models[:MAX_MODELS],
        answers={
            model: list(lengths.values)
            for model, lengths in tuple(predictor.answers.items())[:MAX_MODELS]
        },
        link=_Link(link.delay_ms, link.ms_per_byte, list(link.level.errors.values))
        if link.is_measured
        else None,
    )
    return msgspec.json.encode(memory)


def recall(predictor: Predictor, text: bytes) -> None:
    """Give a fresh predictor what another one knew; it counts as a seed until answers come.

    Raises:
        InvalidInput: The text was not written by `remember`; the predictor is as it was.
    """
    try:
        if len(text) > MAX_BYTES:
            raise msgspec.ValidationError("it is too long")
        memory = msgspec.json.decode(text, type=_Memory)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidInput(
            f"The text is not what the router remembers ({exc})",
            field="state",
            fix="Remove the file; it is written again",
        ) from exc
    for kept in memory.models:
        latency = ModelLatency(None, 0)
        for estimate, values in (
            (latency.load, kept.load),
            (latency.compute, kept.compute),
            (latency.prefill, kept.prefill),
            (latency.per_token, kept.per_token),
            (latency.pause, kept.pause),
        ):
            if values is not None:
                _restore(estimate, values)
        predictor.models[kept.route, kept.model] = latency
    for model, lengths in memory.answers.items():
        if lengths:
            predictor.answers[model] = Recent(values=lengths)
    if memory.link is not None:
        predictor.link.delay_ms = memory.link.delay_ms
        predictor.link.recall(memory.link.ms_per_byte)
        if memory.link.errors:
            predictor.link.level.errors = Recent(values=memory.link.errors)


def _estimate(estimate: SizedLatency) -> _Estimate:
    points = sorted(estimate.shape.points.items())
    return _Estimate(
        points=[(index, size, max(value, 1e-6)) for index, (size, value, _) in points],
        errors=list(estimate.level.errors.values),
        bend=estimate.bend,
    )


def _restore(estimate: SizedLatency, kept: _Estimate) -> None:
    # As much as two answers: another day, perhaps another version of the model.
    estimate.shape.points = {index: [size, value, 2.0] for index, size, value in kept.points}
    estimate.shape.refresh()
    if kept.errors:
        estimate.level.errors = Recent(values=kept.errors)
    estimate.bend = kept.bend
