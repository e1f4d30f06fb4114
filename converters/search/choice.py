"""Which of the variants that were tried go into the bundle, and why. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import structs

from converters.report.evidence import LayerErrors, Tried
from converters.report.page import share
from converters.report.pareto import mark_front
from converters.report.words import damage_of
from converters.settings import Gates
from converters.steps.gate import latency_refusal, size_refusal
from nearfar.errors import ConversionError
from nearfar.units import format_bytes, format_ms

#: Differences that decide nothing: a few kilobytes, what two measurements of one variant differ by,
#: and one answer of a thousand.
_LIKE_SIZE, _LIKE_TIME, _LIKE_QUALITY = 1.05, 1.1, 0.001


def judged(
    tried: Sequence[Tried], gates: Gates, full_bytes: int, layers: Sequence[LayerErrors] = ()
) -> tuple[Tried, ...]:
    """The same, with the Pareto front marked, and with outcome ``refused`` where a gate says so.

    Args:
        tried: What was tried.
        gates: The limits.
        full_bytes: Size of the model's weights in 32 bits; 0 when that is not known.
        layers: Where variants err, to be told of those that lose too much.
    """
    blamed = {one.variant_id: one for one in layers if one.kind == "inside"}
    return tuple(
        structs.replace(one, outcome="refused", reason=problem[0], hint=problem[1])
        if one.outcome != "failed"
        and (problem := _problem(one, gates, full_bytes, blamed.get(one.id))) is not None
        else one
        for one in mark_front(tried)
    )


def choose(
    tried: Sequence[Tried], count: int
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Tried, ...]]:
    """Take the best of the Pareto front.

    The smallest, the fastest and the best are taken first, then what loses least, up to `count`.

    Args:
        tried: From `judged`.
        count: How many variants the bundle may have.

    Returns:
        Ids of those taken, best quality first; a line for each that says why; all that were tried,
        with their outcome.

    Raises:
        ConversionError: No variant holds the limits.
    """
    holding = [one for one in tried if one.outcome not in ("failed", "refused")]
    front = [one for one in holding if one.is_front] or holding
    if not front:
        told = "; ".join(one.reason for one in tried if one.reason)
        raise ConversionError(
            f"No variant holds the limits: {told or 'none could be made'}",
            fix="Allow more with --max-quality-drop, --max-size or --max-latency",
        )
    titles: dict[str, list[str]] = {}

    def title(one: Tried, text: str) -> None:
        if one.id in titles or len(titles) < count:
            titles.setdefault(one.id, []).append(text)

    # Of those that are as good as the smallest, fastest or best, the one that is better otherwise.
    least = min(one.size_bytes for one in front)
    small = [one for one in front if one.size_bytes <= _LIKE_SIZE * least]
    title(min(small, key=lambda one: (one.latency_ms or 0.0, one.lost or 0.0)), "the smallest")
    timed = [one for one in front if one.latency_ms is not None]
    if timed:
        least_ms = min(one.latency_ms or 0.0 for one in timed)
        fast = [one for one in timed if (one.latency_ms or 0.0) <= _LIKE_TIME * least_ms]
        title(min(fast, key=lambda one: (one.lost or 0.0, one.size_bytes)), "the fastest")
    least_lost = min(one.lost or 0.0 for one in front)
    good = [one for one in front if (one.lost or 0.0) <= least_lost + _LIKE_QUALITY]
    title(min(good, key=lambda one: (one.size_bytes, one.lost or 0.0)), "the best")
    for one in sorted(front, key=lambda one: one.lost or 0.0):
        if one.id not in titles:
            title(one, "nothing else is at least as small, as fast and as good")
    by_id = {one.id: one for one in tried}
    ids = sorted(titles, key=lambda key: (by_id[key].lost or 0.0, -by_id[key].size_bytes))
    lines = tuple(f"{key}: {' and '.join(titles[key])} ({_facts(by_id[key])})" for key in ids)
    return tuple(ids), lines, tuple(_told(one, ids, tried) for one in tried)


def _told(one: Tried, ids: Sequence[str], tried: Sequence[Tried]) -> Tried:
    if one.id in ids or one.outcome in ("failed", "refused"):
        return one
    reason = f"{one.id} holds all limits; others were taken"
    better = [other for other in tried if other.id in ids and _is_better(other, one)]
    if better:
        reason = f"{better[0].id} is at least as small, as fast and as good ({_facts(better[0])})"
    return structs.replace(one, outcome="not taken", reason=reason)


def _is_better(one: Tried, other: Tried) -> bool:
    return (
        one.size_bytes <= other.size_bytes
        and (one.lost or 0.0) <= (other.lost or 0.0)
        and (one.latency_ms or 0.0) <= (other.latency_ms or 0.0)
    )


def _problem(
    one: Tried, gates: Gates, full_bytes: int, layers: LayerErrors | None
) -> tuple[str, str] | None:
    limit = gates.max_quality_drop
    if limit is not None and one.lost is not None and one.lost > limit:
        where = f"; {damage_of(layers)}" if layers is not None else ""
        return (
            f"{one.id} loses {share(one.lost)} ({one.metric}), the limit is {share(limit)}{where}",
            "a greater --max-quality-drop, if the application bears it",
        )
    found = size_refusal(one.id, one.size_bytes, gates, full_bytes)
    if found is None and one.latency is not None:
        found = latency_refusal(one.id, one.latency, gates)
    return (found.reason, found.hint) if found is not None else None


def _facts(one: Tried) -> str:
    facts = [format_bytes(one.size_bytes), f"loses {share(one.lost)}"]
    if one.latency_ms is not None:
        what = "a token" if one.latency and one.latency.ms_per_token else "a call"
        facts.insert(1, f"{format_ms(one.latency_ms)} {what}")
    return ", ".join(facts)
