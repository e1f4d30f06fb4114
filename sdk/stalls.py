"""When silence of a route is a stall: what follows from what is known of its answers.

The numbers come from the predictor, the rule from `sdk.routing.hedging`; who keeps the time is the
edge runtime for the device, and the client's link for a cloud.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from nearfar.generation import Prompt
from nearfar.patience import Patience
from sdk.requests import prompt_size
from sdk.routing.hedging import suspicious_after_ms

if TYPE_CHECKING:
    from sdk.knowledge import Knowledge
    from sdk.requests import Request
    from sdk.routing import RouteDecision
    from sdk.routing.estimates import Quantiles

#: Least silence that is suspicious before anything like it was measured here; with the time that
#: looking takes on a busy machine it stays below 1.5 s.
COLD_MS = 1300.0
#: How far beyond its usual pauses a cloud's silence is suspicious, and beyond p99 a device's at
#: most: with the time that looking takes, less than half a second.
PAUSE_MARGIN_MS = 400.0
#: And at least: on a busy machine the threads of a process wait so long for each other.
DEVICE_MARGIN_MS = 200.0


def patience(known: Knowledge, request: Request, *, so_far: str = "") -> Patience:
    """How long the device's engine may be silent over a request.

    Args:
        known: What its answers took.
        request: What is asked for.
        so_far: Text of an answer that it goes on with, and reads like the prompt.
    """
    size = known.size(request)
    if so_far:
        more = prompt_size(Prompt(text=so_far), request.options)
        tokens = size.input_tokens + more.input_tokens
        size = msgspec.structs.replace(size, input_tokens=tokens)
    first, token = known.predictor.silences("edge", request.model, size, now_s=time.monotonic())
    return Patience(
        first_s=_after_ms(first) / 1000.0,
        token_s=_after_ms(token) / 1000.0,
        is_cold=first is None or not first[1],
    )


def pause_limit_s(known: Knowledge, request: Request, decision: RouteDecision) -> float | None:
    """How long a cloud may be silent in the middle of an answer before it counts as stalled.

    Its pauses are those of a server that has others to serve and of a link, so the margin beyond
    them is always a large one: another route costs the work so far.

    Returns:
        `None` when no other route could go on.
    """
    if decision.fallback is None:
        return None
    predictor = known.predictor_of(decision, "cloud")
    _, pause = predictor.silences(
        "cloud", request.model, known.size(request), now_s=time.monotonic()
    )
    if pause is None or not pause[1]:
        return _after_ms(pause) / 1000.0
    return (pause[0][4] + PAUSE_MARGIN_MS) / 1000.0


def _after_ms(silence: tuple[Quantiles, bool] | None) -> float:
    if silence is None:
        return COLD_MS
    quantiles, is_measured = silence
    after_ms = suspicious_after_ms(quantiles, is_measured=True)
    after_ms = max(after_ms, quantiles[4] + DEVICE_MARGIN_MS)
    after_ms = min(after_ms, quantiles[4] + PAUSE_MARGIN_MS)
    return after_ms if is_measured else max(after_ms, COLD_MS)
