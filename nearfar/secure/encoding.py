"""Reading the handshake's fixed layouts: big-endian integers and counted byte strings."""

from __future__ import annotations


class MalformedError(Exception):
    """The bytes do not have the layout; each message translates it into its own error."""


class Reader:
    """Takes bytes from the front of a message; never reads past the end.

    Args:
        data: The whole message.
    """

    __slots__ = ("_data", "position")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        """Exactly that many bytes.

        Raises:
            MalformedError: Fewer are left.
        """
        end = self.position + count
        if end > len(self._data):
            raise MalformedError
        piece = self._data[self.position : end]
        self.position = end
        return piece

    def unsigned(self, size_bytes: int) -> int:
        """Big-endian unsigned integer."""
        return int.from_bytes(self.take(size_bytes), "big")

    def expect(self, literal: bytes) -> None:
        """These very bytes."""
        if self.take(len(literal)) != literal:
            raise MalformedError

    def sized(self, size_bytes: int) -> bytes:
        """A byte string with a 16-bit length in front, which must be `size_bytes`."""
        self.expect(size_bytes.to_bytes(2, "big"))
        return self.take(size_bytes)

    def counted(self, limit_bytes: int) -> bytes:
        """A byte string with a 16-bit length in front, which must not be above `limit_bytes`."""
        size_bytes = self.unsigned(2)
        if size_bytes > limit_bytes:
            raise MalformedError
        return self.take(size_bytes)

    def list_of(self, item_bytes: int) -> tuple[int, ...]:
        """An 8-bit count, at least one, then that many integers, none of them twice."""
        items = tuple(self.unsigned(item_bytes) for _ in range(self.unsigned(1)))
        if not items or len(set(items)) != len(items):
            raise MalformedError
        return items

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data) - self.position)

    def finish(self) -> None:
        """Nothing may be left."""
        if self.position != len(self._data):
            raise MalformedError


def sized(data: bytes) -> bytes:
    """`data` with a 16-bit length in front."""
    return len(data).to_bytes(2, "big") + data


def list_of(items: tuple[int, ...], item_bytes: int) -> bytes:
    """An 8-bit count, then the integers."""
    return bytes([len(items)]) + b"".join(item.to_bytes(item_bytes, "big") for item in items)
