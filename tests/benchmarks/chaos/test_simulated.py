from __future__ import annotations

from benchmarks.chaos import bench, simulated
from benchmarks.routing.world import Window
from cloud_runtime.executor import Ticket
from cloud_runtime.recent import RecentRuns, SharedRun


def test_simulated_requests_are_told_in_time_and_computed_once():
    steps: list[int] = []
    found = simulated.run(requests=900, seed=0, step=lambda: steps.append(1))
    assert found.requests >= 900
    assert len(found.results) == found.requests
    assert max(found.late_ms) <= bench.GRACE_MS
    assert found.computed_twice == 0
    assert found.sent_twice > 0  # otherwise there was nothing to compute twice
    assert set(found.refusals) <= {"deadline_exceeded", "cloud_unavailable"}
    assert all(found.faults[fault] for fault in ("kill", "freeze", "reset"))


def test_a_server_that_forgets_what_it_computed_would_be_noticed(monkeypatch):
    def forgets(self, key, fingerprint, start):
        ticket = Ticket()
        run = SharedRun(start(ticket), ticket, fingerprint, waiters=1)
        self._running[key] = run
        return run

    monkeypatch.setattr(RecentRuns, "join", forgets)
    assert simulated.run(requests=900, seed=0).computed_twice > 0


def test_lives_and_lost_connections():
    troubles = simulated.Troubles(
        kills=[Window(1.0, 2.0), Window(5.0, 6.0)], freezes=[], resets=[3.0]
    )
    assert [troubles.life(at_s) for at_s in (0.5, 1.5, 5.5)] == [0, 1, 2]
    assert troubles.lost_s(0.0, 0.9) is None
    assert troubles.lost_s(2.5, 9.0) == 3.0
