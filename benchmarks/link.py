"""`nearfar bench link`: the client against a real cloud runtime over an emulated link.

The worlds are those of `nearfar bench routing`, with real processes instead of a virtual clock: a
cloud runtime, a link (`benchmarks.emulator`) and this process with client and device. The device
runs the real model, and then holds its slot for as long as the slow device of that world would.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.emulator import EmulatedLink, LinkSpec
from benchmarks.harness import Bar, Figure, Report, Run
from benchmarks.processes import OPEN_POLICY, RealCloud, check_store, wait_until_s
from benchmarks.routing.links import write_trace
from benchmarks.routing.scenarios import DURATION_S, Scenario, scenarios
from benchmarks.routing.simulate import COLUMNS, Result, Score
from benchmarks.routing.world import Job, Nature, factor_at
from benchmarks.subjects import Begin
from nearfar.bundle import BundleStore
from nearfar.engines.base import CancelToken, SessionOptions
from nearfar.engines.model import LoadedModel
from nearfar.errors import Cancelled, NearfarError
from sdk import Client
from sdk.routing import Mode

EDGE, CLOUD, OURS = "edge only", "cloud only", "nearfar"
POLICIES: dict[str, Mode] = {EDGE: "edge_only", CLOUD: "cloud_only", OURS: "auto"}
#: Generated links that stand in, in this order, where there are fewer than three recordings.
GENERATED = ("conference", "vehicle", "cellular")
MIN_LINKS = 3
#: Requests that come before are not counted: everybody's first ones are slow, and ours learns.
SETTLE_S = 4.0
MIN_AHEAD = 0.0  # points of SLO attainment above the better of edge only and cloud only
_HUNG_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is run.

    Attributes:
        models: Folder of bundles.
        model: One in it that takes a tensor of whole numbers, such as the file-type classifier.
        traces: Folder of Mahimahi traces; `None` for generated links only.
        duration_s: Of each run; each link has three.
        seed: What requests and links are drawn from.
    """

    models: Path
    model: str = "file-type"
    traces: Path | None = None
    duration_s: float = 40.0
    seed: int = 0


class SlowModel(LoadedModel):
    """A model on a device that takes its time.

    Attributes:
        takes_s: How long a batch of so many bytes takes now; `None` for as long as it takes.
    """

    takes_s: Callable[[int], float] | None = None

    def infer(
        self, feeds: Mapping[str, np.ndarray], cancel: CancelToken | None = None
    ) -> dict[str, np.ndarray]:
        """As `LoadedModel.infer`."""
        began_s = time.monotonic()
        outputs = super().infer(feeds, cancel)
        if self.takes_s is not None:
            size_bytes = sum(array.nbytes for array in feeds.values())
            left_s = began_s + self.takes_s(size_bytes) - time.monotonic()
            stop = threading.Event()
            if cancel is not None:
                cancel.on_cancel(stop.set)
            if left_s > 0.0 and stop.wait(left_s):
                raise Cancelled("The call was cancelled")
        return outputs


@dataclass(frozen=True, slots=True)
class Outcome:
    """All runs over one link.

    Attributes:
        scenario: Which.
        results: Policy to what became of its requests.
        late_ms: Policy to how long after the deadline each caller knew; 0 for those in time.
    """

    scenario: Scenario
    results: dict[str, list[Result]]
    late_ms: dict[str, list[float]]

    def score(self, policy: str) -> Score:
        return Score.of(self.results[policy])

    @property
    def ahead(self) -> float:
        """Points of attainment above the better fixed policy."""
        best = max(self.score(EDGE).attainment, self.score(CLOUD).attainment)
        return self.score(OURS).attainment - best


def links_of(traces: Path | None) -> list[Scenario]:
    """The recorded links of a folder, and generated ones up to three.

    Raises:
        InvalidInput: The traces cannot be read.
    """
    found = scenarios(traces)
    chosen = [scenario for scenario in found if scenario.is_recorded]
    by_name = {scenario.name: scenario for scenario in found}
    return chosen + [by_name[name] for name in GENERATED][: max(1, MIN_LINKS - len(chosen))]


def measure(settings: Settings, begin: Begin) -> Report:
    """Run every policy over every link.

    Raises:
        InvalidInput: There are no models, or the traces cannot be read.
        CloudUnavailable: The cloud does not start.
    """
    run = Run("link", seed=settings.seed)
    check_store(settings.models)
    chosen = links_of(settings.traces)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="nearfar-bench-") as name:
        folder = Path(name)
        cloud = RealCloud(folder, settings.models, names=[settings.model], threads=1)
        with cloud:
            for scenario in chosen:
                step = begin(scenario.name, len(POLICIES))
                outcomes.append(run_link(cloud, scenario, settings, folder, step))
    return run.report(
        bars=[_bar(outcomes)],
        figures=[figure for outcome in outcomes for figure in _figures(outcome)],
        settings={
            "model": settings.model,
            "duration_s": str(settings.duration_s),
            "links": ", ".join(scenario.name for scenario in chosen),
        },
    )


def run_link(
    cloud: RealCloud, scenario: Scenario, settings: Settings, folder: Path, step: Callable[[], None]
) -> Outcome:
    """Let each policy meet the same requests over the same link."""
    nature = scenario.draw(settings.seed)
    up, down = folder / "link.up", folder / "link.down"
    write_trace(nature.up, up)
    write_trace(nature.down, down)
    spec = LinkSpec(up=up, down=down, offset_s=nature.up.offset_s, rtt_ms=scenario.rtt_ms)
    outcome = Outcome(scenario, {}, {})
    for policy, mode in POLICIES.items():
        with EmulatedLink(cloud.process.port, spec) as link:
            results, late_ms = _run_policy(cloud, link, nature, mode, settings)
        outcome.results[policy] = results
        outcome.late_ms[policy] = late_ms
        step()
    return outcome


def _run_policy(
    cloud: RealCloud, link: EmulatedLink, nature: Nature, mode: Mode, settings: Settings
) -> tuple[list[Result], list[float]]:
    device = _device(settings)
    with Client(
        models=settings.models, cloud=cloud.config(link), policy=OPEN_POLICY, sensitivity="public",
        edge_options=SessionOptions(threads=1),
    ) as client:  # fmt: skip
        # The one seam for it: whatever the device has loaded is what it runs.
        assert client._edge is not None
        client._edge.runtime._host(settings.model, None).loaded = device
        client.warm_up(settings.model)
        caller = _Caller(client, settings.model, mode, nature)
        begin_s = time.monotonic()
        rng = random.Random(settings.seed)

        def takes_s(size_bytes: int) -> float:
            now_s = time.monotonic() - begin_s
            noise = rng.gauss(1.0, 0.08)
            return nature.edge.service_s(size_bytes) * noise * factor_at(nature.thermal, now_s)

        device.takes_s = takes_s
        jobs = [job for job in nature.jobs if job.arrival_s < min(settings.duration_s, DURATION_S)]
        heard = _ask_all(caller, jobs, begin_s)
    counted = [(one, late) for one, late in heard if one.arrival_s >= SETTLE_S]
    return [one for one, _ in counted], [late for _, late in counted]


def _device(settings: Settings) -> SlowModel:
    from nearfar.engines.devices import probe
    from nearfar.engines.selection import candidates

    bundle = BundleStore(settings.models).open(settings.model)
    variant = candidates(bundle.manifest, probe(), "edge")[0].variant
    return SlowModel(bundle, variant.id, SessionOptions(threads=1))


class _Caller:
    def __init__(self, client: Client, model: str, mode: Mode, nature: Nature) -> None:
        self._client = client
        self._model = model
        self._mode: Mode = mode
        self._deadline_ms = (nature.jobs[0].deadline_s - nature.jobs[0].arrival_s) * 1000.0
        (self._input,) = BundleStore(client._edge.store).open(model).manifest.inputs  # type: ignore[union-attr]

    def call(self, job: Job) -> tuple[Result, float]:
        """One request; what became of it, and how long after the deadline that was known."""
        width = self._input.shape[1]
        rows = max(1, round(job.upload_bytes / (4 * width)))
        feeds = {self._input.name: np.full((rows, width), job.number % 250, np.int32)}
        options: dict[str, Any] = {"mode": self._mode, "deadline_ms": self._deadline_ms}
        began_s = time.monotonic()
        route, attempts, is_answered = "", 1, False
        try:
            answer = self._client.infer(self._model, feeds, **options)
        except NearfarError as error:
            route = next(iter(getattr(error, "tried", ())), "")
        else:
            route, is_answered = answer.route.name, True
            attempts += len(answer.route.before) + bool(answer.route.hedge)
        latency_ms = (time.monotonic() - began_s) * 1000.0
        result = Result(
            arrival_s=job.arrival_s, latency_ms=latency_ms,
            is_in_time=is_answered and latency_ms <= self._deadline_ms, attempts=attempts,
            route=route,
        )  # fmt: skip
        return result, max(0.0, latency_ms - self._deadline_ms)

    def hung(self, job: Job) -> tuple[Result, float]:
        """What is noted of a request that never came back."""
        latency_ms = self._deadline_ms + _HUNG_S * 1000.0
        result = Result(
            arrival_s=job.arrival_s, latency_ms=latency_ms, is_in_time=False, attempts=1, route=""
        )
        return result, _HUNG_S * 1000.0


def _ask_all(caller: _Caller, jobs: Sequence[Job], begin_s: float) -> list[tuple[Result, float]]:
    heard: dict[int, tuple[Result, float]] = {}

    def ask(job: Job) -> None:
        heard[job.number] = caller.call(job)

    threads = []
    for job in jobs:
        wait_until_s(begin_s + job.arrival_s)
        thread = threading.Thread(target=ask, args=(job,), daemon=True)
        thread.start()
        threads.append(thread)
    give_up_s = time.monotonic() + _HUNG_S
    for thread in threads:
        thread.join(max(0.0, give_up_s - time.monotonic()))
    return [heard.get(job.number) or caller.hung(job) for job in jobs]


def _bar(outcomes: Sequence[Outcome]) -> Bar:
    ahead = [outcome.ahead for outcome in outcomes]
    return Bar(
        name="SLO attainment above the better of edge only and cloud only",
        value=fmean(ahead), limit=MIN_AHEAD, direction="at_least", unit="points",
        lowest=min(ahead), highest=max(ahead),
    )  # fmt: skip


def _figures(outcome: Outcome) -> list[Figure]:
    figures = []
    for policy in POLICIES:
        score, title = outcome.score(policy), f"{outcome.scenario.name}: {policy}"
        figures += [
            Figure.of_rounds(f"{title}: {text}", unit, [getattr(score, field)])
            for field, text, unit in COLUMNS
        ]
        figures.append(
            Figure.of_calls(f"{title}: known after the deadline", "ms", outcome.late_ms[policy])
        )
    return figures
