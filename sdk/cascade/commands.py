"""The command `nearfar calibrate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from sdk.cascade.calibration import Calibration
    from sdk.cascade.measure import Data


def calibrate(
    model: Annotated[str, typer.Argument(help="Name of the model; device and cloud have it.")],
    data: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(
            "--data",
            help="Unlabelled inputs like those of the app: files to classify, folders of them, or "
            "one .npz file of input tensors whose first axis counts the inputs.",
        ),
    ] = None,
    texts: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option("--texts", help="File with one text in each line, for models of text."),
    ] = None,
    min_agreement: Annotated[
        float, typer.Option(help="Agreement to report; the file serves every other one, too.")
    ] = 0.98,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output", "-o", help="File to write; MODEL.json in [cascade] calibrations otherwise."
        ),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="Probability with which the agreement holds.")
    ] = 0.95,
    horizon: Annotated[
        int,
        typer.Option(help="Hold it also within so many next requests; 0: in the long run only."),
    ] = 1000,
    score: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Classifiers: margin, max_probability or entropy; text: answer_probability, "
            "least_probability or least_margin. The best one otherwise."
        ),
    ] = None,
    min_cosine: Annotated[
        float, typer.Option(help="Embeddings: cosine from which two vectors agree.")
    ] = 0.99,
    max_new_tokens: Annotated[
        int,
        typer.Option(min=1, help="Text: length of answers, as the app's requests will have it."),
    ] = 64,
    stop: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Text: where answers end, as the app's requests will have it."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Text: continue each line, instead of answering it.")
    ] = False,
    limit: Annotated[
        int, typer.Option(min=0, help="Use so many inputs, drawn at random; 0: all.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Draws and orders the inputs.")] = 0,
    config: Annotated[Path, typer.Option("--config", "-c", help="Configuration file.")] = Path(
        "nearfar.toml"
    ),
    sensitivity: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Data class of the inputs; the strictest one when it is not given."),
    ] = None,
    purpose: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What the answers are for; policy may ask."),
    ] = None,
    tenant: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="On whose behalf; policy may ask."),
    ] = None,
) -> None:
    """Find out when the edge model may answer for the cloud's: both run on unlabelled data.

    The data goes to the cloud, so policy must allow that: nearfar calibrate file-type --data
    samples/ --sensitivity public

    A language model agrees when its greedy answer is word for word the cloud's, which short answers
    are likelier to be: nearfar calibrate assistant --texts questions.txt --max-new-tokens 8
    --sensitivity public
    """
    from nearfar.errors import InvalidInput
    from sdk.cascade import calibration as calibrations
    from sdk.cascade.measure import Settings
    from sdk.cascade.measure import calibrate as measure
    from sdk.cascade.run import file_of
    from sdk.cascade.scores import SCORES_OF
    from sdk.client import Client
    from sdk.config_file import load_config

    if not 0.0 < min_agreement < 1.0:
        raise InvalidInput(
            f"--min-agreement is {min_agreement}",
            field="min_agreement",
            fix="Give a number above 0 and below 1",
        )
    known = [name for names in SCORES_OF.values() for name in names]
    if score is not None and score not in known:
        raise InvalidInput(
            f"There is no score {score!r}", field="score", fix=f"Use one of: {', '.join(known)}"
        )
    settings = Settings(
        confidence=confidence,
        horizon_requests=horizon or None,
        score=score,
        min_cosine=min_cosine,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
        is_chat=not raw,
    )
    told = load_config(config)
    if output is None:
        folder = told.cascade.calibrations if told.cascade is not None else None
        if folder is None:
            raise InvalidInput(
                "There is no place for the calibration",
                field="output",
                fix='Name a file with --output, or set calibrations = "calibrations" in the '
                "[cascade] section",
            )
        output = file_of(folder, model)
    inputs = read_data(data or [], texts or [], limit=limit, seed=seed)
    options: dict[str, Any] = {
        name: value
        for name, value in (("sensitivity", sensitivity), ("purpose", purpose), ("tenant", tenant))
        if value is not None
    }
    with Client(told) as client, _Progress(len(inputs)) as progress:
        found = measure(client, model, inputs, settings, on_input=progress.advance, **options)
    calibrations.save(found, output)
    _report(found, min_agreement, output)


def read_data(paths: list[Path], texts: list[Path], *, limit: int = 0, seed: int = 0) -> Data:
    """What the command's paths hold, in random order.

    Args:
        paths: Files, folders, or one .npz file.
        texts: Files of one text in each line.
        limit: How many inputs to take; 0 takes all.
        seed: Draws and orders them.

    Raises:
        InvalidInput: A path holds nothing, or kinds are mixed.
    """
    import random

    from nearfar.errors import InvalidInput
    from sdk.cascade.measure import Data

    has_tensors = any(path.suffix == ".npz" for path in paths)
    if (has_tensors and len(paths) > 1) or (paths and texts):
        raise InvalidInput(
            "The data is of several kinds",
            field="data",
            fix="Give files and folders, or one .npz file, or --texts",
        )
    if has_tensors:
        return _tensors(paths[0], limit, seed)
    items: list[str | Path] = [line for path in texts for line in _lines(path)]
    for path in paths:
        items += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not items:
        raise InvalidInput(
            "There is no data", field="data", fix="Name files with --data or --texts"
        )
    # Whatever is sorted by kind or time must not be a sample of one kind.
    random.Random(seed).shuffle(items)  # noqa: S311 - an order, no secret
    return Data(items=items[: limit or None])


def _tensors(path: Path, limit: int, seed: int) -> Data:
    import numpy as np

    from nearfar.errors import InvalidInput
    from sdk.cascade.measure import Data
    from sdk.commands import load_tensors

    feeds = load_tensors(path)
    counts = {len(array) if array.ndim else 0 for array in feeds.values()}
    if len(counts) != 1 or counts == {0}:
        raise InvalidInput(
            f"The arrays of {path} do not count the same inputs",
            field="data",
            fix="The first axis of each array must count the inputs",
        )
    order = np.random.default_rng(seed).permutation(counts.pop())[: limit or None]
    return Data(feeds={name: array[order] for name, array in feeds.items()})


def _lines(path: Path) -> list[str]:
    from nearfar.errors import InvalidInput

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidInput(
            f"{path} cannot be read as text: {exc}", field="data", fix="Save it as UTF-8"
        ) from exc
    return [line.strip() for line in text.splitlines() if line.strip()]


class _Progress:
    """How far the calibration is, on standard error; nothing where that is no terminal."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("asking edge and cloud"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bars.add_task("", total=total)

    def advance(self, count: int) -> None:
        self._bars.advance(self._task, count)

    def __enter__(self) -> _Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()


def _report(found: Calibration, target: float, path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    threshold = found.threshold(target)
    best = max(len(sample.disagreements) for sample in found.scores.values())
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("samples", f"{found.samples:,}")
    table.add_row("edge and cloud disagree on", f"{best / found.samples:.1%} of them")
    table.add_row("stated agreement", f"{target:g}")
    if threshold.keeps_nothing:
        table.add_row("threshold", "none: every request goes to the cloud")
        table.add_row("samples needed", f"{found.samples_needed(target):,} without a disagreement")
    else:
        bound = "any" if threshold.bound == float("-inf") else f"{threshold.bound:.4g}"
        table.add_row("threshold", f"{threshold.score} above {bound}")
        table.add_row("goes to the cloud", f"{1 - threshold.kept_share:.1%}")
        table.add_row(
            "agreement",
            f"{1 - threshold.kept_disagreements / found.samples:.2%} here; at least "
            f"{threshold.agreement_bound:.2%} with {found.confidence:.0%} confidence",
        )
    table.add_row("written to", str(path))
    Console(highlight=False, file=sys.stdout).print(table)
