"""Seeds of the targets that decide whom to trust; always the same bytes."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import jwt
import msgspec

from cloud_runtime.tokens import ALGORITHM, DEFAULT_ISSUER
from fuzz import trust_targets
from fuzz.common import IDENTITY, NEXT_IDENTITY, NOW_S, directory, joined
from fuzz.trust_targets import CLIENT, ISSUER, MANIFEST, SIGNING_KEY, jwk_of
from nearfar.bundle import signature as bundle_signature
from nearfar.bundle.manifest import FileEntry
from nearfar.secure import keys
from nearfar.secure.identity import RotationStatement, ServerIdentity
from nearfar.secure.keys import KeyConfiguration
from sdk.trust.store import PreviousPin, TrustEntry, _TrustFile

_NOW_S = int(NOW_S)
_HEADER = json.dumps({"alg": ALGORITHM, "typ": "JWT"}).encode()


def _claims(**changes: Any) -> dict[str, Any]:
    claims = {
        "iss": DEFAULT_ISSUER, "sub": "clinic-2", "aud": str(IDENTITY.pin), "iat": _NOW_S,
        "nbf": _NOW_S, "exp": _NOW_S + 600, "cnf": {"jwk": jwk_of(CLIENT.public.public_key)},
        **changes,
    }  # fmt: skip
    return {name: value for name, value in claims.items() if value is not None}


def tokens() -> Iterator[bytes]:
    """Good ones and ones with a flaw each, signed by the harness; and as text."""
    flaws: tuple[dict[str, Any], ...] = (
        {}, {"aud": [str(IDENTITY.pin), "nf1:other"]}, {"exp": _NOW_S + 601}, {"exp": _NOW_S - 61},
        {"exp": float(_NOW_S + 60)}, {"exp": str(_NOW_S + 60)}, {"iat": _NOW_S + 90}, {"sub": 7},
        {"sub": ""}, {"cnf": None}, {"cnf": {"jwk": {"kty": "OKP"}}}, {"iss": "other"},
        {"cnf": {"kid": "1"}}, {"exp": 1e308}, {"jti": "x", "scope": "read"},
        {"models": ["chat-*", "minilm"], "max_priority": 3}, {"models": []},
        {"models": "chat"}, {"max_priority": 10},
    )  # fmt: skip
    for flaw in flaws:
        yield b"S" + joined(_HEADER, json.dumps(_claims(**flaw)).encode())
    for header in ({"alg": "none"}, {"alg": "HS256"}, {"alg": ALGORITHM, "crit": ["x"]}, []):
        yield b"S" + joined(json.dumps(header).encode(), json.dumps(_claims()).encode())
    yield jwt.encode(_claims(), ISSUER, algorithm=ALGORITHM).encode()
    yield b"e30.e30."


def issuers() -> Iterator[bytes]:
    yield trust_targets.issuer_file()
    yield b'{"version": 1, "issuers": []}'
    other = {"issuer": "old", "jwk": {**jwk_of(bytes(32)), "d": "AA"}}
    yield json.dumps({"version": 1, "issuers": [other]}).encode()
    yield trust_targets.issuer_file().replace(b"Ed25519", b"X25519")


def _configuration(**changes: Any) -> bytes:
    fields = {"not_before_s": _NOW_S - 300, "lifetime_s": keys.MAX_LIFETIME_S, **changes}
    public_key = bytes(index % 256 for index in range(1216))
    return KeyConfiguration.issue(IDENTITY, public_key, **fields).message


def key_configurations() -> Iterator[bytes]:
    """Of now, before, later and for too long."""
    kinds: tuple[dict[str, Any], ...] = (
        {}, {"not_before_s": _NOW_S - 90_000}, {"not_before_s": _NOW_S + 60},
        {"lifetime_s": 86_401}, {"lifetime_s": 1}, {"attestation_hash": b"\x01" * 32},
    )  # fmt: skip
    for changes in kinds:
        message = _configuration(**changes)
        yield b"-" + message
        yield b"S" + message[:-64]
    cosigning = ServerIdentity(bytes(range(32)), cosigns=True)
    fields = {"not_before_s": _NOW_S - 300, "lifetime_s": 3600}
    yield b"-" + KeyConfiguration.issue(cosigning, bytes(1216), **fields).message


def key_ring_clocks() -> Iterator[bytes]:
    """A clock that goes on, one that stands, one that jumps, and one that goes back."""
    hour = (450).to_bytes(2, "little")
    for lifetime in (b"\x00\x00", b"\x08\x07", b"\xff\xff"):
        for kinds in ((2,), (0, 2), (2, 3), (2, 2, 3, 3), (3, 2, 0, 1)):
            yield lifetime + b"".join(
                bytes([kinds[index % len(kinds)]]) + hour for index in range(20)
            )
        yield lifetime + (b"\x02" + (40).to_bytes(2, "little")) * 24
        yield lifetime + (b"\x02\xff\xff") * 8 + (b"\x03\xff\xff") * 8


def key_files() -> Iterator[bytes]:
    """A good one of each kind, as it is and in the place of another."""
    folder = directory() / "seeds"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    ServerIdentity(bytes(range(32))).save(folder / "I")
    ServerIdentity(bytes(range(32)), cosigns=True).save(folder / "I2")
    CLIENT.save(folder / "C")
    SIGNING_KEY.save(folder / "K")
    for kind in b"ICPK":
        for name in ("I", "I2", "C", "K", "K.pub"):
            yield bytes([kind]) + (folder / name).read_bytes()


def public_keys() -> Iterator[bytes]:
    yield str(SIGNING_KEY.public).encode()
    yield b"  " + str(SIGNING_KEY.public).encode() + b"\n"
    yield b"ed25519:" + base64.b64encode(bytes(31))


def rotations() -> Iterator[bytes]:
    """Of now, of the past and of the future, short and long; signed by the harness, and as text."""
    day = 86_400
    for issued_s in (_NOW_S, _NOW_S - 31 * day, _NOW_S + 2 * day, 2**40):
        for overlap_s in (day - 1, day, 30 * day, 367 * day):
            yield b"S" + issued_s.to_bytes(8, "big") + (issued_s + overlap_s).to_bytes(8, "big")
    for old, new in ((IDENTITY, NEXT_IDENTITY), (NEXT_IDENTITY, IDENTITY)):
        yield RotationStatement.issue(old, new, now_s=NOW_S).text().encode()


def trust_files() -> Iterator[bytes]:
    def written(*entries: TrustEntry) -> bytes:
        return msgspec.json.encode(_TrustFile(entries=entries))

    entry = TrustEntry(name="main", pin=str(IDENTITY.pin), added="2027-01-15", source="operator")
    before = PreviousPin(pin=str(NEXT_IDENTITY.pin), until_s=_NOW_S + 60)
    moved = TrustEntry(
        name="moved", pin=str(IDENTITY.pin), added="2027-01-15", source="s", previous=before
    )
    cosigned = str(ServerIdentity(bytes(range(32)), cosigns=True).pin)
    yield written()
    yield written(entry)
    yield written(entry, moved)
    yield written(TrustEntry(name="added", pin=cosigned, added="", source=""))
    yield written(entry, entry)


def signatures() -> Iterator[bytes]:
    """Of one file and of several; payloads that say something else; envelopes as they are."""
    entry = trust_targets._manifest_entry()
    other = FileEntry(path="fp32/model.onnx", size_bytes=8, sha256="0" * 64)
    payloads = [bundle_signature.statement(files) for files in ((entry,), (entry, other), ())]
    payloads += [
        payloads[0].replace(b"urn:nearfar:bundle:1", b"urn:other"),
        payloads[1].replace(b"fp32/model.onnx", b"manifest.json"),
        b"{}",
        b"not JSON",
    ]
    for payload in payloads:
        yield b"S" + payload
        yield b"-" + bundle_signature.sign(payload, SIGNING_KEY)
    envelope = bundle_signature.sign(payloads[0], SIGNING_KEY)
    yield b"-" + bundle_signature.sign(payloads[0], trust_targets.OTHER_KEY, beside=envelope)
    assert entry.size_bytes == len(MANIFEST)
