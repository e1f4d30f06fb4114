"""What is in a picture, what was said in a recording: asked on the device, then in the cloud.

python examples/see_and_hear.py --config nearfar.toml --sensitivity public \
    animal photo.jpg word yes.wav
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sdk import Client, PolicyDenied

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--config", type=Path, default=Path("nearfar.toml"))
parser.add_argument("--sensitivity", help="data class of the files; the strictest by default")
parser.add_argument("model_and_file", nargs="+", help="a model and an image or a WAV file; …")
arguments = parser.parse_args()
pairs = arguments.model_and_file
if len(pairs) % 2:
    parser.error("there is a model without a file")

with Client.from_config(arguments.config, sensitivity=arguments.sensitivity) as client:
    for model, name in zip(pairs[::2], pairs[1::2], strict=True):
        path = Path(name)
        print(f"{path} ({path.stat().st_size:,} B)")
        for mode in ("edge_only", "cloud_only"):
            try:
                result = client.classify(model, path, top_k=2, mode=mode)
            except PolicyDenied as refused:
                print(f"    {mode}: {refused.problem}")
                continue
            labels = ", ".join(f"{label} {score:.1%}" for label, score in result.top)
            print(f"    {labels}: {result.variant}, {result.route}")
            print(f"    {result.timings.total_ms:.1f} ms, {result.bytes_sent:,} B sent")
