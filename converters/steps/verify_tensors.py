"""Compare variants of any tensor model with the source file, on real inputs where there are any."""

from __future__ import annotations

import itertools
import os
import sysconfig
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from converters.steps.gate import UNFUSED
from converters.steps.onnx_session import open_session, run
from nearfar.bundle.manifest import HeadTailPreprocessing, QualityFigure, TensorSpec
from nearfar.errors import ConversionError
from nearfar.tensors import numpy_of

#: Of real files, and of rows that a person gave.
MAX_SAMPLES, _MAX_ROWS = 200, 2000
_SYNTHETIC_SAMPLES = 32
_MAX_FILE_BYTES = 4 << 20
_MAX_FILES_SEEN = 4000

#: Beside the inputs of a sample: the right classes, by their number.
LABELS = "labels"

#: Of classifiers with one class to an input, and with several.
_AGREEMENTS = ("top1_agreement", "labels_agreement")
#: From where a class is true of an input, where several may be.
_TRUE_FROM = 0.5

Feeds = dict[str, np.ndarray]


def file_samples(input_name: str, spec: HeadTailPreprocessing, *, batch: int) -> list[Feeds]:
    """Feature rows of real files of this Python installation: a few of each suffix."""
    from nearfar.processing.head_tail import features

    rows: list[Feeds] = []
    for file in _varied_files():
        data = file.read_bytes()
        if len(data.strip()) < max(spec.min_bytes, 1):
            continue
        row = features(data, spec)
        rows.append({input_name: np.repeat(row[None, :], batch, axis=0)})
        if len(rows) == MAX_SAMPLES:
            break
    return rows


def _varied_files() -> list[Path]:
    by_suffix: dict[str, list[Path]] = {}
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for file in itertools.islice(_files_below(Path(root)), _MAX_FILES_SEEN):
            if 64 <= file.stat().st_size <= _MAX_FILE_BYTES:
                by_suffix.setdefault(file.suffix.lower(), []).append(file)
    picked: list[Path] = []
    for depth in range(MAX_SAMPLES):
        for suffix in sorted(by_suffix):
            files = by_suffix[suffix]
            if depth < len(files):
                picked.append(files[depth * len(files) // min(len(files), MAX_SAMPLES)])
        if len(picked) >= 2 * MAX_SAMPLES:
            break
    return list(dict.fromkeys(picked))


def _files_below(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders.sort()
        for name in sorted(names):
            file = Path(folder, name)
            if file.is_file() and not file.is_symlink():
                yield file


def stored_samples(path: Path, inputs: Sequence[TensorSpec]) -> list[Feeds]:
    """Rows of an ``.npz`` file that has one array for each input; the first axis counts rows.

    An array `LABELS` with the right class of each row is taken along, where it is no input.

    Raises:
        ConversionError: The file does not fit the model; names file and array.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no archive of arrays")  # numpy would take it for a pickle
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError) as exc:
        raise ConversionError(
            f"{path} is not an .npz file with samples ({exc})", fix="Write it with numpy.savez"
        ) from exc
    feeds: list[Feeds] = []
    for spec in inputs:
        array = arrays.get(spec.name)
        if array is None or array.dtype != numpy_of(spec.datatype):
            raise ConversionError(
                f"{path} has no array {spec.name!r} of type {spec.datatype}",
                fix="Give one array for each input of the model, with its type",
            )
        wrong = [a for a, b in zip(array.shape[1:], spec.shape[1:]) if b not in (-1, a)]  # noqa: B905
        if array.ndim != len(spec.shape) or wrong:
            raise ConversionError(
                f"{path}: {spec.name!r} has the shape {list(array.shape)}, the model takes "
                f"{list(spec.shape)} (-1: any size)",
                fix="Give rows as the model takes them; the first axis counts them",
            )
        feeds = feeds or [{} for _ in range(min(_MAX_ROWS, len(array)))]
        if len(array) < len(feeds):
            raise ConversionError(
                f"{path}: {spec.name!r} has fewer rows than the other inputs",
                fix="Give every input the same number of rows",
            )
        for row, feed in enumerate(feeds):
            feed[spec.name] = array[row : row + 1]
    labels = arrays.get(LABELS) if LABELS not in {spec.name for spec in inputs} else None
    if labels is not None:
        if labels.dtype.kind not in "iu" or labels.ndim != 1 or len(labels) < len(feeds):
            raise ConversionError(
                f"{path}: {LABELS!r} has the shape {list(labels.shape)} and the type "
                f"{labels.dtype}; {len(feeds)} whole numbers are needed",
                fix="Give the number of the right class of each row, or leave the array out",
            )
        for row, feed in enumerate(feeds):
            feed[LABELS] = labels[row : row + 1]
    if not feeds:
        raise ConversionError(f"{path} holds no rows", fix="Give at least one row for each input")
    return feeds


def synthetic_samples(inputs: Sequence[TensorSpec], seed: int) -> list[Feeds]:
    """Seeded random inputs, for models nobody gave samples for."""
    generator = np.random.default_rng(seed)
    feeds: list[Feeds] = []
    for number in range(_SYNTHETIC_SAMPLES):
        feed: Feeds = {}
        for spec in inputs:
            # Free sizes are the same for all inputs of one call: they usually are one quantity.
            shape = [size if size >= 0 else 1 + number % 3 for size in spec.shape]
            dtype = numpy_of(spec.datatype)
            if dtype.kind == "f":
                feed[spec.name] = generator.standard_normal(shape).astype(dtype)
            elif dtype.kind in "biu":
                # Zero and one are valid as index, flag and count alike.
                feed[spec.name] = generator.integers(0, 2, shape).astype(dtype)
            else:
                raise ConversionError(
                    f"There are no samples for input {spec.name!r} of type {spec.datatype}",
                    fix="Give real inputs with --samples FILE.npz",
                )
        feeds.append(feed)
    return feeds


def verify_tensors(
    source: Path,
    variants: Mapping[str, Path],
    samples: Sequence[Feeds],
    *,
    source_name: str,
    label_output: str | None,
    min_top1_agreement: float,
    is_unfused: bool = False,
    as_written: bool = False,
    multi_label: bool = False,
) -> dict[str, tuple[QualityFigure, ...]]:
    """Run everything through the source and the variants.

    Args:
        source: The file that was converted.
        variants: Variant id to ONNX file.
        samples: Inputs of one call each.
        source_name: What the source is called in the manifest.
        label_output: Output with class scores, for classifiers.
        min_top1_agreement: Gate for classifiers; a share.
        is_unfused: Also judge the graphs as they are written, see `open_session`.
        as_written: Judge them only so: for graphs that will run elsewhere.
        multi_label: Whether any number of classes may be true, each from a score of 0.5 on.

    Returns:
        Variant id to figures: ``max_abs_error``, ``relative_error``, and ``top1_agreement`` for
        classifiers (``labels_agreement`` where several classes may be true); ``accuracy`` and
        ``f1_macro`` too, where samples bring `LABELS`.

    Raises:
        ConversionError: NaN, or a variant that is not the same model.
    """
    session = open_session(source)
    truth = [run(session, feeds, name="source") for feeds in samples]
    figures: dict[str, tuple[QualityFigure, ...]] = {}
    for variant_id, path in variants.items():
        found: list[QualityFigure] = []
        for suffix in ("", UNFUSED) if is_unfused else ("",):
            session = open_session(path, is_unfused=bool(suffix) or as_written)
            outputs = [run(session, feeds, name=variant_id) for feeds in samples]
            found += _compared(outputs, truth, source_name, label_output, suffix, multi_label)
            if (
                label_output is not None
                and not multi_label
                and all(LABELS in feeds for feeds in samples)
            ):
                found += _right(outputs, samples, source_name, label_output, suffix)
        agreements = [f.value for f in found if f.metric.startswith(_AGREEMENTS)]
        if agreements and max(agreements) < min_top1_agreement:
            raise ConversionError(
                f"Variant {variant_id} gives the source's answer in {max(agreements):.0%} of "
                f"{len(samples)} cases only",
                fix="Leave this variant out with --variants",
            )
        figures[variant_id] = tuple(found)
    return figures


def _compared(
    outputs: Sequence[Mapping[str, np.ndarray]],
    truth: Sequence[Mapping[str, np.ndarray]],
    source_name: str,
    label_output: str | None,
    suffix: str,
    multi_label: bool,
) -> list[QualityFigure]:
    worst, same, total, lost, power = 0.0, 0, 0, 0.0, 0.0
    for found, expected in zip(outputs, truth):  # noqa: B905
        for name, array in expected.items():
            if array.size and array.dtype.kind in "fiu":
                wide = array.astype(np.float64)
                difference = wide - found[name].astype(np.float64)
                worst = max(worst, float(np.abs(difference).max()))
                lost += float(np.square(difference).sum())
                power += float(np.square(wide).sum())
        if label_output is not None:
            one, other = found[label_output], expected[label_output]
            if multi_label:
                agree = ((one >= _TRUE_FROM) == (other >= _TRUE_FROM)).all(axis=-1)
            else:
                agree = one.argmax(axis=-1) == other.argmax(axis=-1)
            same += int(agree.sum())
            total += agree.size
    relative = float(np.sqrt(lost / power)) if power else float(lost > 0)
    made = [
        _figure("max_abs_error" + suffix, worst, len(truth), source_name, higher=False),
        _figure("relative_error" + suffix, relative, len(truth), source_name, higher=False),
    ]
    if label_output is not None:
        agreement = same / max(1, total)
        metric = _AGREEMENTS[multi_label] + suffix
        made.insert(0, _figure(metric, agreement, total, source_name, higher=True))
    return made


def _right(
    outputs: Sequence[Mapping[str, np.ndarray]],
    samples: Sequence[Feeds],
    source_name: str,
    label_output: str,
    suffix: str,
) -> list[QualityFigure]:
    """How often the answer is right, and the mean of the classes' F1 (of those that occur)."""
    found = np.concatenate([one[label_output].argmax(axis=-1).ravel() for one in outputs])
    right = np.concatenate([one[LABELS].ravel() for one in samples])
    if found.shape != right.shape:
        raise ConversionError(
            f"There are {right.size} labels for {found.size} answers",
            fix="Give one label for each row of the samples",
        )
    scores = []
    for label in np.unique(np.concatenate([found, right])):
        hits = float(((found == label) & (right == label)).sum())
        scores.append(2 * hits / float((found == label).sum() + (right == label).sum()))
    accuracy, f1 = float((found == right).mean()), float(np.mean(scores))
    return [
        _figure("accuracy" + suffix, accuracy, right.size, source_name, higher=True),
        _figure("f1_macro" + suffix, f1, right.size, source_name, higher=True),
    ]


def _figure(
    metric: str, value: float, samples: int, reference: str, *, higher: bool
) -> QualityFigure:
    return QualityFigure(
        metric=metric,
        value=value,
        higher_is_better=higher,
        samples=samples,
        reference=reference,
    )
