"""Signatures of bundles: a DSSE envelope around an in-toto statement, in ``signature.json``.

Layout: docs/reference/bundle.md, "Signature". Sources: DSSE 1.0 (`protocol.md` of
github.com/secure-systems-lab/dsse) and in-toto Statement v1. Both are small enough to be read with
`cryptography` alone; `model-signing` brings 35 packages and 69 MB for the same envelope.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec

from nearfar.bundle.manifest import FileEntry
from nearfar.bundle.paths import MANIFEST_NAME
from nearfar.errors import SecurityError

if TYPE_CHECKING:
    from nearfar.bundle.keys import PublicKey, SigningKey

SIGNATURE_NAME = "signature.json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:nearfar:bundle:1"

#: As large as a manifest that names as many files, in Base64.
MAX_SIGNATURE_BYTES = 8 << 20
#: Enough to change keys over time; bounds the work on a file that nobody vouches for yet.
MAX_SIGNATURES = 16

_AGAIN = "Get the bundle again from who made it, or sign it with `nearfar bundle sign`"


class _Signature(msgspec.Struct, frozen=True):
    sig: str
    keyid: str = ""


class _Envelope(msgspec.Struct, frozen=True, rename={"payload_type": "payloadType"}):
    payload: str
    payload_type: str
    signatures: Annotated[tuple[_Signature, ...], msgspec.Meta(max_length=MAX_SIGNATURES)]


class _Digest(msgspec.Struct, frozen=True):
    sha256: str


class _Annotations(msgspec.Struct, frozen=True):
    size_bytes: int


class _Subject(msgspec.Struct, frozen=True):
    name: str
    digest: _Digest
    annotations: _Annotations


class _Statement(
    msgspec.Struct, frozen=True, rename={"type": "_type", "predicate_type": "predicateType"}
):
    type: str
    predicate_type: str
    subject: tuple[_Subject, ...]


@dataclass(frozen=True, slots=True)
class Signed:
    """What a trusted key vouches for.

    Attributes:
        key_id: Id of the key whose signature was found good.
        files: Every file of the bundle, the manifest included, by path.
    """

    key_id: str
    files: dict[str, FileEntry]


def statement(files: Iterable[FileEntry]) -> bytes:
    """The bytes that are signed: one object, keys sorted, no white space, files sorted by path."""
    subjects = tuple(
        _Subject(entry.path, _Digest(entry.sha256), _Annotations(entry.size_bytes))
        for entry in sorted(files, key=lambda entry: entry.path)
    )
    return msgspec.json.encode(
        _Statement(type=STATEMENT_TYPE, predicate_type=PREDICATE_TYPE, subject=subjects),
        order="sorted",
    )


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """What a DSSE signature is over (`PAE`): lengths and contents of type and payload."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(payload: bytes, key: SigningKey, *, beside: bytes | None = None) -> bytes:
    """The contents of ``signature.json``.

    Args:
        payload: What `statement` gave.
        key: Who signs.
        beside: An earlier ``signature.json``; signatures of other keys over the same payload are
            kept, so that one bundle can be trusted through an old and a new key.
    """
    kept: list[_Signature] = []
    if beside is not None:
        try:
            earlier = _envelope(beside)
            if base64.b64decode(earlier.payload) == payload:
                kept = [old for old in earlier.signatures if old.keyid != key.public.id]
        except (SecurityError, binascii.Error, ValueError):
            kept = []
    message = pre_authentication_encoding(PAYLOAD_TYPE, payload)
    own = _Signature(sig=_base64(key.sign(message)), keyid=key.public.id)
    envelope = _Envelope(
        payload=_base64(payload),
        payload_type=PAYLOAD_TYPE,
        signatures=(*kept[-(MAX_SIGNATURES - 1) :], own),
    )
    return msgspec.json.format(msgspec.json.encode(envelope, order="sorted"), indent=2) + b"\n"


def key_ids(data: bytes) -> tuple[str, ...]:
    """Ids of the keys that a ``signature.json`` claims to be signed with; proves nothing.

    Raises:
        SecurityError: It is not a signature file.
    """
    return tuple(found.keyid for found in _envelope(data).signatures)


def check(data: bytes, manifest: bytes, keys: Sequence[PublicKey], where: str) -> Signed:
    """Verify a signature, and that the manifest is the signed one. The manifest is not parsed.

    Args:
        data: Contents of ``signature.json``.
        manifest: Contents of ``manifest.json``.
        keys: Keys that are trusted.
        where: The bundle, for messages.

    Raises:
        SecurityError: No trusted key signed, or the manifest is another one.
    """
    envelope = _envelope(data, where)
    try:
        payload = base64.b64decode(envelope.payload, validate=True)
        signatures = [base64.b64decode(s.sig, validate=True) for s in envelope.signatures]
    except (binascii.Error, ValueError) as exc:
        raise _damaged(where, "it holds something that is not Base64") from exc
    message = pre_authentication_encoding(envelope.payload_type, payload)
    # Key ids are hints that anyone can write (DSSE), so every key is tried on every signature.
    signer = next(
        (key for key in keys for found in signatures if key.verifies(found, message)), None
    )
    if signer is None:
        claimed = ", ".join(s.keyid[:16] or "no id" for s in envelope.signatures) or "nobody"
        raise SecurityError(
            f"Bundle {where} is not signed by a trusted key, or its signature was altered: it "
            f"claims to be signed by {_plain(claimed)}; trusted: "
            + ", ".join(key.id[:16] for key in keys),
            fix="Trust that key if you know whose it is, or get the bundle from who you trust",
        )
    files = _files(envelope.payload_type, payload, where)
    entry = files.get(MANIFEST_NAME)
    if (
        entry is None
        or entry.size_bytes != len(manifest)
        or entry.sha256 != hashlib.sha256(manifest).hexdigest()
    ):
        raise SecurityError(f"{MANIFEST_NAME} of bundle {where} is not the signed one", fix=_AGAIN)
    return Signed(signer.id, files)


def check_entries(signed: Signed, entries: Iterable[FileEntry], where: str) -> None:
    """The files that the manifest names must be the signed ones.

    Raises:
        SecurityError: One is not.
    """
    for entry in entries:
        if signed.files.get(entry.path) != entry:
            raise SecurityError(
                f"File {entry.path!r} of bundle {where} is not covered by its signature", fix=_AGAIN
            )


def _files(payload_type: str, payload: bytes, where: str) -> dict[str, FileEntry]:
    # Signed bytes come from a trusted key, and may still be about something else.
    try:
        stated = msgspec.json.decode(payload, type=_Statement)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise _damaged(where, "what is signed is not a statement about files") from exc
    if (payload_type, stated.type, stated.predicate_type) != (
        PAYLOAD_TYPE,
        STATEMENT_TYPE,
        PREDICATE_TYPE,
    ):
        raise _damaged(where, "what is signed is not a statement about a bundle")
    files = {
        subject.name: FileEntry(
            path=subject.name,
            size_bytes=subject.annotations.size_bytes,
            sha256=subject.digest.sha256,
        )
        for subject in stated.subject
    }
    if len(files) != len(stated.subject):
        raise _damaged(where, "what is signed names a file twice")
    return files


def _envelope(data: bytes, where: str = "") -> _Envelope:
    try:
        return msgspec.json.decode(data, type=_Envelope)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise _damaged(where, str(exc)) from exc


def _damaged(where: str, why: str) -> SecurityError:
    return SecurityError(
        f"{SIGNATURE_NAME} of bundle {where} is not a signature ({why})", fix=_AGAIN
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _plain(foreign: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in foreign)[:200]
