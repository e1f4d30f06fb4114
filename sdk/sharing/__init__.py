"""One computation for several equal requests: while it runs, and for a while after (opt-in).

Reference: docs/reference/cache.md.
"""

from __future__ import annotations

from sdk.sharing.config import CacheConfig

__all__ = ["CacheConfig"]
