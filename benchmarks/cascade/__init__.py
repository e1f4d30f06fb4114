"""The cascade's guarantee on real data: digits, and texts by their module."""

from __future__ import annotations
