"""Engines run one variant of a bundle on this machine.

Importing this package imports no inference library; `load_engine` imports the one it needs.
"""

from __future__ import annotations

from nearfar.engines.loading import load_engine

__all__ = ["load_engine"]
