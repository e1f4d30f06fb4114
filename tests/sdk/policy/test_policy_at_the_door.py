"""Policy and the door to the cloud together: what leaves goes to a channel that policy accepts."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st
from policy_strategies import VALUES, facts, rules, surely_matches

from nearfar.errors import PolicyDenied
from nearfar.generation import GenerationOptions, Prompt
from nearfar.secure.shaping import LEVELS
from nearfar.wire import messages as wire
from sdk.cloud.egress import Permit, send
from sdk.policy import Policy, RequestFacts, Requirement, Rule, evaluate

ALLOWS = Rule(id="a", effect="cloud_ok")
ASKED = RequestFacts(model="assistant", task="embedding", sensitivity="public")


def messages(model: str) -> list[wire.ClientMessage]:
    """One of each kind that comes from a request."""
    return [
        wire.Infer(stream=1, request_id=bytes(16), model=model, tensors=()),
        wire.Generate(
            stream=1, request_id=bytes(16), model=model, prompt=Prompt(text="secret"),
            options=GenerationOptions(), credit=1,
        ),
        wire.Cancel(stream=1),
        wire.Credit(stream=1, tokens=1),
        wire.Resume(stream=1, request_id=bytes(16), ticket=bytes(32), next_index=0, credit=1),
    ]  # fmt: skip


@example([ALLOWS], ASKED, "off", False, "")
@example(
    [ALLOWS, Rule(id="b", effect="cloud_ok", require=Requirement(padding="balanced"))],
    RequestFacts(model="assistant", task="embedding", sensitivity="public", shaping="strict"),
    "off", False, "",
)  # fmt: skip
@example(
    [Rule(id="b", effect="cloud_ok", require=Requirement(attestation=True, padding="strict"))],
    RequestFacts(
        model="assistant", task="embedding", sensitivity="public", shaping="strict", attested=True
    ),
    "strict", True, "eu",
)  # fmt: skip
@given(
    st.lists(
        rules() | rules(effect="cloud_ok"), min_size=1, max_size=4, unique_by=lambda rule: rule.id
    ),
    facts,
    st.sampled_from(LEVELS),
    st.booleans(),
    st.sampled_from(("", *VALUES["region"])),
)
def test_no_byte_goes_to_a_channel_that_does_not_meet_every_demand(
    found: list[Rule], request_facts: RequestFacts, shaping: str, is_attested: bool, claimed: str
) -> None:
    """Whatever the configuration promised when policy was asked, the connection is what counts."""
    channel = SimpleNamespace(shaping=shaping, attested=object() if is_attested else None)
    ready = wire.Ready(
        protocol_version=1, server="s", max_streams=1, max_message_bytes=1, region=claimed
    )
    sent: list[object] = []
    session = SimpleNamespace(send=lambda message, _: sent.append(message) or 1)
    verdict = evaluate(Policy(rules=tuple(found)), request_facts)
    for message in messages(request_facts.model):
        try:
            permit = Permit(verdict, request_facts.model, region=request_facts.region)
            send(session, permit, message, (), channel, ready)
        except PolicyDenied:
            continue
    assert len(sent) in (0, 5)
    if not sent:
        return
    # Policy would say the same if it were asked about this very connection.
    here = msgspec.structs.replace(
        request_facts,
        shaping=shaping,
        attested=is_attested,
        region=claimed or request_facts.region,
    )
    assert evaluate(Policy(rules=tuple(found)), here).cloud
    matching = [rule for rule in found if surely_matches(rule, request_facts)]
    assert any(rule.effect == "cloud_ok" for rule in matching)
    for rule in matching:
        assert rule.effect == "cloud_ok"
        assert not rule.transforms
        assert LEVELS.index(shaping) >= LEVELS.index(rule.require.padding)
        assert is_attested or not rule.require.attestation
        if rule.require.region is not None:
            assert (claimed or request_facts.region) in rule.require.region


@given(facts, st.sampled_from(LEVELS), st.booleans())
def test_what_meets_the_demands_gets_through(
    request_facts: RequestFacts, padding: str, attestation: bool
) -> None:
    """The counterpart: a door that never opens would pass every test above."""
    require = Requirement(padding=padding, attestation=attestation)
    policy = Policy(rules=(Rule(id="a", effect="cloud_ok", require=require),))
    verdict = evaluate(policy, request_facts)
    met = attestation <= (request_facts.attested is True) and (
        LEVELS.index(request_facts.shaping or "off") >= LEVELS.index(padding)
    )
    assert verdict.cloud == met
    assert verdict.edge
    if met:
        assert verdict.require == require
