"""Which requests are equal, and which may be shared at all."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import numpy as np
import pytest

from nearfar.units import Deadline
from sdk.policy import parse_policy
from sdk.requests import Request
from sdk.sharing.keys import key_of, may_share

X = np.arange(6, dtype=np.float32).reshape(2, 3)
TENSORS = Request(method="infer", model="m", deadline=Deadline(), feeds={"x": X})
TEXTS = Request(method="embed", model="m", deadline=Deadline(), form="text", items=("near", "far"))


def key(request: Request, sensitivity: str = "public", variant: str | None = None) -> bytes:
    return key_of(request, sensitivity, variant)


def test_equal_requests_have_one_key_whatever_does_not_change_the_answer():
    same = msgspec.structs.replace(
        TENSORS, feeds={"x": X.copy()}, deadline=Deadline.after_ms(5), priority=9, top_k=4
    )
    assert key(same) == key(TENSORS)
    fortran = msgspec.structs.replace(TENSORS, feeds={"x": np.asfortranarray(X)})
    assert key(fortran) == key(TENSORS)
    two = {"a": X, "b": X + 1}
    swapped = dict(reversed(two.items()))
    assert key(msgspec.structs.replace(TENSORS, feeds=two)) == key(
        msgspec.structs.replace(TENSORS, feeds=swapped)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"feeds": {"x": X + 1}},
        {"feeds": {"y": X}},
        {"feeds": {"x": X.reshape(3, 2)}},
        {"feeds": {"x": X.view(np.int32)}},
        {"model": "n"},
        {"method": "embed"},
        {"version": "1.0.0"},
        {"purpose": "p"},
        {"tenant": "p"},
        {"mode": "edge_only"},
        {"objective": "quality"},
    ],
    ids=str,
)
def test_whatever_may_change_the_answer_changes_the_key(changes):
    assert key(msgspec.structs.replace(TENSORS, **changes)) != key(TENSORS)


def test_class_and_variant_are_part_of_the_key():
    assert len({key(TEXTS), key(TEXTS, "internal"), key(TEXTS, variant="int8")}) == 3


@pytest.mark.parametrize(
    "items", [("nearfar",), ("near", "far", ""), ("nea", "rfar"), ("far", "near"), (b"near", b"f")]
)
def test_texts_are_told_apart_by_where_they_end(items):
    assert key(msgspec.structs.replace(TEXTS, items=items)) != key(TEXTS)


def test_byte_strings_in_tensors_are_part_of_the_key():
    def keyed(*items: object) -> bytes:
        feeds = {"x": np.array(items, dtype=object)}
        return key(msgspec.structs.replace(TENSORS, feeds=feeds))

    assert keyed(b"a", b"b") == keyed(b"a", b"b")
    assert len({keyed(b"a", b"b"), keyed(b"ab", b""), keyed("a", b"b"), keyed(b"b", b"a")}) == 4


def test_another_process_has_another_key():
    code = "from tests.sdk.sharing.test_keys import *; print(key(TEXTS).hex())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.strip()) == 64
    assert done.stdout.strip() != key(TEXTS).hex()


@pytest.mark.parametrize(
    ("classes", "shared"),
    [
        (["public", "internal", "personal", "secret"], {"public", "internal", "personal"}),
        (["public", "secret", "top"], {"public"}),
        (["low", "high"], {"low"}),
        (["only"], set()),
        (["secret"], set()),
    ],
)
def test_secrets_and_the_strictest_class_are_never_shared(classes, shared):
    policy = parse_policy(f"version = 1\nclasses = {classes!r}\n".replace("'", '"'))
    assert {name for name in classes if may_share(policy, name)} == shared
    assert not may_share(policy, "unknown")
