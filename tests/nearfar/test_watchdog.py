from __future__ import annotations

import asyncio

from nearfar.watchdog import Watchdog
from tests.cloud_runtime.support import run


def test_what_is_not_ended_in_time_is_told_once():
    async def scenario():
        late = []
        watchdog = Watchdog(0.01, lambda: late.append(1))
        watchdog.begin()
        await asyncio.sleep(0.1)
        return late

    assert run(scenario()) == [1]


def test_what_ended_is_not_late_and_the_next_thing_has_the_whole_time():
    async def scenario():
        late = []
        loop = asyncio.get_running_loop()
        watchdog = Watchdog(0.2, lambda: late.append(loop.time()))
        watchdog.begin()
        await asyncio.sleep(0.15)
        watchdog.end()
        began_s = loop.time()
        watchdog.begin()  # the first timer is still out, and must not count for this one
        while not late:
            await asyncio.sleep(0.01)
        return late[0] - began_s

    assert run(scenario()) >= 0.199


def test_an_idle_or_closed_watchdog_stays_quiet_and_can_be_used_again():
    async def scenario():
        late = []
        watchdog = Watchdog(0.01, lambda: late.append(1))
        watchdog.end()
        watchdog.begin()
        watchdog.end()
        await asyncio.sleep(0.05)
        assert late == []
        watchdog.begin()
        watchdog.close()
        await asyncio.sleep(0.05)
        assert late == []
        watchdog.begin()
        await asyncio.sleep(0.05)
        return late

    assert run(scenario()) == [1]
