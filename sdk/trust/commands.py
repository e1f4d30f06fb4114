"""`nearfar trust` and `nearfar client-key`: whom this machine trusts, and how it is known."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from nearfar.errors import ConfigError

app = typer.Typer(
    help="Keep the identities of the clouds that this machine trusts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
client_key_app = typer.Typer(
    help="Make and show the key that a client proves to have beside its token.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

#: Names that `identity = "…"` takes.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")

_FileOption = Annotated[
    Path | None,
    typer.Option("--file", metavar="PATH", help="Instead of ~/.config/nearfar/trust.json."),
]
_NameArgument = Annotated[str, typer.Argument(help="What nearfar.toml says in `identity = …`.")]


@app.command()
def add(
    name: _NameArgument,
    pin: Annotated[
        str | None,
        typer.Argument(help="The line that `nearfar cloud identity show` prints on the server."),
    ] = None,
    statement: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Instead of a pin: the operator's rotation.txt, for a known NAME."
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Forget another identity of that name.")
    ] = False,
    source: Annotated[
        str, typer.Option(help="Where the pin came from; kept in the file.")
    ] = "command line",
    file: _FileOption = None,
) -> None:
    """Trust an identity, or follow one to its successor.

    A rotation statement is signed by the identity that is trusted now; its successor is trusted
    from now on, and the old identity until the date in the statement.
    """
    from nearfar.secure.identity import Pin, RotationStatement
    from sdk.toml_table import read_text
    from sdk.trust import store

    path = file or store.default_path()
    if (pin is None) == (statement is None):
        raise ConfigError(
            "Give either a pin or --statement FILE",
            field="pin",
            fix="nearfar trust add main nf1:…, or nearfar trust add main --statement rotation.txt",
        )
    if statement is not None:
        entry = store.adopt(
            path, name, RotationStatement.parse(read_text(statement)), now_s=time.time()
        )
        _say(f"{name} is now {entry.pin}.")
        return
    if not _NAME.fullmatch(name) or pin is None:
        raise ConfigError(
            f"{name!r} cannot name an identity",
            field="name",
            fix="Use up to 48 letters, digits, dots, dashes and underscores, e.g. main",
        )
    store.add_pin(path, name, Pin.parse(pin), source=source, now_s=time.time(), replace=replace)
    _say(f'{name} is trusted. nearfar.toml may say: identity = "{name}"')


@app.command("list")
def list_entries(file: _FileOption = None) -> None:
    """List names, pins, dates and where the pins came from."""
    from datetime import datetime, timezone

    from sdk.trust import store

    for entry in store.read_trust(file or store.default_path()):
        typer.echo(f"{entry.name}  {entry.pin}  {entry.added}  {entry.source}")
        if entry.previous is not None and len(entry.pins(time.time())) > 1:
            until = datetime.fromtimestamp(entry.previous.until_s, timezone.utc)
            typer.echo(f"{entry.name}  {entry.previous.pin}  until {until:%Y-%m-%d}")


@app.command()
def remove(name: _NameArgument, file: _FileOption = None) -> None:
    """Trust an identity no longer."""
    from sdk.trust import store

    store.remove(file or store.default_path(), name)
    _say(f"{name} is no longer trusted.")


_KeyFile = Annotated[Path, typer.Argument(metavar="FILE", help="The key file; secret.")]


@client_key_app.command("new")
def client_key_new(file: _KeyFile) -> None:
    """Make a key (mode 0600), and print its public half for the operator."""
    from nearfar.secure.credentials import ClientKey

    key = ClientKey.generate()
    key.save(file)
    typer.echo(str(key.public))


@client_key_app.command("show")
def client_key_show(file: _KeyFile) -> None:
    """Print the public half of a key."""
    from nearfar.secure.credentials import ClientKey

    typer.echo(str(ClientKey.load(file).public))


def _say(line: str) -> None:
    typer.echo(line, err=True)
