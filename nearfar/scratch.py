"""Memory that all connections of a thread share while bytes pass through.

The event loop has its thread for itself, so what one connection laid here is gone before the next
one's turn. A buffer for each connection would be memory that idles, and a fresh one for each
message is memory that no cache holds: at 150 kB that is what copying costs.
"""

from __future__ import annotations

import threading

import numpy as np

#: Read from the socket at once. OpenSSL's buffer of a connection grows to what came together, and
#: keeps that size.
READ_BYTES = 256 * 1024
#: More than a TLS record can be (RFC 8446, section 5.2): what an earlier read left of one.
_TLS_RECORD_BYTES = 32 * 1024
#: Before the room: for the longest head of a frame, and a multiple of a word.
_HEAD_BYTES = 16
_WORD_BYTES = 8


class Scratch:
    """One thread's buffers; see `of_thread`.

    Attributes:
        sealed: What came from the socket, until TLS has taken it.
        plain: What TLS made of it, until it was handed over.
        room: What is sealed, until TLS has taken it. The same memory as `sealed`: nothing is
            written while the socket is read.
    """

    def __init__(self) -> None:
        buffer = bytearray(READ_BYTES)
        self.sealed = memoryview(buffer)
        self.room = self.sealed[_HEAD_BYTES:]
        self._mask = bytearray(_WORD_BYTES)
        self._mask_word = np.frombuffer(self._mask, np.uint64).reshape(())  # quicker than a number
        self._words = np.frombuffer(buffer, np.uint64)[_HEAD_BYTES // _WORD_BYTES :]
        self.plain = memoryview(bytearray(READ_BYTES + _TLS_RECORD_BYTES))

    def framed(self, size_bytes: int, head: bytes, mask: bytes) -> memoryview:
        """A frame around what lies at the beginning of the room.

        Args:
            size_bytes: Its length; what follows it, up to a whole word, may change.
            head: Laid before it.
            mask: XORed onto it (RFC 6455, section 5.3), if it is not empty.
        """
        if mask:
            words = self._words[: -(-size_bytes // _WORD_BYTES)]
            self._mask[:] = mask * 2
            np.bitwise_xor(words, self._mask_word, words)
        start = _HEAD_BYTES - len(head)
        self.sealed[start:_HEAD_BYTES] = head
        return self.sealed[start : _HEAD_BYTES + size_bytes]


class _Threads(threading.local):
    def __init__(self) -> None:
        self.scratch = Scratch()


_threads = _Threads()


def of_thread() -> Scratch:
    """Those of the thread that calls."""
    return _threads.scratch
