"""Limits and time limits of a cloud runtime, with the reasons for their defaults."""

from __future__ import annotations

from dataclasses import dataclass, field

from nearfar.secure.shaping import Shaping
from nearfar.wire.limits import Limits
from nearfar.wire.retention import RetentionLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What a server tolerates.

    Attributes:
        limits: Sizes and counts within one connection.
        retention: What is kept of answers whose client lost its connection.
        min_shaping: How much sizes and times are hidden at least, whatever a client asks for.
        region: Told to clients in `Ready`; policies may ask for it.
        max_connections: More get HTTP 503. Each costs about 100 KB when idle.
        max_strangers_per_address: Connections of one address that are not admitted yet; more get
            HTTP 503. Keeps one address from taking all places with handshakes it never ends, and
            does not hinder many devices behind one address.
        handshake_timeout_s: From the opened websocket to an accepted API key; TLS and HTTP have
            the same time once more before that.
        message_timeout_s: From the first fragment of a message to its last.
        write_timeout_s: How long a client may leave our output unread.
        ping_interval_s: Keepalive; below the usual 60 s after which middleboxes forget a flow.
        ping_timeout_s: How long its answer may take.
        close_timeout_s: How long a closing client may take.
        drain_s: How long open streams may go on after SIGTERM.
        key_check_s: How often the API key file is looked at.
        telemetry: Whether requests are told to OpenTelemetry.
    """

    limits: Limits = field(default_factory=Limits)
    retention: RetentionLimits = field(default_factory=RetentionLimits)
    min_shaping: Shaping = "off"
    region: str = ""
    max_connections: int = 256
    max_strangers_per_address: int = 32
    handshake_timeout_s: float = 10.0
    message_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    ping_interval_s: float = 20.0
    ping_timeout_s: float = 20.0
    close_timeout_s: float = 5.0
    drain_s: float = 30.0
    key_check_s: float = 1.0
    telemetry: bool = False
