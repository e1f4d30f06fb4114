from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import facts, policies, rules, surely_matches

from nearfar.errors import InvalidInput, PolicyDenied
from sdk.policy import DEVICE_ONLY, Policy, RequestFacts, Requirement, evaluate, parse_policy

CLINIC = parse_policy(
    """
    version = 1

    [[rule]]
    id = "open"
    when = { sensitivity = "public" }
    effect = "cloud_ok"

    [[rule]]
    id = "clinic-2"
    when = { sensitivity = { at_least = "personal" } }
    effect = "edge_only"

    [[rule]]
    id = "no-secrets-in-search"
    when = { sensitivity = "secret", purpose = ["search", "ads"] }
    effect = "deny"

    [[rule]]
    id = "summaries"
    when = { model = "assistant", sensitivity = "internal", region = "eu" }
    effect = "cloud_ok"

    [[rule]]
    id = "research"
    when = { model = "minilm", sensitivity = "internal" }
    effect = "cloud_ok"
    transform = ["pseudonymise"]
    require = { padding = "balanced" }

    [[rule]]
    id = "far-only"
    when = { model = "giant", sensitivity = "public" }
    effect = "cloud_ok"
    edge = false
    """
)


def request(**given_facts: Any) -> RequestFacts:
    return RequestFacts(
        **{"model": "assistant", "task": "text-generation", "sensitivity": "public", **given_facts}
    )


@pytest.mark.parametrize(
    ("given_facts", "edge", "cloud", "rule", "words"),
    [
        ({}, True, True, "open", "open allows the device and the cloud"),
        ({"sensitivity": "personal"}, True, False, "clinic-2", "keeps personal data on the device"),
        ({"sensitivity": "secret"}, True, False, "clinic-2", "keeps secret data on the device"),
        ({"sensitivity": "secret", "purpose": "search"}, False, False,
         "no-secrets-in-search", "denies this request"),
        ({"sensitivity": "internal", "region": "eu"}, True, True, "summaries", "the cloud"),
        ({"sensitivity": "internal", "region": "us"}, False, False, None, "no policy rule matches"),
        ({"sensitivity": "internal"}, False, False, None, "rule summaries asks for a region"),
        ({"sensitivity": "internal", "model": "minilm"}, True, False,
         "research", "demands pseudonymise"),
        ({"model": "giant"}, False, True, "far-only", "rules the device out"),
    ],
)  # fmt: skip
def test_clinic_policy(
    given_facts: dict[str, str], edge: bool, cloud: bool, rule: str | None, words: str
) -> None:
    verdict = evaluate(CLINIC, request(**given_facts))
    assert (verdict.edge, verdict.cloud) == (edge, cloud)
    assert verdict.rule_ids[:1] == (() if rule is None else (rule,))
    assert words in verdict.reason
    assert verdict.policy_hash == CLINIC.hash


def test_without_a_policy_file_everything_stays_on_the_device() -> None:
    for sensitivity in DEVICE_ONLY.classes:
        verdict = evaluate(DEVICE_ONLY, request(sensitivity=sensitivity, region="eu"))
        assert (verdict.edge, verdict.cloud) == (True, False)
        assert "no policy file" in verdict.reason


def test_unknown_sensitivity_is_the_callers_mistake() -> None:
    with pytest.raises(InvalidInput, match="Did you mean 'personal'") as caught:
        evaluate(CLINIC, request(sensitivity="persnal"))
    assert caught.value.field == "sensitivity"


def test_denied_verdict_raises_with_the_rule_that_decided() -> None:
    verdict = evaluate(CLINIC, request(sensitivity="secret", purpose="ads"))
    with pytest.raises(PolicyDenied) as caught:
        verdict.raise_if_denied()
    assert caught.value.rule == "no-secrets-in-search"


def policy_of(rule_text: str) -> Policy:
    return parse_policy(
        'version = 1\n[[rule]]\nid = "open"\nwhen = {}\neffect = "cloud_ok"\n' + rule_text
    )


@pytest.mark.parametrize(
    ("demand", "words"),
    [
        ('transform = ["redact"]', "demands redact"),
        ("require = { attestation = true }", "demands attestation, and whether"),
        ('require = { padding = "strict" }', "demands strict padding, and the cloud's shaping is"),
        ('require = { region = "eu" }', "region"),
    ],
)
def test_a_demand_that_cannot_be_met_takes_the_cloud_away(demand: str, words: str) -> None:
    policy = policy_of(f'[[rule]]\nid = "x"\nwhen = {{}}\neffect = "cloud_ok"\n{demand}')
    verdict = evaluate(policy, request())
    assert (verdict.edge, verdict.cloud) == (True, False)
    assert words in verdict.reason


def test_demands_that_are_met_leave_the_cloud() -> None:
    policy = policy_of(
        '[[rule]]\nid = "x"\nwhen = {}\neffect = "cloud_ok"\n'
        'require = { region = ["eu", "ch"], padding = "off", attestation = false }'
    )
    verdict = evaluate(policy, request(region="ch"))
    assert verdict.cloud
    assert verdict.require == Requirement(region=("ch",))
    assert not evaluate(policy, request(region="us")).cloud


BALANCED = 'require = { padding = "balanced" }'
ATTESTED = "require = { attestation = true }"


@pytest.mark.parametrize(
    ("demand", "given_facts", "words"),
    [
        (BALANCED, {"shaping": "off"}, 'shaping is off: set its shaping = "balanced"'),
        (BALANCED, {}, "the cloud's shaping is not known"),
        (BALANCED, {"shaping": "balanced"}, ""),
        (BALANCED, {"shaping": "strict"}, ""),
        ('require = { padding = "strict" }', {"shaping": "balanced"}, "demands strict padding"),
        (ATTESTED, {"attested": False}, 'has no plug-in for it: set its attestation = "…"'),
        (ATTESTED, {}, "whether the cloud is attested is not known"),
        (ATTESTED, {"attested": True}, ""),
    ],
)
def test_what_the_channel_gives_is_held_against_what_the_rule_demands(
    demand: str, given_facts: dict[str, Any], words: str
) -> None:
    policy = policy_of(f'[[rule]]\nid = "x"\nwhen = {{}}\neffect = "cloud_ok"\n{demand}')
    verdict = evaluate(policy, request(**given_facts))
    assert verdict.edge
    assert verdict.cloud is (not words)
    assert words in verdict.reason
    if not words:
        assert verdict.require == policy.rules[1].require


def test_a_verdict_carries_the_strongest_demand_of_all_its_rules() -> None:
    policy = policy_of(
        '[[rule]]\nid = "x"\nwhen = {}\neffect = "cloud_ok"\nrequire = { padding = "strict" }\n'
        f'[[rule]]\nid = "y"\nwhen = {{}}\neffect = "cloud_ok"\n{BALANCED}\n'
        # Hangs on an unknown fact: it takes what it would take.
        f'[[rule]]\nid = "z"\nwhen = {{ network = "wifi" }}\neffect = "cloud_ok"\n{ATTESTED}\n'
    )
    verdict = evaluate(policy, request(shaping="strict", attested=True))
    assert verdict.cloud
    assert verdict.require == Requirement(padding="strict", attestation=True)


@pytest.mark.parametrize("fact", ["region", "network", "findings"])
def test_a_restriction_on_an_unknown_fact_takes_the_cloud_away(fact: str) -> None:
    policy = policy_of(f'[[rule]]\nid = "x"\nwhen = {{ {fact} = "a" }}\neffect = "edge_only"')
    verdict = evaluate(policy, request())
    assert (verdict.edge, verdict.cloud) == (True, False)
    assert "is not known" in verdict.reason


def test_a_deny_on_an_unknown_region_takes_the_cloud_and_leaves_the_device() -> None:
    policy = policy_of('[[rule]]\nid = "x"\nwhen = { region = "us" }\neffect = "deny"')
    verdict = evaluate(policy, request())
    assert (verdict.edge, verdict.cloud) == (True, False)
    verdict = evaluate(policy, request(region="us"))
    assert (verdict.edge, verdict.cloud) == (False, False)
    assert evaluate(policy, request(region="eu")).cloud


def test_a_deny_on_findings_denies_content_that_nobody_inspected() -> None:
    policy = policy_of('[[rule]]\nid = "x"\nwhen = { findings = "email" }\neffect = "deny"')
    verdict = evaluate(policy, request())
    assert (verdict.edge, verdict.cloud) == (False, False)
    assert "not inspected" in verdict.reason
    inspected = msgspec.structs.replace(request(), findings=frozenset())
    assert evaluate(policy, inspected).cloud


@given(policies, facts)
def test_no_policy_lets_out_what_a_matching_deny_or_edge_only_rule_holds(
    policy: Policy, given_facts: RequestFacts
) -> None:
    verdict = evaluate(policy, given_facts)
    matching = [rule for rule in policy.rules if surely_matches(rule, given_facts)]
    if any(rule.effect == "deny" for rule in matching):
        assert not verdict.edge
        assert not verdict.cloud
    if any(rule.effect == "edge_only" for rule in matching):
        assert not verdict.cloud
    if any(rule.transforms for rule in matching):
        assert not verdict.cloud
    if any(rule.require.attestation for rule in matching) and given_facts.attested is not True:
        assert not verdict.cloud
    if verdict.cloud:
        assert any(rule.effect == "cloud_ok" for rule in matching)
    if not matching:
        assert not verdict.edge
        assert not verdict.cloud


@given(policies, facts, st.data())
def test_a_further_rule_never_widens_what_rules_have_restricted(
    policy: Policy, given_facts: RequestFacts, data: st.DataObject
) -> None:
    before = evaluate(policy, given_facts)
    if not before.rule_ids:
        return  # denied by default: the one thing that a further rule is there to change
    rule = data.draw(rules())
    position = data.draw(st.integers(0, len(policy.rules)))
    grown = Policy(rules=(*policy.rules[:position], rule, *policy.rules[position:]))
    after = evaluate(grown, given_facts)
    assert after.cloud <= before.cloud
    assert after.edge <= before.edge


@given(policies, facts, st.randoms(use_true_random=False))
def test_the_order_of_rules_changes_no_verdict(
    policy: Policy, given_facts: RequestFacts, random: object
) -> None:
    shuffled = list(policy.rules)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one = evaluate(policy, given_facts)
    other = evaluate(Policy(rules=tuple(shuffled)), given_facts)
    assert (one.edge, one.cloud) == (other.edge, other.cloud)
    # The first id is the rule that decides: of several that could, the first in the file.
    assert set(one.rule_ids[1:]) <= set(other.rule_ids)
    assert set(other.rule_ids[1:]) <= set(one.rule_ids)


@given(policies, facts)
def test_forgetting_a_fact_about_the_link_or_content_never_opens_the_cloud(
    policy: Policy, given_facts: RequestFacts
) -> None:
    known = evaluate(policy, given_facts)
    for fact in ("region", "network", "findings", "shaping", "attested"):
        forgotten = evaluate(policy, msgspec.structs.replace(given_facts, **{fact: None}))
        assert forgotten.cloud <= known.cloud
