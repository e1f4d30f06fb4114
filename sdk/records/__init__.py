"""Decisions written down: a bounded file of content-free records, and what can be asked of it.

Reference: docs/reference/records.md.
"""

from __future__ import annotations

from sdk.records.entries import Decided, Entry, Finished, Moment, Stalled
from sdk.records.ring import Recorder, RingReader
from sdk.records.whatif import Comparison, WhatIf, compare

__all__ = [
    "Comparison",
    "Decided",
    "Entry",
    "Finished",
    "Moment",
    "Recorder",
    "RingReader",
    "Stalled",
    "WhatIf",
    "compare",
]
