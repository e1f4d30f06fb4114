"""`python -m converters` is `nearfar convert`."""

import sys

from converters.commands import convert
from nearfar.cli import run

if __name__ == "__main__":
    sys.exit(run(convert, program="python -m converters"))
