"""What is fuzzed: one function of bytes per parser. Any other error than the documented is a bug.

A target returns when the code under test behaved, and raises when it did not. They need no fuzzer:
`tests/test_fuzz_targets.py` runs each on its seed corpus.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fuzz import channel_targets, state_targets, trust_targets
from fuzz.common import IDENTITY, NOW_S, directory, joined, pieces
from nearfar.bundle.bundle import read_manifest
from nearfar.bundle.manifest import decode_manifest, encode_manifest
from nearfar.errors import BundleError, ConfigError, RemoteProtocolError, SecurityError
from nearfar.generation import GenerationOptions, Prompt
from nearfar.secure import frames as frame_layout
from nearfar.secure import records
from nearfar.secure.identity import Pin
from nearfar.secure.keys import KeyRing
from nearfar.session import ClientSession, ServerSession
from nearfar.wire import messages as wire
from nearfar.wire.codec import decode, encode
from nearfar.wire.connection import Connection, ConnectionState, Role
from nearfar.wire.limits import Limits
from sdk.config_file import parse_config
from sdk.policy import Policy, parse_policy
from sdk.policy.cases import outcome, parse_cases, run_case

__all__ = ["TARGETS", "joined", "pieces"]

LIMITS = Limits(
    max_message_bytes=1 << 16, max_header_bytes=1 << 14, max_unauthenticated_bytes=1 << 13,
    max_streams=8,
)  # fmt: skip
REQUEST_ID = bytes(range(16))
TOKEN = "t"


def raw(message: wire.Message, *tensors: np.ndarray) -> bytes:
    """One encoded message."""
    return b"".join(encode(message, tensors))


# Wire


def codec(data: bytes) -> None:
    """One message: what is understood can be said again, and means the same."""
    try:
        message, tensors = decode(data, LIMITS)
    except RemoteProtocolError:
        return
    again, same = decode(raw(message, *tensors), Limits())
    # Not compared with ==: a header may hold NaN.
    assert repr(again) == repr(message)
    for got, sent in zip(same, tensors, strict=True):
        assert got.dtype == sent.dtype
        assert got.shape == sent.shape
        assert got.tobytes() == sent.tobytes() if got.dtype != object else True


def request(stream: int) -> wire.Infer:
    """An `Infer` without tensors."""
    return wire.Infer(stream=stream, request_id=REQUEST_ID, model="m", tensors=())


def generation(stream: int) -> wire.Generate:
    """A `Generate` with credit enough."""
    return wire.Generate(
        stream=stream,
        request_id=REQUEST_ID,
        model="m",
        prompt=Prompt(text="x"),
        options=GenerationOptions(),
        credit=1000,
    )


def _ready() -> wire.Ready:
    return wire.Ready(
        protocol_version=wire.PROTOCOL_VERSION,
        server="fuzz",
        max_streams=LIMITS.max_streams,
        max_message_bytes=LIMITS.max_message_bytes,
    )


def opened(role: Role) -> Connection:
    """One end of an open connection with a stream of each kind, two of them cancelled."""
    ends = {other: Connection(other, LIMITS) for other in Role}
    client, server = ends[Role.CLIENT], ends[Role.SERVER]

    def deliver() -> None:
        for sender, receiver in ((client, server), (server, client)):
            for message in sender.data_to_send():
                receiver.receive(message)

    client.send(wire.Auth(token=TOKEN, client="c"))
    deliver()
    server.send(_ready())
    deliver()
    for message in (wire.ListModels(stream=1), request(2), generation(3), generation(4)):
        client.send(message)
    client.send(request(5))
    client.send(wire.Cancel(stream=4))
    client.send(wire.Cancel(stream=5))
    ends[role].send(wire.Ping(id=1))
    for message in client.data_to_send() if role is Role.SERVER else ():
        server.receive(message)
    ends[role].data_to_send()
    return ends[role]


def _converse(connection: Connection, data: bytes) -> None:
    for message in pieces(data):
        try:
            connection.receive(message)
        except RemoteProtocolError:
            assert connection.state is ConnectionState.CLOSED
            assert connection.receive(message) is None
        assert len(connection.open_streams) <= LIMITS.max_streams
        replies = connection.data_to_send()
        assert len(replies) <= 1
        assert sum(len(reply) for reply in replies) < 16_000


def connection_server(data: bytes) -> None:
    """What a client may say to a server."""
    _converse(opened(Role.SERVER), data)


def connection_client(data: bytes) -> None:
    """What a server may say to a client."""
    _converse(opened(Role.CLIENT), data)


def connection_new(data: bytes) -> None:
    """What comes before a connection is open; the first byte chooses the end."""
    role = Role.CLIENT if data[:1] == b"C" else Role.SERVER
    connection = Connection(role, LIMITS)
    if role is Role.CLIENT:
        connection.send(wire.Auth(token=TOKEN, client="c"))
        connection.data_to_send()
    _converse(connection, data[1:])


# Secure channel


@functools.cache
def ring() -> KeyRing:
    """One for all; it is what costs time."""
    return KeyRing(IDENTITY, now_s=NOW_S)


def new_server() -> ServerSession:
    return ServerSession(keys=ring(), limits=LIMITS, now_s=NOW_S)


def new_client() -> ClientSession:
    return ClientSession(pin=IDENTITY.pin, token=TOKEN, limits=LIMITS, now_s=NOW_S)


def _hear(session: ServerSession | ClientSession, message: bytes) -> None:
    was_closed = session.is_closed
    try:
        session.receive(message, now_s=NOW_S)
    except (SecurityError, RemoteProtocolError):
        assert session.is_closed
    assert session.is_closed or not was_closed
    session.data_to_send()


def session_server(data: bytes) -> None:
    """Whatever a stranger sends to a server."""
    server = new_server()
    server.data_to_send()
    for message in pieces(data):
        _hear(server, message)
    assert not server.is_ready


def session_client(data: bytes) -> None:
    """Whatever a server sends to a client; after an ``S`` the identity signs the first message.

    A fuzzer cannot make signatures; with them it gets behind the check.
    """
    client = new_client()
    for number, message in enumerate(pieces(data[1:])):
        if number == 0 and data[:1] == b"S":
            body = message[:-64]
            message = body + IDENTITY.sign(trust_targets.CONFIGURATION_PURPOSE + body)
        _hear(client, message)
    assert not client.is_ready


def exchange(client: ClientSession, server: ServerSession) -> None:
    """Delivers what either end has queued."""
    for sender, receiver in ((server, client), (client, server)):
        for message in sender.data_to_send():
            receiver.receive(message, now_s=NOW_S)


def connected() -> tuple[ClientSession, ServerSession]:
    """Both ends of a session that is ready."""
    client, server = new_client(), new_server()
    exchange(client, server)
    exchange(client, server)
    server.send(_ready())
    exchange(client, server)
    assert client.is_ready
    return client, server


def session_records(data: bytes) -> None:
    """What someone with the keys of a connection sends; the first byte chooses the end.

    Of each message the first byte is the type of the record and the rest what is sealed.
    """
    client, server = connected()
    attacker, victim = (server, client) if data[:1] == b"C" else (client, server)
    if victim is client:
        client.send(generation(1))
        exchange(client, server)
    sealer = attacker._sealer
    assert sealer is not None
    for message in pieces(data[1:]):
        record_type = message[0] if message else records.TYPE_MESSAGE
        _hear(victim, bytes(sealer.seal(record_type, message[1:])))


#: Of messages in pieces; small, so that a fuzzer finds what happens at the limit.
FRAMES_MAX_BYTES = 4096


def frames(data: bytes) -> None:
    """Plaintexts of records, one after the other: what messages they bring."""
    assembler = frame_layout.Assembler()
    for plaintext in pieces(data):
        try:
            found = assembler.feed(plaintext, max_message_bytes=FRAMES_MAX_BYTES)
        except RemoteProtocolError:
            return
        for arrived in found:
            if arrived.message is not None:
                assert len(arrived.message) <= FRAMES_MAX_BYTES
        assert assembler.unfinished <= frame_layout.MAX_UNFINISHED
        assert assembler.held_bytes <= FRAMES_MAX_BYTES


def pin(data: bytes) -> None:
    """The pin as somebody typed it."""
    try:
        parsed = Pin.parse(data.decode("utf-8", "replace"))
    except ConfigError:
        return
    assert Pin.parse(str(parsed)) == parsed


# Files


@functools.cache
def _directory() -> Path:
    """With the files that the example configuration names."""
    for name in ("ca.pem", "policy.toml", "release.pub", "client.key"):
        (directory() / name).touch()
    return directory()


def manifest(data: bytes) -> None:
    """A bundle's `manifest.json`."""
    (_directory() / "manifest.json").write_bytes(data)
    try:
        parsed, _ = read_manifest(_directory())
    except BundleError:
        return
    assert decode_manifest(encode_manifest(parsed)) == parsed


def policy(data: bytes) -> None:
    """A policy file."""
    try:
        parsed = parse_policy(data.decode("utf-8", "surrogateescape"))
    except ConfigError:
        return
    assert parse_policy(data.decode("utf-8")) == parsed


@functools.cache
def _policy() -> Policy:
    return parse_policy(
        'version = 1\n[[rule]]\nid = "a"\nwhen = { sensitivity = { at_most = "internal" } }\n'
        'effect = "cloud_ok"\nrequire = { padding = "balanced" }'
    )


def policy_cases(data: bytes) -> None:
    """A table of expectations for a policy."""
    try:
        cases = parse_cases(data.decode("utf-8", "surrogateescape"), _policy())
    except ConfigError:
        return
    for case in cases:
        result = run_case(_policy(), case)
        assert result.mismatch or outcome(result.verdict) == case.expect
        is_padded = case.facts.shaping in ("balanced", "strict")
        assert is_padded or not result.verdict.cloud


def config(data: bytes) -> None:
    """A nearfar.toml."""
    try:
        parsed = parse_config(data.decode("utf-8", "surrogateescape"), base=_directory())
    except ConfigError:
        return
    repr(parsed)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        codec,
        connection_server,
        connection_client,
        connection_new,
        session_server,
        session_client,
        session_records,
        frames,
        pin,
        trust_targets.token,
        trust_targets.issuers,
        trust_targets.key_configuration,
        trust_targets.key_ring,
        trust_targets.key_file,
        trust_targets.public_key,
        trust_targets.rotation,
        trust_targets.trust_file,
        trust_targets.signature,
        state_targets.routing_memory,
        state_targets.state_file,
        state_targets.decision,
        manifest,
        policy,
        policy_cases,
        config,
        channel_targets.websocket,
        channel_targets.pieces_of_messages,
        channel_targets.outbox,
    )
}
