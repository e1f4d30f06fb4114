"""`nearfar bench`: measure, and compare with the bars."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Measure nearfar on this machine, and check the bars it must hold.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Models = Annotated[
    Path | None,
    typer.Option(
        "--models",
        help="Store of bundles, such as .nearfar/models of the quickstart. "
        "Without it only importing is measured.",
        show_default=False,
    ),
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", help="Write raw figures, versions and machine there.", show_default=False
    ),
]
Check = Annotated[
    bool, typer.Option("--check", help="Exit with status 1 when a bar falls short, naming it.")
]


@app.callback()
def _bench() -> None:
    """Makes Typer keep the subcommand's name while there is only one."""


@app.command()
def overhead(models: Models = None, json: Json = None, check: Check = False) -> None:
    """What nearfar adds to bare onnxruntime, onnxruntime-genai and Python."""
    from rich.console import Console

    from benchmarks.harness import finish
    from benchmarks.overhead import measure

    with Console(stderr=True).status("") as status:
        report = measure(models, say=status.update)
    finish(report, json_path=json, check=check)
