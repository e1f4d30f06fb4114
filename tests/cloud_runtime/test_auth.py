"""API keys: made, stored as hashes, checked, withdrawn, followed while a server runs."""

from __future__ import annotations

import stat

import pytest

from cloud_runtime import auth
from cloud_runtime.auth import ANONYMOUS, Authenticator
from cloud_runtime.state import StateDir
from nearfar.errors import ConfigError, SecurityError


@pytest.fixture
def state(tmp_path) -> StateDir:
    state = StateDir(tmp_path)
    auth.write_keys(state.api_keys, ())
    return state


def test_an_added_key_is_accepted_under_its_name(state):
    token = auth.add_key(state, "clinic-2")
    assert Authenticator(state.api_keys).authenticate(token).name == "clinic-2"


@pytest.mark.parametrize("token", ["", "nfk_", "nfk_" + "A" * 43, "é", "\ud800"])
def test_any_other_key_is_refused(state, token):
    auth.add_key(state, "clinic-2")
    with pytest.raises(SecurityError, match=r"missing or not accepted.*nearfar cloud key add"):
        Authenticator(state.api_keys).authenticate(token)


def test_the_file_holds_no_key_in_clear_and_is_private(state):
    token = auth.add_key(state, "clinic-2")
    assert token not in state.api_keys.read_text()
    assert token.removeprefix(auth.KEY_PREFIX) not in state.api_keys.read_text()
    assert stat.S_IMODE(state.api_keys.stat().st_mode) == 0o600


def test_keys_are_long_and_never_alike():
    tokens = {auth.generate_api_key() for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) == len("nfk_") + 43 for token in tokens)


def test_a_running_server_sees_keys_that_come_and_go(state):
    authenticator = Authenticator(state.api_keys)
    token = auth.add_key(state, "late")
    key = authenticator.authenticate(token)
    assert authenticator.is_accepted(key)
    auth.remove_key(state, "late")
    with pytest.raises(SecurityError):
        authenticator.authenticate(token)
    assert not authenticator.is_accepted(key)


def test_a_new_key_of_an_old_name_does_not_revive_the_old_one(state):
    old = auth.add_key(state, "clinic-2")
    authenticator = Authenticator(state.api_keys)
    key = authenticator.authenticate(old)
    auth.remove_key(state, "clinic-2")
    auth.add_key(state, "clinic-2")
    authenticator.reload_if_changed()
    assert not authenticator.is_accepted(key)
    with pytest.raises(SecurityError):
        authenticator.authenticate(old)


@pytest.mark.parametrize("damage", ["{", "[]", '{"version": 2, "keys": []}', None])
def test_a_file_damaged_while_serving_admits_nobody(state, damage):
    token = auth.add_key(state, "clinic-2")
    authenticator = Authenticator(state.api_keys)
    authenticator.authenticate(token)
    if damage is None:
        state.api_keys.unlink()
    else:
        state.api_keys.write_text(damage)
    with pytest.raises(SecurityError):
        authenticator.authenticate(token)


@pytest.mark.parametrize("damage", ["{", '{"keys": [{"name": 1}]}', "\x00"])
def test_a_damaged_file_stops_the_start_and_is_named(state, damage):
    state.api_keys.write_text(damage)
    with pytest.raises(ConfigError, match=r"api-keys\.json"):
        Authenticator(state.api_keys)


def test_anonymous_clients_are_let_in_only_on_request(state):
    with pytest.raises(SecurityError):
        Authenticator(state.api_keys).authenticate("")
    open_to_all = Authenticator(state.api_keys, allow_anonymous=True)
    assert open_to_all.authenticate("") is ANONYMOUS
    assert open_to_all.is_accepted(ANONYMOUS)


def test_a_wrong_key_is_refused_even_where_anonymous_clients_are_not(state):
    with pytest.raises(SecurityError):
        Authenticator(state.api_keys, allow_anonymous=True).authenticate("nfk_wrong")


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "né", "-x", "a\nb"])
def test_names_that_would_not_fit_a_log_line_are_refused(state, name):
    with pytest.raises(ConfigError, match="cannot name an API key"):
        auth.add_key(state, name)


def test_a_name_is_given_once(state):
    auth.add_key(state, "clinic-2")
    with pytest.raises(ConfigError, match="already"):
        auth.add_key(state, "clinic-2")


def test_removing_an_unknown_key_says_which_are_known(state):
    auth.add_key(state, "clinic-2")
    with pytest.raises(ConfigError, match="clinic-2"):
        auth.remove_key(state, "clinic-3")


def test_commands_on_a_missing_directory_say_how_to_make_it(tmp_path):
    with pytest.raises(ConfigError, match="nearfar cloud init"):
        auth.add_key(StateDir(tmp_path / "none"), "x")
