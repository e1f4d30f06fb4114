"""Every vector from its file, as another implementation would read it, and with nearfar's code."""

from __future__ import annotations

import hmac
import itertools
import re
import struct
from typing import Any

import msgspec
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nearfar.errors import NearfarError, RemoteProtocolError, SecurityError
from nearfar.secure.handshake import ClientHandshake, derive_secrets
from nearfar.secure.identity import Pin
from nearfar.tensors import NUMPY_OF
from nearfar.wire.codec import decode, describe, encode
from nearfar.wire.limits import Limits
from tests.vectors import channel, generate, independent, samples, shaping

unhex = bytes.fromhex
HANDSHAKES = generate.load("handshake.json")["vectors"]
REFUSED_HANDSHAKES = generate.load("handshake_refused.json")["vectors"]
RECORDS = generate.load("records.json")["vectors"]
REFUSED_RECORDS = generate.load("records_refused.json")["vectors"]
FRAMES = generate.load("frames.json")
REFUSED_FRAMES = generate.load("frames_refused.json")
SHAPING = generate.load("shaping.json")
CODEC = generate.load("codec.json")
REFUSED_CODEC = generate.load("codec_refused.json")
PINS = generate.load("pins.json")


def named(vectors: list[dict[str, Any]]) -> list[Any]:
    return [pytest.param(vector, id=vector["name"]) for vector in vectors]


# The files


@pytest.mark.parametrize("name", generate.FILES)
def test_file_is_what_the_script_makes(name: str) -> None:
    same = (generate.DIRECTORY / name).read_text() == generate.text_of(name)
    assert same, f"{name} is out of date: run `make vectors`, and look at what changed"


def test_every_file_is_described() -> None:
    readme = (generate.DIRECTORY / "README.md").read_text()
    published = (generate.DIRECTORY / "published").glob("*.json")
    for name in [*generate.FILES, *(f"published/{path.name}" for path in published)]:
        assert f"`{name}`" in readme
    assert sorted(path.name for path in generate.DIRECTORY.glob("*.json")) == sorted(generate.FILES)


def test_there_are_hundreds_and_no_two_have_one_name() -> None:
    total = 0
    for name in generate.FILES:
        content = generate.load(name)
        vectors = content["vectors"] + content.get("refused", [])
        names = [vector["name"] for vector in vectors if "name" in vector]
        assert len(set(names)) == len(names)
        total += len(vectors)
    assert total >= 200


# Pins


def test_pins_are_base32_of_key_and_checksum() -> None:
    for vector in PINS["vectors"]:
        assert str(Pin(unhex(vector["public_key"]))) == vector["pin"]
        assert Pin.parse(vector["pin"]).public_key == unhex(vector["public_key"])
    assert Ed25519PrivateKey.from_private_bytes(
        bytes(range(32))
    ).public_key().public_bytes_raw() == unhex(PINS["vectors"][0]["public_key"])


@pytest.mark.parametrize("vector", named(PINS["refused"]))
def test_text_that_is_no_pin_is_refused(vector: dict[str, Any]) -> None:
    with pytest.raises(NearfarError):
        Pin.parse(vector["pin"])


# Handshake


@pytest.mark.parametrize("vector", named(HANDSHAKES))
def test_another_implementation_reads_the_handshake(vector: dict[str, Any]) -> None:
    value = {name: unhex(text) for name, text in vector.items() if _is_hex(text)}
    # The server's side: signature, seed.
    server_key, ephemeral_key = value["configuration_key_seed"], value["ephemeral_key_seed"]
    assert independent.xwing_public_key(server_key) in value["configuration"]
    assert independent.xwing_public_key(ephemeral_key) in value["hello"]
    identity = Ed25519PrivateKey.from_private_bytes(value["identity_seed"])
    body, signature = value["configuration"][:-64], value["configuration"][-64:]
    signed = b"nearfar/1 key configuration signature\x00" + body
    identity.public_key().verify(signature, signed)
    # The seeds: what is in HELLO and WELCOME opens, with the info of the specification.
    for who, key, message, context in (
        ("client", server_key, "hello", ["configuration"]),
        ("server", ephemeral_key, "welcome", ["configuration", "hello"]),
    ):
        sealed, info = value[f"{who}_seed_sealed"], value[f"{who}_seed_info"]
        head = value[message][: value[message].index(sealed) - 2]
        said = [value[name] for name in context] + ([head] if who == "client" else [])
        assert info == b"nearfar/1 %s seed\x00" % who.encode() + independent.transcript(*said)
        shared_secret = independent.xwing_decapsulate(key, sealed[:1120])
        assert independent.hpke_open(sealed, shared_secret, info) == value[f"{who}_seed"]
        with pytest.raises(InvalidTag):
            independent.hpke_open(sealed, shared_secret, info + b"\x00")
    # Both together.
    welcome = value["welcome"].removesuffix(value["confirmation_tag"])
    assert welcome != value["welcome"]
    transcript = independent.transcript(value["configuration"], value["hello"], welcome)
    assert value["transcript"] == transcript
    _check_key_schedule(value)


def _is_hex(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(r"(?:[0-9a-f]{2})+", text) is not None


def _check_key_schedule(value: dict[str, bytes]) -> None:
    """RFC 5869 written out."""
    seeds = value["client_seed"] + value["server_seed"]
    root = independent.extract(value["transcript"], seeds)
    for name in ("client_traffic", "server_traffic", "exporter", "resumption"):
        label = b"nearfar/1 " + name.replace("_", " ").encode()
        assert independent.expand(root, label, 32) == value[name]
    confirmation = independent.expand(root, b"nearfar/1 confirmation", 32)
    tag = hmac.digest(confirmation, value["transcript"], "sha256")
    assert tag == value["confirmation_tag"]


@pytest.mark.parametrize("vector", generate.load("key_schedule.json")["vectors"])
def test_key_schedule(vector: dict[str, str]) -> None:
    value = {name: unhex(text) for name, text in vector.items()}
    _check_key_schedule(value)
    secrets = derive_secrets(value["client_seed"], value["server_seed"], value["transcript"])
    assert all(getattr(secrets, name) == value[name] for name in channel.SECRET_NAMES)


@pytest.mark.parametrize("vector", named(REFUSED_HANDSHAKES))
def test_wrong_handshake_is_refused(vector: dict[str, Any]) -> None:
    (base,) = (v for v in HANDSHAKES if v["name"] == vector["handshake"])
    changes = vector.get("with", {})
    original = unhex(base[vector["message"]])
    message = channel.edited(original, vector["edit"]) if "edit" in vector else original
    if vector["message"] == "configuration":
        client = ClientHandshake(
            Pin.parse(changes.get("pin", base["pin"])),
            versions=tuple(changes.get("client_versions", base["client_versions"])),
            suites=tuple(changes.get("client_suites", base["client_suites"])),
        )
        with pytest.raises(NearfarError) as caught:
            client.receive_configuration(message, now_s=changes.get("now", base["now"]))
    else:
        # The same ends as when the vector was made, so that the original would be accepted.
        with pytest.raises(NearfarError) as caught:
            channel.shake(base["name"], **{vector["message"]: lambda _: message})
    assert caught.value.code == vector["error"] == "security"


@pytest.mark.parametrize("kind", ["configuration", "hello", "welcome"])
def test_every_byte_outside_the_long_values_is_among_the_refused(kind: str) -> None:
    edits = [v["edit"] for v in REFUSED_HANDSHAKES if v["message"] == kind and "edit" in v]
    assert len({edit["offset"] for edit in edits if "offset" in edit}) >= 10
    assert sum("keep" in edit for edit in edits) == 4


# Records


@pytest.mark.parametrize("vector", named(RECORDS))
def test_another_implementation_opens_the_records(vector: dict[str, Any]) -> None:
    secret = unhex(vector["traffic_secret"])
    for sequence, record in enumerate(vector["records"]):
        assert record["sequence"] == sequence
        key, nonce = independent.record_keys(secret, record["epoch"], sequence)
        assert (key.hex(), nonce.hex()) == (record["key"], record["nonce"])
        aead = independent.AEADS[record["aead"]](key)
        header = unhex(record["header"])
        sealed = aead.encrypt(nonce, unhex(record["protected"]), header)
        assert record["record"] == (header + sealed).hex()
    epochs = [record["epoch"] for record in vector["records"]]
    assert epochs[0] == 0
    assert max(epochs) >= 3
    assert all(later - earlier in (0, 1) for earlier, later in itertools.pairwise(epochs))


@pytest.mark.parametrize("vector", named(RECORDS))
def test_records_open_to_their_plaintexts(vector: dict[str, Any]) -> None:
    opener = channel.opener(unhex(vector["traffic_secret"]), vector["suite"])
    for record in vector["records"]:
        record_type, plaintext = opener.open(unhex(record["record"]))
        assert (record_type, plaintext.hex()) == (record["type"], record["plaintext"])


@pytest.mark.parametrize("vector", named(REFUSED_RECORDS))
def test_wrong_record_is_refused(vector: dict[str, Any]) -> None:
    opener = channel.opener(unhex(vector["traffic_secret"]), vector["suite"])
    *good, bad = (unhex(text) for text in vector["deliver"])
    for record in good:
        opener.open(record)
    with pytest.raises(SecurityError):
        opener.open(bad)


# Frames


@pytest.mark.parametrize("vector", named(FRAMES["vectors"]))
def test_another_implementation_finds_the_messages(vector: dict[str, Any]) -> None:
    plaintexts = [unhex(one) for one in vector["plaintexts"]]
    found = independent.messages_in(plaintexts, FRAMES["max_message_bytes"])
    assert found == [(one["stream"], unhex(one["message"])) for one in vector["messages"]]


@pytest.mark.parametrize("vector", named(REFUSED_FRAMES["vectors"]))
def test_wrong_frames_are_refused(vector: dict[str, Any]) -> None:
    plaintexts = [unhex(one) for one in vector["plaintexts"]]
    with pytest.raises(ValueError, match=r"\w"):
        independent.messages_in(plaintexts, REFUSED_FRAMES["max_message_bytes"])
    assert shaping.taken(plaintexts) == len(plaintexts) - 1


# Shaping


def test_padding_is_padme_in_buckets() -> None:
    for vector in SHAPING["padding"]:
        assert independent.padded(vector["bytes"]) == vector["padded"], vector
        assert vector["padded"] - vector["bytes"] < max(128, 0.12 * vector["bytes"])


@pytest.mark.parametrize("vector", named(SHAPING["vectors"]))
def test_records_leave_as_the_specification_says(vector: dict[str, Any]) -> None:
    put, records = vector["put"], vector["records"]
    complete = [index for record in records for index in record["complete"]]
    assert sorted(complete) == list(range(len(put)))
    for stream in {one["stream"] for one in put}:
        of_stream = [index for index in complete if put[index]["stream"] == stream]
        assert of_stream == sorted(of_stream)
    for record in records:
        assert all(put[index]["ms"] <= record["ms"] for index in record["complete"])
    {"off": _unshaped, "balanced": _balanced, "strict": _strict}[vector["level"]](put, records)


def _unshaped(put: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
    for record in records:
        alone = [put[index] for index in record["complete"] if put[index]["bytes"] <= 65536]
        if alone:
            assert record["bytes"] == sum(8 + one["bytes"] for one in alone)
            assert {one["ms"] for one in alone} == {record["ms"]}
        else:
            assert record["bytes"] <= 163840


def _balanced(put: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
    tokens = [index for index, one in enumerate(put) if one["kind"] == "token"]
    first = {min(i for i in tokens if put[i]["stream"] == put[index]["stream"]) for index in tokens}
    at_once = {index for index, one in enumerate(put) if one["kind"] == "message"} | first
    began_ms = put[min(tokens)]["ms"] if tokens else 0
    shaped = [one for one in records if not at_once.intersection(one["complete"])]
    for record in records:
        for index in at_once.intersection(record["complete"]):
            assert record["ms"] == put[index]["ms"]
            if put[index]["bytes"] <= 65536:
                assert record["bytes"] == independent.padded(8 + put[index]["bytes"])
    if not tokens:
        total = sum(one["bytes"] for one in records)
        assert total == sum(independent.padded(_with_headers(one["bytes"])) for one in put)
        return
    # One on every tick until the last message has left, of one length.
    assert [one["ms"] for one in shaped] == [
        began_ms + 100 * (number + 1) for number in range(len(shaped))
    ]
    for record in shaped[:-1]:
        sizes = [8 + put[index]["bytes"] for index in record["complete"]]
        longer = independent.padded(sizes[0]) if sizes and sizes[0] > 192 else 192
        assert record["bytes"] == longer
        assert sum(sizes) <= record["bytes"]
    assert shaped[-1]["bytes"] == 512


def _with_headers(size: int) -> int:
    """A message with its frame's header, or all headers of its pieces and the announcement."""
    return size + 8 if size <= 65536 else size + 8 + 8 * -(-(size + 8) // (163840 - 8))


def _strict(put: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
    assert {record["bytes"] for record in records} == {4096}
    assert [record["ms"] for record in records] == [50 * n for n in range(len(records))]
    assert len(records) % 32 == 0
    assert records[-1]["ms"] >= shaping.STRICT_OPEN_MS > records[-33:][0]["ms"]


# Codec


@pytest.mark.parametrize("vector", named(CODEC["vectors"]))
def test_another_implementation_reads_the_message(vector: dict[str, Any]) -> None:
    data = unhex(vector["message"])
    (header_bytes,) = struct.unpack_from("<I", data)
    end = 4 + header_bytes
    assert samples.jsonable(msgspec.msgpack.decode(data[4:end])) == vector["header"]
    for tensor in vector["tensors"]:
        start = -(-end // 8) * 8
        assert not any(data[end:start])
        content = tensor.get("data")
        if content is None:
            elements = [unhex(element) for element in tensor["elements"]]
            content = b"".join(struct.pack("<I", len(e)) + e for e in elements).hex()
        end = start + len(content) // 2
        assert data[start:end].hex() == content
    assert len(data) == -(-end // 8) * 8
    assert not any(data[end:])


@pytest.mark.parametrize("vector", named(CODEC["vectors"]))
def test_message_is_decoded_and_encoded_to_the_same_bytes(vector: dict[str, Any]) -> None:
    data = unhex(vector["message"])
    message, tensors = decode(data, Limits(**CODEC["limits"]))
    assert type(message).__name__ == vector["type"]
    headers = describe({str(index): tensor for index, tensor in enumerate(tensors)})
    assert [(h.datatype, list(h.shape)) for h in headers] == [
        (tensor["datatype"], tensor["shape"]) for tensor in vector["tensors"]
    ]
    assert b"".join(encode(message, tensors)) == data


@pytest.mark.parametrize("vector", named(REFUSED_CODEC["vectors"]))
def test_malformed_message_is_refused(vector: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(unhex(vector["message"]), Limits(**REFUSED_CODEC["limits"]))
    assert caught.value.code == vector["error"]


def test_every_message_and_every_datatype_has_vectors() -> None:
    types = {vector["type"] for vector in CODEC["vectors"]}
    assert types == {kind.__name__ for kind in samples.kinds()}
    datatypes = {t["datatype"] for vector in CODEC["vectors"] for t in vector["tensors"]}
    assert datatypes == set(NUMPY_OF)
    reasons = {vector["reason"] for vector in REFUSED_CODEC["vectors"]}
    assert reasons == {"cut", "limit", "header", "padding", "trailing", "tensor"}
