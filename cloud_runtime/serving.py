"""One run of a cloud runtime as a process: load, listen, say so, serve, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import pkgutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from cryptography import x509

from cloud_runtime.auth import Authenticator, read_keys
from cloud_runtime.models import ServedModels, ServingOptions
from cloud_runtime.provision import url_of
from cloud_runtime.server import CloudServer, tls_context
from cloud_runtime.settings import ServerSettings
from cloud_runtime.state import StateDir
from cloud_runtime.tokens import TokenVerifier
from nearfar import __version__, eventloop
from nearfar.bundle import BundleStore
from nearfar.errors import ConfigError
from nearfar.secure.attestation import Attester
from nearfar.secure.identity import ServerIdentity
from nearfar.secure.keys import KeyRing

#: How long engine threads may still compute after the drain before the process ends without them.
_THREADS_GRACE_S = 2.0

_ANY_ADDRESS = ("", "0.0.0.0", "::")  # noqa: S104 (compared with, not bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServePlan:
    """What to serve, where, and as whom.

    Attributes:
        models: Folder with bundles.
        state: Identity, API keys and, unless given below, the certificate.
        host: Address to bind.
        port: 0 lets the system choose.
        names: Models to serve; empty means all.
        trusted_keys: When there are any, only bundles that one of them signed are served.
        certificate: PEM chain, instead of the state directory's.
        certificate_key: Its private key.
        allow_anonymous: Whether clients without an API key are let in.
        attester: ``module:function`` of an attestation plug-in; the function makes an `Attester`.
        ready_json: Whether to print one JSON line on stdout when ready, and no banner.
        loop: Event loop, a `nearfar.eventloop.LoopName`.
    """

    models: Path
    state: StateDir
    host: str
    port: int
    names: tuple[str, ...] = ()
    trusted_keys: tuple[str, ...] = ()
    certificate: Path | None = None
    certificate_key: Path | None = None
    allow_anonymous: bool = False
    attester: str | None = None
    ready_json: bool = False
    loop: str = "auto"
    serving: ServingOptions = field(default_factory=ServingOptions)
    settings: ServerSettings = field(default_factory=ServerSettings)


def run(plan: ServePlan) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second SIGINT ends the process at once.

    Raises:
        ConfigError: The state directory is incomplete, the address cannot be bound, or the event
            loop is not installed.
        ModelNotFound, BundleError, EngineError: Models cannot be served.
    """
    # Everything cheap that can be wrong, before minutes may go into loading models.
    state = plan.state
    chain = plan.certificate or state.server_chain
    key = plan.certificate_key or state.server_key
    if not state.identity.exists():
        raise ConfigError(
            f"There is no identity in {state.path}",
            field="state",
            fix=f"Create it with: nearfar cloud init {state.path}",
        )
    eventloop.choose(plan.loop)
    identity = ServerIdentity.load(state.identity)
    has_keys = state.api_keys.exists() or not plan.allow_anonymous
    authenticator = Authenticator(
        state.api_keys if has_keys else None,
        allow_anonymous=plan.allow_anonymous,
        tokens=TokenVerifier(state.token_issuers, audience=str(identity.pin)),
    )
    attester = None if plan.attester is None else load_attester(plan.attester)
    tls = tls_context(chain, key)
    certificate = x509.load_pem_x509_certificate(chain.read_bytes())

    with _end_on_sigterm():
        models = ServedModels.load(
            BundleStore(plan.models, trusted_keys=plan.trusted_keys or None),
            plan.serving,
            names=plan.names,
            progress=_say,
        )
    keys = KeyRing(identity, now_s=time.time(), attester=attester)
    server = CloudServer(
        models=models, keys=keys, authenticator=authenticator, tls=tls, settings=plan.settings
    )
    # What stays for good need not be looked through again: a full collection stops all threads,
    # for some 40 ms with a few models loaded.
    gc.collect()
    gc.freeze()
    try:
        eventloop.limit_tls_buffers()
        eventloop.run(_serve(server, plan, models, str(identity.pin), certificate), name=plan.loop)
    finally:
        models.close()
    _leave_threads_behind()


def load_attester(reference: str) -> Attester:
    """The attestation plug-in that ``module:function`` names.

    Raises:
        ConfigError: It cannot be imported, or does not make an attester.
    """
    try:
        attester = pkgutil.resolve_name(reference)()
        if not isinstance(attester.claims, bytes) or not callable(attester.evidence):
            raise TypeError("it makes no attester")
    except (ImportError, AttributeError, ValueError, TypeError) as exc:
        raise ConfigError(
            f"The attester {reference!r} cannot be used: {exc}",
            field="attester",
            fix="Give MODULE:FUNCTION, where the function takes nothing and returns a "
            "nearfar.secure.attestation.Attester",
        ) from exc
    loaded: Attester = attester
    return loaded


async def _serve(
    server: CloudServer,
    plan: ServePlan,
    models: ServedModels,
    pin: str,
    certificate: x509.Certificate,
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if not stop.is_set():
            _say(f"draining for up to {plan.settings.drain_s:g} s; Ctrl-C again ends at once")
            stop.set()
        elif number == signal.SIGINT:
            os._exit(128 + signal.SIGINT)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    async with server:
        port = await server.start(plan.host, plan.port)
        url = url_of(_public_host(plan.host, certificate), port)
        if plan.ready_json:
            ready = {"event": "ready", "url": url, "pin": pin, "models": list(models.names)}
            sys.stdout.write(json.dumps(ready) + "\n")
            sys.stdout.flush()
        else:
            _print_banner(plan, models, url, pin)
        _warn_about(plan, certificate)
        await stop.wait()
        await server.drain()
    _say("stopped")


def _print_banner(plan: ServePlan, models: ServedModels, url: str, pin: str) -> None:
    served = ", ".join(f"{offer.manifest.name} ({offer.variant})" for offer in models.offers())
    count = len(read_keys(plan.state.api_keys)) if plan.state.api_keys.exists() else 0
    _say(f"nearfar cloud runtime {__version__} is ready")
    _say(f"  url       {url}")
    _say(f"  identity  {pin}")
    _say(f"  models    {served}")
    _say(f"  API keys  {count}, in {plan.state.api_keys}")
    if plan.state.client_config.exists():
        _say(f"  clients   paste {plan.state.client_config} into their nearfar.toml")
    _say("Ctrl-C drains and stops.")


def _warn_about(plan: ServePlan, certificate: x509.Certificate) -> None:
    left = certificate.not_valid_after_utc - datetime.now(timezone.utc)
    if left.total_seconds() <= 0:
        _say(
            "warning: the server certificate has expired and clients will refuse it. "
            f"Renew it with: nearfar cloud init {plan.state.path} --renew-certificate --host NAME"
        )
    elif left.days < 14:
        _say(f"warning: the server certificate expires in {left.days} days")
    if plan.allow_anonymous:
        _say("warning: clients without an API key are let in (--allow-anonymous)")


def _public_host(host: str, certificate: x509.Certificate) -> str:
    """A name that clients can use: a server bound to all addresses is known by its certificate."""
    if host not in _ANY_ADDRESS:
        return host
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return next((str(name.value) for name in names), "localhost")


@contextlib.contextmanager
def _end_on_sigterm() -> Iterator[None]:
    """While models load there is nothing to drain: SIGTERM ends the process, with status 0."""

    def end(*_: object) -> None:
        raise SystemExit(0)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _leave_threads_behind() -> None:
    """Give engine threads a moment, then end without them.

    The interpreter would otherwise wait at its exit for a computation that nobody wants.
    """
    until_s = time.monotonic() + _THREADS_GRACE_S
    engine_threads = [t for t in threading.enumerate() if t.name.startswith("nearfar-")]
    for thread in engine_threads:
        thread.join(max(0.0, until_s - time.monotonic()))
    if any(thread.is_alive() for thread in engine_threads):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
