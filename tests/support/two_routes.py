"""What tests of two routes share: a policy, inputs, a cloud that hangs, and a router that knows."""

from __future__ import annotations

import numpy as np

from sdk import parse_policy

POLICY = parse_policy(
    """
version = 1
[[rule]]
id = "open"
when = { sensitivity = "public" }
effect = "cloud_ok"
[[rule]]
id = "here"
when = { sensitivity = "personal" }
effect = "edge_only"
"""
)
X = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}


def hang(session, message, tensors):
    yield 30


def learn(client, calls: int = 12) -> None:
    """Let the router see both routes."""
    for _ in range(calls):
        client.infer("tensor", X, mode="cloud_only")
        client.infer("tensor", X, mode="edge_only")
