"""The one door to the cloud: nothing is sealed for it without a permit made from a policy verdict.

The link has no other way to send: `send` here is the only caller of ``ClientSession.send`` in the
client (a test reads the source to keep it so). What carries an app's content needs a `Permit`; a
permit cannot be made from a verdict that keeps the request on the device, nor from one whose
demands this version cannot meet. What policy demands of the channel is compared with the connection
itself, for every message: it counts what was agreed and proven there, not what the configuration
promises. Everything unexpected is refused: the door fails closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from nearfar.errors import PolicyDenied
from nearfar.secure.shaping import Shaping
from nearfar.wire.messages import (
    Cancel,
    ClientMessage,
    Credit,
    Generate,
    Infer,
    ListModels,
    Ping,
    Pong,
    Ready,
    Resume,
)
from sdk.policy import Requirement, Verdict
from sdk.policy.evaluate import is_shaped

if TYPE_CHECKING:
    import numpy as np

    from nearfar.secure.attestation import AttestedFacts

_NOTHING = Requirement()
#: Messages without anything of the app in them: no model name, no content, no length of content.
_CONTENT_FREE = (ListModels, Ping, Pong)


class Sealer(Protocol):
    """What a session offers for sending; `nearfar.session.ClientSession` is one."""

    def send(self, message: ClientMessage, tensors: Sequence[np.ndarray] = ()) -> int:
        """Seal and queue a message; returns its sealed size in bytes."""
        ...


class Channel(Protocol):
    """What a connection is, as policy may demand it; `nearfar.session.ClientSession` is one."""

    @property
    def shaping(self) -> Shaping:
        """In force for what is sent now."""
        ...

    @property
    def attested(self) -> AttestedFacts | None:
        """What evidence showed that was verified on this very connection."""
        ...


def unmet_demand(verdict: Verdict, region: str | None) -> str | None:
    """What policy demands on the way to the cloud and this version or endpoint does not give.

    The rest of the demands is up to the connection; see `unmet_on`.

    Args:
        verdict: The policy's answer.
        region: Where the cloud endpoint stands; `None` when unknown.

    Returns:
        The demand in words, or `None` when all are met.
    """
    if verdict.transforms:
        return f"policy demands {' and '.join(verdict.transforms)} first, which is not available"
    require = verdict.require
    if require.region is not None and region not in require.region:
        here = f"the cloud is in {region}" if region else "the cloud's region is not known"
        return f"policy demands region {' or '.join(require.region)}, {here}"
    return None


def unmet_on(channel: Channel | None, ready: Ready | None, require: Requirement) -> str | None:
    """What policy demands and this connection does not give.

    Args:
        channel: The session of the connection; `None` meets no demand.
        ready: What the cloud at its other end said of itself. When it does not say where it
            stands, the region that the permit was made with holds.
        require: `Verdict.require`.

    Returns:
        The demand in words, or `None` when all are met.
    """
    if require.attestation and (channel is None or channel.attested is None):
        return "policy demands attestation, and this connection is not attested"
    if require.padding != "off":
        shaping: Shaping = "off" if channel is None else channel.shaping
        if not is_shaped(shaping, require.padding):
            return f"policy demands {require.padding} padding, and this connection has {shaping}"
    region = "" if ready is None else ready.region
    if require.region is not None and region and region not in require.region:
        return f"policy demands region {' or '.join(require.region)}, the cloud is in {region}"
    return None


class Permit:
    """Proof that policy lets one request, for one model, go to the cloud.

    Args:
        verdict: The policy's answer for this request.
        model: The model it was asked about.
        region: Where the cloud endpoint stands; `None` when unknown.

    Attributes:
        bytes_sent: Sealed bytes that left the device under this permit so far.

    Raises:
        PolicyDenied: The verdict keeps the request on the device, or demands what is not there.
    """

    __slots__ = ("bytes_sent", "demands", "model", "verdict")

    def __init__(self, verdict: Verdict, model: str, *, region: str | None = None) -> None:
        # `is not True`: a truthy value of another type is a bug somewhere, never a permission.
        if not isinstance(verdict, Verdict) or verdict.cloud is not True:
            reason = verdict.reason if isinstance(verdict, Verdict) else "policy was not asked"
            rules = verdict.rule_ids if isinstance(verdict, Verdict) else ()
            raise PolicyDenied(
                f"The request for {model!r} may not leave the device: {reason}",
                rule=rules[0] if rules else "",
                fix="Allow it with a `cloud_ok` rule in the policy file, or use a local model",
            )
        demand = unmet_demand(verdict, region)
        if demand is not None:
            raise PolicyDenied(
                f"The request for {model!r} may not leave the device: {demand}",
                rule=verdict.rule_ids[0] if verdict.rule_ids else "",
                fix="Change the rule in the policy file, or use a local model",
            )
        self.verdict = verdict
        #: Whether there is anything to compare the connection with.
        self.demands = verdict.require != _NOTHING
        self.model = model
        self.bytes_sent = 0


def send(
    session: Sealer,
    permit: Permit | None,
    message: ClientMessage,
    tensors: Sequence[np.ndarray] = (),
    channel: Channel | None = None,
    ready: Ready | None = None,
) -> int:
    """Seal one message for the cloud.

    Args:
        session: Where it is queued.
        permit: Needed for everything that comes from a request; `None` for `ListModels`, `Ping`
            and `Pong`, which carry nothing of the app.
        message: What to say.
        tensors: Its tensors.
        channel: The connection that it would leave on, as it is now.
        ready: What the cloud at its other end said of itself.

    Returns:
        Sealed size in bytes.

    Raises:
        PolicyDenied: There is no permit, it is for another model, or the connection is not what
            policy demands.
    """
    if type(message) in _CONTENT_FREE:
        return session.send(message)
    if type(permit) is not Permit:
        raise _no_permit(message)
    if isinstance(message, (Infer, Generate)):
        if message.model != permit.model:
            raise _no_permit(message)
    elif not isinstance(message, (Cancel, Credit, Resume)):
        raise _no_permit(message)
    if permit.demands:
        demand = unmet_on(channel, ready, permit.verdict.require)
        if demand is not None:
            raise PolicyDenied(
                f"The request for {permit.model!r} was held back: {demand}",
                rule=permit.verdict.rule_ids[0] if permit.verdict.rule_ids else "",
                fix="Ask again; policy then decides with what is known of this connection",
            )
    size = session.send(message, tensors)
    permit.bytes_sent += size
    return size


def _no_permit(message: ClientMessage) -> PolicyDenied:
    return PolicyDenied(
        f"A {type(message).__name__} message was held back: policy gave no permit for it",
        fix="This is a defect in nearfar; please report it",
    )
