"""The trust file: names, pins, rotation; broken or writable by others, it trusts nobody."""

from __future__ import annotations

import json
import time

import pytest
from typer.testing import CliRunner

from nearfar.errors import ConfigError, SecurityError
from nearfar.secure.identity import RotationStatement, ServerIdentity
from sdk.config import CloudConfig
from sdk.config_file import parse_config
from sdk.trust import store
from sdk.trust.commands import app, client_key_app

NOW_S = 1_800_000_000.0
DAY_S = 86_400
A, B, C = (ServerIdentity(bytes([n]) * 32) for n in (1, 2, 3))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "config" / "trust.json"


def add(path, identity: ServerIdentity, **options) -> None:
    store.add_pin(path, "main", identity.pin, source="test", now_s=NOW_S, **options)


def statement(old: ServerIdentity, new: ServerIdentity, now_s: float = NOW_S) -> RotationStatement:
    return RotationStatement.issue(old, new, now_s=now_s, overlap_s=10 * DAY_S)


def pins(path, now_s: float = NOW_S):
    return store.pins_of("main", path, now_s=now_s)


def test_a_pin_is_found_by_its_name_with_when_and_from_where(path):
    add(path, A)
    assert pins(path) == (A.pin,)
    (entry,) = store.read_trust(path)
    assert (entry.added, entry.source) == ("2027-01-15T08:00:00+00:00", "test")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0


def test_a_pin_means_itself_and_needs_no_file(path):
    assert store.pins_of(str(A.pin), path, now_s=NOW_S) == (A.pin,)
    assert not path.exists()


def test_a_name_is_not_given_to_another_identity_by_accident(path):
    add(path, A)
    add(path, A)
    with pytest.raises(ConfigError, match="trusted already"):
        add(path, B)
    assert pins(path) == (A.pin,)
    add(path, B, replace=True)
    assert pins(path) == (B.pin,)


def test_after_a_rotation_both_are_trusted_until_the_overlap_ends(path):
    add(path, A)
    entry = store.adopt(path, "main", statement(A, B), now_s=NOW_S + DAY_S)
    assert entry.pin == str(B.pin)
    assert pins(path, NOW_S + 10 * DAY_S - 1) == (B.pin, A.pin)
    assert pins(path, NOW_S + 10 * DAY_S) == (B.pin,)
    assert store.adopt(path, "main", statement(A, B), now_s=NOW_S + 2 * DAY_S) == entry


def test_a_second_rotation_forgets_the_first_identity(path):
    add(path, A)
    store.adopt(path, "main", statement(A, B), now_s=NOW_S)
    store.adopt(path, "main", statement(B, C), now_s=NOW_S)
    assert pins(path) == (C.pin, B.pin)


def test_a_statement_by_an_identity_that_is_not_trusted_is_refused(path):
    add(path, A)
    for wrong in (statement(B, C), statement(B, A.__class__(b"\x09" * 32))):
        with pytest.raises(SecurityError, match="is trusted as"):
            store.adopt(path, "main", wrong, now_s=NOW_S)
    # Not even by the one before: its word ended with the rotation.
    store.adopt(path, "main", statement(A, B), now_s=NOW_S)
    with pytest.raises(SecurityError, match="is trusted as"):
        store.adopt(path, "main", statement(A, C), now_s=NOW_S)


@pytest.mark.parametrize("now_s", [NOW_S + 10 * DAY_S, NOW_S - 2 * 3600])
def test_a_statement_of_another_time_is_refused(path, now_s):
    add(path, A)
    with pytest.raises(SecurityError, match="Check the clock"):
        store.adopt(path, "main", statement(A, B), now_s=now_s)
    assert pins(path) == (A.pin,)


def test_a_removed_name_is_not_trusted(path):
    add(path, A)
    store.remove(path, "main")
    with pytest.raises(ConfigError, match="neither a pin nor a name"):
        pins(path)
    with pytest.raises(ConfigError, match="neither a pin nor a name"):
        store.remove(path, "main")


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_trusts_nobody(path, mode):
    add(path, A)
    path.chmod(mode)
    with pytest.raises(SecurityError, match="can be changed by other users"):
        pins(path)
    with pytest.raises(SecurityError):
        add(path, A)
    path.chmod(0o644)  # reading it does no harm
    assert pins(path) == (A.pin,)


GOOD = {"name": "main", "pin": str(A.pin), "added": "2027", "source": "x"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        json.dumps({"version": 2}).encode(),
        json.dumps({"version": 1, "entries": [{**GOOD, "pin": "nf1:x"}]}).encode(),
        json.dumps({"version": 1, "entries": [GOOD, GOOD]}).encode(),
        json.dumps({"version": 1, "entries": [{**GOOD, "until": 1}]}).encode(),
        json.dumps({"version": 1, "entries": [{**GOOD, "previous": {"pin": "x"}}]}).encode(),
        b'{"version": 1, "entries": []' + b" " * (1 << 20) + b"}",
    ],
)
def test_a_broken_file_trusts_nobody_and_is_not_overwritten(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"trust\.json is damaged"):
        pins(path)
    with pytest.raises(ConfigError, match="is damaged"):
        add(path, A)
    assert path.read_bytes() == content


def test_the_configuration_names_an_entry(path):
    add(path, A)
    text = f'[cloud.main]\nurl = "wss://h/v1/nearfar"\nidentity = "main"\ntrust_file = "{path}"'
    cloud = parse_config(text).cloud
    assert cloud is not None
    assert cloud.pins(NOW_S) == (A.pin,)
    with pytest.raises(ConfigError, match="neither a pin nor a name") as caught:
        parse_config(text.replace('"main"', '"other"'))
    assert "Known names: main" in caught.value.fix
    with pytest.raises(ConfigError, match="not a pinned identity"):
        CloudConfig(url="wss://h/v1/nearfar", identity="no name!")


# The commands.


def command(*arguments: object, of=app):
    result = CliRunner().invoke(of, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_trust_from_the_command_line_through_a_rotation(path, tmp_path):
    command("add", "main", A.pin, "--file", path, "--source", "printed by the operator")
    listed = command("list", "--file", path).stdout
    assert str(A.pin) in listed
    assert "printed by the operator" in listed
    rotation = tmp_path / "rotation.txt"
    rotation.write_text(RotationStatement.issue(A, B, now_s=time.time()).text())
    command("add", "main", "--statement", rotation, "--file", path)
    listed = command("list", "--file", path).stdout
    assert f"main  {B.pin}" in listed
    assert f"main  {A.pin}  until " in listed
    command("remove", "main", "--file", path)
    assert command("list", "--file", path).stdout == ""


@pytest.mark.parametrize(
    ("arguments", "match"),
    [(["main"], "either a pin"), (["main", str(A.pin), "--statement", "x"], "either a pin"),
     (["a b", str(A.pin)], "cannot name"), (["main", "nf1:x"], "not a pin")],
)  # fmt: skip
def test_what_cannot_be_added_is_refused(path, arguments, match):
    with pytest.raises(ConfigError, match=match):
        command("add", *arguments, "--file", path)


def test_the_default_file_is_in_the_users_configuration(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    command("add", "main", A.pin)
    assert store.pins_of("main", None, now_s=NOW_S) == (A.pin,)
    assert (tmp_path / ".config/nearfar/trust.json").exists()


def test_a_client_key_from_the_command_line(tmp_path):
    file = tmp_path / "client.key"
    public = command("new", file, of=client_key_app).stdout
    assert public.startswith("nfc1:")
    assert command("show", file, of=client_key_app).stdout == public
    with pytest.raises(ConfigError, match="exists already"):
        command("new", file, of=client_key_app)
