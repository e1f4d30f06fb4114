"""What is known about the link to the cloud: round trip, time per byte, and what is under way.

An answer's network time is taken as ``delay + bytes x time per byte``, where the bytes of uploads
that are still under way count too: they go first. Both parts are corrected by every transfer, the
one that made up more of it by more.
"""

from __future__ import annotations

from sdk.routing.estimates import MAX_RATIO, Level, Quantiles

# Until the link is measured: a home or mobile connection to a far data centre, 10 Mbit/s up.
ASSUMED_RTT_MS = 60.0
ASSUMED_MS_PER_BYTE = 8.0 / 10_000.0
ASSUMED_SIGMA = 0.3
# A cell or a crowded network changes within seconds; what was fast or slow longer ago than that
# says little. (Round trips and bandwidth age alike.)
LINK_HALF_LIFE_S = 10.0
# How fast the usual time per byte follows the level: over tens of transfers.
USUAL_WEIGHT = 0.05
DELAY_WEIGHT = 0.3
# A round trip that is so many times the usual one is no accident when it comes twice in a row.
LONGER = 1.5
# A transfer tells the bandwidth when it takes longer than this part of the round trip.
TELLING = 0.25
# And when it is longer than a packet, and moves faster than the slowest of links (50 kbit/s): what
# else an answer waited for is no matter of its bytes.
PACKET_BYTES = 1_448
SLOWEST_MS_PER_BYTE = 8.0 / 50.0
# What a process on the same machine takes; keeps ratios finite.
SHORTEST_DELAY_MS = 0.01


class LinkLatency:
    """Round trip, bandwidth, and how far forecasts of both miss."""

    __slots__ = (
        "_busy_until_s",
        "_is_assumed",
        "_longer",
        "_silence",
        "_silent_s",
        "delay_ms",
        "is_measured",
        "level",
        "ms_per_byte",
    )

    def __init__(self) -> None:
        self.delay_ms = ASSUMED_RTT_MS
        #: The usual one; `level` says how it is now.
        self.ms_per_byte = ASSUMED_MS_PER_BYTE
        self.level = Level(ASSUMED_SIGMA, half_life_s=LINK_HALF_LIFE_S)
        self.is_measured = False
        self._busy_until_s = 0.0
        # How much longer than expected the last request went without an answer, until one comes.
        self._silence = 1.0
        self._silent_s = 0.0
        #: Whether nothing has told the bandwidth yet.
        self._is_assumed = True
        # After an answer that was long: its round trip, and the usual one until then.
        self._longer: tuple[float, float] | None = None

    def recall(self, ms_per_byte: float) -> None:
        """Begin with what an earlier run knew of the bandwidth."""
        self.ms_per_byte = ms_per_byte
        self._is_assumed = False

    def ahead_bytes(self, now_s: float) -> float:
        """Bytes of earlier uploads that are expected to be still under way."""
        left_ms = (self._busy_until_s - now_s) * 1000.0
        return left_ms / self._now(now_s) if left_ms > 0 else 0.0

    def sending(self, size_bytes: int, *, now_s: float) -> None:
        """An upload begins."""
        begin_s = max(now_s, self._busy_until_s)
        self._busy_until_s = begin_s + size_bytes * self._now(now_s) / 1000.0

    def idle(self, *, now_s: float) -> None:
        """Nothing is under way any more."""
        self._busy_until_s = min(self._busy_until_s, now_s)

    def observe_round_trip(self, rtt_ms: float) -> None:
        """Learn from a ping."""
        if not self.is_measured:
            self.delay_ms = rtt_ms
            self.is_measured = True
        self.delay_ms += DELAY_WEIGHT * (rtt_ms - self.delay_ms)

    def observe(self, network_ms: float, transferred_bytes: float, *, now_s: float) -> None:
        """Learn from an answer.

        Args:
            network_ms: Its time without the server's part.
            transferred_bytes: Its own bytes and those that were ahead of it.
            now_s: Monotonic time.
        """
        if not self.is_measured and transferred_bytes * self.ms_per_byte < self.delay_ms:
            self.delay_ms = network_ms
            self.is_measured = True
            return
        self._silence = 1.0
        moving_ms = network_ms - self.delay_ms
        tells = transferred_bytes > PACKET_BYTES and moving_ms > TELLING * self.delay_ms
        if tells and self._is_assumed and self.is_measured:
            # The first one says where the bandwidth is, not that today is unusual.
            self._is_assumed = False
            self.ms_per_byte = min(moving_ms / transferred_bytes, SLOWEST_MS_PER_BYTE)
            return
        self.is_measured = True
        level = self.level.at(now_s)
        transfer_ms = transferred_bytes * self.ms_per_byte * level
        forecast_ms = self.delay_ms + transfer_ms
        part = transfer_ms / forecast_ms
        # A short transfer says little about bandwidth: the level then learns what it expects.
        cause = 1.0
        if transferred_bytes > PACKET_BYTES:
            cause += part * (max(network_ms - self.delay_ms, 0.0) / transfer_ms - 1.0)
        self.level.observe(network_ms / forecast_ms, now_s=now_s, cause=cause)
        self._learn_delay(max(network_ms - transfer_ms, 0.0), 1.0 - part)
        # No round trip takes longer than a whole answer did.
        self.delay_ms = max(min(self.delay_ms, network_ms), SHORTEST_DELAY_MS)
        # The usual time per byte follows slowly, and the level is told from it.
        moved = self.level.value**USUAL_WEIGHT
        self.ms_per_byte *= moved
        self.level.value /= moved

    def _learn_delay(self, left_ms: float, part: float) -> None:
        """Learn from what bytes do not explain; the round trip had that part in the forecast."""
        before, self._longer = self._longer, None
        usual_ms = self.delay_ms if before is None else before[1]
        if part > 0.5 and left_ms > LONGER * usual_ms:
            if before is not None:
                self.delay_ms = min(left_ms, before[0])
                return
            self._longer = left_ms, usual_ms
        self.delay_ms += DELAY_WEIGHT * part**2 * (left_ms - self.delay_ms)

    def observe_late(self, ratio: float, transferred_bytes: float, *, now_s: float) -> None:
        """Learn from a request that was given up.

        Args:
            ratio: It took at least so many times what was due.
            transferred_bytes: Its own bytes and those that were ahead of it.
            now_s: Monotonic time.
        """
        transfer_ms = transferred_bytes * self._now(now_s)
        part = transfer_ms / (transfer_ms + self.delay_ms)
        self.level.observe(ratio, now_s=now_s, cause=1.0 + part * (ratio - 1.0), is_cut=True)
        # What bandwidth does not explain: whoever does not answer small requests is not slow.
        self._silence = min(ratio, MAX_RATIO) ** (1.0 - part)
        self._silent_s = now_s

    def quantiles(self, transferred_bytes: float, *, now_s: float) -> Quantiles:
        """Quantiles at `LEVELS` of the network's part, in milliseconds.

        Args:
            transferred_bytes: The request's own bytes and those ahead of it.
            now_s: Monotonic time.
        """
        scale = self.scale(transferred_bytes, now_s)
        q20, q50, q80, q95, q99 = self.level.errors.quantiles
        return scale * q20, scale * q50, scale * q80, scale * q95, scale * q99

    def scale(self, transferred_bytes: float, now_s: float) -> float:
        """The forecast, of which `level.errors` says how far it misses; as `quantiles`."""
        silence = self._silence
        if silence != 1.0:
            silence = silence ** (0.5 ** ((now_s - self._silent_s) / LINK_HALF_LIFE_S))
        forecast_ms = self.delay_ms + transferred_bytes * self._now(now_s)
        return forecast_ms * silence

    def _now(self, now_s: float) -> float:
        """Milliseconds per byte just now."""
        return self.ms_per_byte * self.level.at(now_s)
