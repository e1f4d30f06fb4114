"""`nearfar bench overhead`: what nearfar adds to the libraries underneath it.

Both sides of every comparison open the same files, take turns within one process, and are checked
to do the same work. A bar is held against the median of the rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from benchmarks.baselines import Start, start_python
from benchmarks.harness import Figure, Report, Run, interleave
from benchmarks.overhead_llm import measure_llm
from benchmarks.overhead_tensors import measure_tensors
from benchmarks.subjects import Begin, Part, Settings, find_models, subject_of
from nearfar.engines.base import SessionOptions
from nearfar.engines.devices import physical_cores
from sdk import Client

MAX_IMPORT_MS = 200.0
MAX_IMPORT_RSS_MB = 40.0


def measure(settings: Settings, begin: Begin) -> Report:
    """Run the three comparisons.

    Args:
        settings: What is measured.
        begin: Shows progress.

    Raises:
        InvalidInput: A bundle is missing; says how to make it.
        EngineError: A side cannot run here, or the two did not do the same work.
    """
    manifests = find_models(settings.models)
    run = Run("overhead", seed=settings.seed)
    if not settings.threads:
        # Given to both sides: onnxruntime-genai's own default is half of the cores.
        settings = replace(settings, threads=physical_cores())
    options = SessionOptions(threads=settings.threads)
    # Without a policy file everything stays on the device, which is what is measured here.
    with Client(models=settings.models, edge_options=options) as client:
        subjects = [subject_of(client, settings.models, manifest) for manifest in manifests]
        # First, while this process has not yet kept the machine busy for minutes.
        parts = [measure_import(settings, run, begin)]
        for subject in subjects:
            if subject.bundle.manifest.task == "text-generation":
                parts.append(measure_llm(client, subject, settings, run, begin))
            else:
                parts.append(measure_tensors(client, subject, settings, run, begin))
    return run.report(
        bars=[bar for part in parts for bar in part.bars],
        figures=[figure for part in parts for figure in part.figures],
        settings={
            "tokens": settings.tokens,
            "rounds": settings.rounds,
            "threads": settings.threads,
            **{
                subject.name: f"{subject.bundle.manifest.version} {subject.variant.id}"
                for subject in subjects
            },
        },
    )


def measure_import(settings: Settings, run: Run, begin: Begin) -> Part:
    """`import sdk; sdk.Client` in a fresh process against a bare Python."""
    step = begin("import sdk", settings.rounds)
    starts: dict[str, list[Start]] = {"bare": [], "sdk": []}

    def side(name: str, statement: str) -> Callable[[], float]:
        def start() -> float:
            starts[name].append(start_python(statement))
            return starts[name][-1].wall_s

        return start

    start_python("import sdk; sdk.Client")  # compiled and in the disk cache from here on
    interleave(
        {"bare": side("bare", "pass"), "sdk": side("sdk", "import sdk; sdk.Client")},
        rounds=settings.rounds,
        random=run.random,
        on_round=step,
    )
    wall = Figure.of_rounds("import sdk: time", "ms", [s.wall_s * 1e3 for s in starts["sdk"]])
    rss = Figure.of_rounds(
        "import sdk: memory above bare Python",
        "MB",
        [
            (ours.rss_bytes - bare.rss_bytes) / 1e6
            for ours, bare in zip(starts["sdk"], starts["bare"], strict=True)
        ],
    )
    cpu = Figure.of_rounds(
        "import sdk: processor time", "ms", [s.cpu_s * 1e3 for s in starts["sdk"]]
    )
    return Part(
        (wall.bar(MAX_IMPORT_MS, "at_most"), rss.bar(MAX_IMPORT_RSS_MB, "at_most")),
        (wall, cpu, rss),
    )
