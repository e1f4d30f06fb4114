"""Signed bundles: what trusted keys let in, and what they keep out."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest

from nearfar.bundle import BundleStore, BundleWriter, open_bundle
from nearfar.bundle import bundle as bundle_module
from nearfar.bundle.commands import app
from nearfar.bundle.keys import PASSPHRASE_VARIABLE, PublicKey, SigningKey, trusted
from nearfar.bundle.manifest import encode_manifest
from nearfar.bundle.sealing import sign_bundle, signature_of
from nearfar.bundle.signature import pre_authentication_encoding, sign, statement
from nearfar.cli import run
from nearfar.errors import BundleError, ConfigError, ModelNotFound, SecurityError
from tests.support.tiny import write_tiny_tensor_bundle


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture
def signed(tmp_path: Path, key: SigningKey) -> Path:
    path = write_tiny_tensor_bundle(tmp_path / "m", "m").path
    sign_bundle(path, key)
    return path


def nearfar_bundle(*arguments: object) -> int:
    return run(app, [str(argument) for argument in arguments], program="nearfar bundle")


def test_a_signed_bundle_opens_with_its_key_and_without_any(signed: Path, key: SigningKey):
    opened = open_bundle(signed, trusted_keys=[key.public])
    assert opened.signed is not None
    assert opened.signed.key_id == key.public.id
    assert sorted(opened.signed.files) == ["fp32/model.onnx", "int8/model.onnx", "manifest.json"]
    opened.verify()
    assert open_bundle(signed).signed is None


def test_one_of_several_trusted_keys_is_enough(signed: Path, key: SigningKey):
    opened = open_bundle(signed, trusted_keys=[SigningKey.generate().public, key.public])
    assert opened.signed is not None


def test_the_layout_is_the_documented_one(signed: Path, key: SigningKey):
    envelope = json.loads((signed / "signature.json").read_bytes())
    payload = base64.b64decode(envelope["payload"])
    manifest = (signed / "manifest.json").read_bytes()
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    assert [set(found) for found in envelope["signatures"]] == [{"keyid", "sig"}]
    assert payload.startswith(
        b'{"_type":"https://in-toto.io/Statement/v1","predicateType":"urn:nearfar:bundle:1",'
        b'"subject":[{"annotations":{"size_bytes":'
    )
    subject = json.loads(payload)["subject"]
    assert [found["name"] for found in subject] == sorted(found["name"] for found in subject)
    assert subject[-1]["annotations"] == {"size_bytes": len(manifest)}
    assert pre_authentication_encoding("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"  # the example of DSSE 1.0
    )


def test_another_implementation_of_dsse_verifies_the_envelope(signed: Path, key: SigningKey):
    dsse = pytest.importorskip("securesystemslib.dsse")
    signer = pytest.importorskip("securesystemslib.signer")
    envelope = dsse.Envelope.from_dict(json.loads((signed / "signature.json").read_bytes()))
    public = signer.SSlibKey(key.public.id, "ed25519", "ed25519", {"public": key.public.raw.hex()})
    assert list(envelope.verify([public], threshold=1)) == [key.public.id]


def test_signing_twice_gives_the_same_bytes(signed: Path, key: SigningKey):
    before = (signed / "signature.json").read_bytes()
    sign_bundle(signed, key)
    assert (signed / "signature.json").read_bytes() == before


def test_a_second_key_signs_beside_the_first_until_the_files_change(signed: Path, key: SigningKey):
    other = SigningKey.generate()
    sign_bundle(signed, other)
    for one in (key, other):
        assert open_bundle(signed, trusted_keys=[one.public]).signed is not None
    (signed / "README.md").write_text("new")
    sign_bundle(signed, other)
    with pytest.raises(SecurityError, match="not signed by a trusted key"):
        open_bundle(signed, trusted_keys=[key.public])


def test_a_writer_can_sign(tmp_path: Path, key: SigningKey):
    plain = write_tiny_tensor_bundle(tmp_path / "plain")
    with BundleWriter(tmp_path / "b") as writer:
        for variant in plain.manifest.variants:
            writer.add(plain.path / variant.entry, variant.entry)
        writer.finish(plain.manifest, signing_key=key)
    open_bundle(tmp_path / "b", trusted_keys=[key.public]).verify()
    with BundleWriter(tmp_path / "c") as writer, pytest.raises(BundleError, match="at the end"):
        writer.file("signature.json")


def _unsigned(path: Path, key: SigningKey) -> None:
    (path / "signature.json").unlink()


def _foreign(path: Path, key: SigningKey) -> None:
    (path / "signature.json").unlink()
    sign_bundle(path, SigningKey.generate())


def _foreign_under_our_id(path: Path, key: SigningKey) -> None:
    (path / "signature.json").unlink()
    sign_bundle(path, SigningKey.generate())
    envelope = json.loads((path / "signature.json").read_bytes())
    envelope["signatures"][0]["keyid"] = key.public.id
    (path / "signature.json").write_text(json.dumps(envelope))


def _altered_payload(path: Path, key: SigningKey) -> None:
    envelope = json.loads((path / "signature.json").read_bytes())
    payload = base64.b64decode(envelope["payload"]).replace(b"fp32", b"fp16")
    envelope["payload"] = base64.b64encode(payload).decode()
    (path / "signature.json").write_text(json.dumps(envelope))


def _altered_type(path: Path, key: SigningKey) -> None:
    envelope = json.loads((path / "signature.json").read_bytes())
    envelope["payloadType"] = "text/plain"
    (path / "signature.json").write_text(json.dumps(envelope))


def _altered_manifest(path: Path, key: SigningKey) -> None:
    file = path / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b'"description": ""', b'"description": "x"'))


def _not_json(path: Path, key: SigningKey) -> None:
    (path / "signature.json").write_bytes(b"\xff{")


def _many_signatures(path: Path, key: SigningKey) -> None:
    envelope = json.loads((path / "signature.json").read_bytes())
    envelope["signatures"] *= 17
    (path / "signature.json").write_text(json.dumps(envelope))


def _no_signatures(path: Path, key: SigningKey) -> None:
    envelope = json.loads((path / "signature.json").read_bytes())
    envelope["signatures"] = []
    (path / "signature.json").write_text(json.dumps(envelope))


def _too_large(path: Path, key: SigningKey) -> None:
    (path / "signature.json").write_bytes(b" " * ((8 << 20) + 1))


def _linked(path: Path, key: SigningKey) -> None:
    (path / "signature.json").rename(path.parent / "elsewhere.json")
    (path / "signature.json").symlink_to(path.parent / "elsewhere.json")


def _other_bundle_of_ours(path: Path, key: SigningKey) -> None:
    other = write_tiny_tensor_bundle(path.parent / ".other", "other").path
    sign_bundle(other, key)
    shutil.copy(other / "signature.json", path)


ATTACKS = [
    _unsigned, _foreign, _foreign_under_our_id, _altered_payload, _altered_type, _altered_manifest,
    _not_json, _many_signatures, _no_signatures, _too_large, _linked, _other_bundle_of_ours,
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_no_trusted_key_signed_is_refused_before_the_manifest_is_parsed(
    signed: Path, key: SigningKey, attack, monkeypatch: pytest.MonkeyPatch
):
    attack(signed, key)
    monkeypatch.setattr(bundle_module, "_parse", lambda *_: pytest.fail("parsed"))
    with pytest.raises((SecurityError, BundleError)):
        open_bundle(signed, trusted_keys=[key.public])
    store = BundleStore(signed.parent, trusted_keys=[key.public])
    with pytest.raises((SecurityError, BundleError, ModelNotFound)):
        store.open("m")


def test_a_signed_manifest_that_names_files_that_were_not_signed_is_refused(
    signed: Path, key: SigningKey
):
    opened = open_bundle(signed)
    whole = signature_of(opened, key)
    payload = json.loads(base64.b64decode(json.loads(whole)["payload"]))
    payload["subject"] = [s for s in payload["subject"] if s["name"] != "int8/model.onnx"]
    (signed / "signature.json").write_bytes(sign(json.dumps(payload).encode(), key))
    with pytest.raises(SecurityError, match=r"int8/model\.onnx.*not covered"):
        open_bundle(signed, trusted_keys=[key.public])


@pytest.mark.parametrize(
    "payload", [b"[]", b"{}", statement([]), b'{"_type":"x","predicateType":"y","subject":[]}']
)
def test_a_trusted_signature_over_something_else_is_refused(signed: Path, key, payload: bytes):
    (signed / "signature.json").write_bytes(sign(payload, key))
    with pytest.raises(SecurityError):
        open_bundle(signed, trusted_keys=[key.public])


def test_an_altered_file_is_refused_before_an_engine_sees_it(signed: Path, key: SigningKey):
    file = signed / "fp32" / "model.onnx"
    file.write_bytes(bytes(file.stat().st_size))
    opened = open_bundle(signed, trusted_keys=[key.public])
    with pytest.raises(BundleError, match="SHA-256"):
        opened.variant_entry(opened.variant("fp32"))


def test_files_beside_the_model_are_signed_too(signed: Path, key: SigningKey):
    (signed / "README.md").write_text("added")
    with pytest.raises(SecurityError, match=r"README\.md.*not covered"):
        open_bundle(signed, trusted_keys=[key.public]).verify()
    sign_bundle(signed, key)
    open_bundle(signed, trusted_keys=[key.public]).verify()
    (signed / "README.md").write_text("other")
    with pytest.raises(BundleError, match=r"README\.md.*SHA-256"):
        open_bundle(signed, trusted_keys=[key.public]).verify()


def test_a_damaged_bundle_is_not_signed(signed: Path, key: SigningKey):
    (signed / "fp32" / "model.onnx").write_bytes(b"")
    with pytest.raises(BundleError):
        sign_bundle(signed, key)


def test_a_store_with_keys_leaves_out_what_they_did_not_sign(signed: Path, key: SigningKey):
    write_tiny_tensor_bundle(signed.parent / "free", "free")
    store = BundleStore(signed.parent, trusted_keys=[str(key.public)])
    assert [m.name for m in store.models()] == ["m"]
    assert store.open("m").signed is not None
    with pytest.raises(SecurityError, match="is not signed"):
        store.open("free")
    assert [m.name for m in BundleStore(signed.parent).models()] == ["free", "m"]


def test_a_store_notices_that_a_signature_was_taken_away(signed: Path, key: SigningKey):
    store = BundleStore(signed.parent, trusted_keys=[key.public])
    assert len(store.models()) == 1
    (signed / "signature.json").unlink()
    assert store.models() == []


def test_no_trusted_key_at_all_is_a_mistake_and_not_a_wish(tmp_path: Path):
    with pytest.raises(ConfigError, match="empty"):
        BundleStore(tmp_path, trusted_keys=[])


def test_a_manifest_may_not_name_the_signature(signed: Path):
    manifest = open_bundle(signed).manifest
    text = encode_manifest(manifest).replace(b"int8/model.onnx", b"signature.json")
    (signed / "manifest.json").write_bytes(text)
    with pytest.raises(BundleError, match="names the signature"):
        open_bundle(signed)


def test_keys_survive_their_files(tmp_path: Path, key: SigningKey):
    public = key.save(tmp_path / "k")
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    assert SigningKey.load(tmp_path / "k").public == key.public
    assert trusted([public, str(public), str(key.public), key.public]) == (key.public,) * 4
    with pytest.raises(ConfigError, match="exists already"):
        key.save(tmp_path / "k")


def test_a_passphrase_encrypts_the_key(tmp_path: Path, key: SigningKey, monkeypatch):
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "correct horse")
    key.save(tmp_path / "k")
    assert b"ENCRYPTED" in (tmp_path / "k").read_bytes()
    assert SigningKey.load(tmp_path / "k").public == key.public
    for wrong in ("", "battery"):
        monkeypatch.setenv(PASSPHRASE_VARIABLE, wrong)
        with pytest.raises(ConfigError, match="passphrase"):
            SigningKey.load(tmp_path / "k")


def test_keys_that_are_none_are_named(tmp_path: Path, key: SigningKey):
    key.save(tmp_path / "k")
    (tmp_path / "k").chmod(0o644)
    with pytest.raises(SecurityError, match="open to other users"):
        SigningKey.load(tmp_path / "k")
    with pytest.raises(ConfigError, match="private key"):
        PublicKey.load(tmp_path / "k")
    (tmp_path / "noise").write_bytes(b"noise")
    (tmp_path / "noise").chmod(0o600)
    for read in (PublicKey.load, SigningKey.load):
        with pytest.raises(ConfigError):
            read(tmp_path / "noise")
        with pytest.raises(ConfigError):
            read(tmp_path / "nowhere")
    with pytest.raises(ConfigError):
        PublicKey.parse(str(key.public)[:-4])


def test_the_commands_make_a_key_sign_and_verify(tmp_path: Path, capsys):
    bundle = write_tiny_tensor_bundle(tmp_path / "m", "m").path
    key = tmp_path / "release"
    assert nearfar_bundle("keygen", key) == 0
    text = capsys.readouterr().out.strip()
    assert text == str(PublicKey.load(f"{key}.pub"))
    assert nearfar_bundle("verify", bundle) == 0
    assert "signature: unsigned" in capsys.readouterr().out
    assert nearfar_bundle("verify", bundle, "--key", text) == 1
    assert nearfar_bundle("sign", bundle, "--key", key) == 0
    assert nearfar_bundle("verify", bundle, "--key", f"{key}.pub") == 0
    assert "good, by the trusted key" in capsys.readouterr().out
    assert nearfar_bundle("inspect", bundle) == 0
    assert "not checked; claims to be by" in capsys.readouterr().out
