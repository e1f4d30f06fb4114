"""Vectors of the secure channel: pins, handshake, key schedule, records; see README.md."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nearfar.errors import NearfarError
from nearfar.secure import records
from nearfar.secure.handshake import ClientHandshake, ServerHandshake, derive_secrets
from nearfar.secure.identity import Pin, ServerIdentity
from nearfar.secure.keys import (
    MAX_LIFETIME_S,
    MIN_LIFETIME_S,
    SUPPORTED_SUITES,
    SUPPORTED_VERSIONS,
    KeyRing,
)
from tests.vectors import independent
from tests.vectors.seeded import Randomness, seeded

NOW_S = 1_800_000_000
IDENTITY_SEED = bytes(range(32))
SECRET_NAMES = ("client_traffic", "server_traffic", "exporter", "resumption", "confirmation_tag")
TAG_BYTES = 16


# Handshake


@dataclass
class Shake:
    """A handshake with its random choices."""

    configuration: bytes
    hello: bytes
    welcome: bytes
    at_client: Any
    at_server: Any
    randomness: Randomness


def shake(
    name: str,
    *,
    versions: tuple[int, ...] = SUPPORTED_VERSIONS,
    suites: tuple[int, ...] = SUPPORTED_SUITES,
    lifetime_s: int = MAX_LIFETIME_S,
    now_s: float = NOW_S,
    configuration: Callable[[bytes], bytes] = bytes,
    hello: Callable[[bytes], bytes] = bytes,
    welcome: Callable[[bytes], bytes] = bytes,
    seed: bytes = IDENTITY_SEED,
    pinned: bytes = IDENTITY_SEED,
) -> Shake:
    """Runs nearfar's two ends with randomness that depends on the name only.

    Args:
        now_s: The client's clock; the configuration was issued at NOW_S.
        configuration: What becomes of the message on its way; `hello` and `welcome` likewise.
    """
    with seeded(name) as randomness:
        ring = KeyRing(ServerIdentity(seed), lifetime_s=lifetime_s, now_s=NOW_S)
        server = ServerHandshake(ring, now_s=NOW_S)
        client = ClientHandshake(ServerIdentity(pinned).pin, versions=versions, suites=suites)
        first = configuration(server.configuration.message)
        second = hello(client.receive_configuration(first, now_s=now_s))
        third, at_server = server.receive_hello(second, now_s=NOW_S)
        third = welcome(third)
        at_client = client.receive_welcome(third)
    return Shake(first, second, third, at_client, at_server, randomness)


#: name -> options of `shake`.
HANDSHAKES: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, other randomness": {},
    "client that speaks more than the server": {
        "versions": (*(max(SUPPORTED_VERSIONS) + n for n in (2, 1)), *SUPPORTED_VERSIONS),
        "suites": (0x7FFF, *SUPPORTED_SUITES, 0x7FFE),
    },
    "shortest lifetime": {"lifetime_s": MIN_LIFETIME_S},
    **{f"suite {suite:#06x} only": {"suites": (suite,)} for suite in SUPPORTED_SUITES},
}


def handshakes() -> dict[str, Any]:
    """Every message and every value between them."""
    vectors = []
    for name, options in HANDSHAKES.items():
        done = shake(name, **options)
        assert done.at_client == done.at_server, name
        secrets, (client, server) = done.at_client, done.randomness.seals
        tag: bytes = secrets.confirmation_tag
        assert done.welcome.endswith(tag)
        draws = done.randomness.draws
        server_key, ephemeral_key = done.randomness.key_seeds
        vectors.append(
            {
                "name": name,
                "identity_seed": IDENTITY_SEED.hex(),
                "pin": str(ServerIdentity(IDENTITY_SEED).pin),
                "now": NOW_S,
                "lifetime": options.get("lifetime_s", MAX_LIFETIME_S),
                "configuration_key_seed": server_key.hex(),
                "ephemeral_key_seed": ephemeral_key.hex(),
                "nonces": [draw.hex() for draw in draws
                           if draw not in (client.plaintext, server.plaintext)],
                "client_versions": list(options.get("versions", SUPPORTED_VERSIONS)),
                "client_suites": list(options.get("suites", SUPPORTED_SUITES)),
                "client_seed": client.plaintext.hex(),
                "client_seed_info": client.info.hex(),
                "client_seed_encapsulation_randomness": client.randomness.hex(),
                "client_seed_sealed": client.sealed.hex(),
                "server_seed": server.plaintext.hex(),
                "server_seed_info": server.info.hex(),
                "server_seed_encapsulation_randomness": server.randomness.hex(),
                "server_seed_sealed": server.sealed.hex(),
                "configuration": done.configuration.hex(),
                "hello": done.hello.hex(),
                "welcome": done.welcome.hex(),
                "transcript": secrets.transcript_hash.hex(),
                **{field: getattr(secrets, field).hex() for field in SECRET_NAMES},
            }
        )  # fmt: skip
    return {"vectors": vectors}


def _regions(message: bytes, known: dict[str, bytes]) -> Iterator[tuple[str, int]]:
    """First and last byte of every value that is known, and every byte between such values."""
    covered: dict[int, str] = {}
    for name, value in known.items():
        start = message.index(value)
        for position in range(start, start + len(value)):
            covered[position] = name
        yield f"first byte of the {name}", start
        yield f"last byte of the {name}", start + len(value) - 1
    for position in range(len(message)):
        if position not in covered:
            yield f"byte {position}", position


def _halves(name: str, key: bytes) -> dict[str, bytes]:
    return {f"{name}, ML-KEM-768": key[:-32], f"{name}, X25519": key[-32:]}


def _sealed(sealed: bytes) -> dict[str, bytes]:
    return {
        "ML-KEM-768 ciphertext": sealed[:1088],
        "X25519 share": sealed[1088:1120],
        "sealed seed": sealed[1120:-16],
        "tag of the sealed seed": sealed[-16:],
    }


def _edits() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, message, edit): one change each to a message of the plain handshake."""
    done = shake("plain")
    server_key, ephemeral = (
        independent.xwing_public_key(seed) for seed in done.randomness.key_seeds
    )
    client, server = done.randomness.seals
    (nonce,) = (d for d in done.randomness.draws if d not in (client.plaintext, server.plaintext))
    known = {
        "configuration": (
            done.configuration,
            {
                **_halves("key", server_key),
                "identity": ServerIdentity(IDENTITY_SEED).pin.public_key,
                "signature": done.configuration[-64:],
            },
        ),
        "hello": (
            done.hello,
            {"nonce": nonce, **_halves("ephemeral key", ephemeral), **_sealed(client.sealed)},
        ),
        "welcome": (
            done.welcome,
            {**_sealed(server.sealed), "confirmation tag": done.at_client.confirmation_tag},
        ),
    }
    for kind, (message, values) in known.items():
        for region, position in _regions(message, values):
            mask = f"{1 << position % 8:02x}"
            yield f"{kind}: {region} changed", kind, {"offset": position, "xor": mask}
        for kept in (0, 1, len(message) // 2, len(message) - 1):
            yield f"{kind}: cut to {kept} bytes", kind, {"keep": kept}
        yield f"{kind}: one byte longer", kind, {"append": "00"}


def edited(message: bytes, edit: dict[str, Any]) -> bytes:
    """Applies one of the edits that README.md describes."""
    if "keep" in edit:
        return message[: edit["keep"]]
    if "append" in edit:
        return message + bytes.fromhex(edit["append"])
    damaged = bytearray(message)
    damaged[edit["offset"]] ^= int(edit["xor"], 16)
    return bytes(damaged)


#: name -> options of `shake` with which the client refuses the configuration.
REFUSED_CLOCKS: dict[str, dict[str, Any]] = {
    "configuration: one second too early": {"now_s": NOW_S - 301},
    "configuration: at its expiry": {"now_s": NOW_S - 300 + MAX_LIFETIME_S},
    "configuration: a year later": {"now_s": NOW_S + 365 * 86400},
    "configuration: clock at 1970": {"now_s": 0},
    "client without a common version": {"versions": (0x7F,)},
    "client without a common suite": {"suites": (0x7FFF,)},
    "pin of another server": {"pinned": bytes(range(1, 33))},
}


def refused_handshakes() -> dict[str, Any]:
    """What an end must refuse: edits of the plain handshake's messages, clocks, pins."""
    vectors: list[dict[str, Any]] = []
    receivers = {"configuration": "client", "hello": "server", "welcome": "client"}
    for name, kind, edit in _edits():

        def damage(message: bytes, edit: dict[str, Any] = edit) -> bytes:
            return edited(message, edit)

        error = _refusal(**{kind: damage})
        vectors.append(
            {
                "name": name,
                "handshake": "plain",
                "message": kind,
                "edit": edit,
                "refused_by": receivers[kind],
                "error": error,
            }
        )
    for name, options in REFUSED_CLOCKS.items():
        values: dict[str, Any] = {}
        if "now_s" in options:
            values["now"] = options["now_s"]
        if "pinned" in options:
            values["pin"] = str(ServerIdentity(options["pinned"]).pin)
        for field in ("versions", "suites"):
            if field in options:
                values[f"client_{field}"] = list(options[field])
        vectors.append(
            {
                "name": name,
                "handshake": "plain",
                "message": "configuration",
                "with": values,
                "refused_by": "client",
                "error": _refusal(**options),
            }
        )
    return {"vectors": vectors}


def _refusal(**options: Any) -> str:
    try:
        shake("plain", **options)
    except NearfarError as error:
        return error.code
    raise AssertionError(f"accepted: {options}")


def key_schedules() -> dict[str, Any]:
    """Secrets from seeds and transcript."""
    vectors = []
    cases = [(b"\x01" * 32, b"\x02" * 32, b"\x03" * 32), (bytes(32), bytes(32), bytes(32))]
    randomness = Randomness("key schedule")
    cases += [(randomness.bytes(32), randomness.bytes(32), randomness.bytes(32)) for _ in range(6)]
    for client_seed, server_seed, transcript in cases:
        secrets = derive_secrets(client_seed, server_seed, transcript)
        vectors.append(
            {
                "client_seed": client_seed.hex(),
                "server_seed": server_seed.hex(),
                "transcript": transcript.hex(),
                **{field: getattr(secrets, field).hex() for field in SECRET_NAMES},
            }
        )
    return {"vectors": vectors}


def pins() -> dict[str, Any]:
    """Texts that are pins, and texts that are not."""
    randomness = Randomness("pins")
    keys = [ServerIdentity(IDENTITY_SEED).pin.public_key, bytes(32), b"\xff" * 32]
    keys += [randomness.bytes(32) for _ in range(5)]
    good = str(Pin(keys[0]))
    swapped = "a" if good[10] != "a" else "b"
    refused = {
        "empty": "",
        "no prefix": good[4:],
        "another prefix": "nf2:" + good[4:],
        "too short": good[:-1],
        "too long": good + "a",
        "one character mistyped": good[:10] + swapped + good[11:],
        "two characters swapped": good[:20] + good[21] + good[20] + good[22:],
        "character outside base32": good[:10] + "1" + good[11:],
        "white space inside": good[:10] + " " + good[11:],
        "padding": good + "======",
        "spare bits set": _with_spare_bits(good),
    }
    for text in refused.values():
        try:
            Pin.parse(text)
        except NearfarError:
            continue
        raise AssertionError(f"accepted: {text}")
    return {
        "vectors": [{"public_key": key.hex(), "pin": str(Pin(key))} for key in keys],
        "refused": [{"name": name, "pin": text} for name, text in refused.items()],
    }


def _with_spare_bits(pin: str) -> str:
    # 36 bytes are 57.6 characters: the last one carries three bits of data and two spare ones.
    alphabet = "abcdefghijklmnopqrstuvwxyz234567"
    return pin[:-1] + alphabet[alphabet.index(pin[-1]) | 1]


# Records

HEADER_BYTES = records.OVERHEAD_BYTES - TAG_BYTES
LIMITS = {"records": 4, "size_bytes": 600}
SIZES = (0, 1, 15, 16, 17, 100, 127, 128, 129, 255, 256, 300, 601, 1)


def _made(kind: type, secret: bytes, suite: int, limits: dict[str, int]) -> Any:
    options: dict[str, Any] = {"limits": records.RekeyLimits(**limits)}
    if "suite" in inspect.signature(kind).parameters:
        options["suite"] = suite
    return kind(secret, **options)


def sealer(secret: bytes, suite: int, limits: dict[str, int] = LIMITS) -> Any:
    """nearfar's sending end under the vectors' limits."""
    return _made(records.RecordSealer, secret, suite, limits)


def opener(secret: bytes, suite: int) -> Any:
    """nearfar's receiving end under the vectors' limits."""
    return _made(records.RecordOpener, secret, suite, LIMITS)


def _streams() -> Iterator[tuple[str, bytes, int]]:
    for suite in SUPPORTED_SUITES:
        secrets = shake("plain", suites=(suite,)).at_client
        yield "client to server", secrets.client_traffic, suite
        yield "server to client", secrets.server_traffic, suite


def _record(record: bytes, secret: bytes) -> dict[str, Any]:
    header = record[:HEADER_BYTES]
    epoch, sequence = int.from_bytes(header[1:5], "big"), int.from_bytes(header[5:13], "big")
    key, nonce = independent.record_keys(secret, epoch, sequence)
    aead, protected = independent.open_record(record, HEADER_BYTES, secret, epoch, sequence)
    return {
        "epoch": epoch,
        "sequence": sequence,
        "aead": aead,
        "key": key.hex(),
        "nonce": nonce.hex(),
        "header": header.hex(),
        "protected": protected.hex(),
        "record": record.hex(),
    }


def _sealed_stream(secret: bytes, suite: int) -> list[tuple[bytes, bytes]]:
    sending = sealer(secret, suite)
    plaintexts = [bytes((size + index) % 256 for index in range(size)) for size in SIZES]
    return [(p, sending.seal(records.TYPE_MESSAGE, p)) for p in plaintexts]


def record_streams() -> dict[str, Any]:
    """Records of both directions and every suite, over several epochs, in order."""
    vectors = []
    for direction, secret, suite in _streams():
        sealed = _sealed_stream(secret, suite)
        vectors.append(
            {
                "name": f"{direction}, suite {suite:#06x}",
                "suite": suite,
                "traffic_secret": secret.hex(),
                "limits": LIMITS,
                "records": [
                    {"type": records.TYPE_MESSAGE, "plaintext": plaintext.hex(),
                     **_record(record, secret)}
                    for plaintext, record in sealed
                ],
            }
        )  # fmt: skip
    return {"vectors": vectors}


def refused_records() -> dict[str, Any]:
    """Deliveries of which the last record must be refused."""
    vectors = []
    streams = list(_streams())
    for direction, secret, suite in streams:
        sealed = [record for _, record in _sealed_stream(secret, suite)]
        (other,) = (s for d, s, u in streams if u == suite and d != direction)
        for name, delivered in _record_attacks(sealed, other, secret, suite):
            opens = _opened(opener(secret, suite), delivered)
            assert opens == len(delivered) - 1, name
            vectors.append(
                {
                    "name": f"{direction}, suite {suite:#06x}: {name}",
                    "suite": suite,
                    "traffic_secret": secret.hex(),
                    "limits": LIMITS,
                    "deliver": [record.hex() for record in delivered],
                }
            )
    return {"error": "security", "vectors": vectors}


def _opened(receiving: Any, delivered: list[bytes]) -> int:
    for count, record in enumerate(delivered):
        try:
            receiving.open(record)
        except NearfarError:
            return count
    return len(delivered)


def _record_attacks(
    sealed: list[bytes], other: bytes, secret: bytes, suite: int
) -> Iterator[tuple[str, list[bytes]]]:
    first, second, third = sealed[:3]
    for position in range(len(second)):
        flipped = edited(second, {"offset": position, "xor": f"{1 << position % 8:02x}"})
        yield f"bit of byte {position} changed", [first, flipped]
    for kept in sorted({0, 1, HEADER_BYTES, HEADER_BYTES + TAG_BYTES, len(second) - 1}):
        yield f"cut to {kept} bytes", [first, second[:kept]]
    yield "one byte longer", [first, second + b"\x00"]
    yield "replayed", [first, first]
    yield "replayed after an epoch", [*sealed[:6], first]
    yield "skipped", [first, third]
    yield "first one missing", [second]
    yield "two joined", [first + second]
    yield "header of the next", [second[:HEADER_BYTES] + first[HEADER_BYTES:]]
    yield "of the other direction", [sealer(other, suite).seal(records.TYPE_MESSAGE, b"")]
    late = sealer(secret, suite, {"records": 100, "size_bytes": 2**20})
    stale = [late.seal(records.TYPE_MESSAGE, b"") for _ in range(LIMITS["records"] + 1)]
    yield "key used longer than allowed", stale
    early = sealer(secret, suite, {"records": 1})
    fast = [early.seal(records.TYPE_MESSAGE, b"") for _ in range(3)]
    yield "epoch skipped", [fast[0], fast[2]]
    yield "old epoch again", [fast[0], fast[1], stale[2]]
