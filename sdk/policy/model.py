"""The words of a policy: classes, rules, facts about a request, and the verdict.

Specification: docs/reference/policy.md. Everything here is an immutable value.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

from nearfar.errors import PolicyDenied
from nearfar.secure.shaping import Shaping

Effect = Literal["deny", "edge_only", "cloud_ok"]
Transform = Literal["redact", "pseudonymise", "noise"]
Padding = Shaping

DEFAULT_CLASSES = ("public", "internal", "personal", "secret")
BUILT_IN_RULE_ID = "built-in"


class RequestFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What policy may look at; never the content itself.

    Attributes:
        model: Name of the model.
        task: The model's task, for example ``text-generation``.
        sensitivity: One of the policy's classes.
        purpose: What the answer is for, as the app declares it; `None` when it declares none.
        tenant: On whose behalf the app asks; `None` when it declares none.
        region: Where the cloud endpoint stands; `None` when unknown or when there is no cloud.
        network: The link in use, for example ``wifi``; `None` when unknown.
        findings: Kinds of personal data found in the content; `None` when it was not inspected.
        shaping: Least traffic shaping of every connection to the cloud endpoint; `None` when
            unknown or when there is no cloud.
        attested: Whether an attestation plug-in must accept the cloud before anything is sent to
            it; `None` when unknown or when there is no cloud.
    """

    model: str
    task: str
    sensitivity: str
    purpose: str | None = None
    tenant: str | None = None
    region: str | None = None
    network: str | None = None
    findings: frozenset[str] | None = None
    shaping: Padding | None = None
    attested: bool | None = None


class Condition(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """When a rule applies: every field that is set must hold; an empty condition always holds.

    Each field lists the accepted values, sorted; `None` accepts anything. `sensitivity` is
    already expanded (``{at_least = "personal"}`` becomes ``("personal", "secret")``).
    """

    model: tuple[str, ...] | None = None
    task: tuple[str, ...] | None = None
    sensitivity: tuple[str, ...] | None = None
    tenant: tuple[str, ...] | None = None
    purpose: tuple[str, ...] | None = None
    region: tuple[str, ...] | None = None
    network: tuple[str, ...] | None = None
    findings: tuple[str, ...] | None = None


class Requirement(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What must hold on the way to the cloud.

    Attributes:
        padding: Least traffic shaping.
        attestation: Whether the cloud must prove what it runs.
        region: Regions the cloud endpoint may stand in; `None` for any.
    """

    padding: Padding = "off"
    attestation: bool = False
    region: tuple[str, ...] | None = None


class Rule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One rule of a policy.

    Attributes:
        id: Unique; shown in every reason and error.
        when: Condition on the request.
        effect: ``deny`` no route, ``edge_only`` the device, ``cloud_ok`` the device and the cloud.
        edge: ``False`` takes the device away as a route; only with ``cloud_ok``.
        transforms: What must be done to the content before it leaves.
        require: What must hold on the way to the cloud.
    """

    id: str
    effect: Effect
    when: Condition = Condition()
    edge: bool = True
    transforms: tuple[Transform, ...] = ()
    require: Requirement = Requirement()


class _Canonical(msgspec.Struct, frozen=True):
    """What the policy hash is taken over: the meaning, not the file's layout or comments.

    Defaults are left out of it, so a field added later does not change the hash of old policies.
    """

    version: int
    classes: tuple[str, ...]
    rules: tuple[Rule, ...]


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed policy; make one with `parse_policy` or `load_policy`.

    Attributes:
        version: Version of the file format.
        classes: Data classes, from the least to the most strict.
        rules: In file order; the order never changes a verdict.
        source: File name for messages; not part of the hash.
        hash: SHA-256 (hex) of the policy's meaning; stands in every verdict and decision record.
    """

    version: int = 1
    classes: tuple[str, ...] = DEFAULT_CLASSES
    rules: tuple[Rule, ...] = ()
    source: str = "policy"
    hash: str = ""

    def __post_init__(self) -> None:
        canonical = msgspec.json.encode(
            _Canonical(self.version, self.classes, self.rules), order="sorted"
        )
        msgspec.structs.force_setattr(self, "hash", hashlib.sha256(canonical).hexdigest())

    @property
    def strictest(self) -> str:
        """The class that unlabelled data is taken to have."""
        return self.classes[-1]


DEVICE_ONLY = Policy(
    rules=(Rule(id=BUILT_IN_RULE_ID, effect="edge_only"),), source="built-in policy"
)
"""What holds when no policy file is configured: everything stays on the device."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What policy says about one request; nothing downstream may widen it.

    Attributes:
        edge: Whether the device may answer.
        cloud: Whether the cloud may answer.
        rule_ids: Rules that matched, the deciding one first; empty when none matched.
        reason: One sentence for people, without the final dot.
        policy_hash: `Policy.hash` of the policy that was asked.
        transforms: What must be done to the content before it leaves. This version carries out
            none and takes the cloud away instead, so it is empty.
        require: What must still hold when bytes leave, and is checked on the very connection that
            they leave on: what the matching rules demand together, the region being the one that
            the cloud was allowed for.
    """

    edge: bool
    cloud: bool
    rule_ids: tuple[str, ...]
    reason: str
    policy_hash: str
    transforms: tuple[Transform, ...] = ()
    require: Requirement = Requirement()

    def allows(self, route: str) -> bool:
        """Whether that route (``edge`` or ``cloud``) is allowed."""
        return self.cloud if route == "cloud" else self.edge and route == "edge"

    def raise_if_denied(self) -> None:
        """Raise `PolicyDenied` when no route is allowed."""
        if not (self.edge or self.cloud):
            raise PolicyDenied(
                self.reason[:1].upper() + self.reason[1:],
                rule=self.rule_ids[0] if self.rule_ids else "",
                fix="Run `nearfar policy explain` with the same facts to see which rules match",
            )
