"""What kind of file is this? Answered from its first and last bytes, on the device or the cloud.

python examples/classify_file.py --config nearfar.toml README.md setup.cfg
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sdk import Client

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--config", type=Path, default=Path("nearfar.toml"))
parser.add_argument("--model", default="file-type")
parser.add_argument("--sensitivity", help="data class of the files; the strictest by default")
parser.add_argument("files", type=Path, nargs="+")
arguments = parser.parse_args()

with Client.from_config(arguments.config) as client:
    for path in arguments.files:
        result = client.classify(
            arguments.model, path, top_k=3, sensitivity=arguments.sensitivity, deadline_ms=5000
        )
        labels = ", ".join(f"{label} {score:.0%}" for label, score in result.top)
        print(f"{path}: {labels}")
        print(f"    {result.route}, {result.timings.total_ms:.1f} ms, {result.bytes_sent} B sent")
