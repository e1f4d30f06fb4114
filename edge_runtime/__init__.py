"""Run bundles on this device, in this process."""

from __future__ import annotations

from edge_runtime.generation import EdgeGeneration
from edge_runtime.runtime import DirectCall, EdgeModel, EdgeResult, EdgeRuntime

__all__ = ["DirectCall", "EdgeGeneration", "EdgeModel", "EdgeResult", "EdgeRuntime"]
