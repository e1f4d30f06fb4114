"""Hypothesis strategies for policies and requests, from a vocabulary small enough to collide."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from sdk.policy import Condition, Policy, RequestFacts, Requirement, Rule
from sdk.policy.model import DEFAULT_CLASSES

VALUES = {
    "model": ("assistant", "minilm"),
    "task": ("text-generation", "embedding"),
    "tenant": ("clinic", "shop"),
    "purpose": ("summary", "search"),
    "region": ("eu", "us"),
    "network": ("wifi", "cellular"),
    "findings": ("email", "name"),
}


def _some(values: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...] | None]:
    chosen = st.lists(st.sampled_from(values), min_size=1, unique=True)
    return st.none() | chosen.map(lambda found: tuple(sorted(found)))


conditions = st.builds(
    Condition,
    sensitivity=_some(DEFAULT_CLASSES),
    **{key: _some(values) for key, values in VALUES.items()},
)
# Conditions on one or two facts, so that rules match often enough to meet each other.
loose_conditions = st.builds(
    Condition, sensitivity=_some(DEFAULT_CLASSES), region=_some(VALUES["region"])
)
requirements = st.builds(
    Requirement,
    padding=st.sampled_from(("off", "balanced", "strict")),
    attestation=st.booleans(),
    region=_some(VALUES["region"]),
)
transforms = st.lists(st.sampled_from(("redact", "pseudonymise", "noise")), unique=True).map(tuple)


@st.composite
def rules(draw: st.DrawFn, effect: str | None = None) -> Rule:
    chosen = effect or draw(st.sampled_from(("deny", "edge_only", "cloud_ok", "cloud_ok")))
    extra: dict[str, Any] = {}
    if chosen == "cloud_ok":
        extra = {
            "edge": draw(st.sampled_from((True, True, False))),
            "transforms": draw(st.just(()) | transforms),
            "require": draw(st.just(Requirement()) | requirements),
        }
    return Rule(
        id=draw(st.text("abcdef", min_size=6, max_size=6)),
        effect=chosen,
        when=draw(st.one_of(loose_conditions, conditions)),
        **extra,
    )


policies = st.lists(rules(), max_size=6, unique_by=lambda rule: rule.id).map(
    lambda found: Policy(rules=tuple(found))
)
facts = st.builds(
    RequestFacts,
    model=st.sampled_from(VALUES["model"]),
    task=st.sampled_from(VALUES["task"]),
    sensitivity=st.sampled_from(DEFAULT_CLASSES),
    tenant=st.none() | st.sampled_from(VALUES["tenant"]),
    purpose=st.none() | st.sampled_from(VALUES["purpose"]),
    region=st.none() | st.sampled_from(VALUES["region"]),
    network=st.none() | st.sampled_from(VALUES["network"]),
    findings=st.none() | st.frozensets(st.sampled_from(VALUES["findings"])),
    shaping=st.sampled_from((None, "off", "balanced", "balanced", "strict", "strict")),
    attested=st.sampled_from((None, False, True, True)),
)


def surely_matches(rule: Rule, request: RequestFacts) -> bool:
    """Whether every condition holds: written apart from the code under test."""
    for key in Condition.__struct_fields__:
        wanted = getattr(rule.when, key)
        value = getattr(request, key)
        if wanted is None:
            continue
        if key == "findings":
            if value is None or not (set(wanted) & set(value)):
                return False
        elif value not in wanted:
            return False
    return True


def policy_with(*found: Rule) -> Policy:
    return Policy(rules=found)
