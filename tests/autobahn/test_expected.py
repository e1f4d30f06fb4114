"""What `make autobahn` takes for explained; the cases themselves need kosoku and a minute."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from tests.autobahn.__main__ import DIRECTORY, SERVERS, is_explained

EXPECTED = json.loads((DIRECTORY / "expected.json").read_text())


def result(case: str, behavior: str, close: str, code: int | None, *, passed: bool = False):
    return SimpleNamespace(
        case_id=case,
        behavior=SimpleNamespace(value=behavior),
        behavior_close=SimpleNamespace(value=close),
        remote_close_code=code,
        passed=passed,
    )


@pytest.mark.parametrize("server", SERVERS)
def test_every_exception_has_its_reason(server):
    skipped = EXPECTED[server]["skipped"]
    assert not skipped["cases"] or len(skipped["why"]) > 20
    for entry in EXPECTED[server]["explained"]:
        assert entry["cases"]
        assert entry["outcomes"]
        assert len(entry["why"]) > 20


def test_each_server_has_its_expectations():
    assert set(EXPECTED) == set(SERVERS)


def test_what_passed_is_explained_and_what_failed_is_not():
    explained = EXPECTED["echo"]["explained"]
    assert is_explained(result("1.1.1", "OK", "OK", 1000, passed=True), explained)
    assert not is_explained(result("1.1.1", "FAILED", "OK", 1000), explained)


def test_an_exception_covers_its_cases_outcomes_and_codes_only():
    explained = EXPECTED["echo"]["explained"]
    assert is_explained(result("7.1.5", "FAILED", "WRONG CODE", 1002), explained)
    for other in (
        result("7.1.4", "FAILED", "WRONG CODE", 1002),
        result("7.1.5", "FAILED", "UNCLEAN", 1002),
        result("7.1.5", "FAILED", "WRONG CODE", None),
    ):
        assert not is_explained(other, explained)


def test_silence_is_not_explained_where_the_runtime_must_refuse():
    explained = EXPECTED["cloud runtime"]["explained"]
    assert is_explained(result("1.1.1", "FAILED", "FAILED", 1003), explained)
    assert not is_explained(result("1.1.1", "FAILED", "UNCLEAN", None), explained)
    assert not is_explained(result("9.1.1", "ERROR", "FAILED", None), explained)
