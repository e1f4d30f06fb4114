"""`nearfar bench`: measure the performance that is promised, on your own machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Measure nearfar against the obvious baseline, on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

#: Options that every benchmark takes.
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write bars, figures, versions and machine to a file.",
        show_default=False,
    ),
]
Check = Annotated[
    bool,
    typer.Option("--check", help="Say in one line which bar falls short; exit status 1 if any."),
]
Seed = Annotated[int, typer.Option(help="The order of the sides is drawn from it.")]


@app.callback()
def bench() -> None:
    """Measure nearfar against the obvious baseline, on this machine."""
    # A callback makes Typer keep the subcommand's name while there is only one.


@app.command()
def overhead(
    models: Annotated[
        Path,
        typer.Option(help="Folder of bundles, such as `nearfar quickstart` makes."),
    ] = Path(".nearfar/models"),
    tokens: Annotated[int, typer.Option(min=8, max=512, help="Length of each LLM answer.")] = 64,
    rounds: Annotated[
        int, typer.Option(min=2, max=1000, help="How often each side is measured.")
    ] = 12,
    threads: Annotated[
        int,
        typer.Option(min=0, max=256, help="Compute threads of both sides; 0: one per core."),
    ] = 0,
    seed: Seed = 0,
    json_file: JsonFile = None,
    check: Check = False,
) -> None:
    """What nearfar adds to bare ONNX Runtime, and what `import sdk` costs.

    Three comparisons on the same files in the same run, interleaved: a streamed LLM answer with a
    bare onnxruntime-genai loop; `infer`, `classify` and `embed` with a bare ONNX Runtime call; and
    `import sdk` with a bare Python.
    """
    from benchmarks import harness
    from benchmarks.overhead import measure
    from benchmarks.subjects import Settings

    harness.check_json_path(json_file)
    settings = Settings(models=models, tokens=tokens, rounds=rounds, threads=threads, seed=seed)
    with harness.progress(is_quiet=check) as begin:
        report = measure(settings, begin)
    harness.conclude(report, json_path=json_file, check=check)


@app.command()
def wire(
    rounds: Annotated[
        int, typer.Option(min=2, max=1000, help="How often each side is measured.")
    ] = 12,
    echoes: Annotated[
        int,
        typer.Option(
            min=1, max=100_000, help="Echoes of 1 KiB in each round; larger ones take fewer."
        ),
    ] = 200,
    connections: Annotated[
        int, typer.Option(min=1, max=20_000, help="Idle connections for the memory figure.")
    ] = 1000,
    seed: Seed = 0,
    json_file: JsonFile = None,
    check: Check = False,
) -> None:
    """What the secure channel and the protocol add to a bare TLS 1.3 websocket.

    The same payloads through a bare `websockets` echo, the secure session, and the whole cloud
    runtime, interleaved between two processes: processor time, messages in a second, handshake,
    memory of idle connections.
    """
    from benchmarks import harness
    from benchmarks.wire import Settings, measure

    harness.check_json_path(json_file)
    settings = Settings(rounds=rounds, echoes=echoes, connections=connections, seed=seed)
    with harness.progress(is_quiet=check) as begin:
        report = measure(settings, begin)
    harness.conclude(report, json_path=json_file, check=check)


#: Recorded links are used where they lie beside the checkout.
_TRACES_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "traces"


@app.command()
def routing(
    traces: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of recorded links, NAME.up and NAME.down in Mahimahi's format; "
            "without it ../shared/traces where that exists.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs of each scenario.")] = 5,
    seed: Seed = 0,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write routing.html with charts, and pictures (matplotlib: nearfar[plots]).",
            show_default=False,
        ),
    ] = None,
    json_file: JsonFile = None,
    check: Check = False,
) -> None:
    """The router against fixed rules, others' rules and an oracle, in simulated worlds.

    Drives the client's own prediction, decision, circuit breaker and repair with a virtual clock
    over links that are generated or recorded; every policy meets the same requests.
    """
    from benchmarks import harness
    from benchmarks.routing import bench as lab
    from benchmarks.routing.pictures import require, write_pictures
    from benchmarks.routing.plots import write_page

    harness.check_json_path(json_file)
    if plot is not None:
        require()  # said before minutes of simulation
    if traces is None and _TRACES_BESIDE.is_dir():
        traces = _TRACES_BESIDE
    settings = lab.Settings(seed=seed, seeds=seeds, traces=traces)
    with harness.progress(is_quiet=check) as begin:
        report, outcomes = lab.measure(settings, begin)
    if plot is not None:
        write_page(outcomes, plot)
        write_pictures(outcomes, plot)
    harness.conclude(report, json_path=json_file, check=check)


@app.command()
def handover(
    models: Annotated[
        Path,
        typer.Option(help="Folder of bundles, such as `nearfar quickstart` makes."),
    ] = Path(".nearfar/models"),
    model: Annotated[str, typer.Option(help="Text generation model in it.")] = "assistant",
    variant: Annotated[str, typer.Option(help="Its variant, on both routes.")] = "fp32",
    tokens: Annotated[int, typer.Option(min=2, max=512, help="Length of the answer.")] = 64,
    other: Annotated[
        str,
        typer.Option(
            help="Another variant for the device: answers must then be well-formed and marked, and "
            "keep what was shown, instead of being the same.",
            show_default=False,
        ),
    ] = "",
    json_file: JsonFile = None,
    check: Check = False,
) -> None:
    """Whether an answer comes out right when its route dies after any of its tokens.

    Device and cloud run the same variant, and each dies once after each token of a greedy answer;
    the other one goes on. Takes some ten minutes.
    """
    from benchmarks import harness
    from benchmarks.handover import Settings, measure

    harness.check_json_path(json_file)
    with harness.progress(is_quiet=check) as begin:
        settings = Settings(models=models, model=model, variant=variant, tokens=tokens, other=other)
        report = measure(settings, begin)
    harness.conclude(report, json_path=json_file, check=check)


@app.command()
def link(
    models: Annotated[
        Path,
        typer.Option(help="Folder of bundles, such as `nearfar quickstart` makes."),
    ] = Path(".nearfar/models"),
    traces: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of recorded links, as for `nearfar bench routing`.",
            show_default=False,
        ),
    ] = None,
    duration: Annotated[
        float, typer.Option(min=6.0, max=120.0, help="Seconds of each run; a link has three.")
    ] = 40.0,
    seed: Annotated[int, typer.Option(help="Of requests and generated links.")] = 0,
    json_file: JsonFile = None,
    check: Check = False,
) -> None:
    """The client over emulated links to a real cloud runtime, against edge only and cloud only.

    Cloud runtime, link and client are processes of their own; the link delays and follows
    recordings or generated traces. Takes some seven minutes.
    """
    from benchmarks import harness
    from benchmarks.link import Settings, measure

    harness.check_json_path(json_file)
    if traces is None and _TRACES_BESIDE.is_dir():
        traces = _TRACES_BESIDE
    settings = Settings(models=models, traces=traces, duration_s=duration, seed=seed)
    with harness.progress(is_quiet=check) as begin:
        report = measure(settings, begin)
    harness.conclude(report, json_path=json_file, check=check)


@app.command()
def chaos(
    models: Annotated[
        Path,
        typer.Option(help="Folder of bundles, such as `nearfar quickstart` makes."),
    ] = Path(".nearfar/models"),
    parts: Annotated[
        str, typer.Option(help="Of simulated, real, slots and wedges; with commas.")
    ] = "simulated,real,slots,wedges",
    simulated: Annotated[
        int, typer.Option(min=1, max=10_000_000, help="Requests in the simulation, at least.")
    ] = 10_000,
    real: Annotated[int, typer.Option(min=1, max=1_000_000, help="Real requests.")] = 500,
    rate: Annotated[
        float, typer.Option(min=0.1, max=1000.0, help="Real requests in a second.")
    ] = 5.0,
    rounds: Annotated[
        int, typer.Option(min=1, max=1000, help="Of each cancellation, frozen server and hang.")
    ] = 8,
    seed: Annotated[int, typer.Option(help="Of requests and faults.")] = 0,
    json_file: JsonFile = None,
    check: Check = False,
) -> None:
    """What becomes of requests while servers die, stop and lose their connections.

    Simulated requests with the client's own router and a virtual clock; real ones against a cloud
    runtime that is killed and started again, frozen and cut off; how soon a cancelled answer gives
    its slot back, and how soon a frozen server and an engine that hangs are noticed. Takes some
    eight minutes.
    """
    from benchmarks import harness
    from benchmarks.chaos.bench import PARTS, Settings, measure

    harness.check_json_path(json_file)
    settings = Settings(
        models=models, parts=_choice(parts, PARTS, "--parts", "parts"),
        simulated_requests=simulated,
        real_requests=real, rate_s=rate, rounds=rounds, seed=seed,
    )  # fmt: skip
    with harness.progress(is_quiet=check) as begin:
        report = measure(settings, begin)
    harness.conclude(report, json_path=json_file, check=check)


def _choice(given: str, known: Sequence[str], option: str, what: str) -> tuple[str, ...]:
    """A list with commas of names that exist.

    Raises:
        InvalidInput: One does not, or there is none.
    """
    from nearfar.errors import InvalidInput

    wished = tuple(name.strip() for name in given.split(",") if name.strip())
    if not wished or not set(wished) <= set(known):
        raise InvalidInput(
            f"{given!r} does not name {what}", field=option, fix=f"Choose of {', '.join(known)}"
        )
    return wished


@app.command()
def cascade(
    models: Annotated[
        Path,
        typer.Option(help="Folder of bundles with minilm, such as `nearfar quickstart` makes."),
    ] = Path(".nearfar/models"),
    splits: Annotated[
        int, typer.Option(min=2, max=10_000, help="Random splits of each pool of inputs.")
    ] = 100,
    seed: Annotated[int, typer.Option(help="Of models, texts and splits.")] = 0,
    json_file: JsonFile = None,
    check: Check = False,
) -> None:
    """Whether the cascade holds the agreement that it states, on inputs it was not calibrated with.

    Trains two small networks on handwritten digits and heads on MiniLM's vectors, converts them,
    and splits real inputs at random: one half calibrates, the other is answered.
    """
    from benchmarks import harness
    from benchmarks.cascade.bench import Settings, measure

    harness.check_json_path(json_file)
    settings = Settings(models=models, splits=splits, seed=seed)
    with harness.progress(is_quiet=check) as begin:
        report = measure(settings, begin)
    harness.conclude(report, json_path=json_file, check=check)


@app.command()
def convert(
    sources: Annotated[
        Path,
        typer.Option(help="Folder with the models' files, such as `nearfar quickstart` unpacks."),
    ] = Path(".nearfar/sources"),
    parts: Annotated[
        str, typer.Option(help="Which comparisons, separated by commas.")
    ] = "encoder,llm,vision,audio,files,resume",
    rounds: Annotated[
        int, typer.Option(min=2, max=1000, help="How often each side of a speed is measured.")
    ] = 6,
    tokens: Annotated[int, typer.Option(min=8, max=512, help="Length of each LLM answer.")] = 64,
    sounds: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Recordings for `audio`: .wav, 16 bits, one channel, 8 or 16 kHz. Default: those "
            "that --fetch brings.",
            show_default=False,
        ),
    ] = None,
    files: Annotated[
        int, typer.Option(min=1000, max=100_000, help="How many files `files` classifies.")
    ] = 1500,
    fetch: Annotated[
        bool,
        typer.Option("--fetch", help="Bring silero-vad and recorded speech below --sources first."),
    ] = False,
    kills: Annotated[
        int, typer.Option(min=1, max=1000, help="How often a conversion is killed.")
    ] = 50,
    quick: Annotated[
        bool, typer.Option("--quick", help="Five kills, and nothing that has no bar.")
    ] = False,
    seed: Seed = 0,
    json_file: JsonFile = None,
    check: Check = False,
) -> None:
    """What conversions of real models save, and what they keep of the quality.

    Converts all-MiniLM-L6-v2 to INT8 plainly and by nearfar's recipe, and SmolLM2-135M to INT8,
    INT4 rounded to the nearest and INT4 as nearfar makes it; kills a conversion again and again.
    Takes the better part of an hour on two cores. A part that fails is told, and the others go on.
    """
    from benchmarks import harness
    from benchmarks.convert import PARTS, Settings, measure
    from nearfar.errors import InvalidInput

    harness.check_json_path(json_file)
    wished = tuple(part.strip() for part in parts.split(",") if part.strip())
    if not wished or not set(wished) <= set(PARTS):
        raise InvalidInput(
            f"{parts!r} does not name comparisons",
            field="--parts",
            fix=f"Choose of {', '.join(PARTS)}",
        )
    if fetch:
        from benchmarks.sounds import fetch_audio

        fetch_audio(sources)
    settings = Settings(
        sources=sources, parts=wished, rounds=rounds, tokens=tokens,
        kills=min(kills, 5) if quick else kills, quick=quick, seed=seed,
        sounds=sounds, files=files,
    )  # fmt: skip
    with harness.progress(is_quiet=check) as begin:
        report = measure(settings, begin)
    harness.conclude(report, json_path=json_file, check=check)


@app.command()
def tensorrt(
    models: Annotated[
        Path | None,
        typer.Option(help="Folder of bundles, whose variants are asked about as they are."),
    ] = None,
    sources: Annotated[
        Path | None,
        typer.Option(help="Folder with the models' files; those that are there are converted."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep results of steps, for the next time.", show_default=False
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for each build.")] = 600.0,
    json_file: JsonFile = None,
    check: Check = False,
) -> None:
    """Whether TensorRT takes the graphs that nearfar makes, asked without a GPU.

    Converts an MLP, a CNN, a transformer encoder and ResNet-18, and of the sources MiniLM, magika
    and silero-vad, for CPU and TensorRT, and has TensorRT RTX build every variant with a dynamic
    batch. Needs tensorrt-rtx. Takes some minutes, and says nothing about speed.
    """
    from benchmarks import harness
    from benchmarks.tensorrt import Settings, measure
    from benchmarks.tensorrt_table import show

    harness.check_json_path(json_file)
    settings = Settings(models=models, sources=sources, cache=cache, timeout_s=timeout)
    with harness.progress(is_quiet=check) as begin:
        found = measure(settings, begin)
    if not check:
        show(found)
    harness.conclude(found.report, json_path=json_file, check=check)


__all__ = ["app"]
