"""`nearfar bench tensorrt`: whether TensorRT takes what nearfar makes, with a dynamic batch.

Every graph is parsed and built by TensorRT RTX without a GPU, in a process of its own. Nothing is
run on a GPU, and nothing is said about speed there.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.harness import Bar, Figure, Report, Run
from benchmarks.subjects import Begin
from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.recipes.tensorrt import IDS
from converters.settings import CalibrationSettings, Gates, Int8Settings, TensorrtSettings
from converters.settings import Settings as ConverterSettings
from converters.tensorrt.check import Verdict, check_graph, check_variant, require_library
from nearfar.bundle import Bundle, BundleStore
from nearfar.bundle.manifest import Variant
from nearfar.errors import ConversionError, InvalidInput

#: Variants of language models that are made for TensorRT too.
_PLAIN = ("onnx-fp32", "onnx-fp16")
#: Bundles of the store whose variants are asked about as they are.
_ENGINES = ("onnxruntime", "tensorrt")
_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
#: silero-vad hears 16 kHz in windows of 512 samples after 64 of the one before.
_SILERO = TensorrtSettings(
    axes={"input.0": (1, 4, 16), "input.1": (576, 576, 576), "state.1": (1, 4, 16)},
    fixed={"sr": 16000.0},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is asked about.

    Attributes:
        models: Store of bundles, as `nearfar quickstart` makes it; `None` leaves it out.
        sources: Folder below which the models' own files lie; `None` leaves them out.
        cache: Folder with results of earlier steps; `None` does everything.
        timeout_s: For each build.
    """

    models: Path | None
    sources: Path | None
    cache: Path | None = None
    timeout_s: float = 600.0


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One graph, and what TensorRT says about it.

    Attributes:
        graph: Model and variant.
        is_for_tensorrt: Whether it was made for TensorRT, so that it must be taken as it is.
        verdict: What it says; `None` when the graph could not be made.
        why: Why it could not.
    """

    graph: str
    is_for_tensorrt: bool
    verdict: Verdict | None = None
    why: str = ""

    @property
    def is_taken(self) -> bool:
        return self.verdict is not None and self.verdict.accepted

    @property
    def is_taken_repaired(self) -> bool:
        return self.is_taken or (self.verdict is not None and bool(self.verdict.fixed_accepted))

    @property
    def summary(self) -> str:
        """For the report."""
        if self.is_taken:
            return "taken"
        word = "refused, taken when repaired" if self.is_taken_repaired else "refused"
        return f"{word}: {self.reason}"

    @property
    def reason(self) -> str:
        """Why it is refused, or "" when it is taken as it is."""
        if self.verdict is None or self.is_taken:
            return self.why
        return "; ".join(str(finding) for finding in self.verdict.findings)


class TensorrtReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report with its table."""

    report: Report
    answers: tuple[Answer, ...]


def measure(settings: Settings, begin: Begin) -> TensorrtReport:
    """Convert, and ask.

    Raises:
        ConversionError: There is no TensorRT RTX to ask.
        InvalidInput: There is nothing to ask about.
    """
    require_library()
    run = Run("tensorrt", seed=0)
    answers: list[Answer] = []
    if settings.models is not None:
        answers += _of_store(settings.models, settings.timeout_s, begin)
    answers += _silero(settings.sources, settings.timeout_s, begin)
    with tempfile.TemporaryDirectory(prefix="nearfar-bench-") as folder, _examples():
        subjects = list(_subjects(settings))
        step = begin("conversions", len(subjects))
        for name, source, options in subjects:
            answers += _converted(name, source, options, Path(folder), settings.timeout_s)
            step()
    if not answers:
        raise InvalidInput(
            "There is nothing to ask TensorRT about",
            field="--models",
            fix="Name a folder of models",
        )
    own = [answer for answer in answers if answer.is_for_tensorrt]
    built = [one.verdict for one in answers if one.verdict is not None and one.verdict.build_s]
    report = run.report(
        bars=[
            _none("variants made for TensorRT that it refuses", sum(not a.is_taken for a in own)),
            _none(
                "variants that it refuses also when they are repaired",
                sum(not answer.is_taken_repaired for answer in answers),
            ),
        ],
        figures=[
            Figure.of_rounds("variants asked about", "", [float(len(answers))]),
            Figure.of_rounds(
                "taken as they are", "", [float(sum(answer.is_taken for answer in answers))]
            ),
            *(
                [Figure.of_calls("one build", "s", [verdict.build_s for verdict in built])]
                if built
                else []
            ),
        ],
        settings={
            "models": settings.models.name if settings.models else "",
            "sources": settings.sources.name if settings.sources else "",
            "library": built[0].library if built else "",
            **{answer.graph: answer.summary for answer in answers},
        },
    )
    return TensorrtReport(report=report, answers=tuple(answers))


def _of_store(models: Path, timeout_s: float, begin: Begin) -> list[Answer]:
    """What the store's variants are, most of them made for the CPU."""
    store = BundleStore(models)
    found = [
        (manifest, variant)
        for manifest in store.models()
        for variant in manifest.variants
        if variant.engine in _ENGINES
    ]
    step = begin("variants of the store", len(found))
    answers = []
    for manifest, variant in found:
        bundle = store.open(manifest.name, manifest.version)
        answers.append(_asked(bundle, variant, timeout_s=timeout_s))
        step()
    return answers


def _asked(bundle: Bundle, variant: Variant, *, timeout_s: float) -> Answer:
    verdict = check_variant(bundle, variant, timeout_s=timeout_s)
    is_own = variant.engine == "tensorrt" or variant.id in _PLAIN
    graph = f"{bundle.manifest.name}/{variant.id}"
    return Answer(graph=graph, is_for_tensorrt=is_own, verdict=verdict)


def _subjects(settings: Settings) -> Iterator[tuple[str, Path, ConversionOptions]]:
    """(name, source, options) of everything that is converted for the purpose."""
    base = ConversionOptions(
        measure=False,
        cache=settings.cache,
        variants=("fp32", "int8", *IDS),
        settings=ConverterSettings(
            # Quality is not what is asked here.
            gates=Gates(min_mean_cosine=0.0, min_top1_agreement=0.0),
            int8=Int8Settings(
                method="static", calibration=CalibrationSettings(target="tensorrt", samples=8)
            ),
        ),
    )
    for name, inputs, axes in (
        ("mlp", "mlp_inputs", None),
        ("cnn", "cnn_inputs", None),
        ("encoder", "encoder_inputs", "batch=0,tokens=1"),
    ):
        if (_EXAMPLES / "nets.py").is_file():
            options = _with(base, name=name, inputs=f"nets:{inputs}", axes=axes)
            yield name, Path(f"nets:make_{name}"), options
    nets = "benchmarks.tensorrt_nets"
    options = _with(base, name="resnet18", inputs=f"{nets}:resnet18_inputs")
    yield "resnet18", Path(f"{nets}:make_resnet18"), options
    if settings.sources is None:
        return
    for name, pattern in (
        ("minilm", "**/modules.json"),
        ("file-type", "**/standard_v3*/model.onnx"),
    ):
        found = sorted(settings.sources.glob(pattern))
        if found:
            source = found[0].parent if pattern.endswith(".json") else found[0]
            yield name, source, _with(base, name=name)
    for source in sorted(settings.sources.glob("**/*.gguf"))[:1]:
        yield "language-model", source, _with(base, name="language-model", variants=_PLAIN)


def _silero(sources: Path | None, timeout_s: float, begin: Begin) -> list[Answer]:
    """silero-vad's own file, as it is and for one sample rate.

    As it is, its branches ask for the sample rate; with that fixed they are decided.
    """
    found = sorted(sources.glob("**/silero_vad.onnx")) if sources is not None else []
    if not found:
        return []
    step = begin("silero-vad", 2)
    published = check_graph(found[0], axes=_SILERO.axes, timeout_s=timeout_s)
    step()
    fixed = check_graph(found[0], axes=_SILERO.axes, fixed=_SILERO.fixed, timeout_s=timeout_s)
    step()
    # Stating the rate is the repair of what is published.
    published = msgspec.structs.replace(published, fixed_accepted=fixed.accepted)
    return [
        Answer(graph="silero-vad/as published", is_for_tensorrt=False, verdict=published),
        Answer(graph="silero-vad/16 kHz", is_for_tensorrt=True, verdict=fixed),
    ]


def _with(options: ConversionOptions, **changes: object) -> ConversionOptions:
    from dataclasses import replace

    return replace(options, **changes)  # type: ignore[arg-type]  # names are those of the options


def _converted(
    name: str, source: Path, options: ConversionOptions, folder: Path, timeout_s: float
) -> list[Answer]:
    """Ask about every variant; one that cannot be made is an answer too."""
    try:
        bundle = convert_model(source, folder / name, options)
    except ConversionError as exc:
        return [Answer(graph=name, is_for_tensorrt=True, why=str(exc))]
    answers = [_asked(bundle, variant, timeout_s=timeout_s) for variant in bundle.manifest.variants]
    made = {variant.id for variant in bundle.manifest.variants}
    answers += [
        Answer(
            graph=f"{name}/{one}",
            is_for_tensorrt=one in (*IDS, *_PLAIN),
            why="it could not be made: the conversion left it out",
        )
        for one in options.variants
        if one not in made
    ]
    return answers


@contextmanager
def _examples() -> Iterator[None]:
    """Let modules of the examples be named as a user names them from their folder."""
    sys.path.insert(0, str(_EXAMPLES))
    try:
        yield
    finally:
        sys.path.remove(str(_EXAMPLES))


def _none(name: str, count: int) -> Bar:
    return Bar(name=name, value=float(count), limit=0.0, direction="at_most", unit="")
