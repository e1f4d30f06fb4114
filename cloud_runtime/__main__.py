"""``python -m cloud_runtime`` is ``nearfar cloud``."""

from __future__ import annotations

import sys

from cloud_runtime.commands import app
from nearfar.cli import run

if __name__ == "__main__":
    sys.exit(run(app, program="python -m cloud_runtime"))
