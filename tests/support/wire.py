"""Both ends of a connection in memory, and Hypothesis strategies for what travels on it."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nearfar.bundle.manifest import FileEntry, Manifest, Variant
from nearfar.generation import ChatMessage, GenerationOptions, Prompt, Usage
from nearfar.secure.identity import ServerIdentity
from nearfar.secure.keys import KeyRing
from nearfar.session import ClientSession, Received, ServerSession
from nearfar.tensors import EXTENDED, NUMPY_OF, numpy_of
from nearfar.wire import messages as wire
from nearfar.wire.codec import describe
from nearfar.wire.limits import Limits

NOW_S = 1_800_000_000.0
IDENTITY = ServerIdentity(bytes(range(32)))
REQUEST_ID = bytes(range(16))
#: Small enough that a test can exceed it.
LIMITS = Limits(max_message_bytes=1 << 20, max_header_bytes=1 << 16, max_streams=4)


def ready(limits: Limits = LIMITS) -> wire.Ready:
    return wire.Ready(
        protocol_version=1,
        server="test",
        max_streams=limits.max_streams,
        max_message_bytes=limits.max_message_bytes,
    )


def infer(stream: int = 1, arrays: dict[str, np.ndarray] | None = None) -> wire.Infer:
    return wire.Infer(
        stream=stream, request_id=REQUEST_ID, model="m", tensors=describe(arrays or {})
    )


def result(stream: int = 1, arrays: dict[str, np.ndarray] | None = None) -> wire.Result:
    return wire.Result(
        stream=stream,
        tensors=describe(arrays or {}),
        variant="v",
        execution_provider="CPUExecutionProvider",
        queue_ms=0.0,
        compute_ms=1.0,
    )


def generate(stream: int = 1, credit: int = 100) -> wire.Generate:
    return wire.Generate(
        stream=stream,
        request_id=REQUEST_ID,
        model="m",
        prompt=Prompt(text="Hello"),
        options=GenerationOptions(),
        credit=credit,
    )


def resume(stream: int = 1, next_index: int = 0, credit: int = 100) -> wire.Resume:
    return wire.Resume(
        stream=stream,
        request_id=REQUEST_ID,
        ticket=bytes(32),
        next_index=next_index,
        credit=credit,
    )


def fin(stream: int, count: int, digest: bytes) -> wire.Fin:
    return wire.Fin(
        stream=stream,
        count=count,
        digest=digest,
        finish_reason="stop",
        usage=Usage(prompt_tokens=1, completion_tokens=count),
        variant="v",
        execution_provider="CPUExecutionProvider",
        queue_ms=0.0,
        prefill_ms=1.0,
        decode_ms=1.0,
    )


@dataclass
class Pair:
    """A client and a server session with nothing but this code between them."""

    client: ClientSession
    server: ServerSession
    at_client: list[Received] = field(default_factory=list)
    at_server: list[Received] = field(default_factory=list)

    @classmethod
    def new(cls, limits: Limits = LIMITS, identity: ServerIdentity = IDENTITY) -> Pair:
        keys = KeyRing(identity, now_s=NOW_S)
        return cls(
            ClientSession(pin=identity.pin, token="t", limits=limits, now_s=NOW_S),
            ServerSession(keys=keys, limits=limits, now_s=NOW_S),
        )

    @classmethod
    def connected(cls, limits: Limits = LIMITS) -> Pair:
        """Handshake done, `Ready` received."""
        pair = cls.new(limits)
        pair.exchange()
        pair.server.send(ready(limits))
        pair.exchange()
        pair.at_client.clear()
        pair.at_server.clear()
        return pair

    def to_client(self) -> None:
        """Deliver what the server has queued."""
        for data in self.server.data_to_send():
            self.at_client += self.client.receive(data, now_s=NOW_S)

    def to_server(self) -> None:
        """Deliver what the client has queued."""
        for data in self.client.data_to_send():
            self.at_server += self.server.receive(data, now_s=NOW_S)

    def exchange(self) -> None:
        """Deliver everything in both directions until both are silent."""
        for _ in range(4):
            self.to_client()
            self.to_server()


# Strategies

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_stream = st.integers(1, 2**32 - 1)
_ms = st.floats(0, 1e9)
_request_id = st.binary(min_size=16, max_size=16)
_trace = st.just(b"") | st.binary(min_size=24, max_size=24).map(lambda b: b"\1" + b[1:-1] + b"\1")
_optional_text = st.none() | _text
_usage = st.builds(
    Usage, prompt_tokens=st.integers(0, 2**40), completion_tokens=st.integers(0, 2**40)
)
_prompt = st.builds(
    Prompt,
    text=_optional_text,
    messages=st.lists(st.builds(ChatMessage, role=_text, content=_text), max_size=3).map(tuple),
    answer_so_far=_text,
)
_options = st.builds(
    GenerationOptions,
    max_new_tokens=st.integers(0, 2**31),
    temperature=st.floats(0, 2),
    seed=st.none() | st.integers(0, 2**63),
    stop=st.lists(_text, max_size=2).map(tuple),
)
_variant = st.builds(
    Variant,
    id=_text,
    engine=st.just("onnxruntime"),
    precision=_text,
    entry=_text,
    files=st.lists(
        st.builds(FileEntry, path=_text, size_bytes=st.integers(0, 2**40), sha256=_text), max_size=2
    ).map(tuple),
)
_manifest = st.builds(
    Manifest,
    name=_text,
    version=_text,
    task=st.just("tensor"),
    variants=st.lists(_variant, max_size=2).map(tuple),
)
_offer = st.builds(wire.ModelOffer, manifest=_manifest, variant=_text, queue_ms=_ms)

#: Without the package ml_dtypes these are tested where it is installed.
EXTENDED_DTYPES = (
    [numpy_of(datatype) for datatype in EXTENDED] if importlib.util.find_spec("ml_dtypes") else []
)
_NUMBERS = [dtype for name, dtype in NUMPY_OF.items() if name != "BYTES"]
_shape = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


def _objects(shape: tuple[int, ...], values: list[bytes]) -> np.ndarray:
    array = np.empty(math.prod(shape), dtype=object)
    for index in range(len(array)):
        array[index] = values[index % len(values)]
    return array.reshape(shape)


_bytes_array = st.builds(_objects, _shape, st.lists(st.binary(max_size=9), min_size=1, max_size=5))


def _extended(dtype: np.dtype, bits: np.ndarray) -> np.ndarray:
    """Any bits as that type; the high half of a 4-bit element's byte is not its own."""
    if dtype.itemsize == 2:
        return bits.view(dtype)
    return (bits & (0x0F if "int4" in dtype.name else 0xFF)).astype(np.uint8).view(dtype)


_extended_array = st.builds(
    lambda dtype, bits: _extended(dtype, bits),
    st.sampled_from(EXTENDED_DTYPES or [np.dtype(np.uint16)]),
    hnp.arrays(np.uint16, _shape),
)


def _reordered(array: np.ndarray, how: int) -> np.ndarray:
    """The same kind of array, not contiguous in memory."""
    if array.ndim == 0 or how == 0:
        return array
    return array.T if how == 1 else array[::-1] if how == 2 else array[..., ::2]


arrays = st.builds(
    _reordered,
    st.sampled_from(_NUMBERS).flatmap(lambda dtype: hnp.arrays(dtype, _shape))
    | _extended_array
    | _bytes_array,
    st.integers(0, 3),
)
named_arrays = st.dictionaries(_text, arrays, max_size=4)

#: Every message that carries no tensors.
plain_messages = st.one_of(
    st.builds(wire.Auth, token=_text, client=_text, proof=st.sampled_from([b"", bytes(64)])),
    st.builds(
        wire.Ready,
        protocol_version=st.just(1),
        server=_text,
        max_streams=st.integers(1, 99),
        max_message_bytes=st.integers(1, 2**30),
        region=_text,
        resume_key=st.just(b"") | st.binary(min_size=32, max_size=32),
    ),
    st.builds(wire.ListModels, stream=_stream),
    st.builds(wire.Models, stream=_stream, models=st.lists(_offer, max_size=2).map(tuple)),
    st.builds(
        wire.Generate,
        stream=_stream,
        request_id=_request_id,
        model=_text,
        prompt=_prompt,
        options=_options,
        credit=st.integers(0, 2**31 - 1),
        version=_optional_text,
        variant=_optional_text,
        deadline_ms=st.none() | _ms,
        priority=st.integers(0, 9),
        trace=_trace,
    ),
    st.builds(wire.Token, stream=_stream, index=st.integers(0, 2**63), text=_text),
    st.builds(
        wire.Fin,
        stream=_stream,
        count=st.integers(0, 2**63),
        digest=st.binary(min_size=32, max_size=32),
        finish_reason=st.sampled_from(["stop", "length", "stop_string", "cancelled", "deadline"]),
        usage=_usage,
        variant=_text,
        execution_provider=_text,
        queue_ms=_ms,
        prefill_ms=_ms,
        decode_ms=_ms,
    ),
    st.builds(wire.Cancel, stream=_stream),
    st.builds(
        wire.Credit,
        stream=_stream,
        tokens=st.integers(1, 2**31 - 1),
        received=st.integers(0, 2**63),
    ),
    st.builds(
        wire.Resume,
        stream=_stream,
        request_id=_request_id,
        ticket=st.binary(min_size=32, max_size=32),
        next_index=st.integers(0, 2**63),
        credit=st.integers(0, 2**31 - 1),
    ),
    st.builds(wire.Ping, id=st.integers(0, 2**64 - 1)),
    st.builds(wire.Pong, id=st.integers(0, 2**64 - 1)),
    st.builds(wire.GoAway, last_stream=st.integers(0, 2**32 - 1), reason=_text),
    st.builds(wire.Error, stream=st.integers(0, 2**32 - 1), code=_text, problem=_text, fix=_text),
)


def _with_tensors(named: dict[str, np.ndarray]) -> st.SearchStrategy[wire.Message]:
    headers = st.just(describe(named))
    return st.builds(
        wire.Infer,
        stream=_stream,
        request_id=_request_id,
        model=_text,
        tensors=headers,
        version=_optional_text,
        deadline_ms=st.none() | _ms,
        priority=st.integers(0, 9),
        trace=_trace,
    ) | st.builds(
        wire.Result,
        stream=_stream,
        tensors=headers,
        variant=_text,
        execution_provider=_text,
        queue_ms=_ms,
        compute_ms=_ms,
    )


#: (message, its tensors), for every kind of message and every dtype.
messages = st.one_of(
    plain_messages.map(lambda message: (message, ())),
    named_arrays.flatmap(
        lambda named: st.tuples(_with_tensors(named), st.just(tuple(named.values())))
    ),
)
