"""May this request leave the device? Pure rules, no I/O in `evaluate`.

    policy = load_policy("policy.toml")
    facts = RequestFacts(model="assistant", task="text-generation", sensitivity="personal")
    verdict = evaluate(policy, facts)
    verdict.cloud   # False
    verdict.reason  # "policy rule clinic-2 keeps personal data on the device"

Semantics: docs/reference/policy.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdk.policy.evaluate import evaluate
from sdk.policy.model import (
    DEVICE_ONLY,
    Condition,
    Policy,
    RequestFacts,
    Requirement,
    Rule,
    Verdict,
)

if TYPE_CHECKING:
    from sdk.policy.parser import load_policy, parse_policy

__all__ = [
    "DEVICE_ONLY",
    "Condition",
    "Policy",
    "RequestFacts",
    "Requirement",
    "Rule",
    "Verdict",
    "evaluate",
    "load_policy",
    "parse_policy",
]


def __getattr__(name: str) -> object:
    """The parser is loaded when a policy is read, which not every client does."""
    if name in ("load_policy", "parse_policy"):
        from sdk.policy import parser

        return getattr(parser, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
