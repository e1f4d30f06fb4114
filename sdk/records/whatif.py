"""Decide again: as recorded, bit by bit, or with another deadline, link or confidence.

The router is a pure function of `DecisionInputs`, and a record holds them all.
"""

from __future__ import annotations

import msgspec

from nearfar.errors import InvalidInput
from sdk.records.entries import Decided, Moment
from sdk.routing import DecisionInputs, Prediction, RouteDecision, decide

_MBIT_PER_S_TO_BYTES_PER_MS = 125.0


class WhatIf(msgspec.Struct, frozen=True, kw_only=True):
    """What to change; `None` leaves it as it was.

    Attributes:
        deadline_ms: Time that was left for the answer; ``math.inf`` for no deadline.
        rtt_ms: Round trip of the link.
        bandwidth_mbit_per_s: Bandwidth of the link.
        confidence: Probability with which a route must be in time.

    Raises:
        InvalidInput: A number cannot be meant.
    """

    deadline_ms: float | None = None
    rtt_ms: float | None = None
    bandwidth_mbit_per_s: float | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        deadline_ms, rtt_ms = self.deadline_ms, self.rtt_ms
        bandwidth, confidence = self.bandwidth_mbit_per_s, self.confidence
        checks = (
            ("deadline_ms", deadline_ms, deadline_ms is None or deadline_ms > 0, "above 0"),
            ("rtt_ms", rtt_ms, rtt_ms is None or 0 <= rtt_ms < 1e9, "0 or more"),
            ("bandwidth", bandwidth, bandwidth is None or 0 < bandwidth < 1e9, "above 0"),
            ("confidence", confidence, confidence is None or 0 < confidence < 1, "in (0, 1)"),
        )
        for name, value, is_good, allowed in checks:
            if not is_good:
                raise InvalidInput(f"{name} is {value}", field=name, fix=f"It must be {allowed}")

    @property
    def is_nothing(self) -> bool:
        """Whether it changes nothing."""
        return all(value is None for value in msgspec.structs.astuple(self))

    def apply(self, record: Decided) -> DecisionInputs:
        """The inputs of the recorded decision, changed.

        Another link moves the whole distribution of the cloud by the difference that it makes to
        the median; how far answers spread is left as it was.
        """
        inputs = record.decision.inputs
        if self.deadline_ms is not None:
            remaining_ms = None if self.deadline_ms == float("inf") else self.deadline_ms
            inputs = msgspec.structs.replace(inputs, remaining_ms=remaining_ms)
        if self.confidence is not None:
            inputs = msgspec.structs.replace(inputs, confidence=self.confidence)
        if self.rtt_ms is not None or self.bandwidth_mbit_per_s is not None:
            prediction = self._moved(inputs, record.moment)
            cloud = msgspec.structs.replace(inputs.cloud, prediction=prediction)
            inputs = msgspec.structs.replace(inputs, cloud=cloud)
        return inputs

    def _moved(self, inputs: DecisionInputs, moment: Moment) -> Prediction:
        old = inputs.cloud.prediction
        if old.p50_ms is None:
            return old
        delay_ms = min(moment.delay_ms, old.network_ms)
        transfer_ms = old.network_ms - delay_ms
        if self.bandwidth_mbit_per_s is not None:
            size_bytes = inputs.size.upload_bytes + inputs.size.download_bytes
            transfer_ms = size_bytes / (self.bandwidth_mbit_per_s * _MBIT_PER_S_TO_BYTES_PER_MS)
        network_ms = (delay_ms if self.rtt_ms is None else self.rtt_ms) + transfer_ms
        by_ms = network_ms - old.network_ms
        return msgspec.structs.replace(
            old,
            network_ms=network_ms,
            p20_ms=_add(old.p20_ms, by_ms),
            p50_ms=_add(old.p50_ms, by_ms),
            p80_ms=_add(old.p80_ms, by_ms),
            p95_ms=_add(old.p95_ms, by_ms),
            p99_ms=_add(old.p99_ms, by_ms),
            ttft_ms=_add(old.ttft_ms, by_ms),
        )


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One record, decided again.

    Attributes:
        record: As it was written.
        again: The same inputs, decided now.
        what_if: The changed inputs, decided now; `None` when nothing was to be changed.
    """

    record: Decided
    again: RouteDecision
    what_if: RouteDecision | None

    @property
    def is_reproduced(self) -> bool:
        """Whether the same inputs gave the same decision, bit by bit."""
        return self.again.encode() == self.record.decision.encode()

    @property
    def is_changed(self) -> bool:
        """Whether the change would have led to another route."""
        return self.what_if is not None and self.what_if.route != self.record.decision.route


def compare(record: Decided, what_if: WhatIf) -> Comparison:
    """Decide a recorded decision again."""
    return Comparison(
        record=record,
        again=decide(record.decision.inputs),
        what_if=None if what_if.is_nothing else decide(what_if.apply(record)),
    )


def _add(value: float | None, by_ms: float) -> float | None:
    return None if value is None else max(0.0, value + by_ms)
