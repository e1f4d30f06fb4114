"""Find the paragraphs of text files that mean what you ask, whatever words they use.

    python examples/semantic_search.py --config nearfar.toml "how is data protected?" README.md

Question and paragraphs are embedded in one call: one variant of the model makes all vectors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from sdk import Client

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--config", type=Path, default=Path("nearfar.toml"))
parser.add_argument("--model", default="minilm")
parser.add_argument("--sensitivity", help="data class of the texts; the strictest by default")
parser.add_argument("--top", type=int, default=3)
parser.add_argument("question")
parser.add_argument("files", type=Path, nargs="+")
arguments = parser.parse_args()

paragraphs = [
    " ".join(block.split())
    for path in arguments.files
    for block in path.read_text(encoding="utf-8").split("\n\n")
    if len(block) > 60
]
if not paragraphs:
    raise SystemExit("These files hold no paragraph of more than 60 characters.")

with Client.from_config(arguments.config) as client:
    result = client.embed(
        arguments.model, [arguments.question, *paragraphs], sensitivity=arguments.sensitivity
    )

vectors = result.vectors / np.linalg.norm(result.vectors, axis=1, keepdims=True)
scores = vectors[1:] @ vectors[0]
for index in np.argsort(scores)[::-1][: arguments.top]:
    print(f"{scores[index]:.2f}  {paragraphs[index][:160]}")
print(f"\n{len(paragraphs)} paragraphs, {result.route}, {result.timings.total_ms:.0f} ms")
