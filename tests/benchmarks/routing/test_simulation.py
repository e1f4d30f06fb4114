from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from benchmarks.routing import bench
from benchmarks.routing.bench import Settings, run_scenario
from benchmarks.routing.links import steady_link
from benchmarks.routing.pictures import write_pictures
from benchmarks.routing.policies import Fixed, Oracle, Ours, fixed_policies
from benchmarks.routing.scenarios import Scenario, scenarios
from benchmarks.routing.simulate import Score, simulate
from benchmarks.routing.world import Job, Nature, Speed, Window, World, arrival_times
from nearfar.cli import main
from nearfar.errors import InvalidInput

EDGE = Fixed("edge only", lambda job: "edge")
CLOUD = Fixed("cloud only", lambda job: "cloud")


def job(number: int, arrival_s: float, *, deadline_s: float = 1.0, **more: object) -> Job:
    fields = {
        "upload_bytes": 15_000, "download_bytes": 1_500, "edge_noise": 1.0, "cloud_noise": 1.0,
        "rtt_s": 0.04, "cloud_wedges": False,
    } | more  # fmt: skip
    return Job(number, arrival_s, arrival_s + deadline_s, **fields)  # type: ignore[arg-type]


def nature(*jobs: Job, **more: object) -> Nature:
    fields = {
        "jobs": jobs, "up": steady_link(12), "down": steady_link(48),
        "edge": Speed(fixed_ms=100, per_kb_ms=0), "cloud": Speed(fixed_ms=10, per_kb_ms=0),
        "cloud_slots": 1, "others": (),
    } | more  # fmt: skip
    return Nature(**fields)  # type: ignore[arg-type]


def latencies(world: Nature, policy: Fixed) -> list[float]:
    return [round(result.latency_ms) for result in simulate(World(world), policy)]


def test_the_device_serves_one_after_the_other() -> None:
    assert latencies(nature(job(0, 0.0), job(1, 0.0), job(2, 0.05)), EDGE) == [100, 200, 250]


def test_the_cloud_takes_round_trip_transfer_and_service() -> None:
    # 10 packets at one per millisecond, the first at once; 40 ms; 10 ms; one packet back.
    assert latencies(nature(job(0, 0.0)), CLOUD)[0] in (59, 60)
    uploads = latencies(nature(job(0, 0.0), job(1, 0.0), cloud_slots=2), CLOUD)
    assert uploads[1] - uploads[0] == 10


def test_the_clouds_other_clients_take_its_slots() -> None:
    busy = nature(job(0, 0.0), others=((0.0, 0.3),))
    assert latencies(busy, CLOUD)[0] == 330


def test_who_waits_past_the_deadline_never_runs() -> None:
    late = nature(job(0, 0.0), job(1, 0.0, deadline_s=0.09), job(2, 0.0))
    results = simulate(World(late), EDGE)
    assert [result.is_in_time for result in results] == [True, False, True]
    assert [round(result.latency_ms) for result in results] == [100, 90, 200]


def test_a_wedge_is_late_and_an_outage_is_a_refusal_that_is_repaired() -> None:
    assert latencies(nature(job(0, 0.0, cloud_wedges=True)), CLOUD) == [1000]
    down = nature(job(0, 0.0), edge=Speed(fixed_ms=500, per_kb_ms=0), outages=(Window(0, 9),))
    (result,) = simulate(World(down), Ours(down, random.Random(0)))
    assert (result.route, result.attempts, result.is_in_time) == ("edge", 2, True)
    assert round(result.latency_ms) == 540


def test_a_wedge_is_answered_by_the_other_route_and_the_loser_is_given_up() -> None:
    quick = Speed(fixed_ms=40, per_kb_ms=0)
    wedged = nature(
        *(job(n, 0.5 * n, edge_noise=3.0, cloud_wedges=n == 9) for n in range(12)),
        edge=quick, cloud=Speed(fixed_ms=2, per_kb_ms=0),
    )  # fmt: skip
    policy = Ours(wedged, random.Random(0))
    results = simulate(World(wedged), policy)
    assert results[9].route == "edge"
    assert results[9].attempts == 2
    assert results[9].latency_ms < 300
    assert policy.hedging.started == sum(result.attempts - 1 for result in results)
    without = simulate(World(wedged), Ours(wedged, random.Random(0), hedge_budget=0.0))
    assert round(without[9].latency_ms) == 1000


def test_a_device_that_is_given_up_is_free_for_the_next() -> None:
    world = World(nature(job(0, 0.0), job(1, 0.0)))
    visit = world.start("edge", job(0, 0.0), 0.0)
    world.cancel(visit, 0.01)
    assert world.foresee("edge", job(1, 0.01), 0.01).end_s == pytest.approx(0.16)
    queued = world.start("edge", job(1, 0.01), 0.01)
    world.cancel(visit, 0.02)  # somebody is behind it: nothing moves
    assert world.foresee("edge", job(2, 0.02), 0.02).end_s == pytest.approx(queued.end_s + 0.1)


def test_a_connection_that_an_outage_cuts_fails_when_it_is_cut() -> None:
    cut = nature(job(0, 0.0), cloud=Speed(fixed_ms=500, per_kb_ms=0), outages=(Window(0.2, 9),))
    (result,) = simulate(World(cut), CLOUD)
    assert (result.is_in_time, round(result.latency_ms)) == (False, 220)


def test_a_hot_device_is_slower() -> None:
    assert latencies(nature(job(0, 0.0), thermal=(Window(0, 1, 3.0),)), EDGE) == [300]


def test_foreseeing_changes_nothing_and_comes_true() -> None:
    drawn = scenarios(None)[0].draw(3)
    world = World(drawn)
    for each in drawn.jobs[:50]:
        foreseen = [world.foresee(route, each, each.arrival_s) for route in ("edge", "cloud")]
        again = [world.foresee(route, each, each.arrival_s) for route in ("edge", "cloud")]
        assert foreseen == again
        assert world.start("cloud", each, each.arrival_s) == foreseen[1]


def test_the_oracle_is_not_beaten_by_a_fixed_rule() -> None:
    drawn = replace(scenarios(None)[0], rate_s=3.0).draw(1)
    best = Score.of(simulate(world := World(drawn), Oracle(world)))
    for policy in fixed_policies():
        score = Score.of(simulate(World(drawn), policy))
        assert score.attainment <= best.attainment
        assert score.p95_ms >= best.p95_ms


def test_the_same_seed_gives_the_same_run() -> None:
    scenario = scenarios(None)[0]
    runs = []
    for _ in range(2):
        drawn = scenario.draw(7)
        runs.append(simulate(World(drawn), Ours(drawn, random.Random(7))))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("kind", ["poisson", "bursty", "diurnal"])
def test_requests_come_at_the_mean_rate(kind: str) -> None:
    times = arrival_times(kind, 10.0, 2000.0, random.Random(2))  # type: ignore[arg-type]
    assert len(times) / 2000 == pytest.approx(10, rel=0.1)
    assert times == sorted(times)


def test_recorded_links_are_found_by_their_names(tmp_path) -> None:
    with pytest.raises(InvalidInput, match="no folder"):
        scenarios(tmp_path / "none")
    with pytest.raises(InvalidInput, match="no traces"):
        scenarios(tmp_path)
    for name in ("mine.up", "mine.down", "alone.up"):
        (tmp_path / name).write_text("0\n5\n9\n")
    assert scenarios(tmp_path)[0].name == "mine"
    assert scenarios(tmp_path)[0].use == "held_out"
    assert [s.name for s in scenarios(tmp_path) if s.is_recorded] == ["mine"]


def no_progress(title: str, steps: int):
    return lambda: None


def test_all_policies_meet_the_same_worlds(monkeypatch) -> None:
    drawn: list[int] = []
    scenario = scenarios(None)[0]
    original = Scenario.draw

    def draw(self: Scenario, seed: int) -> Nature:
        drawn.append(seed)
        whole = original(self, seed)
        return replace(whole, jobs=whole.jobs[:40])

    monkeypatch.setattr(Scenario, "draw", draw)
    outcome = run_scenario(scenario, [4, 5], no_progress(scenario.name, 2))
    assert drawn == [4, 5, 4, 5]  # once for all policies, once to see why requests were late
    assert {len(scores) for scores in outcome.scores.values()} == {2}
    assert outcome.best_static not in bench.ADAPTIVE


def test_the_report_says_which_bars_fall_short(monkeypatch, tmp_path, capfd) -> None:
    original = Scenario.draw

    def draw(self: Scenario, seed: int) -> Nature:
        whole = original(self, seed)
        return replace(whole, jobs=whole.jobs[:40])

    monkeypatch.setattr(Scenario, "draw", draw)
    monkeypatch.setattr(bench, "DECISION_CALLS", 20)
    page, report = tmp_path / "plots", tmp_path / "routing.json"
    command = ["bench", "routing", "--seeds", "1", "--traces", str(tmp_path)]
    for name in ("t.up", "t.down"):
        (tmp_path / name).write_text("\n".join(str(i) for i in range(0, 1000, 2)))
    assert main([*command, "--plot", str(page), "--json", str(report)]) == 0
    assert "SLO attainment" in capfd.readouterr().out
    bars = {bar["name"] for bar in json.loads(report.read_bytes())["bars"]}
    assert {
        "tuned: SLO attainment above the oracle's",
        "held out: p95 regret to the oracle",
    } <= bars
    text = (page / "routing.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 2 * len(scenarios(tmp_path))
    assert "<script" not in text


def test_a_decision_is_timed_call_by_call(monkeypatch) -> None:
    monkeypatch.setattr(bench, "DECISION_CALLS", 50)
    decisions = bench.Decisions()
    decisions.sample()
    decisions.sample()
    quietest, every = decisions.figures()
    assert (quietest.summary.count, every.summary.count) == (50, 100)
    assert 0 < every.summary.min <= quietest.summary.min
    assert quietest.summary.p50 <= every.summary.p50


def test_held_out_scenarios_have_seeds_of_their_own(monkeypatch) -> None:
    asked: dict[str, list[int]] = {}

    def run(scenario, seeds, step):
        asked[scenario.use] = list(seeds)
        raise KeyboardInterrupt if scenario.use == "held_out" else StopIteration

    monkeypatch.setattr(bench, "run_scenario", run)
    chosen = {
        use: next(s for s in scenarios(None) if s.use == use) for use in ("tuned", "held_out")
    }
    for scenario in chosen.values():
        monkeypatch.setattr(bench, "scenarios", lambda traces, scenario=scenario: [scenario])
        with pytest.raises((KeyboardInterrupt, StopIteration)):
            bench.measure(Settings(seed=3, seeds=2), no_progress)
    assert set(asked["tuned"]).isdisjoint(asked["held_out"])


def test_cloud_calls_and_energy_are_those_of_the_attempts() -> None:
    world = nature(job(0, 0.0, upload_bytes=500_000), job(1, 10.0, upload_bytes=500_000))
    near = Score.of(simulate(World(world), EDGE))
    assert (near.cloud_calls, near.energy_j) == (0.0, pytest.approx(0.1 * 10.0))
    far = Score.of(simulate(World(world), CLOUD))
    assert (far.cloud_calls, far.energy_j) == (100.0, pytest.approx(0.5 * 5.6))


def test_pictures_are_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    outcome = run_scenario(scenarios(None)[0], [0], lambda: None)
    for path in write_pictures([outcome], tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")
