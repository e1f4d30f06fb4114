"""``python -m edge_runtime`` is ``nearfar edge``."""

from __future__ import annotations

import sys

from edge_runtime.commands import app
from nearfar.cli import run

if __name__ == "__main__":
    sys.exit(run(app, program="python -m edge_runtime"))
