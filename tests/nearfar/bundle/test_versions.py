"""Order of semantic versions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.bundle.versions import is_version, version_key

#: The example of semver.org, section 11, extended.
ORDERED = [
    "0.9.10", "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2",
    "1.0.0-beta.11", "1.0.0-rc.1", "1.0.0", "1.0.1", "1.2.0", "1.10.0", "2.0.0",
]  # fmt: skip


def test_the_published_example_is_in_order():
    backwards = ORDERED[::-1]
    assert sorted(backwards, key=version_key) == ORDERED


@pytest.mark.parametrize("text", ["1", "1.0", "v1.0.0", "1.0.0-", "01.0.0", "1.0.0-01", "1.0.0\n"])
def test_what_is_no_version_is_refused(text: str):
    assert not is_version(text)


@given(st.text(max_size=70))
def test_only_versions_have_a_key(text: str):
    if is_version(text):
        assert version_key(text) == version_key(text + "+build")
