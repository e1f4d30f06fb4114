"""Make what a cloud runtime needs before it can be served: certificates, identity, first API key.

The certificate authority made here is for development and closed networks. Its private key exists
only while this runs: it signs one server certificate and is forgotten, so there is nothing to
steal. A public service uses a certificate of a public authority instead, and keeps the rest.

Certificates follow RFC 5280 closely enough for OpenSSL's strict mode (``VERIFY_X509_STRICT``, which
Python 3.13 turns on): critical basic constraints and key usage, subject and authority key ids.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloud_runtime import auth
from cloud_runtime.state import PRIVATE_MODE, PUBLIC_MODE, StateDir
from nearfar.errors import ConfigError
from nearfar.files import write_atomically
from nearfar.secure.identity import RotationStatement, ServerIdentity

DEFAULT_HOSTS = ("localhost", "127.0.0.1", "::1")
DEFAULT_PORT = 8443
WEBSOCKET_PATH = "/v1/nearfar"

#: Apple's and the browsers' limit for server certificates; nobody accepts more for long.
DEFAULT_VALIDITY = datetime.timedelta(days=397)
CA_VALIDITY = datetime.timedelta(days=5 * 365)

#: Clients' clocks may be behind; a certificate "from the future" would be refused.
CLOCK_SKEW = datetime.timedelta(minutes=5)

_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


class DevelopmentCa:
    """A certificate authority that lives for one call.

    Args:
        now: Start of validity; aware UTC.

    Attributes:
        certificate: Self-signed; what clients trust.
    """

    def __init__(self, now: datetime.datetime) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        # A fresh name each time: a client that trusts an older CA of the same name would otherwise
        # pick the wrong issuer and report a bad signature instead of an unknown issuer.
        key_id = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        name = _name(f"nearfar development CA {key_id.digest.hex()[:8]}")
        self.certificate = (
            _builder(name, name, self._key.public_key(), now, now + CA_VALIDITY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(key_id, critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_id),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )

    def issue(
        self,
        hosts: Sequence[str],
        *,
        not_before: datetime.datetime,
        validity: datetime.timedelta,
    ) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        """Server certificate for DNS names and IP addresses, with its fresh private key.

        Raises:
            ConfigError: A host is neither a DNS name nor an IP address, or there is none.
        """
        if not hosts:
            raise ConfigError(
                "A server certificate needs at least one host", field="host", fix="Give --host NAME"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        authority = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        certificate = (
            _builder(
                _name("nearfar cloud runtime"),
                self.certificate.subject,
                key.public_key(),
                not_before,
                not_before + validity,
            )
            .add_extension(
                x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority.value),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        return certificate, key


def provision(
    state: StateDir,
    hosts: Sequence[str] = DEFAULT_HOSTS,
    *,
    port: int = DEFAULT_PORT,
    key_name: str = "first",
    validity: datetime.timedelta = DEFAULT_VALIDITY,
    not_before: datetime.datetime | None = None,
    force: bool = False,
) -> None:
    """Write a complete state directory; see `StateDir` for what is in it.

    Args:
        hosts: DNS names and IP addresses under which clients will reach the server; the first one
            goes into the client's snippet.
        port: Goes into the client's snippet.
        key_name: Name of the first API key.
        validity: How long the server certificate is valid.
        not_before: Start of its validity; five minutes ago when `None`.
        force: Replace what is there, including the identity that clients may have pinned.

    Raises:
        ConfigError: A file exists already and `force` is not given, a host is malformed, or the
            directory cannot be written.
    """
    identity = ServerIdentity.generate()
    api_key = auth.generate_api_key()
    entry = auth.new_entry(key_name, api_key)
    certificates = _make_certificates(hosts, validity, not_before)
    try:
        state.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(
            f"The state directory {state.path} cannot be made: {exc.strerror}",
            field="state",
            fix="Choose a directory that you may write to",
        ) from exc

    with state.locked():
        if not force:
            _refuse_to_overwrite(state)
        certificates.write(state)
        save_identity(state, identity)
        _end_rotation(state)
        auth.write_keys(state.api_keys, (entry,))
        write_atomically(state.client_key, f"{api_key}\n".encode(), mode=PRIVATE_MODE)
        write_atomically(
            state.client_config, _client_snippet(state, hosts[0], port).encode(), mode=PUBLIC_MODE
        )


def renew_certificates(
    state: StateDir,
    hosts: Sequence[str],
    *,
    validity: datetime.timedelta = DEFAULT_VALIDITY,
) -> None:
    """Replace the CA and the server certificate, and keep identity and API keys.

    Clients need the new ``ca.pem``; their pin and their keys stay.

    Raises:
        ConfigError: There is no such state directory, or a host is malformed.
    """
    certificates = _make_certificates(hosts, validity, None)
    with state.locked():
        certificates.write(state)


@dataclass(frozen=True, slots=True)
class _Certificates:
    ca: x509.Certificate
    server: x509.Certificate
    server_key: ec.EllipticCurvePrivateKey

    def write(self, state: StateDir) -> None:
        pem = serialization.Encoding.PEM
        ca_pem = self.ca.public_bytes(pem)
        server_pem = self.server.public_bytes(pem)
        key_pem = self.server_key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_atomically(state.ca_certificate, ca_pem, mode=PUBLIC_MODE)
        write_atomically(state.server_chain, server_pem + ca_pem, mode=PUBLIC_MODE)
        write_atomically(state.server_key, key_pem, mode=PRIVATE_MODE)


def _make_certificates(
    hosts: Sequence[str], validity: datetime.timedelta, not_before: datetime.datetime | None
) -> _Certificates:
    start = not_before or datetime.datetime.now(datetime.timezone.utc) - CLOCK_SKEW
    ca = DevelopmentCa(start)
    certificate, key = ca.issue(hosts, not_before=start, validity=validity)
    return _Certificates(ca.certificate, certificate, key)


def replace_identity(state: StateDir, *, cosigns: bool = False) -> ServerIdentity:
    """Make a new identity; clients refuse the server until they pin it.

    Args:
        cosigns: Whether it signs with ML-DSA-65 beside Ed25519.

    Raises:
        ConfigError: There is no such state directory.
    """
    identity = ServerIdentity.generate(cosigns=cosigns)
    with state.locked():
        _put_in_place(state, identity)
        _end_rotation(state)
    return identity


def prepare_rotation(
    state: StateDir, *, overlap: datetime.timedelta, cosigns: bool = False
) -> RotationStatement:
    """Make the next identity, and a statement by the present one that it will follow.

    Nothing changes for clients yet; see `activate_rotation`.

    Args:
        overlap: How long clients that adopt it trust the present one.
        cosigns: Whether the next identity signs with ML-DSA-65 beside Ed25519.

    Raises:
        ConfigError: A rotation is under way already, or there is no such state directory.
    """
    with state.locked():
        if state.next_identity.exists():
            raise ConfigError(
                f"{state.next_identity} exists already: a rotation is under way",
                field="state",
                fix="Finish it with --activate, or give it up by removing the file",
            )
        new = ServerIdentity.generate(cosigns=cosigns)
        statement = RotationStatement.issue(
            ServerIdentity.load(state.identity),
            new,
            now_s=time.time(),
            overlap_s=int(overlap.total_seconds()),
        )
        new.save(state.next_identity)
        write_atomically(state.rotation, statement.text().encode(), mode=PUBLIC_MODE)
    return statement


def activate_rotation(state: StateDir) -> ServerIdentity:
    """Put the next identity into the place of the present one, whose private key is deleted.

    Raises:
        ConfigError: No rotation is under way.
    """
    with state.locked():
        if not state.next_identity.exists():
            raise ConfigError(
                f"There is no next identity in {state.path}",
                field="state",
                fix="Begin with `nearfar cloud identity rotate`, without --activate",
            )
        identity = ServerIdentity.load(state.next_identity)
        _put_in_place(state, identity)
        state.next_identity.unlink()
    return identity


def _end_rotation(state: StateDir) -> None:
    """What the old identity announced is void."""
    state.next_identity.unlink(missing_ok=True)
    state.rotation.unlink(missing_ok=True)


def _put_in_place(state: StateDir, identity: ServerIdentity) -> None:
    save_identity(state, identity)
    if state.client_config.exists():
        lines = state.client_config.read_text().splitlines()
        pinned = [
            f'identity = "{identity.pin}"' if line.startswith("identity = ") else line
            for line in lines
        ]
        data = "\n".join((*pinned, "")).encode()
        write_atomically(state.client_config, data, mode=PUBLIC_MODE)


def save_identity(state: StateDir, identity: ServerIdentity) -> None:
    """Write the identity (0600) and its pin, replacing what is there."""
    temporary = state.identity.with_name(f".{state.identity.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        identity.save(temporary)
        temporary.replace(state.identity)
    finally:
        temporary.unlink(missing_ok=True)
    write_atomically(state.pin, f"{identity.pin}\n".encode(), mode=PUBLIC_MODE)


def url_of(host: str, port: int) -> str:
    """Websocket address; IPv6 addresses get their brackets."""
    return f"wss://{f'[{host}]' if ':' in host else host}:{port}{WEBSOCKET_PATH}"


def _refuse_to_overwrite(state: StateDir) -> None:
    files = (
        state.ca_certificate,
        state.server_chain,
        state.server_key,
        state.identity,
        state.pin,
        state.api_keys,
        state.client_key,
        state.client_config,
    )
    present = [file.name for file in files if file.exists()]
    if present:
        raise ConfigError(
            f"{state.path} already holds {', '.join(present)}",
            field="state",
            fix="Choose another directory, or give --force to replace them: clients must then pin "
            "the new identity and get a new API key",
        )


def _client_snippet(state: StateDir, host: str, port: int) -> str:
    directory = state.path.resolve()
    return f"""\
# Paste this into the client's nearfar.toml. On another machine, copy ca.pem and client-key.txt
# there and correct the two paths. Keep client-key.txt secret.
[cloud.main]
url = "{url_of(host, port)}"
identity = "{state.pin.read_text().strip()}"
ca_file = {_toml_string(directory / "ca.pem")}
credentials = {_toml_string(f"file:{directory / 'client-key.txt'}")}
"""


def _toml_string(value: Path | str) -> str:
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    not_before: datetime.datetime,
    not_after: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.removeprefix("*.").split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ConfigError(
            f"{host!r} is neither a DNS name nor an IP address",
            field="host",
            fix="Give the bare name, without scheme, port or path, e.g. --host gpu.example.org",
        )
    return x509.DNSName(host)
