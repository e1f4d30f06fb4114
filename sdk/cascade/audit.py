"""Watch whether the stated agreement still holds, on a small sample of live traffic.

Of the requests that policy lets go to the cloud, a coin that does not look at them picks a few.
There the cloud is asked although the edge was sure enough, and what is observed is X: the part of
the answers that the device would have given and the cloud would not. As long as the agreement is
what was stated, E[X] <= risk. Against that a bet is run: with a stake for each of some suspected
rates q,

    e(X) = (1 - q) / (1 - risk) + X * (q / risk - (1 - q) / (1 - risk))

is never negative and has a mean of at most 1 (for X of 0 or 1 it is the likelihood ratio of q
against the risk; betting as in Waudby-Smith and Ramdas 2023, "Estimating means of bounded random
variables by betting"). S <- e(X) * (S + 1) is the Shiryaev-Roberts e-detector of Shin, Ramdas and
Rinaldo 2023 ("E-detectors"): looked at after every observation, for ever, it exceeds c on average
no sooner than after c audited requests, if nothing has changed. It needs no window and no time of
change, and past good luck does not count against it, as it would in a plain product.

On an alarm the device keeps about half as much as before, and the bet begins anew. After six
alarms it keeps nothing. Only a new calibration widens it again.
"""

from __future__ import annotations

import math

import msgspec

#: Mean number of audited requests to a false alarm, at least.
MEAN_TO_FALSE_ALARM = 10_000.0
#: Suspected rates, as multiples of the risk; far ones are found in fewer observations.
_SUSPECTED = (1.5, 2.0, 4.0, 8.0)
#: Alarms after which the device keeps nothing: less than a fiftieth was left.
MAX_LEVEL = 6


class AuditState(msgspec.Struct, frozen=True, kw_only=True):
    """What an audit knows; small enough to be kept in a file.

    Attributes:
        audited: Requests that were looked at.
        differed: Sum of X over them.
        level: Alarms so far; the device keeps about ``0.5 ** level`` of what it kept at first.
        evidence: One detector for each suspected rate.
    """

    audited: int = 0
    differed: float = 0.0
    level: int = 0
    evidence: tuple[float, ...] = (0.0,) * len(_SUSPECTED)


def observe(state: AuditState, differed: float, risk: float) -> AuditState:
    """The state after one more audited request.

    Args:
        state: Before.
        differed: Part of the answers that were kept (or would have been) and differ, 0 to 1. Of a
            request that escalated it is 0.
        risk: 1 minus the stated agreement.

    Returns:
        A state whose `level` is one higher if this raised the alarm.
    """
    evidence = []
    for factor, seen in zip(_SUSPECTED, state.evidence, strict=True):
        suspected = min(factor * risk, (1.0 + risk) / 2.0)  # below 1, also for a large risk
        low = (1.0 - suspected) / (1.0 - risk)
        evidence.append((low + differed * (suspected / risk - low)) * (seen + 1.0))
    level = state.level
    if math.fsum(evidence) / len(evidence) >= MEAN_TO_FALSE_ALARM:
        level = min(level + 1, MAX_LEVEL)
        evidence = [0.0] * len(_SUSPECTED)
    return AuditState(
        audited=state.audited + 1,
        differed=state.differed + differed,
        level=level,
        evidence=tuple(evidence),
    )


def is_sound(state: AuditState) -> bool:
    """Whether a state that was read from a file can be one."""
    return (
        state.audited >= 0
        and 0 <= state.level <= MAX_LEVEL
        and 0.0 <= state.differed <= state.audited
        and len(state.evidence) == len(_SUSPECTED)
        and all(0.0 <= x < math.inf for x in state.evidence)
    )


def kept_share(share: float, level: int) -> float:
    """Part of the traffic that is kept after `level` alarms, if `share` was kept at first."""
    return 0.0 if level >= MAX_LEVEL else share * 0.5**level
