"""Run bundles on this device, in this process."""

from __future__ import annotations

from edge_runtime.direct import DirectCall
from edge_runtime.generation import EdgeGeneration
from edge_runtime.hosted import EdgeModel
from edge_runtime.runtime import EdgeResult, EdgeRuntime
from edge_runtime.stalls import Stall

__all__ = ["DirectCall", "EdgeGeneration", "EdgeModel", "EdgeResult", "EdgeRuntime", "Stall"]
