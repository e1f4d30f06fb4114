"""Nothing leaves the device without a permit that policy gave."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sdk
from nearfar.errors import PolicyDenied
from nearfar.generation import GenerationOptions, Prompt
from nearfar.secure.attestation import AttestedFacts
from nearfar.wire import messages as wire
from sdk.cloud.egress import Permit, send
from sdk.policy import Requirement, Verdict


class Recorder:
    """Stands where a session stands."""

    def __init__(self) -> None:
        self.sent: list[object] = []

    def send(self, message, tensors=()):
        self.sent.append(message)
        return 100


def verdict(**fields) -> Verdict:
    base = {"edge": True, "cloud": True, "rule_ids": ("r",), "reason": "why", "policy_hash": "h"}
    return Verdict(**{**base, **fields})


def infer(model: str = "m") -> wire.Infer:
    return wire.Infer(stream=1, request_id=bytes(16), model=model, tensors=())


def generate(model: str = "m") -> wire.Generate:
    return wire.Generate(
        stream=1,
        request_id=bytes(16),
        model=model,
        prompt=Prompt(text="secret"),
        options=GenerationOptions(),
        credit=1,
    )


def test_a_verdict_that_keeps_the_request_here_gives_no_permit():
    with pytest.raises(PolicyDenied, match="why") as caught:
        Permit(verdict(cloud=False), "m")
    assert caught.value.rule == "r"


@pytest.mark.parametrize("truthy", [1, "yes", object()])
def test_only_true_itself_gives_a_permit(truthy):
    with pytest.raises(PolicyDenied):
        Permit(verdict(cloud=truthy), "m")


def test_something_that_is_no_verdict_gives_no_permit():
    class Lookalike:
        cloud = True

    with pytest.raises(PolicyDenied, match="not asked"):
        Permit(Lookalike(), "m")


@pytest.mark.parametrize(
    ("demand", "word"),
    [
        ({"transforms": ("redact",)}, "redact"),
        ({"require": Requirement(region=("eu",))}, "region"),
    ],
)
def test_a_demand_that_cannot_be_met_gives_no_permit(demand, word):
    with pytest.raises(PolicyDenied, match=word):
        Permit(verdict(**demand), "m")


def test_a_region_that_fits_gives_a_permit():
    permit = Permit(verdict(require=Requirement(region=("eu",))), "m", region="eu")
    assert permit.model == "m"


@pytest.mark.parametrize(
    "message",
    [
        infer(),
        generate(),
        wire.Cancel(stream=1),
        wire.Credit(stream=1, tokens=1),
        wire.Resume(stream=1, request_id=bytes(16), ticket=bytes(32), next_index=0, credit=1),
        wire.Auth(),
    ],
)
@pytest.mark.parametrize("permit", [None, True, verdict()])
def test_content_without_a_permit_is_held_back(message, permit):
    session = Recorder()
    with pytest.raises(PolicyDenied):
        send(session, permit, message)
    assert session.sent == []


@pytest.mark.parametrize("message", [infer("other"), generate("other"), wire.Auth()])
def test_a_permit_is_good_for_its_own_model_and_for_requests_only(message):
    session = Recorder()
    with pytest.raises(PolicyDenied):
        send(session, Permit(verdict(), "m"), message)
    assert session.sent == []


def test_a_permit_counts_what_left_under_it():
    permit = Permit(verdict(), "m")
    session = Recorder()
    send(session, permit, infer())
    send(session, permit, wire.Cancel(stream=1))
    assert permit.bytes_sent == 200


@pytest.mark.parametrize("message", [wire.ListModels(stream=1), wire.Ping(id=1), wire.Pong(id=1)])
def test_messages_without_content_need_no_permit(message):
    session = Recorder()
    send(session, None, message)
    assert session.sent == [message]


@given(
    edge=st.booleans(),
    cloud=st.booleans(),
    transforms=st.lists(st.sampled_from(["redact", "pseudonymise", "noise"]), max_size=2),
    region=st.sampled_from([None, "eu", "us"]),
)
def test_a_permit_exists_only_for_verdicts_that_allow_the_cloud_and_demand_nothing_missing(
    edge, cloud, transforms, region
):
    asked = verdict(
        edge=edge,
        cloud=cloud,
        transforms=tuple(transforms),
        require=Requirement(region=("eu",)),
    )
    allowed = cloud and not transforms and region == "eu"
    try:
        Permit(asked, "m", region=region)
    except PolicyDenied:
        assert not allowed
    else:
        assert allowed


CONTENT = (
    infer(),
    generate(),
    wire.Cancel(stream=1),
    wire.Credit(stream=1, tokens=1),
    wire.Resume(stream=1, request_id=bytes(16), ticket=bytes(32), next_index=0, credit=1),
)


class Channel:
    """Stands where the session of a connection stands."""

    def __init__(self, shaping: str = "off", *, is_attested: bool = False) -> None:
        self.shaping = shaping
        self.attested = AttestedFacts(claims=b"c") if is_attested else None


def ready(region: str = "") -> wire.Ready:
    return wire.Ready(
        protocol_version=1, server="s", max_streams=1, max_message_bytes=1, region=region
    )


@pytest.mark.parametrize("message", CONTENT)
@pytest.mark.parametrize(
    ("require", "channel", "region", "words"),
    [
        (Requirement(padding="balanced"), Channel("off"), "", "balanced padding"),
        (Requirement(padding="strict"), Channel("balanced"), "", "strict padding"),
        (Requirement(padding="balanced"), None, "", "balanced padding"),
        (Requirement(attestation=True), Channel("strict"), "", "not attested"),
        (Requirement(attestation=True), None, "", "not attested"),
        (Requirement(region=("eu",)), Channel("strict", is_attested=True), "us", "is in us"),
    ],
)
def test_a_connection_that_is_not_what_policy_demands_gets_nothing(
    message, require, channel, region, words
):
    permit = Permit(verdict(require=require), "m", region="eu")
    session = Recorder()
    with pytest.raises(PolicyDenied, match=words) as caught:
        send(session, permit, message, (), channel, ready(region))
    assert caught.value.rule == "r"
    assert session.sent == []
    assert permit.bytes_sent == 0


@pytest.mark.parametrize("message", CONTENT)
def test_a_connection_that_is_what_policy_demands_gets_the_request(message):
    require = Requirement(padding="balanced", attestation=True, region=("eu",))
    permit = Permit(verdict(require=require), "m", region="eu")
    session = Recorder()
    for shaping in ("balanced", "strict"):
        for region in ("", "eu"):
            send(session, permit, message, (), Channel(shaping, is_attested=True), ready(region))
    assert len(session.sent) == 4


def test_no_other_place_in_the_client_sends_through_a_session():
    """Reads the source: `session.send` may be called in egress.py alone."""
    found = []
    for path in Path(sdk.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "send"
                and "session" in ast.unparse(node.func.value)
            ):
                found.append(path.name)
    assert found == ["egress.py", "egress.py"]
