"""A client and a server around the sans-IO sessions, as small as they can be and still be honest.

The server keeps answers with `Retention` and runs a request id once; the client reconnects and
resumes with tickets. What asyncio does in the real shells is an event of the virtual clock here.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from nearfar.errors import NearfarError, ResumeMissed, from_code
from nearfar.generation import GenerationOptions, Prompt
from nearfar.secure.handshake import derive_secrets
from nearfar.secure.keys import SUPPORTED_SUITES, KeyRing
from nearfar.secure.shaping import Shaping
from nearfar.session import ClientSession, Received, ServerSession
from nearfar.wire import messages as wire
from nearfar.wire.codec import describe
from nearfar.wire.retention import Kept, Retention, RetentionLimits, ticket_for
from tests.simulator.link import Clock, Faults, Wire
from tests.support.wire import IDENTITY, LIMITS, NOW_S, fin, ready

CREDIT = 8
#: How often the client pings, and how long it bears silence.
PING_S, SILENCE_S = 0.5, 2.0
SCOPE = "the client"
RETENTION = RetentionLimits(keep_s=3.0, answer_bytes=20_000, client_bytes=40_000)


class Forgery(AssertionError):
    """An end took something that the other one did not send on this connection."""


class Ledger:
    """What one connection's ends said, to compare with what was heard."""

    def __init__(self) -> None:
        self._said: dict[str, Counter[str]] = {"client": Counter(), "server": Counter()}

    def said(self, by: str, message: wire.Message, tensors: Sequence[np.ndarray]) -> None:
        self._said[by][_print_of(message, tensors)] += 1
        if isinstance(message, wire.Ping):
            self._said["server"][_print_of(wire.Pong(id=message.id), ())] += 1

    def heard(self, of: str, received: Received) -> None:
        found = _print_of(received.message, received.tensors)
        if not self._said[of][found]:
            raise Forgery(f"nobody said {type(received.message).__name__}")
        self._said[of][found] -= 1


def _print_of(message: wire.Message, tensors: Sequence[np.ndarray]) -> str:
    # `Auth` gets its proof, and `Ready` its shaping, inside the session, which also makes `Pong`.
    if isinstance(message, (wire.Auth, wire.Ready)):
        return type(message).__name__
    return repr(message) + "".join(hashlib.sha256(t.tobytes()).hexdigest() for t in tensors)


class End:
    """One end of one connection: a session, and the shell's work."""

    def __init__(
        self,
        name: str,
        session: ClientSession | ServerSession,
        link: Wire,
        clock: Clock,
        ledger: Ledger,
        on_message: Callable[[Received], None],
        on_end: Callable[[], None],
    ) -> None:
        self.session = session
        self.is_over = False
        self._name = name
        self._peer = "server" if name == "client" else "client"
        self._link = link
        self._clock = clock
        self._ledger = ledger
        self._on_message = on_message
        self._on_end = on_end
        self._flush_at_s: float | None = None
        link.deliver[name] = self._receive
        link.lost[name] = self._lost

    def say(self, message: wire.Message, tensors: Sequence[np.ndarray] = ()) -> None:
        self._ledger.said(self._name, message, tensors)
        self.session.send(message, tensors)

    def flush(self) -> None:
        """Send what may leave now, and come back when the session says so."""
        while (data := self.session.next_to_send(self._clock.now_s)) is not None:
            self._link.send(self._peer, bytes(data))
        due_s = self.session.next_flush_s()
        if due_s is not None and due_s != self._flush_at_s:
            self._flush_at_s = due_s
            self._clock.after(max(0.0, due_s - self._clock.now_s), self._on_tick)

    def _on_tick(self) -> None:
        self._flush_at_s = None
        if not self.is_over:
            self.flush()

    def _receive(self, data: bytes) -> None:
        if self.is_over:
            return
        try:
            heard = self.session.receive(data, now_s=NOW_S + self._clock.now_s)
        except NearfarError:
            assert self.session.is_closed
            heard = []
        for received in heard:
            self._ledger.heard(self._peer, received)
            self._on_message(received)
        self.flush()
        if self.session.is_closed:
            self._link.cut()

    def _lost(self) -> None:
        if not self.is_over:
            self.is_over = True
            self.session.close()
            self._on_end()


@dataclass
class Job:
    """One request of the client, and what became of it.

    Attributes:
        tokens: What a right answer to a generation is; `None` for a batch.
        array: Input of a batch, which is given back.
        text: What arrived.
        outcome: ``done``, or the code of the error it ended in.
    """

    request_id: bytes
    tokens: list[str] | None
    array: np.ndarray | None
    text: list[str] = field(default_factory=list)
    result: np.ndarray | None = None
    outcome: str = ""
    stream: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    keys: list[bytes] = field(default_factory=list)  # resume keys the server may hold, newest last
    tried: bytes = b""
    is_confirmed: bool = False  # something came on this connection


class _Answer:
    """One generation of the server, whether or not somebody reads it."""

    def __init__(self, kept: Kept, tokens: list[str]) -> None:
        self.kept = kept
        self.tokens = tokens
        self.made = 0
        self.reader: _Reader | None = None
        self.is_stopped = False


class _Reader:
    """A stream on which an answer is sent."""

    def __init__(self, answer: _Answer, at: _Serving, stream: int, index: int) -> None:
        self.answer, self.at, self.stream, self.index = answer, at, stream, index


class Server:
    """All connections of one server."""

    def __init__(self, clock: Clock, rng: random.Random, jobs: dict[bytes, Job]) -> None:
        self.clock, self.rng = clock, rng
        self.keys = KeyRing(IDENTITY, now_s=NOW_S)
        self.retention = Retention(RETENTION)
        self.answers: dict[bytes, _Answer] = {}
        self.results: dict[bytes, np.ndarray] = {}
        self.runs: Counter[bytes] = Counter()
        self.jobs = jobs
        self.given_up: set[bytes] = set()
        self.most_kept_bytes = 0

    def look_after(self) -> None:
        """Give up what nobody came back for."""
        for kept in [*self.retention.expire(self.clock.now_s), *self.retention.given_up]:
            answer = self.answers.pop(kept.key[1], None)
            if answer is not None:
                answer.is_stopped = True
                self.given_up.add(kept.key[1])
        self.retention.given_up.clear()
        self.most_kept_bytes = max(self.most_kept_bytes, self.retention.size_bytes)

    def work(self, answer: _Answer) -> None:
        """Make one token, and come again."""
        if answer.is_stopped or answer.made == len(answer.tokens):
            return
        if answer.reader is not None or not self.retention.is_full(answer.kept):
            self.retention.add(answer.kept, answer.tokens[answer.made])
            answer.made += 1
            self.look_after()
            self.send(answer)
        self.clock.after(self.rng.uniform(0.001, 0.05), lambda: self.work(answer))

    def send(self, answer: _Answer) -> None:
        """Send what the reader has credit for, and the end when it has all."""
        reader = answer.reader
        if reader is None or reader.at.end.session.is_closed:
            return
        session, stream = reader.at.end.session, reader.stream
        while reader.index < answer.kept.next_index and session.credit(stream) > 0:
            (text,) = answer.kept.since(reader.index, 1)
            reader.at.end.say(wire.Token(stream=stream, index=reader.index, text=text))
            reader.index += 1
        if reader.index == len(answer.tokens):
            reader.at.end.say(fin(stream, reader.index, session.digest(stream)))
            answer.reader = None
            self.retention.leave(answer.kept, self.clock.now_s, is_running=False)
        reader.at.end.flush()


class _Serving:
    """The server's end of one connection."""

    def __init__(self, server: Server, link: Wire, ledger: Ledger) -> None:
        self.server = server
        self.resume_key = server.rng.randbytes(32)
        session = ServerSession(keys=server.keys, limits=LIMITS, now_s=NOW_S + server.clock.now_s)
        self.end = End("server", session, link, server.clock, ledger, self._hear, self._ended)

    def _hear(self, received: Received) -> None:
        message = received.message
        if isinstance(message, wire.Auth):
            self.end.say(
                wire.Ready(
                    protocol_version=1,
                    server="simulated",
                    max_streams=ready().max_streams,
                    max_message_bytes=ready().max_message_bytes,
                    resume_key=self.resume_key,
                )
            )
        elif isinstance(message, wire.Infer):
            self._infer(message, received.tensors)
        elif isinstance(message, wire.Generate):
            self._generate(message)
        elif isinstance(message, wire.Resume):
            self._resume(message)
        elif isinstance(message, wire.Credit):
            for answer in self.server.answers.values():
                reader = answer.reader
                if reader is not None and reader.at is self and reader.stream == message.stream:
                    self.server.retention.acknowledge(answer.kept, message.received)
                    self.server.send(answer)

    def _infer(self, message: wire.Infer, tensors: Sequence[np.ndarray]) -> None:
        results = self.server.results
        if message.request_id not in results:
            self.server.runs[message.request_id] += 1
            results[message.request_id] = np.array(tensors[0])
        outputs = {"y": results[message.request_id]}
        answer = wire.Result(
            stream=message.stream,
            tensors=describe(outputs),
            variant="v",
            execution_provider="CPUExecutionProvider",
            queue_ms=0.0,
            compute_ms=1.0,
        )
        self.end.say(answer, list(outputs.values()))

    def _generate(self, message: wire.Generate) -> None:
        server, request_id = self.server, message.request_id
        ticket = ticket_for(self.resume_key, request_id)
        answer = server.answers.get(request_id)
        if answer is not None and answer.kept.first == 0:
            server.retention.read(answer.kept, ticket)
        else:
            tokens = server.jobs[request_id].tokens
            assert tokens is not None
            server.runs[request_id] += 1
            kept = server.retention.begin((SCOPE, request_id), None, ticket)
            answer = server.answers[request_id] = _Answer(kept, tokens)
            server.clock.after(0.01, lambda: server.work(answer))
        answer.reader = _Reader(answer, self, message.stream, 0)
        server.send(answer)

    def _resume(self, message: wire.Resume) -> None:
        server = self.server
        try:
            kept = server.retention.resume(
                (SCOPE, message.request_id),
                message.ticket,
                message.next_index,
                new_ticket=ticket_for(self.resume_key, message.request_id),
                now_s=server.clock.now_s,
            )
        except ResumeMissed as missed:
            self.end.say(
                wire.Error(
                    stream=message.stream, code=missed.code, problem=missed.problem, fix=missed.fix
                )
            )
            return
        answer = server.answers[message.request_id]
        self.end.session.carry_over(message.stream, kept.digest_at(message.next_index))
        answer.reader = _Reader(answer, self, message.stream, message.next_index)
        server.send(answer)

    def _ended(self) -> None:
        server = self.server
        for answer in server.answers.values():
            if answer.reader is not None and answer.reader.at is self:
                answer.reader = None
                is_running = answer.made < len(answer.tokens)
                server.retention.leave(answer.kept, server.clock.now_s, is_running=is_running)
        server.look_after()
        if server.retention.next_expiry_s is not None:
            server.clock.after(RETENTION.keep_s + 0.01, server.look_after)


class Client:
    """An app that wants all its jobs done, over as many connections as it takes."""

    MAX_CONNECTIONS = 10

    def __init__(
        self,
        server: Server,
        jobs: list[Job],
        faults: Faults,
        shaping: Shaping,
        *,
        is_short: bool,
    ) -> None:
        self._server, self._clock, self._rng = server, server.clock, server.rng
        self._jobs = jobs
        self._faults = faults
        self._shaping = shaping
        self._is_short = is_short
        self.connections = 0
        self.most_held_bytes = 0
        self._connect()

    @property
    def is_done(self) -> bool:
        return all(job.outcome for job in self._jobs)

    def _connect(self) -> None:
        if self.is_done:
            return
        if self.connections == self.MAX_CONNECTIONS:
            for job in self._jobs:
                job.outcome = job.outcome or "cloud_unavailable"
            return
        self.connections += 1
        self._pings_unanswered, self._silent_s = 0, 0.0
        link = Wire(self._clock, self._rng, self._faults)
        ledger = Ledger()
        session = ClientSession(
            pin=IDENTITY.pin,
            token="t",
            limits=LIMITS,
            shaping=self._shaping,
            now_s=NOW_S + self._clock.now_s,
        )
        self._end = End("client", session, link, self._clock, ledger, self._hear, self._ended)
        serving = _Serving(self._server, link, ledger)
        ledger.said("client", wire.Auth(), ())
        if self._is_short:
            self._skip_handshake(session, serving.end.session)
        serving.end.flush()
        self._end.flush()
        self._watch(self._end, link)

    def _watch(self, end: End, link: Wire) -> None:
        """Ping now and then, as shells do: only what follows shows that something was dropped."""
        if end.is_over or self.is_done:
            return
        if self._pings_unanswered or not end.session.is_ready:
            self._silent_s += PING_S
        else:
            self._silent_s = 0.0
        if self._silent_s > SILENCE_S:
            link.cut()
            return
        if end.session.is_ready and not self._pings_unanswered:
            self._pings_unanswered += 1
            end.say(wire.Ping(id=self._clock.ticks))
            end.flush()
        self._clock.after(PING_S, lambda: self._watch(end, link))

    def _skip_handshake(self, client: ClientSession, server: ServerSession) -> None:
        """Give both ends the keys of a handshake that nobody disturbed; the real one takes 2 ms."""
        server.data_to_send()
        shared = derive_secrets(*(self._rng.randbytes(32) for _ in range(3)))
        suite = self._rng.choice(SUPPORTED_SUITES)
        client._install(shared.client_traffic, shared.server_traffic, suite)
        server._install(shared.server_traffic, shared.client_traffic, suite)
        client.send(client._auth)

    def _ended(self) -> None:
        for job in self._jobs:
            job.stream = 0
        self._clock.after(self._rng.uniform(0.0, 0.3), self._connect)

    def _hear(self, received: Received) -> None:
        message = received.message
        if isinstance(message, wire.Pong):
            self._pings_unanswered = 0
            return
        if isinstance(message, wire.Ready):
            self._resume_key = message.resume_key
            for job in self._jobs:
                if not job.outcome:
                    self._ask(job)
            return
        job = next((j for j in self._jobs if j.stream == getattr(message, "stream", 0)), None)
        if job is None or job.stream == 0:
            return
        if isinstance(message, wire.Token):
            self._confirm(job)
            assert message.index == len(job.text), "a token was lost or repeated"
            job.text.append(message.text)
            session = self._end.session
            job.digest.update(message.text.encode())
            # `Fin` may have come in the same record.
            if session.is_open(job.stream) and session.credit(job.stream) <= CREDIT // 2:
                self._end.say(wire.Credit(stream=job.stream, tokens=CREDIT, received=len(job.text)))
        elif isinstance(message, wire.Fin):
            job.outcome, job.stream = "done", 0
        elif isinstance(message, wire.Result):
            job.result = np.array(received.tensors[0])
            job.outcome, job.stream = "done", 0
        elif isinstance(message, wire.Error):
            job.stream = 0
            self._failed(job, from_code(message.code, message.problem, message.fix))

    def _confirm(self, job: Job) -> None:
        if not job.is_confirmed:
            job.is_confirmed = True
            job.keys = [self._resume_key]

    def _failed(self, job: Job, error: NearfarError) -> None:
        # Refused, so the server holds neither the ticket that was tried nor this connection's.
        job.keys = [key for key in job.keys if key not in (job.tried, self._resume_key)]
        if isinstance(error, ResumeMissed) and job.keys:
            self._ask(job)
        else:
            job.outcome = error.code

    def _ask(self, job: Job) -> None:
        session = self._end.session
        assert isinstance(session, ClientSession)
        job.stream, job.is_confirmed = session.next_stream, False
        if job.array is not None:
            self._end.say(
                wire.Infer(
                    stream=job.stream,
                    request_id=job.request_id,
                    model="m",
                    tensors=describe({"x": job.array}),
                ),
                [job.array],
            )
        elif not job.text:
            # Nothing came yet: the same request again, which is run once.
            job.keys = [self._resume_key]
            self._end.say(
                wire.Generate(
                    stream=job.stream,
                    request_id=job.request_id,
                    model="m",
                    prompt=Prompt(text="Hello"),
                    options=GenerationOptions(),
                    credit=CREDIT,
                )
            )
        else:
            job.tried = job.keys[-1]
            self._end.say(
                wire.Resume(
                    stream=job.stream,
                    request_id=job.request_id,
                    ticket=ticket_for(job.tried, job.request_id),
                    next_index=len(job.text),
                    credit=CREDIT,
                )
            )
            session.carry_over(job.stream, job.digest)
            job.keys.append(self._resume_key)
        self._end.flush()
