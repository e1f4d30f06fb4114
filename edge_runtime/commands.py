"""`nearfar edge`: what this device can run, and running it from the shell."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import numpy as np

    from edge_runtime import EdgeResult, EdgeRuntime
    from nearfar.bundle.manifest import Manifest
    from nearfar.engines.devices import Device

app = typer.Typer(
    help="Run models on this device, without client, policy or cloud.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Models = Annotated[Path, typer.Option("--models", "-m", help="Folder of bundles.")]
TrustedKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--trusted-key",
        metavar="PUBLIC_KEY",
        help="Use only bundles signed by this key (.pub file or ed25519:…); repeatable.",
    ),
]
_DEFAULT_MODELS = Path(".nearfar/models")


@app.command("list")
def list_models(models: Models = _DEFAULT_MODELS, trusted_key: TrustedKeys = None) -> None:
    """The models of a store, and the variant of each that this device would run."""
    from rich.console import Console
    from rich.table import Table

    from nearfar.engines.devices import probe
    from nearfar.engines.selection import runnable_variants
    from nearfar.units import format_bytes

    table = Table(box=None)
    for column in ("model", "version", "task", "runs here", "size"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for manifest in _manifests(models, trusted_key):
        runnable = runnable_variants(manifest, probe(), "edge")
        size = format_bytes(runnable[0].size_bytes) if runnable else ""
        variant = runnable[0].id if runnable else "none (see `nearfar edge check`)"
        table.add_row(manifest.name, manifest.version, manifest.task, variant, size)
    Console(highlight=False).print(table)


@app.command()
def check(models: Models = _DEFAULT_MODELS, trusted_key: TrustedKeys = None) -> None:
    """This device, and for every variant whether it runs here, or why not.

    Exit status 1 when a model has no variant that runs here. Loads no model.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from nearfar.engines.devices import probe
    from nearfar.engines.selection import candidates
    from nearfar.units import format_bytes

    device = probe()
    console = Console(highlight=False)
    console.print(_device_table(device))
    console.print()
    table = Table(box=None)
    for column in ("model", "variant", "size", "here"):
        table.add_column(column, justify="right" if column == "size" else "left")
    is_complete = True
    for manifest in _manifests(models, trusted_key):
        found = candidates(manifest, device, "edge")
        is_complete &= found[0].excluded is None
        for position, candidate in enumerate(found):
            if candidate.excluded is not None:
                verdict = Text(f"no: {candidate.excluded}", style="red")
            elif position == 0:
                verdict = Text("yes, and it is the one that runs", style="green")
            else:
                verdict = Text("yes")
            table.add_row(
                manifest.name if position == 0 else "",
                candidate.variant.id,
                format_bytes(candidate.variant.size_bytes),
                verdict,
            )
    console.print(table)
    if not is_complete:
        raise typer.Exit(1)


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="A question for a text model; texts to embed; files to classify; or one .npz "
            "file of input tensors."
        ),
    ],
    models: Models = _DEFAULT_MODELS,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the output tensors to this .npz file."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Text models: longest answer.")] = 256,
    top_k: Annotated[int, typer.Option(help="Classifiers: labels to show.")] = 3,
    trusted_key: TrustedKeys = None,
) -> None:
    """Run one model once, on this device.

    nearfar edge run assistant "Why is the sky blue?" · nearfar edge run file-type report.pdf ·
    nearfar edge run minilm near far -o vectors.npz
    """
    from edge_runtime import EdgeRuntime
    from nearfar.bundle import BundleStore
    from nearfar.bundle.manifest import BYTES_PREPROCESSING, TextPreprocessing

    with EdgeRuntime(BundleStore(models, trusted_keys=trusted_key or None)) as runtime:
        manifest = runtime.describe(model).manifest
        if manifest.task == "text-generation":
            _answer(runtime, model, " ".join(inputs), max_new_tokens)
            return
        if isinstance(manifest.preprocessing, BYTES_PREPROCESSING):
            result = _files(runtime, model, inputs)
        elif isinstance(manifest.preprocessing, TextPreprocessing):
            result = runtime.infer(model, form="text", items=inputs)
        else:
            result = runtime.infer(model, _load_tensors(inputs))
        _show(manifest, inputs, result, top_k)
        if output is not None:
            _save(output, result.outputs)


@app.command()
def build(
    bundle: Annotated[
        str,
        typer.Argument(
            help="Name of a model in the store, or a bundle's folder or .nfb file.",
            show_default=False,
        ),
    ],
    variant: Annotated[
        str | None, typer.Option(help="Only this variant.", show_default=False)
    ] = None,
    models: Models = _DEFAULT_MODELS,
    force: Annotated[
        bool, typer.Option("--force", help="Build engines anew that are there.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for each engine.")] = 3600.0,
    trusted_key: TrustedKeys = None,
) -> None:
    """Build TensorRT engines of a model's trt-… variants, for this device and its TensorRT.

    Takes minutes on a small device. Engines are kept in ~/.cache/nearfar/tensorrt
    (NEARFAR_TENSORRT_ENGINES names another folder) and used by everything that runs the model.
    """
    from edge_runtime.building import build_engines, tensorrt_variants
    from nearfar.bundle import BundleStore, open_bundle
    from nearfar.bundle.keys import trusted
    from nearfar.units import format_bytes

    if Path(bundle).exists():
        opened = open_bundle(
            Path(bundle), trusted_keys=trusted(trusted_key) if trusted_key else None
        )
    else:
        opened = BundleStore(models, trusted_keys=trusted_key or None).open(bundle)
    wished = tensorrt_variants(opened, variant)
    with _phases() as progress:
        for state in build_engines(
            opened, wished, is_forced=force, timeout_s=timeout, progress=progress
        ):
            how = f"built in {state.build_s:.0f} s" if state.is_new else "was there already"
            typer.echo(f"{state.variant_id}: {how}, {format_bytes(state.size_bytes)}")


@contextmanager
def _phases() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for TensorRT's outermost phase, and the name of the one it is in."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("building", total=None)
        outermost = ""

        def show(phase: str, step: int, steps: int) -> None:
            nonlocal outermost
            outermost = outermost or phase
            if phase == outermost:
                bar.update(task, completed=step, total=steps or None)
            bar.update(task, description=phase)

        yield show


def _manifests(models: Path, trusted_keys: list[str] | None) -> list[Manifest]:
    from nearfar.bundle import BundleStore
    from nearfar.errors import ModelNotFound

    found = BundleStore(models, trusted_keys=trusted_keys or None).models()
    if not found:
        raise ModelNotFound(
            f"There is no model in {models}" + (" that a trusted key signed" * bool(trusted_keys)),
            fix="Name another folder with --models, or make bundles with `nearfar convert`",
        )
    return found


def _device_table(device: Device) -> object:
    from rich.table import Table

    from nearfar.units import format_bytes

    table = Table(box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_row("device", device.machine)
    table.add_row("memory", format_bytes(device.memory_bytes))
    table.add_row("execution providers", ", ".join(device.execution_providers) or "none")
    for provider, why in device.missing_providers.items():
        table.add_row("", f"{provider} does not work: {why}")
    if device.sm_arch is not None:
        memory = format_bytes(device.gpu_memory_bytes)
        table.add_row("GPU", f"sm_{device.sm_arch}, {memory}")
    table.add_row("onnxruntime-genai", "installed" if device.has_genai else "not installed")
    table.add_row("CPU features", " ".join(device.cpu_flags) or "none that matter here")
    return table


def _answer(runtime: EdgeRuntime, model: str, question: str, max_new_tokens: int) -> None:
    from nearfar.generation import ChatMessage, GenerationOptions, Prompt

    prompt = Prompt(messages=(ChatMessage("user", question),))
    options = GenerationOptions(max_new_tokens=max_new_tokens)
    with runtime.generate(model, prompt, options) as generation:
        for chunk in generation:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
            tokens = chunk.index
    sys.stdout.write("\n")
    prefill_s, decode_s = generation.prefill_s or 0.0, generation.decode_s or 0.0
    speed = f", then {(tokens - 1) / decode_s:.0f} tokens/s" if tokens > 1 and decode_s else ""
    _note(
        f"{generation.variant} on {generation.execution_provider}: {tokens} tokens, first after "
        f"{prefill_s * 1000:.0f} ms{speed}"
    )


def _files(runtime: EdgeRuntime, model: str, names: list[str]) -> EdgeResult:
    """The outputs for all files, asked for one by one: sounds of several lengths are no batch."""
    import msgspec
    import numpy as np

    from nearfar.errors import about

    results = []
    for name in names:
        data = _read(Path(name))
        with about(name):
            results.append(runtime.infer(model, form="bytes", items=[data]))
    outputs = {
        output: np.concatenate([result.outputs[output] for result in results])
        for output in results[0].outputs
    }
    compute_s = sum(result.compute_s for result in results)
    return msgspec.structs.replace(results[0], outputs=outputs, compute_s=compute_s)


def _show(manifest: Manifest, inputs: list[str], result: EdgeResult, top_k: int) -> None:
    from nearfar.processing.classification import top_labels
    from nearfar.units import format_ms

    scores = result.outputs.get(manifest.label_output or "")
    if manifest.labels and scores is not None and len(scores) == len(inputs):
        for name, row in zip(inputs, scores, strict=True):
            best = top_labels(row, manifest.labels, top_k)
            typer.echo(f"{name}: " + ", ".join(f"{label} {score:.3f}" for label, score in best))
    else:
        for name, array in result.outputs.items():
            typer.echo(f"{name} {array.dtype} {list(array.shape)}: {_beginning(array)}")
    _note(f"{result.variant} on {result.execution_provider}: {format_ms(result.compute_s * 1000)}")


def _beginning(array: np.ndarray) -> str:
    flat = array.reshape(-1)
    shown = " ".join(
        f"{value:.4g}" if array.dtype.kind == "f" else str(value) for value in flat[:6]
    )
    return f"{shown} …" if flat.size > 6 else shown


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _read(path: Path) -> bytes:
    from nearfar.errors import InvalidInput

    try:
        return path.read_bytes()
    except OSError as exc:
        raise InvalidInput(
            f"{path} cannot be read ({exc.strerror})", field="inputs", fix="Check the path"
        ) from exc


def _load_tensors(inputs: list[str]) -> dict[str, np.ndarray]:
    import numpy as np

    from nearfar.errors import InvalidInput

    try:
        (path,) = inputs
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (OSError, ValueError, TypeError, AttributeError) as exc:
        raise InvalidInput(
            f"This model takes tensors, and {' '.join(inputs)!r} is not one .npz file of them",
            field="inputs",
            fix="Save them with numpy.savez, one array per input; "
            "`nearfar bundle inspect` lists the inputs",
        ) from exc


def _save(path: Path, outputs: dict[str, np.ndarray]) -> None:
    import numpy as np

    from nearfar.errors import InvalidInput

    try:
        with path.open("wb") as stream:
            np.savez(stream, **outputs)  # type: ignore[arg-type]  # names come from the model
    except OSError as exc:
        raise InvalidInput(
            f"{path} cannot be written ({exc.strerror})", field="output", fix="Check the path"
        ) from exc
