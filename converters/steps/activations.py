"""How the numbers of activations are spread, and what calibration made of them: for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from converters.libraries import load
from converters.report.evidence import ActivationHistogram
from converters.steps.onnx_session import open_session, run
from nearfar.errors import ConversionError

#: Enough to see a shape. All tensors of a model would be a page nobody reads.
_FEEDS, _TENSORS, _BINS = 8, 12, 61


def histograms(
    source: Path,
    ranges: Mapping[str, tuple[float, float]],
    feeds: Sequence[Mapping[str, np.ndarray]],
    work: Path,
) -> tuple[ActivationHistogram, ...]:
    """Histograms of the activations that are hardest to round, hardest first.

    Hard is what has a wide range for its usual size: a few large numbers then decide the step of
    all the others (range over standard deviation).

    Args:
        source: FP32 model.
        ranges: Tensor to the range that calibration chose.
        feeds: Inputs of one call each; the first few are used.
        work: Folder for intermediate files.

    Returns:
        At most twelve; none when the model cannot be run with its activations as outputs.
    """
    onnx = load("onnx")
    model = onnx.load(str(source))
    present = {name for node in model.graph.node for name in node.output}
    wanted = [name for name in ranges if name in present]
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in wanted if name not in outputs
    )
    probe = work / "activations.onnx"
    try:
        onnx.save(model, str(probe))
        session = open_session(probe)
        calls = [run(session, feed, name="activations") for feed in feeds[:_FEEDS]]
    except ConversionError:
        return ()  # a picture less; the conversion does not depend on it
    finally:
        probe.unlink(missing_ok=True)
    found = []
    for name in wanted:
        values = np.concatenate([call[name].ravel() for call in calls])
        spread = float(values.std()) if values.size else 0.0
        if spread > 0 and values.dtype.kind == "f":
            low, high = ranges[name]
            found.append(((high - low) / spread, _histogram(name, values, low, high)))
    found.sort(key=lambda one: (-one[0], one[1].tensor))
    return tuple(one for _, one in found[:_TENSORS])


def _histogram(name: str, values: np.ndarray, low: float, high: float) -> ActivationHistogram:
    counts, edges = np.histogram(values.astype(np.float64), bins=_BINS)
    cut = float(np.mean((values < low - 1e-6 * abs(low)) | (values > high + 1e-6 * abs(high))))
    return ActivationHistogram(
        tensor=name,
        low=low,
        high=high,
        least=float(edges[0]),
        most=float(edges[-1]),
        counts=tuple(int(count) for count in counts),
        cut=cut,
    )
