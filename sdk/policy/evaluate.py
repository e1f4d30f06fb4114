"""Evaluate a policy: a pure function of (policy, facts). See docs/reference/policy.md."""

from __future__ import annotations

from typing import Final, Literal

from nearfar.errors import InvalidInput
from nearfar.secure.shaping import LEVELS, Shaping, strongest
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
    # What the rules demand together; whoever opens the connection checks it once more there.
    padding: Shaping = "off"
    attestation = bound_to_region = False
    for rule in policy.rules:
        # A rule for another region would match there, so the answer is for this one.
        if rule.when.region is not None:
            bound_to_region = True
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
        if effect == "cloud_ok":
            # Also of rules that hang on an unknown fact: they take what they would take.
            padding = strongest(padding, rule.require.padding)
            attestation = attestation or rule.require.attestation
            if certain:
                allow = allow or rule
                if rule.require.region is not None:
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
        region = (facts.region,) if bound_to_region and facts.region is not None else None
        require = Requirement(padding=padding, attestation=attestation, region=region)
        if not_edge is not None:
            reason = f"policy rule {not_edge.id} allows the cloud and rules the device out"
            return _verdict(policy, matched, not_edge, reason, require, cloud=True)
        reason = f"policy rule {allow.id} allows the device and the cloud"
        return _verdict(policy, matched, allow, reason, require, edge=True, cloud=True)
    if not_edge is not None:
        reason = f"{keep_reason}, and policy rule {not_edge.id} rules the device out"
        return _verdict(policy, matched, keep, reason)
    return _verdict(policy, matched, keep, keep_reason, edge=True)


def _verdict(
    policy: Policy,
    matched: list[Rule],
    deciding: Rule | None,
    reason: str,
    require: Requirement = Requirement(),  # noqa: B008 (immutable)
    *,
    edge: bool = False,
    cloud: bool = False,
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
        require=require,
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
    demand = unmet_demand(rule, facts)
    if demand:
        return 1, f"policy rule {rule.id} demands {demand}"
    wanted = rule.require.region
    if wanted is not None and facts.region not in wanted:
        return 2, (
            f"policy rule {rule.id} requires a region that the cloud is not in"
            if facts.region is not None
            else f"policy rule {rule.id} requires a region, and the cloud's region is not known"
        )
    return 9, ""


def unmet_demand(rule: Rule, facts: RequestFacts) -> str:
    """What the rule demands of content or channel and is not given, and how to give it.

    Returns:
        The words that follow "demands"; ``""`` when nothing is missing. The region, which is about
        where and not how, is not among them.
    """
    if rule.transforms:
        return f"{rule.transforms[0]} for the cloud, which this version of nearfar does not offer"
    require = rule.require
    if require.attestation and facts.attested is not True:
        return (
            "attestation, and whether the cloud is attested is not known"
            if facts.attested is None
            else 'attestation, and the cloud has no plug-in for it: set its attestation = "…"'
        )
    if not is_shaped(facts.shaping, require.padding):
        return (
            f"{require.padding} padding, and the cloud's shaping is not known"
            if facts.shaping is None
            else f"{require.padding} padding, and the cloud's shaping is {facts.shaping}: "
            f'set its shaping = "{require.padding}"'
        )
    return ""


def is_shaped(shaping: Shaping | None, least: Shaping) -> bool:
    """Whether traffic shaped like that hides at least what `least` does; unknown counts as off."""
    return LEVELS.index(shaping or "off") >= LEVELS.index(least)
