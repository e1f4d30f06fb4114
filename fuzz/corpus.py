"""Where fuzzing starts: the test vectors, and the examples of the documentation."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fuzz import channel_corpus, state_corpus, targets, trust_corpus
from fuzz.common import joined
from nearfar.bundle.manifest import (
    FileEntry,
    HeadTailPreprocessing,
    LatencyFigure,
    Manifest,
    QualityFigure,
    Requirements,
    Task,
    TensorSpec,
    TextPreprocessing,
    Variant,
    encode_manifest,
)
from nearfar.secure import frames as layout
from nearfar.secure.records import TYPE_MESSAGE
from nearfar.wire import messages as wire

ROOT = Path(__file__).resolve().parents[1]
VECTORS = ROOT / "tests" / "vectors"

#: Targets whose format is text: a fuzzer gets its words.
TEXTS = (
    "policy", "policy_cases", "config", "manifest", "token", "issuers", "rotation", "trust_file",
    "signature", "routing_memory", "state_file",
)  # fmt: skip

#: More is slower and finds nothing new.
MAX_SEED_BYTES = 8192


def _vectors(name: str) -> list[dict[str, Any]]:
    vectors: list[dict[str, Any]] = json.loads((VECTORS / name).read_text())["vectors"]
    return vectors


def _messages() -> list[bytes]:
    names = ("codec.json", "codec_refused.json")
    return [bytes.fromhex(vector["message"]) for name in names for vector in _vectors(name)]


def _conversations() -> Iterator[bytes]:
    messages = [message for message in _messages() if len(message) < 2000]
    for message in messages:
        yield joined(message)
    for start in range(0, len(messages), 8):
        yield joined(*messages[start : start + 8])


def _prefixed(prefixes: bytes, seeds: Iterator[bytes]) -> Iterator[bytes]:
    for seed in seeds:
        for prefix in prefixes:
            yield bytes([prefix]) + seed


class _Listening:
    """Stands before a sealer and writes down what is sealed."""

    def __init__(self, sealer: Any) -> None:
        self._sealer = sealer
        self.heard: list[bytes] = []

    def seal(self, record_type: int, plaintext: Any, **options: Any) -> Any:
        self.heard.append(bytes([record_type]) + bytes(plaintext))
        return self._sealer.seal(record_type, plaintext, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sealer, name)


def _records() -> Iterator[bytes]:
    """What two honest ends seal, whatever the layout; and what neither of them would."""
    client, server = targets.connected()
    ends: dict[bytes, tuple[Any, _Listening]] = {}
    for victim, end in ((b"S", client), (b"C", server)):
        ends[victim] = (end, _Listening(end._sealer))  # type: ignore[attr-defined]
        end._sealer = ends[victim][1]  # type: ignore[attr-defined]
    client.send(targets.generation(1))
    client.send(targets.request(2))
    client.send(wire.ListModels(stream=3))
    targets.exchange(client, server)
    client.send(wire.Credit(stream=1, tokens=9))
    client.send(wire.Cancel(stream=2))
    client.send(wire.Ping(id=1))
    server.send(wire.Token(stream=1, index=0, text="near, far"))
    server.send(wire.Error(stream=1, code="engine", problem="It broke"))
    server.send(wire.GoAway(last_stream=9, reason="update"))
    targets.exchange(client, server)
    for victim, (_, listening) in ends.items():
        assert listening.heard
        yield victim + joined(*listening.heard)
        for content in listening.heard:
            yield victim + joined(content)
            yield victim + joined(content, content)
    for message in _messages():
        if len(message) < 500:
            yield b"S" + joined(bytes([TYPE_MESSAGE]) + message)


def _handshakes(*names: str) -> Iterator[bytes]:
    for vector in _vectors("handshake.json"):
        yield joined(*(bytes.fromhex(vector[name]) for name in names))


def _frames() -> Iterator[bytes]:
    """Whole messages, several in a record, one in pieces, two in turns, and padding."""
    short = [layout.frame((b"near",), 4), layout.frame((b"far!",), 4, 128)]
    pieces: list[list[bytes]] = []
    for number in (1, 2):
        message = bytes(range(200)) * 2
        long = layout.Pieces(
            (message,), len(message), stream=number, number=number, record_bytes=128
        )
        pieces.append([long.take() for _ in range(long.count)])
    yield joined(*short)
    yield joined(b"".join(short))
    yield joined(*pieces[0])
    yield joined(*(piece for both in zip(*pieces, strict=True) for piece in both))
    yield joined(pieces[0][0], *short, *pieces[0][1:])
    yield joined(*pieces[0], *pieces[0])
    yield joined(pieces[0][1])
    yield joined(bytes(128))


def _pins() -> Iterator[bytes]:
    content = json.loads((VECTORS / "pins.json").read_text())
    for vector in content["vectors"] + content["refused"]:
        yield vector["pin"].encode()


def _toml(name: str) -> Iterator[bytes]:
    """The examples of a page of the documentation, whole and table by table."""
    text = (ROOT / "docs" / "reference" / name).read_text()
    pin = next(_pins()).decode()
    text = re.sub(r'"nf1:[^"]*"', f'"{pin}"', text)  # the page shows only its beginning
    for example in re.findall(r"```toml\n(.*?)```", text, re.S):
        yield example.encode()
        for part in re.split(r"\n(?=\[)", example):
            yield part.encode() if name != "policy.md" else b"version = 1\n" + part.encode()


def _cases() -> Iterator[bytes]:
    """The example of the documentation, for a rule that the harness's policy has; and others."""
    page = (ROOT / "docs" / "reference" / "policy.md").read_text()
    (example,) = re.findall(r"```toml\n(# cases.toml\n.*?)```", page, re.S)
    yield example.replace('"clinic-2"', '"a"').encode()
    for shaping, attested, expect in (("off", "true", "denied"), ("strict", "false", "edge_only")):
        yield (
            f'[[case]]\nmodel = "m"\nsensitivity = "public"\nshaping = "{shaping}"\n'
            f'attested = {attested}\nexpect = "{expect}"\nregion = "eu"\nnetwork = "wifi"\n'
        ).encode()


def _manifest(task: Task, **fields: Any) -> bytes:
    def file(path: str) -> FileEntry:
        return FileEntry(path=path, size_bytes=8, sha256="0" * 64)

    variant = Variant(
        id="fp32",
        engine="onnxruntime",
        precision="fp32",
        entry="fp32/model.onnx",
        files=(file("fp32/model.onnx"),),
        requirements=Requirements(sm_arch="87", memory_bytes=1 << 20),
        quality=(
            QualityFigure(
                metric="perplexity", value=9.5, higher_is_better=False, samples=8, reference="x"
            ),
        ),
        latency=(
            LatencyFigure(
                machine="m", execution_provider="CPUExecutionProvider", p50_ms=1.0, p99_ms=2.5,
                calls=9,
            ),
        ),
    )  # fmt: skip
    tensors = {
        "inputs": (TensorSpec(name="x", datatype="INT32", shape=(-1, 4)),),
        "outputs": (TensorSpec(name="y", datatype="FP32", shape=(-1, 2)),),
    }
    manifest = Manifest(
        name="tiny",
        version="1.0.0",
        task=task,
        variants=(variant,),
        files=(file("tokenizer.json"),),
        **{**tensors, **fields},
    )
    return encode_manifest(manifest)


def _manifests() -> Iterator[bytes]:
    """One that holds together for each task."""
    yield _manifest("tensor")
    yield _manifest("text-generation", context_length_tokens=512, inputs=(), outputs=())
    text = TextPreprocessing(tokenizer="tokenizer.json", max_length_tokens=64)
    yield _manifest("embedding", preprocessing=text, embedding_output="y", mixed_routes=True)
    ends = HeadTailPreprocessing(head_bytes=8, tail_bytes=8, block_bytes=64, padding_value=256)
    yield _manifest("classification", preprocessing=ends, label_output="y", labels=("a", "b"))


SEEDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "codec": lambda: iter(_messages()),
    "connection_server": _conversations,
    "connection_client": _conversations,
    "connection_new": lambda: _prefixed(b"CS", _conversations()),
    "session_server": lambda: _handshakes("hello"),
    "session_client": lambda: _prefixed(b"S-", _handshakes("configuration", "welcome")),
    "session_records": _records,
    "frames": _frames,
    "pin": _pins,
    "token": trust_corpus.tokens,
    "issuers": trust_corpus.issuers,
    "key_configuration": trust_corpus.key_configurations,
    "key_ring": trust_corpus.key_ring_clocks,
    "key_file": trust_corpus.key_files,
    "public_key": trust_corpus.public_keys,
    "rotation": trust_corpus.rotations,
    "trust_file": trust_corpus.trust_files,
    "signature": trust_corpus.signatures,
    "routing_memory": state_corpus.memories,
    "state_file": state_corpus.memories,
    "decision": state_corpus.decisions,
    "manifest": _manifests,
    "policy": lambda: _toml("policy.md"),
    "policy_cases": _cases,
    "config": lambda: _toml("configuration.md"),
    "websocket": channel_corpus.websockets,
    "pieces_of_messages": channel_corpus.pieces,
    "outbox": channel_corpus.queues,
}


def seeds(target: str) -> list[bytes]:
    """The seed corpus of a target, without repetition."""
    return list(dict.fromkeys(seed for seed in SEEDS[target]() if len(seed) <= MAX_SEED_BYTES))


def write(target: str, directory: Path) -> int:
    """Writes the seed corpus; returns how many files it has."""
    directory.mkdir(parents=True, exist_ok=True)
    found = seeds(target)
    for seed in found:
        (directory / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    return len(found)


def write_dictionary(target: str, file: Path) -> bool:
    """Words of the text formats, which a fuzzer would take long to spell; whether there are any."""
    words: set[str] = set()
    if target in TEXTS:
        for seed in seeds(target):
            words |= set(re.findall(r"[A-Za-z_]{3,24}", seed.decode("utf-8", "replace")))
    file.write_text("".join(f'"{word}"\n' for word in sorted(words)))
    return bool(words)
