"""`nearfar tensorrt`: whether TensorRT takes a bundle or a graph, and graphs that it takes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from converters.tensorrt.check import Verdict

app = typer.Typer(
    help="Ask TensorRT about graphs, on a machine without a GPU, and repair what it refuses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Axes = Annotated[
    list[str] | None,
    typer.Option(
        "--axis",
        metavar="NAME=MIN,OPT,MAX",
        help="Sizes of a free axis, by its name or as INPUT.AXIS; repeatable. Default: what "
        "the bundle says; else 1,4,16 for the first axis of every input, 1,32,128 for others.",
        show_default=False,
    ),
]
Fixed = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="An input of one number that always has this value; repeatable.",
        show_default=False,
    ),
]
Timeout = Annotated[float, typer.Option(min=1, help="Seconds for each build.")]


@app.command()
def check(
    path: Annotated[
        Path,
        typer.Argument(help="A bundle (folder or .nfb), or an ONNX file.", show_default=False),
    ],
    axis: Axes = None,
    fixed: Fixed = None,
    timeout: Timeout = 600.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per graph.")
    ] = False,
) -> None:
    """Have TensorRT RTX build every graph, and say why where it does not.

    Needs the package tensorrt-rtx, here or in the Python that NEARFAR_TENSORRT_PYTHON names. A
    graph that is refused is repaired and tried again, in a copy that is thrown away. Exit status 1
    when a graph is refused as it is.
    """
    import msgspec
    from rich.console import Console

    from converters.tensorrt.check import require_library

    axes, values = _axes(axis), _fixed(fixed)
    require_library()
    console = Console(highlight=False)
    is_complete = True
    for name, ask in _graphs(path):
        if ask is None:
            if not as_json:
                console.print(f"{name}: not for TensorRT (onnxruntime-genai)", markup=False)
            continue
        verdict = ask(axes=axes, fixed=values, timeout_s=timeout)
        is_complete &= verdict.accepted
        if as_json:
            line = {"graph": name, **msgspec.to_builtins(verdict)}
            sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
        else:
            _show(console, name, verdict)
    if not is_complete:
        raise typer.Exit(1)


@app.command()
def fix(
    model: Annotated[Path, typer.Argument(help="An ONNX file.", show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="File to write.", show_default=False)
    ],
    axis: Axes = None,
    fixed: Fixed = None,
    timeout: Timeout = 600.0,
) -> None:
    """Write a repaired copy of an ONNX file that TensorRT takes. Compare it before you use it.

    Exit status 1, and no file, when TensorRT refuses the repaired graph too.
    """
    from rich.console import Console

    from converters.tensorrt.check import check_graph, require_library
    from nearfar.errors import ConversionError

    if output.resolve() == model.resolve():
        raise ConversionError(
            f"{output} is the file that would be repaired", fix="Write to another file"
        )
    axes, values = _axes(axis), _fixed(fixed)
    require_library()
    verdict = check_graph(model, axes=axes, fixed=values, save_fixed=output, timeout_s=timeout)
    _show(Console(highlight=False), str(model), verdict)
    if verdict.fixed_accepted:
        typer.echo(str(output))
    elif verdict.accepted:
        typer.echo("TensorRT takes it as it is: nothing is written", err=True)
    else:
        raise typer.Exit(1)


def _show(console: object, name: str, verdict: Verdict) -> None:
    from rich.console import Console
    from rich.text import Text

    from nearfar.units import format_bytes

    assert isinstance(console, Console)
    if verdict.accepted:
        word, style = "taken", "green"
    elif verdict.fixed_accepted:
        word, style = "refused; taken when repaired", "yellow"
    else:
        word, style = "refused", "red"
    built = (
        f", engine of {format_bytes(verdict.engine_bytes)} in {verdict.build_s:.1f} s"
        if verdict.engine_bytes
        else ""
    )
    line = Text.assemble(f"{name}: ", (word, style), f" ({verdict.library}{built})")
    console.print(line, soft_wrap=True)
    for finding in verdict.findings:
        console.print(Text(f"  {finding}"), soft_wrap=True)
        if not finding.is_fixed:
            console.print(Text(f"    {finding.fix}"), style="dim", soft_wrap=True)


def _graphs(path: Path) -> list[tuple[str, Callable[..., Verdict] | None]]:
    """(what to call it, what asks about it or `None`) of everything to be checked."""
    from functools import partial

    from converters.tensorrt.check import check_graph, check_variant
    from nearfar.bundle import open_bundle

    if path.suffix == ".onnx":
        return [(str(path), partial(check_graph, path))]
    bundle = open_bundle(path)
    found: list[tuple[str, Callable[..., Verdict] | None]] = []
    for variant in bundle.manifest.variants:
        is_known = variant.engine in ("onnxruntime", "tensorrt")
        ask = partial(check_variant, bundle, variant) if is_known else None
        found.append((f"{bundle.manifest.name}/{variant.id}", ask))
    return found


def _axes(stated: list[str] | None) -> dict[str, tuple[int, int, int]]:
    from nearfar.errors import ConfigError

    found = {}
    for one in stated or ():
        name, _, sizes = one.partition("=")
        try:
            smallest, usual, largest = (int(size) for size in sizes.split(","))
        except ValueError:
            raise ConfigError(
                f"{one!r} is not a range of sizes",
                field="axis",
                fix="Write it as NAME=MIN,OPT,MAX, such as tokens=1,64,256",
            ) from None
        found[name] = (smallest, usual, largest)
    return found


def _fixed(stated: list[str] | None) -> dict[str, float]:
    from nearfar.errors import ConfigError

    found = {}
    for one in stated or ():
        name, _, value = one.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise ConfigError(
                f"{one!r} is not an input with its value",
                field="fixed",
                fix="Write it as NAME=VALUE, such as sr=16000",
            ) from None
    return found
