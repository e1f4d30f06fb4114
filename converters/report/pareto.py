"""Which of several variants are worth having: those that no other one beats in everything."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import structs

from converters.report.evidence import Tried


def mark_front(tried: Sequence[Tried]) -> tuple[Tried, ...]:
    """The same variants, with `is_front` where it is deserved.

    A variant is beaten by one that is not larger, not slower and not worse, and is better in one of
    these. Variants without a size, or without a figure of quality, take no part; where not all have
    been timed, time takes no part.
    """
    judged = [one for one in tried if one.size_bytes and one.lost is not None]
    is_timed = all(one.latency_ms is not None for one in judged)

    def marks(one: Tried) -> tuple[float, ...]:
        assert one.lost is not None
        return (one.size_bytes, one.lost, (one.latency_ms or 0.0) if is_timed else 0.0)

    def beats(one: Tried, other: Tried) -> bool:
        pairs = list(zip(marks(one), marks(other)))  # noqa: B905
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    front = {id(one) for one in judged if not any(beats(other, one) for other in judged)}
    return tuple(structs.replace(one, is_front=id(one) in front) for one in tried)
