"""`nearfar doctor` about how fast the device may run."""

from __future__ import annotations

import pytest

from nearfar.engines import condition
from nearfar.engines.condition import DeviceCondition
from sdk.doctor import examine


@pytest.mark.parametrize(
    ("found", "statuses"),
    [
        (DeviceCondition(), []),
        (DeviceCondition(1.0, 51.0, "15W"), ["ok"]),
        (DeviceCondition(None, 51.0), ["ok"]),
        (DeviceCondition(0.45, 91.0, "7W"), ["warn"]),
    ],
)
def test_the_condition_is_told_where_there_is_any(tmp_path, monkeypatch, found, statuses) -> None:
    monkeypatch.setattr(condition, "read_condition", lambda **_: found)
    told = [one for one in examine(tmp_path / "none.toml") if one.subject == "condition"]
    assert [one.status for one in told] == statuses
    for one in told:
        assert one.detail == condition.describe(found)
        assert bool(one.fix) == (one.status == "warn")
