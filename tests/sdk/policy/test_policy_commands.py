from __future__ import annotations

from pathlib import Path

import pytest

from nearfar.cli import run
from sdk.policy.commands import app

POLICY = """
version = 1

[[rule]]
id = "open"
when = { sensitivity = "public" }
effect = "cloud_ok"

[[rule]]
id = "clinic-2"
when = { sensitivity = "personal" }
effect = "edge_only"

[[rule]]
id = "later"
when = { sensitivity = "internal", model = "assistant" }
effect = "cloud_ok"
transform = ["redact"]
"""

CASES = """
[[case]]
name = "visits stay here"
model = "assistant"
sensitivity = "personal"
expect = "edge_only"
rule = "clinic-2"

[[case]]
model = "assistant"
sensitivity = "public"
expect = "edge_or_cloud"

[[case]]
model = "assistant"
sensitivity = "secret"
expect = "denied"
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(POLICY)
    return path


def nearfar_policy(*arguments: object) -> int:
    return run(app, [str(argument) for argument in arguments], program="nearfar policy")


def test_check_accepts_and_warns(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nearfar_policy("check", policy) == 0
    out = capsys.readouterr().out
    assert "policy.toml: ok" in out
    assert "rule 'later' demands redact" in out
    assert "no rule is about class 'secret'" in out


def test_check_refuses_a_mistake(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy.write_text(POLICY.replace("edge_only", "edgeonly"))
    assert nearfar_policy("check", policy) == 2
    err = capsys.readouterr().err
    assert "clinic-2" in err
    assert "Did you mean 'edge_only'" in " ".join(err.split())


def test_explain_shows_the_verdict_and_each_rule(
    policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        nearfar_policy("explain", policy, "--model", "assistant", "--sensitivity", "personal") == 0
    )
    out = capsys.readouterr().out
    assert "edge_only: policy rule clinic-2 keeps personal data on the device" in out
    assert "sensitivity is 'personal'" in out  # why `open` does not match


CHANNEL_POLICY = """
version = 1

[[rule]]
id = "padded"
when = { sensitivity = "internal" }
effect = "cloud_ok"
require = { padding = "balanced" }

[[rule]]
id = "proven"
when = { sensitivity = "personal" }
effect = "cloud_ok"
require = { attestation = true }
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["internal"], "edge_only: policy rule padded demands balanced padding, and the cloud's"),
        (["internal", "--shaping", "off"], "set its shaping = "),
        (["internal", "--shaping", "strict"], "edge_or_cloud: "),
        (["personal", "--not-attested"], "set its attestation = "),
        (["personal", "--attested"], "edge_or_cloud: "),
    ],
)
def test_explain_says_which_demand_is_not_met_and_how_to_meet_it(
    policy: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    policy.write_text(CHANNEL_POLICY)
    arguments = ["--model", "m", "--sensitivity", *arguments]
    assert nearfar_policy("explain", policy, *arguments) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert words in out
    assert ("padded cloud_ok yes demands" in out) is ("padding, and" in out)


def test_explain_refuses_a_shaping_that_there_is_not(
    policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "m", "--sensitivity", "public", "--shaping", "some"]
    assert nearfar_policy("explain", policy, *arguments) == 2
    assert "'balanced'" in capsys.readouterr().err


def test_check_says_that_attestation_needs_a_plug_in(
    policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy.write_text(CHANNEL_POLICY)
    assert nearfar_policy("check", policy) == 0
    out = capsys.readouterr().out
    assert "rule 'proven' demands attestation" in out
    assert "padded" not in out


def test_expectations_may_be_about_the_channel(policy: Path, tmp_path: Path) -> None:
    policy.write_text(CHANNEL_POLICY)
    cases = tmp_path / "cases.toml"
    expected = (
        ("internal", 'shaping = "balanced"', "edge_or_cloud"),
        ("internal", 'shaping = "off"', "edge_only"),
        ("internal", "", "edge_only"),
        ("personal", "attested = true", "edge_or_cloud"),
        ("personal", "attested = false", "edge_only"),
    )
    cases.write_text(
        "".join(
            f'[[case]]\nmodel = "m"\nsensitivity = "{name}"\n{line}\nexpect = "{expect}"\n'
            for name, line, expect in expected
        )
    )
    assert nearfar_policy("test", policy, cases) == 0


def test_explain_refuses_an_unknown_class(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nearfar_policy("explain", policy, "--model", "m", "--sensitivity", "persnal") == 2
    assert "Did you mean 'personal'" in " ".join(capsys.readouterr().err.split())


def test_expectations_that_hold_exit_0(policy: Path, tmp_path: Path) -> None:
    cases = tmp_path / "cases.toml"
    cases.write_text(CASES)
    assert nearfar_policy("test", policy, cases) == 0


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('expect = "denied"', 'expect = "edge_only"', "expected edge_only, found denied"),
        ('rule = "clinic-2"', 'rule = "open"', "expected rule open to decide, found clinic-2"),
    ],
)
def test_an_expectation_that_does_not_hold_exits_1(
    policy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    words: str,
) -> None:
    cases = tmp_path / "cases.toml"
    cases.write_text(CASES.replace(old, new, 1))
    assert nearfar_policy("test", policy, cases) == 1
    out = capsys.readouterr().out
    assert words in out
    assert "2 of 3 cases hold" in out


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('expect = "denied"', 'expect = "deny"', "Did you mean 'denied'"),
        ('rule = "clinic-2"', 'rule = "clinic-3"', "Did you mean 'clinic-2'"),
        ('sensitivity = "secret"', 'sensitivity = "secrets"', "Did you mean 'secret'"),
        ('sensitivity = "secret"', 'sensitivity = "secret"\nshaping = "strick"', "'strict'"),
        ('sensitivity = "secret"', 'sensitivity = "secret"\nattested = "no"', "true or false"),
        ('model = "assistant"', "", "'model' is missing"),
        (CASES, "", "'case' is missing"),
        (CASES, "case = []", "holds no case"),
    ],
)
def test_mistakes_in_the_table_are_named(
    policy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    words: str,
) -> None:
    cases = tmp_path / "cases.toml"
    cases.write_text(CASES.replace(old, new, 1))
    assert nearfar_policy("test", policy, cases) == 2
    assert words in " ".join(capsys.readouterr().err.split())
