"""Evaluate a policy: a pure function of (policy, facts). See docs/reference/policy.md."""

from __future__ import annotations

from typing import Final, Literal

from nearfar.errors import InvalidInput
from sdk.policy.model import (
    BUILT_IN_RULE_ID,
    Condition,
    Policy,
    RequestFacts,
    Requirement,
    Rule,
    Verdict,
)
from sdk.toml_table import suggestion

# How a condition relates to the facts. A rule whose condition hangs on a fact that nobody knows
# gives nothing, and takes what it would take: fail closed in both directions.
_NO: Final = 0
_UNKNOWN_LINK: Final = 1  # would match if the region or network were a listed one
_UNKNOWN_CONTENT: Final = 2  # would match if the content held a listed finding; nobody looked
_YES: Final = 3

_MAX_MODEL_IN_REASON = 32
_NOTHING = Requirement()


def evaluate(policy: Policy, facts: RequestFacts) -> Verdict:
    """Say where a request may be answered.

    Args:
        policy: What to ask.
        facts: What is known about the request.

    Raises:
        InvalidInput: `facts.sensitivity` is not one of the policy's classes.
    """
    if facts.sensitivity not in policy.classes:
        raise InvalidInput(
            f"sensitivity is {facts.sensitivity[:40]!r}, which is not among the policy's classes",
            field="sensitivity",
            fix=suggestion(facts.sensitivity, policy.classes),
        )
    matched: list[Rule] = []
    deny: Rule | None = None  # the first rule of each kind, in file order, is the one named
    keep: Rule | None = None
    keep_reason = ""
    keep_rank = 9
    allow: Rule | None = None
    not_edge: Rule | None = None
    unknown: Rule | None = None
    bound_to_region = False
    for rule in policy.rules:
        match = _match(rule.when, facts)
        if match == _NO:
            continue
        certain = match == _YES
        if certain:
            matched.append(rule)
        else:
            unknown = unknown or rule
        effect = rule.effect
        if effect == "deny" and match != _UNKNOWN_LINK:
            deny = deny or rule
            continue
        if effect == "cloud_ok" and certain:
            allow = allow or rule
            if rule.when.region is not None or rule.require.region is not None:
                bound_to_region = True
            if not rule.edge:
                not_edge = not_edge or rule
        rank, reason = _why_not_cloud(rule, facts, certain=certain)
        if rank < keep_rank:
            keep, keep_rank, keep_reason = rule, rank, reason
    if deny is not None:
        reason = (
            f"policy rule {deny.id} denies this request"
            if deny in matched
            else f"policy rule {deny.id} denies requests by what their content holds, "
            "and the content was not inspected"
        )
        return _verdict(policy, matched, deny, reason)
    if not matched:
        reason = (
            f"no policy rule matches {facts.sensitivity} data for model "
            f"{facts.model[:_MAX_MODEL_IN_REASON]!r}, and what no rule allows is denied"
        )
        if unknown is not None:
            reason += f" (rule {unknown.id} asks for a region, network or finding not known here)"
        return _verdict(policy, matched, None, reason)
    if keep is None:
        assert allow is not None
        # Whoever opens the connection can check once more that it leads where policy was asked.
        region = facts.region if bound_to_region else None
        if not_edge is not None:
            reason = f"policy rule {not_edge.id} allows the cloud and rules the device out"
            return _verdict(policy, matched, not_edge, reason, cloud=True, region=region)
        reason = f"policy rule {allow.id} allows the device and the cloud"
        return _verdict(policy, matched, allow, reason, edge=True, cloud=True, region=region)
    if not_edge is not None:
        reason = f"{keep_reason}, and policy rule {not_edge.id} rules the device out"
        return _verdict(policy, matched, keep, reason)
    return _verdict(policy, matched, keep, keep_reason, edge=True)


def _verdict(
    policy: Policy,
    matched: list[Rule],
    deciding: Rule | None,
    reason: str,
    *,
    edge: bool = False,
    cloud: bool = False,
    region: str | None = None,
) -> Verdict:
    rule_ids = tuple(rule.id for rule in matched if rule is not deciding)
    if deciding is not None:
        rule_ids = (deciding.id, *rule_ids)
    return Verdict(
        edge=edge,
        cloud=cloud,
        rule_ids=rule_ids,
        reason=reason,
        policy_hash=policy.hash,
        require=_NOTHING if region is None else Requirement(region=(region,)),
    )


def _match(when: Condition, facts: RequestFacts) -> Literal[0, 1, 2, 3]:
    if when.sensitivity is not None and facts.sensitivity not in when.sensitivity:
        return _NO
    if when.model is not None and facts.model not in when.model:
        return _NO
    if when.task is not None and facts.task not in when.task:
        return _NO
    # Tenant and purpose are what the app declares: an absent one is "none", not "unknown".
    if when.tenant is not None and facts.tenant not in when.tenant:
        return _NO
    if when.purpose is not None and facts.purpose not in when.purpose:
        return _NO
    unknown_link = False
    if when.region is not None:
        if facts.region is None:
            unknown_link = True
        elif facts.region not in when.region:
            return _NO
    if when.network is not None:
        if facts.network is None:
            unknown_link = True
        elif facts.network not in when.network:
            return _NO
    if when.findings is not None:
        if facts.findings is None:
            return _UNKNOWN_CONTENT
        if facts.findings.isdisjoint(when.findings):
            return _NO
    return _UNKNOWN_LINK if unknown_link else _YES


def _why_not_cloud(rule: Rule, facts: RequestFacts, *, certain: bool) -> tuple[int, str]:
    """How strongly the rule keeps the request off the cloud (0 most, 9 not at all), and why."""
    if rule.effect != "cloud_ok":
        if not certain:
            return 3, (
                f"policy rule {rule.id} keeps some requests on the device, "
                "and whether this is one of them is not known"
            )
        if rule.id == BUILT_IN_RULE_ID:
            return 0, "no policy file is configured, so everything stays on the device"
        return 0, f"policy rule {rule.id} keeps {facts.sensitivity} data on the device"
    demand = undeliverable(rule)
    if demand:
        return 1, (
            f"policy rule {rule.id} demands {demand} for the cloud, "
            "which this version of nearfar does not offer"
        )
    wanted = rule.require.region
    if wanted is not None and facts.region not in wanted:
        return 2, (
            f"policy rule {rule.id} requires a region that the cloud is not in"
            if facts.region is not None
            else f"policy rule {rule.id} requires a region, and the cloud's region is not known"
        )
    return 9, ""


def undeliverable(rule: Rule) -> str:
    """What the rule demands that this version cannot carry out; ``""`` when nothing."""
    if rule.transforms:
        return rule.transforms[0]
    if rule.require.attestation:
        return "attestation"
    if rule.require.padding != "off":
        return f"{rule.require.padding} padding"
    return ""
