"""`nearfar bench chaos`: what becomes of requests while servers die, stop and lose connections."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos import real, simulated, slots, wedges
from benchmarks.harness import Bar, Figure, Report, Run
from benchmarks.processes import check_store
from benchmarks.subjects import Begin, Part

PARTS = ("simulated", "real", "slots", "wedges")

MIN_TOLD = 99.9  # percent of requests
MAX_STILL = 1.0  # percent of their deadlines
GRACE_MS = real.GRACE_MS
MAX_FREED_MS = 50.0
MAX_NOTICED_WARM_MS, MAX_NOTICED_COLD_MS = 500.0, 1500.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is done.

    Attributes:
        models: Folder of bundles.
        parts: Some of `PARTS`.
        simulated_requests: In the simulation, at least.
        real_requests: Against real processes.
        rate_s: Of them in a second.
        rounds: Cancellations of each kind, and frozen servers.
        seed: What requests and faults are drawn from.
        kinds: What is drawn from for each real request.
        names: The models that real requests ask.
    """

    models: Path
    parts: Sequence[str] = PARTS
    simulated_requests: int = 10_000
    real_requests: int = 500
    rate_s: float = 5.0
    rounds: int = 8
    seed: int = 0
    kinds: Sequence[real.Kind] = ("tensors", "tensors", "bytes", "text")
    names: real.Models = field(default_factory=real.Models)


def measure(settings: Settings, begin: Begin) -> Report:
    """Run the parts.

    Args:
        settings: What is done.
        begin: Shows progress.

    Raises:
        InvalidInput: The folder of bundles is not there.
        CloudUnavailable: The cloud does not start.
    """
    run = Run("chaos", seed=settings.seed)
    if set(settings.parts) & {"real", "slots", "wedges"}:
        check_store(settings.models)
    measures = {"simulated": _simulated, "real": _real, "slots": _slots,
                "wedges": _wedges}  # fmt: skip
    parts = [measures[name](settings, begin) for name in PARTS if name in settings.parts]
    return run.report(
        bars=[bar for part in parts for bar in part.bars],
        figures=[figure for part in parts for figure in part.figures],
        settings={
            "parts": ",".join(settings.parts),
            "simulated_requests": settings.simulated_requests,
            "real_requests": settings.real_requests,
            "rounds": settings.rounds,
        },
    )


def _simulated(settings: Settings, begin: Begin) -> Part:
    step = begin("simulated requests", math.ceil(settings.simulated_requests / 480))
    found = simulated.run(requests=settings.simulated_requests, seed=settings.seed, step=step)
    in_time = sum(late_ms <= GRACE_MS for late_ms in found.late_ms)
    hung = found.requests - len(found.results)
    bars = (
        _told_bar("simulated", in_time, found.requests),
        _none("simulated: requests that hung", hung),
        _none("simulated: computed twice by one server", found.computed_twice),
    )
    answered = sum(result.is_in_time for result in found.results)
    figures = (
        _count("simulated: requests", found.requests),
        Figure.of_rounds("simulated: answered", "%", [100.0 * answered / found.requests]),
        *_counts("simulated: told", found.refusals),
        *_counts("simulated: faults", found.faults),
        _count("simulated: computations in the cloud", found.computed),
        _count("simulated: sent to one server more than once", found.sent_twice),
        _count("simulated: attempts beyond the first",
               sum(result.attempts - 1 for result in found.results)),
    )  # fmt: skip
    return Part(bars, figures)


def _real(settings: Settings, begin: Begin) -> Part:
    step = begin("real requests", settings.real_requests)
    found = real.run(
        models=settings.models, requests=settings.real_requests, rate_s=settings.rate_s,
        seed=settings.seed, step=step, kinds=settings.kinds, names=settings.names,
    )  # fmt: skip
    return real_part(found)


def real_part(found: real.Outcome) -> Part:
    """Bars and figures of a run with real processes."""
    told = found.told
    delays = list(zip(told, found.allowed_ms, found.alarm_ms, strict=True))
    # Whoever waits needs a processor and Python's lock, and has to wait for its turn.
    in_time = sum(
        one.is_typed and one.late_ms <= max(allowed_ms, GRACE_MS + alarm_ms)
        for one, allowed_ms, alarm_ms in delays
    )
    # But if it often has to, that is nearfar's doing, not the machine's.
    still = sum(alarm_ms > allowed_ms for _, allowed_ms, alarm_ms in delays)
    at_once = sum(one.is_typed and one.late_ms <= GRACE_MS for one in told)
    heard = [one for one in told if one.ended_s is not None]
    bars = (
        _told_bar("real", in_time, len(told)),
        Bar(
            name="real: deadlines at which the client's whole process stood still",
            value=100.0 * still / len(told), limit=MAX_STILL, direction="at_most", unit="%",
        ),
        _none("real: requests that hung", len(told) - len(heard)),
        _none("real: computed twice by one server", found.computed_twice),
        _none("real: errors that are not ours", sum(not one.is_typed for one in told)),
        _none("real: answers with a token twice or out of order",
              sum(not one.is_in_order for one in told)),
    )  # fmt: skip
    late_of: dict[str, list[float]] = {}
    for one in heard:
        asked = f"{one.ask.kind}, {one.ask.mode}"
        late_of.setdefault(asked, []).append(max(0.0, one.late_ms))
    late = [late_ms for values in late_of.values() for late_ms in values]
    figures = [
        _count("real: requests", len(told)),
        Figure.of_rounds(
            "real: answered", "%", [100.0 * sum(not one.error for one in heard) / len(told)]
        ),
        Figure.of_rounds(
            f"real: told by the deadline + {GRACE_MS:.0f} ms, whatever delayed them", "%",
            [100.0 * at_once / len(told)],
        ),
        Figure.of_calls("real: after the deadline", "ms", late or [0.0]),
        *(
            Figure.of_calls(f"real: after the deadline: {asked}", "ms", values)
            for asked, values in sorted(late_of.items())
        ),
        Figure.of_calls("real: delays of the machine above 1 ms", "ms", found.tick_ms or [0.0]),
        Figure.of_calls("real: a thread that only waits for the deadline, after it", "ms",
                        found.alarm_ms),
        *_counts("real: told", Counter(one.error for one in told if one.error)),
        *_counts("real: answered by", Counter(one.path for one in told if not one.error)),
        *_counts("real: faults", Counter({str(k): v for k, v in found.faults.items()})),
        _count("real: a second route was started", sum(bool(one.hedge) for one in told)),
        _count("real: computations in the cloud", found.computed),
        _count("real: computed again after a kill", found.computed_again),
    ]  # fmt: skip
    return Part(bars, tuple(figures))


def _slots(settings: Settings, begin: Begin) -> Part:
    rounds, names = settings.rounds, settings.names
    phases = len(slots.PHASES)
    step = begin("slots of the device", phases * rounds)
    freed = slots.free_edge_slots(settings.models, names.text, rounds, step)
    with slots.world(settings.models, (names.text, names.tensors)) as cloud:
        step = begin("slots of the cloud", phases * rounds)
        slots.free_cloud_slots(cloud, names.text, rounds, freed, step)
        step = begin("frozen servers", 2 * rounds)
        stalls = slots.notice_stalls(cloud, settings.models, names.tensors, rounds, step)
    figures = [
        Figure.of_rounds(f"slots: {place}: free after cancelling, {_DURING[phase]}", "ms", values)
        for place, of_phase in (("device", freed.edge), ("cloud", freed.cloud))
        for phase, values in of_phase.items()
    ]
    noticed = (
        (Figure.of_rounds("slots: frozen server noticed, warm", "ms", stalls.warm),
         MAX_NOTICED_WARM_MS),
        (Figure.of_rounds("slots: frozen server noticed, cold", "ms", stalls.cold),
         MAX_NOTICED_COLD_MS),
    )  # fmt: skip
    bars = [
        *(figure.bar(MAX_FREED_MS, "at_most") for figure in figures),
        *(_worst(figure, limit) for figure, limit in noticed),
    ]
    return Part(tuple(bars), (*figures, *(figure for figure, _ in noticed)))


def _wedges(settings: Settings, begin: Begin) -> Part:
    rounds, names, found = settings.rounds, settings.names, wedges.Wedges()
    with slots.world(settings.models, (names.text, names.tensors)) as cloud:
        step = begin("engines that hang", 2 * len(wedges.PHASES) * rounds)
        wedges.hang_device(cloud, settings.models, names, rounds, found, step)
        step = begin("servers that fall silent", 4 * rounds)
        wedges.silence_cloud(cloud, settings.models, names, rounds, found, step)
    wedges.be_busy(
        settings.models, names.tensors, found, begin("honest work on a busy machine", 20)
    )
    return wedges_part(found)


def wedges_part(found: wedges.Wedges) -> Part:
    """Bars and figures of engines that hang and servers that fall silent."""
    noticed = [
        (Figure.of_rounds(f"wedges: {route}: silence noticed, {phase}, {warmth}", "ms", values),
         MAX_NOTICED_WARM_MS if warmth == "warm" else MAX_NOTICED_COLD_MS)
        for (route, phase, warmth), values in sorted(found.noticed.items())
    ]  # fmt: skip
    bars = (
        *(_worst(figure, limit) for figure, limit in noticed),
        _none("wedges: answers with a token lost, twice or not marked", found.wrong),
        _none("wedges: honest calls on a busy machine taken for a stall", found.false_alarms),
    )
    figures = (
        *(figure for figure, _ in noticed),
        Figure.of_rounds("wedges: closing a client whose engine hangs", "ms", found.closed_ms),
        _count("wedges: honest calls on a busy machine", found.honest),
        *_counts("wedges", found.answered),
    )
    return Part(bars, figures)


_DURING = {"prompt": "in the prompt", "answer": "in the answer"}


def _worst(figure: Figure, limit: float) -> Bar:
    """A bar on the largest round: a promise about each, not about most."""
    seen = figure.summary
    return Bar(
        name=figure.name, value=seen.max, limit=limit, direction="at_most", unit=figure.unit,
        lowest=seen.min, highest=seen.max,
    )  # fmt: skip


def _told_bar(side: str, in_time: int, count: int) -> Bar:
    delay = " and the delay of a thread that only waits" if side == "real" else ""
    return Bar(
        name=f"{side}: answered, or told why not, by the deadline + {GRACE_MS:.0f} ms{delay}",
        value=100.0 * in_time / count, limit=MIN_TOLD, direction="at_least", unit="%",
    )  # fmt: skip


def _none(name: str, count: int) -> Bar:
    return Bar(name=name, value=float(count), limit=0.0, direction="at_most", unit="")


def _count(name: str, count: int) -> Figure:
    return Figure.of_rounds(name, "", [float(count)])


def _counts(name: str, counts: Counter[str]) -> list[Figure]:
    return [_count(f"{name}: {key}", count) for key, count in sorted(counts.items())]
