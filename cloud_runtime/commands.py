"""``nearfar cloud``: set up and serve a cloud runtime.

Only typer is imported here; each command imports what it runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nearfar.errors import ConfigError

app = typer.Typer(
    help="Serve models to nearfar clients over an end-to-end encrypted websocket.\n\n"
    "First time:\n\n"
    "    nearfar cloud init DIR --host gpu.example.org\n\n"
    "    nearfar cloud serve --models BUNDLES --state DIR --listen 0.0.0.0:8443\n\n"
    "then paste DIR/client.toml into the client's nearfar.toml.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
identity_app = typer.Typer(
    help="The Ed25519 identity that clients pin.", no_args_is_help=True, add_completion=False
)
key_app = typer.Typer(
    help="The API keys that clients present.", no_args_is_help=True, add_completion=False
)
app.add_typer(identity_app, name="identity")
token_app = typer.Typer(
    help="Short-lived tokens, each bound to a client's key.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(key_app, name="key")
app.add_typer(token_app, name="token")

StateOption = Annotated[
    Path, typer.Option("--state", metavar="DIR", help="Directory made by `nearfar cloud init`.")
]


CosignOption = Annotated[
    bool,
    typer.Option(
        "--co-sign", help="Sign with ML-DSA-65 as well (pin nf2:…), against a quantum computer."
    ),
]


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put the files.")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="DNS name or IP address under which clients reach the server; repeatable. "
            "The first one goes into client.toml. Default: localhost, 127.0.0.1, ::1.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Port for client.toml.")] = 8443,
    key_name: Annotated[str, typer.Option(help="Name of the first API key.")] = "first",
    days: Annotated[
        int, typer.Option(min=1, max=1825, help="How long the server certificate is valid.")
    ] = 397,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace what is there. Clients must then pin the new identity."
        ),
    ] = False,
    renew_certificate: Annotated[
        bool,
        typer.Option(
            "--renew-certificate",
            help="Replace only ca.pem, server.pem and server.key; keep identity and API keys.",
        ),
    ] = False,
) -> None:
    """Make a development CA, a server certificate, an identity and one API key.

    Writes ca.pem, server.pem, server.key, identity.key, pin.txt, api-keys.json (hashes only),
    client-key.txt (the API key in clear, for the client) and client.toml. Private files get mode
    0600. Nothing is overwritten without --force.
    """
    from datetime import timedelta

    from cloud_runtime import provision
    from cloud_runtime.state import StateDir

    state = StateDir(directory)
    hosts = tuple(host or provision.DEFAULT_HOSTS)
    validity = timedelta(days=days)
    if renew_certificate:
        provision.renew_certificates(state, hosts, validity=validity)
        _say(f"New certificates for {', '.join(hosts)} are in {directory}.")
        _say(f"Restart the server, and give clients the new {state.ca_certificate}.")
        return
    provision.provision(state, hosts, port=port, key_name=key_name, validity=validity, force=force)
    _say(f"The state directory {directory} is ready, for {', '.join(hosts)}.")
    _say(f"  serve    nearfar cloud serve --models BUNDLES --state {directory}")
    _say(f"  clients  paste {state.client_config} into nearfar.toml; they also need ca.pem and")
    _say("           client-key.txt (secret: it is the API key in clear)")


@app.command()
def serve(
    models: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder with bundles, made by `nearfar convert`.")
    ],
    state: StateOption,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Address to listen on.")
    ] = "127.0.0.1:8443",
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Port instead of that in --listen; 0 picks a free one."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Serve only this model; repeatable. Default: all."),
    ] = None,
    trusted_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PUBLIC_KEY",
            help="Serve only bundles signed by this key (.pub file or ed25519:…); repeatable.",
        ),
    ] = None,
    slots: Annotated[
        int, typer.Option(min=1, max=256, help="Requests per model that compute at once.")
    ] = 1,
    max_waiting: Annotated[
        int,
        typer.Option(
            min=0, max=4096, help="Requests per model that may wait; more are told to come back."
        ),
    ] = 32,
    threads: Annotated[
        int,
        typer.Option(min=0, help="Compute threads per running request; 0: all physical cores."),
    ] = 0,
    max_connections: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 256,
    drain_s: Annotated[
        float, typer.Option(min=0, help="Seconds that open answers may take after SIGTERM.")
    ] = 30.0,
    resume_s: Annotated[
        float,
        typer.Option(min=0, help="Seconds to keep answers for clients that lost their connection."),
    ] = 60.0,
    region: Annotated[
        str, typer.Option(help="Told to clients, whose policies may ask for it, e.g. eu.")
    ] = "",
    min_shaping: Annotated[
        str,
        typer.Option(
            metavar="LEVEL",
            help="Least traffic shaping for all clients: off, balanced or strict.",
        ),
    ] = "off",
    certificate: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="Certificate chain instead of DIR/server.pem."),
    ] = None,
    certificate_key: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Private key of --certificate.")
    ] = None,
    allow_anonymous: Annotated[
        bool,
        typer.Option("--allow-anonymous", help="Let clients in that give no API key at all."),
    ] = False,
    attester: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Attestation plug-in: the function makes it. Without one the server attests "
            "nothing.",
        ),
    ] = None,
    ready_json: Annotated[
        bool,
        typer.Option(
            "--ready-json",
            help="When ready, print one JSON line on stdout (event, url, pin, models), no banner.",
        ),
    ] = False,
    loop: Annotated[
        str,
        typer.Option(
            metavar="auto|asyncio|uvloop",
            help="Event loop; auto takes uvloop where it is installed.",
        ),
    ] = "auto",
    telemetry: Annotated[
        bool,
        typer.Option("--telemetry", help="Spans and figures for OpenTelemetry, as it is set up."),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No access log; warnings and errors only.")
    ] = False,
) -> None:
    """Load the models, then serve them until SIGTERM or Ctrl-C, which drain.

    The server speaks TLS 1.3 only, at /v1/nearfar; /healthz and /readyz answer plain GETs. Open
    answers are finished for up to --drain-s seconds, then the process ends with status 0. A second
    Ctrl-C ends it at once.

    The access log (stderr) holds ids, sizes, durations, model and status: no prompt, no tensor, no
    key. API keys added or removed with `nearfar cloud key` take effect without a restart.
    """
    import logging

    from cloud_runtime.models import ServingOptions
    from cloud_runtime.serving import ServePlan, run
    from cloud_runtime.settings import ServerSettings
    from cloud_runtime.state import StateDir
    from nearfar.engines.base import SessionOptions
    from nearfar.secure.shaping import check_shaping
    from nearfar.wire.retention import RetentionLimits

    if (certificate is None) != (certificate_key is None):
        raise ConfigError(
            "--certificate and --certificate-key go together",
            field="certificate",
            fix="Give both, or neither to use the state directory's",
        )
    host, listen_port = parse_address(listen)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING if quiet else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    run(
        ServePlan(
            models=models,
            state=StateDir(state),
            host=host,
            port=listen_port if port is None else port,
            names=tuple(model or ()),
            trusted_keys=tuple(trusted_key or ()),
            certificate=certificate,
            certificate_key=certificate_key,
            allow_anonymous=allow_anonymous,
            attester=attester,
            ready_json=ready_json,
            loop=loop,
            serving=ServingOptions(
                session=SessionOptions(threads=threads), slots=slots, max_waiting=max_waiting
            ),
            settings=ServerSettings(
                max_connections=max_connections,
                drain_s=drain_s,
                region=region,
                retention=RetentionLimits(keep_s=resume_s),
                min_shaping=check_shaping(min_shaping),
                telemetry=telemetry,
            ),
        )
    )


@identity_app.command("show")
def identity_show(state: StateOption) -> None:
    """Print the pin that clients put into `identity = …`."""
    from cloud_runtime.state import StateDir
    from nearfar.secure.identity import ServerIdentity

    typer.echo(str(ServerIdentity.load(StateDir(state).identity).pin))


@identity_app.command("new")
def identity_new(
    state: StateOption,
    force: Annotated[
        bool, typer.Option("--force", help="Confirm: clients refuse the server until they re-pin.")
    ] = False,
    cosign: CosignOption = False,
) -> None:
    """Replace the identity, for example because identity.key may have leaked.

    Restart the server afterwards. Every client must pin the new identity.
    """
    from cloud_runtime import provision
    from cloud_runtime.state import StateDir

    directory = StateDir(state)
    if directory.identity.exists() and not force:
        raise ConfigError(
            f"{directory.identity} exists, and clients have pinned it",
            field="state",
            fix="Give --force to replace it; every client must then pin the new identity",
        )
    typer.echo(str(provision.replace_identity(directory, cosigns=cosign).pin))
    _say("Restart the server, and put this pin into every client's nearfar.toml.")


@identity_app.command("rotate")
def identity_rotate(
    state: StateOption,
    overlap_days: Annotated[
        int,
        typer.Option(
            min=1, max=366, help="How long clients that adopt the next identity trust the old one."
        ),
    ] = 30,
    cosign: CosignOption = False,
    activate: Annotated[
        bool,
        typer.Option("--activate", help="Serve as the next identity from the next start on."),
    ] = False,
) -> None:
    """Move to a next identity without any client being refused.

    First without --activate: makes identity-next.key and rotation.txt, a statement signed by both.
    Give rotation.txt to all clients (`nearfar trust add NAME --statement rotation.txt`). When they
    have it: --activate, and restart the server. This is no remedy for a leak: whoever has the old
    key can sign such a statement, too; use `identity new --force` then.
    """
    from datetime import timedelta

    from cloud_runtime import provision
    from cloud_runtime.state import StateDir

    directory = StateDir(state)
    if activate:
        typer.echo(str(provision.activate_rotation(directory).pin))
        _say("Restart the server. Tokens must now be issued for this pin.")
        return
    statement = provision.prepare_rotation(
        directory, overlap=timedelta(days=overlap_days), cosigns=cosign
    )
    typer.echo(str(statement.new))
    _say(f"Give {directory.rotation} to every client: nearfar trust add NAME --statement FILE")
    _say(f"Then: nearfar cloud identity rotate --state {state} --activate")


@token_app.command("init")
def token_init(
    state: StateOption,
    issuer: Annotated[str, typer.Option(help="The tokens' `iss`.")] = "nearfar-cloud",
) -> None:
    """Make the key that signs tokens, and let the server accept what it signs.

    Writes token-signing.key (PEM, mode 0600) and token-issuers.json. A service of your own may
    sign tokens with that key; then move it there, since the server only needs token-issuers.json.
    """
    from cloud_runtime import tokens
    from cloud_runtime.state import StateDir

    directory = StateDir(state)
    tokens.init_issuer(directory, issuer=issuer)
    _say(f"{directory.token_key} signs tokens of the issuer {issuer!r}; keep it secret.")


@token_app.command("issue")
def token_issue(
    state: StateOption,
    tenant: Annotated[str, typer.Option(help="Who the client is; appears in the access log.")],
    key: Annotated[
        str,
        typer.Option(
            metavar="nfc1:…", help="The client's public key, from `nearfar client-key new`."
        ),
    ],
    minutes: Annotated[int, typer.Option(min=1, max=10, help="How long it is valid.")] = 10,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A model that it allows, or a pattern such as 'chat-*'; may be given several "
            "times. Without any: all models.",
        ),
    ] = None,
    max_priority: Annotated[
        int | None, typer.Option(min=0, max=9, help="Highest priority that it allows.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the token there (mode 0600), replacing it."),
    ] = None,
) -> None:
    """Issue a token that only the holder of the client's key can use, on this server."""
    from cloud_runtime import tokens
    from cloud_runtime.state import PRIVATE_MODE, StateDir
    from nearfar.files import write_atomically
    from nearfar.secure.credentials import ClientPublicKey
    from nearfar.secure.identity import ServerIdentity

    directory = StateDir(state)
    token = tokens.issue(
        directory,
        tenant=tenant,
        client_key=ClientPublicKey.parse(key),
        audience=str(ServerIdentity.load(directory.identity).pin),
        lifetime_s=minutes * 60,
        models=model or None,
        max_priority=max_priority,
    )
    if output is None:
        typer.echo(token)
        return
    write_atomically(output, f"{token}\n".encode(), mode=PRIVATE_MODE)
    _say(f"The token is in {output}.")


@key_app.command("add")
def key_add(
    name: Annotated[str, typer.Argument(help="Who will hold it; appears in the access log.")],
    state: StateOption,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the key there (mode 0600) instead of printing."),
    ] = None,
) -> None:
    """Make an API key and show it, once: only its hash is stored."""
    from cloud_runtime import auth
    from cloud_runtime.state import PRIVATE_MODE, StateDir
    from nearfar.files import write_atomically

    if output is not None and output.exists():
        raise ConfigError(f"{output} exists already", field="output", fix="Choose another file")
    token = auth.add_key(StateDir(state), name)
    if output is None:
        typer.echo(token)
        _say("This is the only time that the key is shown.")
        return
    write_atomically(output, f"{token}\n".encode(), mode=PRIVATE_MODE)
    _say(f"The key is in {output}.")


@key_app.command("list")
def key_list(state: StateOption) -> None:
    """List names and dates of the accepted API keys."""
    from cloud_runtime import auth
    from cloud_runtime.state import StateDir

    for key in auth.read_keys(StateDir(state).api_keys):
        typer.echo(f"{key.created}  {key.name}")


@key_app.command("remove")
def key_remove(
    name: Annotated[str, typer.Argument(help="Name of the key, as in `key list`.")],
    state: StateOption,
) -> None:
    """Withdraw an API key; a running server ends its connections within seconds."""
    from cloud_runtime import auth
    from cloud_runtime.state import StateDir

    auth.remove_key(StateDir(state), name)
    _say(f"The key {name!r} is no longer accepted.")


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT``, ``[::1]:PORT`` or ``:PORT`` to host and port."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(
            f"{text!r} is not an address",
            field="listen",
            fix="Give HOST:PORT, e.g. 0.0.0.0:8443 or [::1]:8443",
        )
    return host, int(port)


def _say(line: str) -> None:
    typer.echo(line, err=True)
