"""`python -m converters.tensorrt`: the same as `nearfar tensorrt`."""

from __future__ import annotations

import sys

from converters.tensorrt.commands import app
from nearfar.cli import run

if __name__ == "__main__":
    sys.exit(run(app, program="python -m converters.tensorrt"))
