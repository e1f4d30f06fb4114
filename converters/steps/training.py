"""What all training of converters shares: randomness and threads of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: Modules of up to this many weights train faster on one thread, and then the same on any machine.
SMALL = 1_000_000


@contextmanager
def seeded(torch: Any, seed: int, *, is_small: bool) -> Iterator[None]:
    """Randomness of our own, and as many threads as serve; both as before afterwards."""
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    torch.manual_seed(seed)
    if is_small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.random.set_rng_state(state)
