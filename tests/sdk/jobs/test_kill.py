"""Processes that are killed (SIGKILL) while they submit and run jobs lose and repeat nothing."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from nearfar.wire import messages as wire
from sdk import Client
from tests.support.scripted_cloud import ScriptedCloud, obliging

ROOT = Path(__file__).resolve().parents[3]
POLICY = (
    'version = 1\n[[rule]]\nid = "open"\nwhen = { sensitivity = "public" }\neffect = "cloud_ok"\n'
)
#: Submits jobs whose tensors hold their number, says each id, and runs until all have ended.
APP = """
import sys
import numpy as np
from sdk import Client

config, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with Client.from_config(config) as client:
    for number in range(first, first + count):
        feeds = {"x": np.full((1, 4), number, np.float32)}
        job = client.submit("tensor", feeds=feeds, deferrable=True)
        print(number, job.id, flush=True)
    for job in client.jobs():
        job.result()
print("done", flush=True)
"""


class App:
    """The app in a process of its own."""

    def __init__(self, config: Path, first: int, count: int) -> None:
        self.ids: dict[int, str] = {}
        self.is_done = False
        self.process = subprocess.Popen(
            [sys.executable, "-c", APP, str(config), str(first), str(count)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not line.endswith("\n"):
                return  # cut by the kill
            if line == "done\n":
                self.is_done = True
            else:
                number, job_id = line.split()
                self.ids[int(number)] = job_id

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.end(-signal.SIGKILL)

    def end(self, status: int, timeout_s: float = 60) -> None:
        assert self.process.wait(timeout_s) == status
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def cloud(tmp_path):
    with ScriptedCloud(tmp_path / "state") as server:
        yield server


@pytest.fixture
def config(cloud, tmp_path):
    there = cloud.config()
    (tmp_path / "policy.toml").write_text(POLICY)
    path = tmp_path / "nearfar.toml"
    path.write_text(
        f"""
[cloud.main]
url = "{there.url}"
identity = "{there.identity}"
credentials = "{there.credentials}"
ca_file = "{there.ca_file}"

[policy]
file = "policy.toml"
default_sensitivity = "public"

[jobs]
file = "jobs.db"
"""
    )
    return path


def check(config: Path, cloud: ScriptedCloud, ids: dict[int, str]) -> None:
    """Each job has its own answer, and was asked for under one id."""
    with Client.from_config(config) as client:
        jobs = {job.id: job for job in client.jobs()}
        assert set(ids.values()) <= set(jobs)
        for number, job_id in ids.items():
            outputs = jobs[job_id].result(30).outputs["y"]
            np.testing.assert_array_equal(outputs, np.full((1, 4), number, np.float32))
        for job in jobs.values():
            job.result(30)
            assert job.status == "done"
    assert len({message.request_id for message in cloud.saw(wire.Infer)}) == len(jobs)


def test_a_job_that_was_running_is_asked_for_again_under_its_id(config, cloud):
    def hang_on_the_third(session, message, tensors):
        if len(cloud.saw(wire.Infer)) == 3:
            yield 60
        yield from obliging(session, message, tensors)

    cloud.behaviour = hang_on_the_third
    app = App(config, 0, 5)
    ends_s = time.monotonic() + 60
    while len(cloud.saw(wire.Infer)) < 3 or len(app.ids) < 5:
        assert time.monotonic() < ends_s
        time.sleep(0.01)
    app.kill()
    hung = cloud.saw(wire.Infer)[2].request_id
    assert not app.is_done

    again = App(config, 5, 0)
    again.end(0)
    assert again.is_done
    asked = [message.request_id for message in cloud.saw(wire.Infer)]
    assert asked.count(hung) == 2
    assert len(asked) == 6
    check(config, cloud, app.ids)


def test_kills_at_any_moment_lose_no_job_and_repeat_no_answer(config, cloud):
    def take_a_moment(session, message, tensors):
        yield 0.02
        yield from obliging(session, message, tensors)

    cloud.behaviour = take_a_moment
    chance = random.Random(5)
    ids: dict[int, str] = {}
    kills = 0
    for turn in range(6):
        app = App(config, 10 * turn, 4)
        ends_s = time.monotonic() + 30
        while not app.ids and app.process.poll() is None:
            assert time.monotonic() < ends_s
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.2))
        if app.process.poll() is None:
            kills += 1
            app.kill()
        else:
            app.end(0)
        ids.update(app.ids)
    assert kills >= 2
    assert len(ids) >= 6
    check(config, cloud, ids)
