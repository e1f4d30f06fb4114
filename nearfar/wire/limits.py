"""How much of a peer's data one connection will hold."""

from __future__ import annotations

from dataclasses import dataclass

from nearfar.errors import ConfigError

MIB = 1 << 20
#: Sizes must fit 32 bits on the wire; nobody should want to hold more in memory.
MAX_MESSAGE_BYTES = 1024 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds that are checked before memory is spent.

    Attributes:
        max_message_bytes: Largest plaintext message, header and tensors together. 16 MiB holds a
            batch of 27 RGB images of 224 x 224 in FP32.
        max_header_bytes: Largest msgpack header; a list of models with their manifests is the
            longest one in practice.
        max_unauthenticated_bytes: Largest message before the connection is open: the handshake
            (2.5 KB) and `Auth` with its token.
        max_tensors: Tensors in one message.
        max_streams: Streams open at once.
        max_unsent_replies: Automatic answers (`Pong`) that may wait for `data_to_send`; a peer
            that pings faster than it reads is cut off.
    """

    max_message_bytes: int = 16 * MIB
    max_header_bytes: int = 4 * MIB
    max_unauthenticated_bytes: int = 64 * 1024
    max_tensors: int = 256
    max_streams: int = 64
    max_unsent_replies: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.max_message_bytes <= MAX_MESSAGE_BYTES:
            raise ConfigError(
                f"max_message_bytes is {self.max_message_bytes}",
                field="max_message_bytes",
                fix=f"Choose between 1 and {MAX_MESSAGE_BYTES}",
            )
