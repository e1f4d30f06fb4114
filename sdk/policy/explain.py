"""What a policy author asks: which rule matched and why, and what looks like a mistake?"""

from __future__ import annotations

from typing import Literal

import msgspec

from sdk.policy.evaluate import unmet_demand
from sdk.policy.model import Condition, Policy, RequestFacts, Rule

Match = Literal["yes", "no", "unknown"]

_UNKNOWABLE = {
    "region": "the cloud's region is not known",
    "network": "the network is not known",
    "findings": "the content is not inspected",
}


class RuleReport(msgspec.Struct, frozen=True, kw_only=True):
    """How one rule relates to one request.

    Attributes:
        rule: The rule.
        match: ``unknown`` when it hangs on a fact that nobody knows: such a rule gives nothing,
            and takes what it would take.
        because: Why it does not match, or is unknown; of one that matches, which of its demands is
            not met. ``""`` when there is nothing to say.
    """

    rule: Rule
    match: Match
    because: str


def report_rules(policy: Policy, facts: RequestFacts) -> tuple[RuleReport, ...]:
    """How each rule relates to a request, in file order."""
    return tuple(_report(rule, facts) for rule in policy.rules)


def warnings(policy: Policy) -> tuple[str, ...]:
    """What is legal in a policy, but probably not what its author meant."""
    found = []
    if not policy.rules:
        found.append("there are no rules, so every request is denied")
    for rule in policy.rules:
        if rule.transforms:
            found.append(
                f"rule '{rule.id}' demands {rule.transforms[0]}, which this version does not "
                "offer: what it matches stays on the device"
            )
        if rule.require.attestation:
            found.append(
                f"rule '{rule.id}' demands attestation, for which nearfar brings no plug-in: what "
                "it matches stays on the device unless the configuration names one for the cloud"
            )
        if rule.when.findings is not None:
            found.append(
                f"rule '{rule.id}' asks for findings, and this version does not inspect content: "
                "it never allows anything"
                + ("" if rule.effect == "cloud_ok" else ", and restricts as if they were found")
            )
    for name in policy.classes:
        rules = [
            rule
            for rule in policy.rules
            if rule.when.sensitivity is None or name in rule.when.sensitivity
        ]
        if policy.rules and not rules:
            found.append(f"no rule is about class '{name}', so requests of that class are denied")
    return tuple(found)


def _report(rule: Rule, facts: RequestFacts) -> RuleReport:
    unknown = ""
    for key in Condition.__struct_fields__:
        wanted: tuple[str, ...] | None = getattr(rule.when, key)
        if wanted is None:
            continue
        value = getattr(facts, key)
        if value is None and key in _UNKNOWABLE:
            unknown = unknown or _UNKNOWABLE[key]
        elif key == "findings":
            if value.isdisjoint(wanted):
                return RuleReport(rule=rule, match="no", because="none of its findings")
        elif value not in wanted:
            shown = "not given" if value is None else f"'{value}'"
            return RuleReport(rule=rule, match="no", because=f"{key} is {shown}")
    if unknown:
        return RuleReport(rule=rule, match="unknown", because=unknown)
    demand = unmet_demand(rule, facts)
    return RuleReport(rule=rule, match="yes", because=f"demands {demand}" if demand else "")
