"""A table of expectations for a policy: requests, and where each may be answered."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from nearfar.errors import ConfigError
from nearfar.secure.shaping import LEVELS
from sdk.policy.evaluate import evaluate
from sdk.policy.model import Policy, RequestFacts, Verdict
from sdk.toml_table import Table, parse_toml, suggestion

Expectation = Literal["denied", "edge_only", "cloud_only", "edge_or_cloud"]
EXPECTATIONS: tuple[Expectation, ...] = get_args(Expectation)

_FACT_KEYS = ("model", "task", "tenant", "purpose", "region", "network")
_CASE_KEYS = ("name", "expect", "rule", "sensitivity", "shaping", "attested", *_FACT_KEYS)
_MAX_LENGTH = 128


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One expectation.

    Attributes:
        name: For people.
        facts: The request.
        expect: Where it may be answered.
        rule: Id of the rule that must decide; `None` for any.
    """

    name: str
    facts: RequestFacts
    expect: Expectation
    rule: str | None = None


class CaseResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one expectation.

    Attributes:
        case: The expectation.
        verdict: What the policy says.
        mismatch: What differs; ``""`` when nothing does.
    """

    case: Case
    verdict: Verdict
    mismatch: str


def parse_cases(text: str, policy: Policy, *, source: str = "cases") -> tuple[Case, ...]:
    """Parse a table of expectations.

    Raises:
        ConfigError: It is not one, or is about classes and rules that the policy does not have.
    """
    top = Table(parse_toml(text, source=source), where=source, known=("case",))
    value = top.required("case", fix="Begin each case with [[case]]")
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise top.error("case", "must be a list of tables", fix="Begin each case with [[case]]")
    rule_ids = {rule.id for rule in policy.rules}
    cases = []
    for number, values in enumerate(value, start=1):
        table = Table(values, where=f"{source}: case {number}", known=_CASE_KEYS)
        facts = {
            key: table.text(key, fix='Write a string, as in "assistant"') for key in _FACT_KEYS
        }
        table.required("model", fix='Name a model, as in model = "assistant"')
        sensitivity = table.required(
            "sensitivity", fix=f"Name a class: {', '.join(policy.classes)}"
        )
        table.choice("sensitivity", policy.classes)
        table.required("expect", fix=f"Use one of: {', '.join(EXPECTATIONS)}")
        expect = table.choice("expect", EXPECTATIONS)
        assert expect is not None
        rule = table.text("rule", fix="Name the rule that must decide, or leave it out")
        if rule is not None and rule not in rule_ids:
            raise table.error(
                "rule", "names a rule that the policy does not have", fix=_rule_fix(rule, rule_ids)
            )
        cases.append(
            Case(
                name=table.text("name", fix="Write a few words") or f"case {number}",
                facts=RequestFacts(
                    model=facts["model"] or "",
                    task=facts["task"] or "",
                    sensitivity=str(sensitivity),
                    tenant=facts["tenant"],
                    purpose=facts["purpose"],
                    region=facts["region"],
                    network=facts["network"],
                    shaping=table.choice("shaping", LEVELS),
                    attested=table.boolean("attested", default=False)
                    if table.has("attested")
                    else None,
                ),
                expect=expect,
                rule=rule,
            )
        )
    if not cases:
        raise ConfigError(f"{source}: it holds no case", fix="Begin each case with [[case]]")
    return tuple(cases)


def run_case(policy: Policy, case: Case) -> CaseResult:
    """Ask the policy and compare."""
    verdict = evaluate(policy, case.facts)
    found = outcome(verdict)
    mismatch = ""
    if found != case.expect:
        mismatch = f"expected {case.expect}, found {found}"
    elif case.rule is not None and verdict.rule_ids[:1] != (case.rule,):
        decided = verdict.rule_ids[0] if verdict.rule_ids else "no rule"
        mismatch = f"expected rule {case.rule} to decide, found {decided}"
    return CaseResult(case=case, verdict=verdict, mismatch=mismatch)


def outcome(verdict: Verdict) -> Expectation:
    """A verdict in one word."""
    if verdict.edge:
        return "edge_or_cloud" if verdict.cloud else "edge_only"
    return "cloud_only" if verdict.cloud else "denied"


def _rule_fix(rule: str, rule_ids: set[str]) -> str:
    return suggestion(rule, rule_ids) if rule_ids else "The policy has no rules"
