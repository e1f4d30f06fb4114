"""A conversation in the terminal; every answer says where it came from and why.

python examples/chat.py --config nearfar.toml --sensitivity personal
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sdk import Client, NearfarError

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--config", type=Path, default=Path("nearfar.toml"))
parser.add_argument("--model", default="assistant")
parser.add_argument("--sensitivity", help="data class of what you say; the strictest by default")
parser.add_argument("--max-new-tokens", type=int, default=120)
arguments = parser.parse_args()

messages: list[dict[str, str]] = []
with Client.from_config(arguments.config) as client:
    while True:
        try:
            said = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not said:
            continue
        asked = [*messages, {"role": "user", "content": said}]
        try:
            with client.chat(
                arguments.model,
                asked,
                sensitivity=arguments.sensitivity,
                max_new_tokens=arguments.max_new_tokens,
            ) as answer:
                for chunk in answer:
                    print(chunk.text, end="", flush=True)
            print(f"\n    [{answer.route}]")
        except NearfarError as error:
            print(f"\n    [{type(error).__name__}: {error}]")
            continue
        messages = [*asked, {"role": "assistant", "content": answer.text()}]
