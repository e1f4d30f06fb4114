"""`nearfar convert`: the command line around `converters.pipeline`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from converters.options import ConversionOptions
    from converters.settings import PruneSettings


class TaskName(str, Enum):
    """What the model is for."""

    auto = "auto"
    text_generation = "text-generation"
    embedding = "embedding"
    classification = "classification"
    tensor = "tensor"


class Int8Method(str, Enum):
    """What is rounded to 8 bits, and when."""

    weights = "weights"
    dynamic = "dynamic"
    static = "static"


def convert(
    context: typer.Context,
    model: Annotated[
        Path | None,
        typer.Argument(
            help="GGUF file, Hugging Face folder with safetensors, ONNX file, a bundle to add "
            "variants to, or a PyTorch module as package.module:factory.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder of the new bundle.", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the bundle. Default: from the source.")
    ] = None,
    version: Annotated[str, typer.Option(help="Semantic version of the bundle.")] = "1.0.0",
    task: Annotated[TaskName, typer.Option(help="What the model is for.")] = TaskName.auto,
    variants: Annotated[
        str,
        typer.Option(
            help="Comma-separated. Default: int4,fp32 for language models, int8,fp32 for "
            "sentence encoders and Hugging Face classifiers, the file's own precision for ONNX.",
            show_default=False,
        ),
    ] = "",
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Classifiers: class names, one a line or a JSON list.", show_default=False
        ),
    ] = None,
    preprocessing: Annotated[
        str | None,
        typer.Option(
            help="ONNX: how raw input becomes tensors, as JSON or a file with it.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            help="Real inputs to verify and calibrate with. ONNX: .npz, with the right classes as "
            "labels; models that hear: .wav; classifiers of images and sounds: a folder; encoders "
            "and classifiers of texts: one text a line, or .jsonl.",
            show_default=False,
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            help="PyTorch: example inputs, as package.module:function or an .npz. Default: "
            "example_inputs beside the factory.",
            show_default=False,
        ),
    ] = None,
    axes: Annotated[
        str | None,
        typer.Option(
            help="PyTorch: free sizes, as NAME=AXIS or NAME=INPUT.AXIS. Default: batch=0.",
            show_default=False,
        ),
    ] = None,
    int8: Annotated[
        Int8Method,
        typer.Option(
            help="ONNX and encoders: round weights only; activations too, in every call; or "
            "activations with ranges found on samples (QDQ)."
        ),
    ] = Int8Method.weights,
    prune: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            help="PyTorch: share of the channels and neurons of each layer that goes, such as "
            "0.5; variants pruned and int8 are then made of the narrow model.",
            show_default=False,
        ),
    ] = None,
    drop_layers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Transformers, one's own in PyTorch too: how many layers go, those that change "
            "least; variants slim, int8 and int4 are then made of what is left, trained again.",
            show_default=False,
        ),
    ] = None,
    keep_heads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Language models: how many attention heads each layer keeps.",
            show_default=False,
        ),
    ] = None,
    keep_mlp: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Transformers, one's own in PyTorch too: share of each layer's MLP channels that "
            "stays, such as 0.8.",
            show_default=False,
        ),
    ] = None,
    recovery_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="How many steps what is left of a sliced model is trained. Default: 200.",
            show_default=False,
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            help="PyTorch: what a pruned or sliced module is trained on, inputs or (inputs, "
            "labels), as package.module:function or an .npz. Default: the example inputs. Sliced "
            "models: a text file with an empty line between two texts. Default: Python's "
            "documentation.",
            show_default=False,
        ),
    ] = None,
    dimensions: Annotated[
        int | None,
        typer.Option(
            help="Sentence encoders: shorten vectors to so many numbers, all variants alike.",
            show_default=False,
        ),
    ] = None,
    max_quality_drop: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Most a compressed variant may lose, such as 1%: keeps sensitive nodes in full "
            "precision until it holds, and leaves out a variant that is worse.",
            show_default=False,
        ),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Leave out variants that are larger: 20MiB, or 0.3x of the size in 32 bits.",
            show_default=False,
        ),
    ] = None,
    max_latency: Annotated[
        str | None,
        typer.Option(
            metavar="MS",
            help="Leave out variants that are slower on this machine (p50; language models: time "
            "to the first token), in milliseconds.",
            show_default=False,
        ),
    ] = None,
    auto: Annotated[
        bool,
        typer.Option(
            "--auto",
            help="Try the ways to compress the model, and put the best that hold the limits into "
            "the bundle: those that no other beats in size, speed and quality.",
        ),
    ] = False,
    max_variants: Annotated[
        int, typer.Option(min=1, help="With --auto: how many variants the bundle may have.")
    ] = 3,
    only: Annotated[
        str,
        typer.Option(
            metavar="WAYS",
            help="With --auto: try these ways and no others, comma-separated, such as "
            "int8-blocks-32,int8-dynamic; --dry-run names them.",
            show_default=False,
        ),
    ] = "",
    check_tensorrt: Annotated[
        bool,
        typer.Option(
            "--check-tensorrt",
            help="Ask TensorRT RTX, which needs no GPU, whether it takes each graph.",
        ),
    ] = False,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Hugging Face: read weights that exist as pickles only, with torch's loader for "
            "weights. Only for files that you trust.",
        ),
    ] = False,
    license_: Annotated[
        str,
        typer.Option("--license", help="SPDX expression. Default: what the source states."),
    ] = "",
    description: Annotated[str, typer.Option(help="One line about the model.")] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Replace a bundle that is already there.")
    ] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure",
            help="Measure speed and memory on this machine; the router starts from the figures.",
        ),
    ] = True,
    golden: Annotated[
        bool,
        typer.Option(
            "--golden/--no-golden",
            help="Put a few made-up inputs and their outputs into the bundle, for `nearfar bundle "
            "verify`.",
        ),
    ] = True,
    sign: Annotated[
        Path | None,
        typer.Option(
            metavar="KEY",
            help="Sign the bundle with this private key (`nearfar bundle keygen`).",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Do as this recipe says, a file or the name of one that nearfar brings; options "
            "beside it win.",
            show_default=False,
        ),
    ] = None,
    save_recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write down what was done, as a recipe.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show steps, time and disk; convert nothing.")
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where results of steps are kept, for the next time. "
            "Default: ~/.cache/nearfar/convert.",
            show_default=False,
        ),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Do every step, and keep no results of steps.")
    ] = False,
    show_cache: Annotated[
        bool, typer.Option("--show-cache", help="Show what the cache holds, and end.")
    ] = False,
    clear_cache: Annotated[
        bool, typer.Option("--clear-cache", help="Empty the cache, and end.")
    ] = False,
    keep_work: Annotated[
        bool, typer.Option("--keep-work", help="Keep intermediate files in OUTPUT.work.")
    ] = False,
) -> None:
    """Convert a model into a bundle that edge and cloud can run.

    Every variant is compared with its source on real input, and the figures are written into the
    bundle's manifest. Nothing is downloaded, and no code is run but a factory that you name.

    A chat model, 4 bits for the device and full precision for the cloud:

        nearfar convert SmolLM2-135M-Instruct.Q4_1.gguf -o models/assistant --name assistant

    A sentence encoder (a folder with config.json, model.safetensors, tokenizer.json):

        nearfar convert all-MiniLM-L6-v2/ -o models/minilm --variants int8,fp32

    A classifier that exists as ONNX, with its class names and real inputs to verify with:

        nearfar convert digits.onnx -o models/digits --labels digits.txt --samples digits.npz

    A PyTorch module of your own, with example_inputs() beside its factory:

        nearfar convert mypackage.nets:make_encoder -o models/encoder --axes batch=0,tokens=1

    A classifier of raw bytes (a magika model needs no options: its config file is read):

        nearfar convert bytes.onnx -o models/bytes --labels labels.txt --preprocessing
        '{"kind":"head-tail","head_bytes":1024,"tail_bytes":1024,"block_bytes":4096,"padding_value":256}'

    The same again, to the same files, and on another model of the kind:

        nearfar convert digits.onnx -o models/digits --save-recipe digits.toml

        nearfar convert digits.onnx -o again --recipe digits.toml

    A sentence encoder in 8 bits that must keep 97 of 100 neighbours:

        nearfar convert all-MiniLM-L6-v2/ -o models/minilm --max-quality-drop 3%

    The best of all ways to compress it, with at most 2% lost and 30 MiB:

        nearfar convert all-MiniLM-L6-v2/ -o models/minilm --auto --max-quality-drop 2%
        --max-size 30MiB

    Eight bits beside what a bundle has already:

        nearfar convert models/digits -o models/digits-8 --variants int8

    Then open report.html in the bundle, or look at it with `nearfar bundle inspect models/minilm`.
    """
    import msgspec
    from rich.console import Console

    from converters.cache import default_root
    from converters.limits import with_limits
    from converters.options import ConversionOptions
    from converters.pipeline import convert_model
    from converters.recipe_file import find_recipe, options_of, overridden, read_recipe
    from converters.reporting import Reporter
    from converters.slim.stated import sliced
    from nearfar.errors import ConfigError

    root = cache or default_root()
    if show_cache or clear_cache:
        _tend_cache(root, is_cleared=clear_cache)
        return
    if model is None:
        raise ConfigError("No model is given", field="model", fix="See `nearfar convert --help`")
    stated: dict[str, object] = {
        "name": name,
        "version": version,
        "task": None if task is TaskName.auto else task.value,
        "variants": tuple(part.strip() for part in variants.split(",") if part.strip()),
        "labels": labels,
        "preprocessing": preprocessing,
        "samples": samples,
        "inputs": inputs,
        "axes": axes,
        "train": train,
        "license": license_,
        "description": description,
        "measure": measure,
        "golden": golden,
    }
    options, known = ConversionOptions(), None
    if recipe is not None:
        recipe = find_recipe(recipe)
        known = read_recipe(recipe)
        options = options_of(known, recipe)
        stated = {key: value for key, value in stated.items() if _is_stated(context, key)}
    settings = options.settings
    if _is_stated(context, "int8"):
        # Nodes that another method had to keep say nothing about this one.
        chosen = msgspec.structs.replace(settings.int8, method=int8.value, keep=())
        settings = msgspec.structs.replace(settings, int8=chosen)
    if prune is not None:
        settings = msgspec.structs.replace(settings, prune=_pruned(settings.prune, prune))
    settings = sliced(
        settings,
        drop_layers=drop_layers,
        keep_heads=keep_heads,
        keep_mlp=keep_mlp,
        recovery_steps=recovery_steps,
    )
    if dimensions is not None:
        if not 2 <= dimensions <= 65_536:
            raise ConfigError(
                f"Vectors cannot have {dimensions} numbers", field="dimensions", fix="Use 2 or more"
            )
        shorter = msgspec.structs.replace(settings.embedding, dimensions=dimensions)
        settings = msgspec.structs.replace(settings, embedding=shorter)
    gates = with_limits(
        settings.gates, quality=max_quality_drop, size=max_size, latency=max_latency
    )
    settings = msgspec.structs.replace(settings, gates=gates)
    if check_tensorrt:
        asked = msgspec.structs.replace(settings.tensorrt, check=True)
        settings = msgspec.structs.replace(settings, tensorrt=asked)
    stated["settings"] = settings
    options = overridden(options, **stated, replace=force, keep_work=keep_work, sign=sign)
    options = replace(options, allow_pickle=allow_pickle)
    options = replace(options, cache=None if no_cache else root)
    console = Console(highlight=False)
    is_search = auto or bool(options.trials)
    if auto and variants:
        raise ConfigError(
            "--auto chooses the variants itself", field="variants", fix="Leave out one of the two"
        )
    ways = tuple(part.strip() for part in only.split(",") if part.strip())
    if ways and not auto:
        raise ConfigError(
            "--only says what --auto tries", field="only", fix="Add --auto, or use --variants"
        )
    if dry_run:
        _show_plan(console, model, options, is_search=is_search, ways=ways)
        return
    if output is None:
        raise ConfigError(
            "It is not said where the bundle shall be", field="output", fix="Give -o FOLDER"
        )
    make = convert_model
    if is_search:
        from converters.search.search import search_model

        make = partial(search_model, count=max_variants, ways=ways)
    with _terminate_like_ctrl_c():
        bundle = make(
            model,
            output,
            options,
            reporter=Reporter(console),
            recipe=known,
            save_recipe=save_recipe,
        )
    if is_search:
        from converters.report.contents import report_in
        from converters.report.table import variants_table

        console.print(variants_table(report_in(bundle)))
    typer.echo(f"{bundle.path}: {bundle.manifest.name} {bundle.manifest.version}")
    typer.echo(f"{bundle.path / 'report.html'}: how good it is, and why")


def _pruned(settings: PruneSettings, ratio: float) -> PruneSettings:
    import msgspec

    from nearfar.errors import ConfigError

    if not 0 <= ratio < 1:
        raise ConfigError(
            f"{ratio} is not a share that can go", field="prune", fix="Use 0.5, or another below 1"
        )
    return msgspec.structs.replace(settings, ratio=ratio)


def _is_stated(context: typer.Context, option: str) -> bool:
    """Whether a person gave the option, so that it wins over the recipe."""
    parameter = "license_" if option == "license" else option
    source = context.get_parameter_source(parameter)
    return source is not None and source.name != "DEFAULT"


def _show_plan(
    console: Console,
    model: Path,
    options: ConversionOptions,
    *,
    is_search: bool,
    ways: tuple[str, ...],
) -> None:
    from rich.table import Table

    from converters.plan import plan
    from converters.sources.detect import open_source
    from nearfar.units import format_bytes

    source = open_source(
        model, inputs=options.inputs, axes=options.axes, allow_pickle=options.allow_pickle
    )
    if is_search:
        from converters.search.candidates import plan_search

        planned = plan_search(source, options, ways)
    else:
        planned = plan(source, options)
    table = Table(box=None)
    table.add_column("step")
    table.add_column("time", justify="right")
    table.add_column("disk", justify="right")
    for step in planned.steps:
        disk = format_bytes(step.disk_bytes) if step.disk_bytes else ""
        table.add_row(step.title, f"{step.time_s:.0f} s", disk)
    table.add_row(
        "together, about", f"{planned.time_s:.0f} s", format_bytes(planned.disk_bytes), style="bold"
    )
    console.print(f"{source.label}: {', '.join(planned.variants)}", markup=False)
    console.print(table)
    console.print(f"The bundle will have about {format_bytes(planned.bundle_bytes)}.")


def _tend_cache(root: Path, *, is_cleared: bool) -> None:
    from converters.cache import clear, contents
    from nearfar.units import format_bytes

    if is_cleared:
        typer.echo(f"{format_bytes(clear(root))} freed in {root}")
        return
    found = contents(root)
    for step, (count, size) in found.items():
        typer.echo(f"{step:<16} {count:>5} {format_bytes(size):>10}")
    total = sum(size for _, size in found.values())
    typer.echo(f"{format_bytes(total)} in {root}")


@contextmanager
def _terminate_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that partial output is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signal_number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
