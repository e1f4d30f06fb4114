"""The `nearfar` command: finds the subcommands that the packages register, and runs one.

Subcommands are entry points of the group ``nearfar.commands``: a Typer app, or a function with
Typer annotations. Only the module of the chosen subcommand is imported, so that an app developer's
`nearfar chat` never waits for a converter's dependencies. Help imports them all; they are light.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from nearfar import __version__
from nearfar.errors import InvalidInput, NearfarError

GROUP = "nearfar.commands"

#: The order of a first day with nearfar; commands of other packages follow alphabetically.
_ORDER = (
    "quickstart", "doctor", "infer", "chat", "explain", "calibrate", "replay", "top", "jobs",
    "policy",
    "trust", "client-key", "convert", "tensorrt", "bundle", "edge", "cloud", "bench",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {point.name: point for point in entry_points(group=GROUP)}
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _print_help(commands)
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"nearfar {__version__}")  # noqa: T201
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1)
        hint = f"Did you mean `nearfar {close[0]}`" if close else "See `nearfar --help`"
        return report(InvalidInput(f"There is no command {name!r}", field="command", fix=hint))
    return run(commands[name].load(), rest, program=f"nearfar {name}")


def run(command: Any, arguments: Sequence[str] | None = None, *, program: str) -> int:
    """Run one subcommand and turn its errors into text and an exit status.

    Args:
        command: A Typer app, or a function with Typer annotations.
        arguments: Its arguments; `sys.argv` when `None`.
        program: How the usage line names it.
    """
    import typer

    if not isinstance(command, typer.Typer):
        command = _app_of(command)
    try:
        result = command(args=arguments, prog_name=program, standalone_mode=True)
    except NearfarError as error:
        return report(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone (`| head`); nothing to say to it
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return result if isinstance(result, int) else 0


def report(error: NearfarError) -> int:
    """Print an error as people read it, and return its exit status."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), f"{error.problem}."))
    if error.fix:
        console.print(Text.assemble(("  fix: ", "bold green"), f"{error.fix}."))
    return 2 if isinstance(error, InvalidInput) else 1


def _app_of(function: Callable[..., Any]) -> Any:
    import typer

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    return app


def _print_help(commands: dict[str, EntryPoint]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    ranked = sorted(commands, key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), n))
    for name in ranked:
        table.add_row(name, _summary(commands[name]))
    console = Console(highlight=False)
    console.print(
        f"nearfar {__version__}: the answer from the nearest place that policy allows "
        "and the deadline needs.\n\n[bold]Usage:[/] nearfar COMMAND …\n"
    )
    console.print(table)
    console.print("\nnearfar COMMAND --help teaches a command. Start with: nearfar quickstart")


def _summary(point: EntryPoint) -> str:
    """First line of the command's help, or why it cannot run here."""
    try:
        command = point.load()
    except ImportError as error:
        return f"[dim](not installed: {error.name} is missing)[/]"
    info = getattr(command, "info", None)
    text = getattr(info, "help", None) or getattr(command, "__doc__", None) or ""
    return str(text).strip().partition("\n")[0]
