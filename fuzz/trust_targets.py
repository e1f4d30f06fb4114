"""Targets that decide whom to trust: tokens, key configurations, key files, pins, signatures.

A fuzzer cannot make signatures. An input that begins with ``S`` says what is to be signed, and the
harness signs it: so the fuzzer gets behind the check, where only the contents are left to judge.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
from datetime import datetime, tzinfo
from types import SimpleNamespace
from unittest import mock

import jwt
import jwt.api_jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud_runtime.caller import NotAdmitted
from cloud_runtime.tokens import (
    ALGORITHM,
    CLOCK_TOLERANCE_S,
    DEFAULT_ISSUER,
    MAX_LIFETIME_S,
    MAX_TOKEN_BYTES,
    TokenVerifier,
    read_issuers,
)
from fuzz.common import IDENTITY, NEXT_IDENTITY, NOW_S, directory, file, pieces
from nearfar.bundle import signature as bundle_signature
from nearfar.bundle.keys import PublicKey, SigningKey
from nearfar.bundle.paths import MANIFEST_NAME
from nearfar.errors import ConfigError, SecurityError
from nearfar.secure import kem, keys
from nearfar.secure.credentials import ClientKey, proof_message
from nearfar.secure.identity import RotationStatement, ServerIdentity, _rotation_bytes
from nearfar.secure.keys import KeyConfiguration, KeyRing
from sdk.trust import store

#: What the identity signs its configurations for.
CONFIGURATION_PURPOSE = b"nearfar/1 key configuration signature\x00"

# Tokens

EXPORTER = b"\x07" * 32
CLIENT = ClientKey(bytes(range(64, 96)))
ISSUER = Ed25519PrivateKey.from_private_bytes(bytes(range(96, 128)))


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def jwk_of(public_key: bytes) -> dict[str, str]:
    """A public Ed25519 key as RFC 8037 writes it."""
    return {"kty": "OKP", "crv": "Ed25519", "x": _base64url(public_key)}


def issuer_file() -> bytes:
    """A token-issuers.json with the harness's issuer."""
    entry = {"issuer": DEFAULT_ISSUER, "jwk": jwk_of(ISSUER.public_key().public_bytes_raw())}
    return json.dumps({"version": 1, "issuers": [entry]}).encode()


@functools.cache
def _verifier() -> TokenVerifier:
    return TokenVerifier(file("token-issuers.json", issuer_file()), audience=str(IDENTITY.pin))


class _Clock(datetime):
    """PyJWT asks the real clock; an input must do the same thing today and tomorrow."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return datetime.fromtimestamp(NOW_S, tz)


def token(data: bytes) -> None:
    """A token as a client sends it; after an ``S`` a header and claims, signed by the issuer."""
    proof = bytes(64)
    if data[:1] == b"S":
        parts = [*pieces(data[1:]), b"", b""]
        signed = f"{_base64url(parts[0])}.{_base64url(parts[1])}"
        text = f"{signed}.{_base64url(ISSUER.sign(signed.encode()))}"
        proof = CLIENT.sign(proof_message(EXPORTER, text))
    else:
        text = data.decode("utf-8", "surrogateescape")
    try:
        with mock.patch.object(jwt.api_jwt, "datetime", _Clock):
            caller = _verifier().verify(text, proof=proof, exporter=EXPORTER)
    except NotAdmitted as exc:
        refusal = str(exc)
    else:
        refusal = ""
    if refusal:
        assert len(refusal) < 200  # it goes to the log
        return
    assert data[:1] == b"S", "let in without a signature"
    assert len(text) <= MAX_TOKEN_BYTES
    assert json.loads(parts[0])["alg"] == ALGORITHM
    claims = json.loads(parts[1])
    assert caller.name == f"token:{claims['sub']}"
    assert claims["cnf"]["jwk"]["x"] == jwk_of(CLIENT.public.public_key)["x"]
    assert caller.max_priority == claims.get("max_priority")
    assert caller.models == (tuple(claims["models"]) if "models" in claims else None)
    caller.may_use("chat-small")
    assert caller.expires_s is not None
    assert NOW_S < caller.expires_s <= NOW_S + MAX_LIFETIME_S + 2 * CLOCK_TOLERANCE_S


def issuers(data: bytes) -> None:
    """The token-issuers.json of a server."""
    path = file("issuers-fuzzed.json", data)
    try:
        found = read_issuers(path)
    except ConfigError:
        return
    for issuer in found:
        assert issuer.jwk.crv == "Ed25519"


# Key configurations


def key_configuration(data: bytes) -> None:
    """What a server says first; after an ``S`` the identity signs it.

    Checked against the pins of a client that knows of a rotation: the new one, then the old.
    """
    message = data[1:]
    if data[:1] == b"S":
        message += IDENTITY.sign(CONFIGURATION_PURPOSE + message)
    try:
        configuration = KeyConfiguration.parse(message)
    except SecurityError:
        return
    verified = []
    for pin in (NEXT_IDENTITY.pin, IDENTITY.pin):
        try:
            configuration.verify(pin, now_s=NOW_S)
        except SecurityError:
            continue
        verified.append(pin)
    if not verified:
        return
    assert verified == [IDENTITY.pin]
    assert configuration.not_before_s <= NOW_S < configuration.expires_s
    assert configuration.expires_s - configuration.not_before_s <= keys.MAX_LIFETIME_S
    assert len(configuration.public_key) == 1216


def key_ring(data: bytes) -> None:
    """Rotation under any clock: two bytes of lifetime, then steps of three bytes.

    The first byte of a step says whether the clock goes back (odd) and whether a configuration is
    asked for (bit 1), the others by how many times 8 s.
    """
    numbers = itertools.count()

    def generate() -> SimpleNamespace:
        """Stands for a key; making real ones would be all that this target does."""
        return SimpleNamespace(public_bytes=next(numbers).to_bytes(1216, "big"))

    with mock.patch.object(kem.KemPrivateKey, "generate", generate):
        _rotate(data)


def _rotate(data: bytes) -> None:
    span_s = keys.MAX_LIFETIME_S - keys.MIN_LIFETIME_S
    lifetime_s = keys.MIN_LIFETIME_S + int.from_bytes(data[:2], "little") * 2 % (span_s + 1)
    now_s = NOW_S
    ring = KeyRing(IDENTITY, lifetime_s=lifetime_s, now_s=now_s)
    seen: dict[bytes, KeyConfiguration] = {}
    gone: set[bytes] = set()
    steps = data[2 : 2 + 3 * 24]
    for at in range(0, len(steps) - 2, 3):
        step_s = 8 * int.from_bytes(steps[at + 1 : at + 3], "little")
        now_s += -step_s if steps[at] & 1 else step_s
        if steps[at] & 2:
            current = ring.current(now_s)
            current.verify(IDENTITY.pin, now_s=now_s)
            # Half of its life is left, so that a client may take its time.
            assert current.expires_s - now_s > lifetime_s / 2
            assert current.key_id not in gone
            seen[current.key_id] = current
        for key_id, configuration in seen.items():
            private = ring.private_key(key_id, now_s)
            if now_s >= configuration.expires_s:
                gone.add(key_id)
            # All that clients may still hold work beside each other, and what is gone stays gone.
            assert (private is None) == (key_id in gone)
            if private is not None:
                assert private.public_bytes == configuration.public_key
    assert ring.private_key(bytes(8), now_s) is None


# Files of keys and pins

_SECRET = bytes(range(128, 160))
_READERS = {
    b"I": ServerIdentity.load,
    b"C": ClientKey.load,
    b"P": PublicKey.load,
    b"K": SigningKey.load,
}


def key_file(data: bytes) -> None:
    """A file of a key; the first byte says of which kind it should be."""
    reader = _READERS.get(data[:1], ServerIdentity.load)
    path = file("some.key", data[1:])
    try:
        key = reader(path)
    except (ConfigError, SecurityError):
        return
    if isinstance(key, PublicKey):
        assert PublicKey.parse(str(key)) == key
        assert PublicKey.load(file("again.pub", key.pem())) == key
        return
    again = directory() / "again.key"
    for old in (again, again.with_name("again.key.pub")):
        old.unlink(missing_ok=True)
    key.save(again)
    saved = reader(again)
    assert repr(saved) == repr(key)
    assert saved.sign(b"m") == key.sign(b"m") or not isinstance(key, SigningKey)


def public_key(data: bytes) -> None:
    """A bundle's public key as somebody typed it."""
    try:
        key = PublicKey.parse(data.decode("utf-8", "replace"))
    except ConfigError:
        return
    assert PublicKey.parse(str(key)) == key


def rotation(data: bytes) -> None:
    """A rotation statement; after an ``S`` two times, as numbers of 8 bytes, that both sign."""
    if data[:1] == b"S":
        issued_s, until_s = (int.from_bytes(data[at : at + 8], "big") for at in (1, 9))
        signed = _rotation_bytes(IDENTITY.pin, NEXT_IDENTITY.pin, issued_s, until_s)
        text = RotationStatement(
            old=IDENTITY.pin, new=NEXT_IDENTITY.pin, issued_s=issued_s, until_s=until_s,
            old_signature=IDENTITY.sign(signed), new_signature=NEXT_IDENTITY.sign(signed),
        ).text()  # fmt: skip
    else:
        text = data.decode("utf-8", "replace")
    try:
        statement = RotationStatement.parse(text)
    except (ConfigError, SecurityError):
        return
    assert RotationStatement.parse(statement.text()) == statement
    path = directory() / "trust-adopting.json"
    path.unlink(missing_ok=True)
    store.add_pin(path, "main", IDENTITY.pin, source="harness", now_s=NOW_S)
    try:
        entry = store.adopt(path, "main", statement, now_s=NOW_S)
    except SecurityError:
        assert store.pins_of("main", path, now_s=NOW_S) == (IDENTITY.pin,)
        return
    if statement.new == IDENTITY.pin:  # known already: nothing changes
        assert store.read_trust(path) == (entry,)
        assert entry.pins(NOW_S) == (IDENTITY.pin,)
        return
    assert statement.old == IDENTITY.pin
    assert entry.pins(NOW_S) == (statement.new, IDENTITY.pin)
    assert entry.pins(statement.until_s) == (statement.new,)
    assert store.read_trust(path) == (entry,)


def trust_file(data: bytes) -> None:
    """A trust.json; one that is read can be changed, and is read again as it was written."""
    path = file("trust.json", data)
    try:
        entries = store.read_trust(path)
    except ConfigError:
        return
    for entry in entries:
        if not entry.name.startswith(("nf1:", "nf2:")):
            pins = store.pins_of(entry.name, path, now_s=NOW_S)
            assert 1 <= len(pins) <= 2
    store.add_pin(path, "added", NEXT_IDENTITY.pin, source="", now_s=NOW_S, replace=True)
    assert store.pins_of("added", path, now_s=NOW_S) == (NEXT_IDENTITY.pin,)
    store.remove(path, "added")
    assert store.read_trust(path) == tuple(one for one in entries if one.name != "added")


# Signatures of bundles

SIGNING_KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(_SECRET))
OTHER_KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(_SECRET[::-1]))
#: Never parsed by what is fuzzed.
MANIFEST = b'{"name": "tiny"}'


def signature(data: bytes) -> None:
    """A bundle's signature.json; after an ``S`` the payload, which the harness signs."""
    is_signed = data[:1] == b"S"
    envelope = bundle_signature.sign(data[1:], SIGNING_KEY) if is_signed else data[1:]
    trusted = (OTHER_KEY.public, SIGNING_KEY.public)
    try:
        signed = bundle_signature.check(envelope, MANIFEST, trusted, "b")
    except SecurityError:
        pass
    else:
        assert signed.key_id in {key.id for key in trusted}
        manifest = signed.files[MANIFEST_NAME]
        assert manifest.sha256 == hashlib.sha256(MANIFEST).hexdigest()
        bundle_signature.check_entries(signed, signed.files.values(), "b")
    try:
        claimed = bundle_signature.key_ids(envelope)
    except SecurityError:
        claimed = ()
    assert len(claimed) <= bundle_signature.MAX_SIGNATURES
    # Beside whatever lay there, a good signature is a good one.
    payload = bundle_signature.statement([_manifest_entry()])
    again = bundle_signature.sign(payload, OTHER_KEY, beside=envelope)
    bundle_signature.check(again, MANIFEST, [OTHER_KEY.public], "b")


def _manifest_entry() -> bundle_signature.FileEntry:
    return bundle_signature.FileEntry(
        path=MANIFEST_NAME,
        size_bytes=len(MANIFEST),
        sha256=hashlib.sha256(MANIFEST).hexdigest(),
    )
