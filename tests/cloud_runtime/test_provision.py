"""What `nearfar cloud init` writes: certificates that strict verifiers accept, private files."""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
import stat
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from cloud_runtime import auth
from cloud_runtime.provision import (
    activate_rotation,
    prepare_rotation,
    provision,
    renew_certificates,
    replace_identity,
)
from cloud_runtime.state import StateDir
from nearfar.errors import ConfigError
from nearfar.files import write_atomically
from nearfar.secure.identity import RotationStatement, ServerIdentity

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRIVATE = {"server.key", "identity.key", "api-keys.json", "client-key.txt"}
PUBLIC = {"ca.pem", "server.pem", "pin.txt", "client.toml"}


@pytest.fixture
def state(tmp_path) -> StateDir:
    state = StateDir(tmp_path / "state")
    provision(state, ("gpu.example.org", "localhost", "127.0.0.1", "::1"), port=9443)
    return state


def shake_hands(state: StateDir, name: str) -> str:
    """TLS in memory, with the checks that Python 3.13 makes by default."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(state.server_chain, state.server_key)
    client = ssl.create_default_context(cafile=str(state.ca_certificate))
    client.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname=name)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (ours, theirs):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    version = ours.version()
    assert version is not None
    return version


def test_exactly_the_documented_files_are_written_with_the_right_modes(state):
    assert set(os.listdir(state.path)) == PRIVATE | PUBLIC
    for name in PRIVATE | PUBLIC:
        mode = stat.S_IMODE((state.path / name).stat().st_mode)
        assert mode & ~(0o600 if name in PRIVATE else 0o644) == 0, name


@pytest.mark.parametrize("name", ["gpu.example.org", "localhost", "127.0.0.1", "::1"])
def test_a_strict_client_accepts_the_certificate_for_each_host(state, name):
    assert shake_hands(state, name) == "TLSv1.3"


def test_a_strict_client_refuses_another_host(state):
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands(state, "other.example.org")


def test_an_expired_certificate_is_refused(tmp_path):
    state = StateDir(tmp_path)
    long_ago = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=2)
    provision(state, ("localhost",), not_before=long_ago, validity=datetime.timedelta(days=1))
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        shake_hands(state, "localhost")


def test_the_certificate_serves_servers_only(state):
    certificate = x509.load_pem_x509_certificate(state.server_chain.read_bytes())
    extension = certificate.extensions.get_extension_for_class
    assert list(extension(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert not extension(x509.BasicConstraints).value.ca
    assert not extension(x509.KeyUsage).value.key_cert_sign
    addresses = extension(x509.SubjectAlternativeName).value.get_values_for_type(x509.IPAddress)
    assert ipaddress.ip_address("::1") in addresses


def test_the_private_key_of_the_ca_is_not_kept(state):
    ca = x509.load_pem_x509_certificate(state.ca_certificate.read_bytes())
    key = serialization.load_pem_private_key(state.server_key.read_bytes(), None)
    assert key.public_key() != ca.public_key()
    assert sum(b"PRIVATE KEY" in path.read_bytes() for path in state.path.iterdir()) == 1


def test_two_authorities_never_share_a_name(tmp_path):
    names = []
    for number in (1, 2):
        state = StateDir(tmp_path / str(number))
        provision(state, ("localhost",))
        names.append(x509.load_pem_x509_certificate(state.ca_certificate.read_bytes()).subject)
    assert names[0] != names[1]


def test_the_snippet_holds_all_a_client_needs(state):
    cloud = tomllib.loads(state.client_config.read_text())["cloud"]["main"]
    assert cloud["url"] == "wss://gpu.example.org:9443/v1/nearfar"
    assert cloud["identity"] == str(ServerIdentity.load(state.identity).pin)
    assert cloud["ca_file"] == str(state.ca_certificate)
    kind, _, path = cloud["credentials"].partition(":")
    assert kind == "file"
    token = Path(path).read_text().strip()
    assert auth.Authenticator(state.api_keys).authenticate(token).name == "first"


def test_nothing_is_overwritten_without_force(state):
    before = {path.name: path.read_bytes() for path in state.path.iterdir()}
    with pytest.raises(ConfigError, match=r"already holds ca\.pem.*--force"):
        provision(state, ("localhost",))
    assert {path.name: path.read_bytes() for path in state.path.iterdir()} == before


def test_force_replaces_identity_and_keys(state):
    before = state.pin.read_text()
    provision(state, ("localhost",), force=True)
    assert state.pin.read_text() != before
    assert len(auth.read_keys(state.api_keys)) == 1


def test_renewing_certificates_keeps_identity_and_keys(state):
    kept = {name: (state.path / name).read_bytes() for name in ("identity.key", "api-keys.json")}
    old = state.server_chain.read_bytes()
    renew_certificates(state, ("localhost",))
    assert state.server_chain.read_bytes() != old
    assert {name: (state.path / name).read_bytes() for name in kept} == kept
    shake_hands(state, "localhost")


def test_a_new_identity_is_pinned_by_the_snippet_too(state):
    identity = replace_identity(state)
    assert str(ServerIdentity.load(state.identity).pin) == str(identity.pin)
    assert str(identity.pin) in state.client_config.read_text()
    assert state.pin.read_text().strip() == str(identity.pin)
    assert stat.S_IMODE(state.identity.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "host", ["https://x", "a b", "x:1", "-x.org", "", "a..b", "x/y", "a" * 254]
)
def test_hosts_that_are_no_names_are_refused_before_anything_is_written(tmp_path, host):
    with pytest.raises(ConfigError, match="neither a DNS name nor an IP address"):
        provision(StateDir(tmp_path / "state"), (host,))
    assert not (tmp_path / "state").exists()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new", mode=0o600)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


# Rotation of the identity.


def test_a_rotation_prepares_announces_and_then_activates(state):
    old = ServerIdentity.load(state.identity)
    statement = prepare_rotation(state, overlap=datetime.timedelta(days=3))
    assert RotationStatement.parse(state.rotation.read_text()) == statement
    assert statement.old == old.pin == ServerIdentity.load(state.identity).pin
    assert statement.until_s - statement.issued_s == 3 * 86_400
    assert stat.S_IMODE(state.next_identity.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="under way"):
        prepare_rotation(state, overlap=datetime.timedelta(days=3))

    new = activate_rotation(state)
    assert new.pin == statement.new == ServerIdentity.load(state.identity).pin
    assert state.pin.read_text().strip() == str(new.pin)
    assert f'identity = "{new.pin}"' in state.client_config.read_text()
    # The old private key is nowhere any more.
    assert not state.next_identity.exists()
    assert all(
        old.pin != ServerIdentity.load(file).pin for file in state.path.glob("identity*.key")
    )
    with pytest.raises(ConfigError, match="no next identity"):
        activate_rotation(state)


def test_a_new_identity_ends_a_rotation_that_the_old_one_began(state):
    prepare_rotation(state, overlap=datetime.timedelta(days=3))
    replace_identity(state)
    assert not state.next_identity.exists()
    assert not state.rotation.exists()
