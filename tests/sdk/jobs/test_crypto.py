"""What jobs look like on disk."""

from __future__ import annotations

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.errors import ConfigError, SecurityError
from sdk.jobs.crypto import KEY_BYTES, OVERHEAD_BYTES, Vault, store_key

VAULT = Vault(bytes(range(32)), b"s" * 16)


@given(st.binary(max_size=200))
def test_what_was_sealed_is_opened_again_and_says_nothing(value):
    sealed = VAULT.seal(value, "a" * 32, "request")
    assert len(sealed) == len(value) + OVERHEAD_BYTES
    assert len(value) < 8 or value not in sealed
    assert VAULT.open(sealed, "a" * 32, "request") == value


def test_equal_values_look_different():
    assert VAULT.seal(b"same", "a", "request") != VAULT.seal(b"same", "a", "request")


@pytest.mark.parametrize(
    ("vault", "job_id", "kind"),
    [
        (VAULT, "b", "request"),
        (VAULT, "a", "result"),
        (Vault(bytes(range(32)), b"t" * 16), "a", "request"),
        (Vault(bytes(32), b"s" * 16), "a", "request"),
    ],
    ids=["another job", "another column", "another store", "another key"],
)
def test_a_value_opens_only_where_it_was_put(vault, job_id, kind):
    sealed = VAULT.seal(b"content", "a", "request")
    with pytest.raises(SecurityError, match="cannot be opened"):
        vault.open(sealed, job_id, kind)


def test_every_changed_byte_is_noticed():
    sealed = VAULT.seal(b"content", "a", "request")
    for index in range(len(sealed)):
        changed = bytearray(sealed)
        changed[index] ^= 1
        with pytest.raises(SecurityError):
            VAULT.open(bytes(changed), "a", "request")
    for length in range(len(sealed)):
        with pytest.raises(SecurityError):
            VAULT.open(sealed[:length], "a", "request")


def test_a_key_of_another_length_is_refused():
    with pytest.raises(ConfigError, match="32 bytes"):
        Vault(b"short", b"s" * 16)


def test_a_key_file_is_made_for_its_owner_only_and_read_again(tmp_path):
    old = os.umask(0)
    try:
        key = store_key(tmp_path / "k", None, may_create=True)
    finally:
        os.umask(old)
    assert len(key) == KEY_BYTES
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    assert store_key(tmp_path / "k", None, may_create=True) == key
    assert store_key(tmp_path / "k", None, may_create=False) == key
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


def test_a_key_that_others_can_read_is_refused(tmp_path):
    store_key(tmp_path / "k", None, may_create=True)
    (tmp_path / "k").chmod(0o640)
    with pytest.raises(SecurityError, match="read by others"):
        store_key(tmp_path / "k", None, may_create=False)


def test_a_missing_key_is_not_replaced(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        store_key(tmp_path / "k", None, may_create=False)
    assert not (tmp_path / "k").exists()


def test_a_damaged_key_file_is_named(tmp_path):
    (tmp_path / "k").write_bytes(b"x" * 31)
    (tmp_path / "k").chmod(0o600)
    with pytest.raises(ConfigError, match="does not hold a key"):
        store_key(tmp_path / "k", None, may_create=True)


def test_the_app_may_give_the_key(tmp_path):
    assert store_key(tmp_path / "k", lambda: b"g" * 32, may_create=True) == b"g" * 32
    assert store_key(tmp_path / "k", b"h" * 32, may_create=False) == b"h" * 32
    assert list(tmp_path.iterdir()) == []
