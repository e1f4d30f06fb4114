"""The routing laboratory: the client's own router on simulated links, devices and clouds.

A discrete-event simulation with a virtual clock. What it is and what it leaves out:
docs/reference/bench.md.
"""

from __future__ import annotations
