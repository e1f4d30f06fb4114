"""A calibration: what a sample of unlabelled traffic says about thresholds; and its file.

It holds the scores of the samples on which edge and cloud disagreed, quantiles of all scores, and
for which two variants that is true. No content, no labels, no model outputs. From it follows the
threshold for any stated agreement, so one file serves them all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from nearfar.bundle.manifest import Manifest
from nearfar.errors import CalibrationError
from nearfar.files import write_atomically
from nearfar.generation import GenerationOptions
from sdk.cascade.audit import AuditState, is_sound
from sdk.cascade.bounds import allowed_disagreements, rate_at_most, samples_needed
from sdk.cascade.scores import SCORES_OF, CascadeTask, ScoreName

FORMAT_VERSION = 1
#: A file of a hundred thousand disagreements is larger; nobody calibrates with that.
MAX_BYTES = 4 << 20

CONFIDENCE = 0.95
HORIZON_REQUESTS = 1000

#: How finely the distribution of all scores is kept: enough to say what share a threshold keeps.
_QUANTILES = 101

_Share = Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class VariantKey(msgspec.Struct, frozen=True, kw_only=True):
    """One variant by its content.

    Attributes:
        variant: Its id, for messages.
        digest: SHA-256 over the hashes of its files and what turns inputs and outputs into
            answers; see `digest_of`.
    """

    variant: str
    digest: str


class ScoreSample(msgspec.Struct, frozen=True, kw_only=True):
    """What the sample says about one score.

    Attributes:
        disagreements: Scores of samples on which the models disagreed, highest first. Samples
            without a finite score are never kept, so they are left out.
        quantiles: Of the scores of all samples, from the lowest to the highest in equal steps.
    """

    disagreements: tuple[float, ...]
    quantiles: tuple[float, ...]

    def share_above(self, bound: float) -> float:
        """About which part of the traffic scores above a bound."""
        if bound == math.inf:
            return 0.0
        if bound == -math.inf:
            return 1.0
        ordered, steps = self.quantiles, len(self.quantiles) - 1
        if bound < ordered[0]:
            return 1.0
        if bound >= ordered[-1]:
            return 0.0
        below = max(i for i in range(steps) if ordered[i] <= bound)
        width = ordered[below + 1] - ordered[below]
        return 1.0 - (below + ((bound - ordered[below]) / width if width else 0.0)) / steps

    def bound_for_share(self, share: float) -> float:
        """The bound that keeps about that part of the traffic; infinite when it is none."""
        if share <= 0.0:
            return math.inf
        if share >= 1.0:
            return -math.inf
        position = (1.0 - share) * (len(self.quantiles) - 1)
        low = min(int(position), len(self.quantiles) - 2)
        first, second = self.quantiles[low], self.quantiles[low + 1]
        return first + (second - first) * (position - low)


class Threshold(msgspec.Struct, frozen=True, kw_only=True):
    """What a stated agreement comes to.

    Attributes:
        target: The stated agreement.
        score: Which score is looked at.
        bound: The edge's answer is kept when its score is above; infinite: never, minus infinite:
            whenever it is finite.
        kept_share: About which part of the calibration traffic that keeps.
        kept_disagreements: Samples that would have been kept and were answered differently.
        agreement_bound: Lower confidence bound of the cascade's agreement (Clopper-Pearson, at the
            calibration's confidence). For the score that was chosen among several it is the one
            that accounts for the choice.
    """

    target: float
    score: ScoreName
    bound: float
    kept_share: float
    kept_disagreements: int
    agreement_bound: float

    @property
    def keeps_nothing(self) -> bool:
        """Whether every request escalates."""
        return self.bound == math.inf


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a calibration file.

    Attributes:
        model: Name of the model.
        task: What was compared.
        edge: The variant on the device.
        cloud: The variant in the cloud.
        samples: How many inputs were compared.
        scores: Score to what the sample says about it.
        confidence: Probability with which a threshold holds its agreement.
        horizon_requests: It also holds it within so many next requests; `None`: in the long run
            only.
        min_cosine: For embeddings: vectors agree when their cosine is at least this.
        centre: For embeddings: what `typicality` is measured from.
        generation: For text: how long answers were and where they ended; other answers are others.
        created: ISO date and time, UTC.
        audits: What live audits found since, by the agreement that they watch.
    """

    model: str
    task: CascadeTask
    edge: VariantKey
    cloud: VariantKey
    samples: Annotated[int, msgspec.Meta(ge=1)]
    scores: dict[ScoreName, ScoreSample]
    confidence: _Share = CONFIDENCE
    horizon_requests: Annotated[int, msgspec.Meta(ge=1)] | None = HORIZON_REQUESTS
    min_cosine: float = 0.0
    centre: tuple[float, ...] = ()
    generation: GenerationOptions | None = None
    created: str = ""
    audits: dict[str, AuditState] = {}
    format_version: int = FORMAT_VERSION

    def threshold(self, target: float) -> Threshold:
        """The threshold for a stated agreement: of all scores, the one that keeps most.

        The choice among scores is paid for by dividing the probability of error among them
        (Bonferroni).

        Args:
            target: Such as 0.98.

        Raises:
            ValueError: It is not between 0 and 1.
        """
        if not 0.0 < target < 1.0:
            raise ValueError(f"an agreement of {target} cannot be aimed at")
        found = [self._threshold(name, target) for name in self.scores]
        return max(found, key=lambda threshold: threshold.kept_share)

    def samples_needed(self, target: float) -> int:
        """How many samples it takes before anything can be kept."""
        return samples_needed(1.0 - target, self._error, horizon=self.horizon_requests)

    @property
    def _error(self) -> float:
        return (1.0 - self.confidence) / len(self.scores)

    def _threshold(self, name: ScoreName, target: float) -> Threshold:
        sample = self.scores[name]
        allowed = allowed_disagreements(
            self.samples, 1.0 - target, self._error, horizon=self.horizon_requests
        )
        if allowed is None:
            bound, kept = math.inf, 0
        elif allowed >= len(sample.disagreements):
            bound, kept = -math.inf, len(sample.disagreements)
        else:
            bound = sample.disagreements[allowed]
            kept = sum(1 for score in sample.disagreements[:allowed] if score > bound)
        worst = 0.0 if allowed is None else rate_at_most(kept, self.samples, 1.0 - self._error)
        return Threshold(
            target=target,
            score=name,
            bound=bound,
            kept_share=sample.share_above(bound),
            kept_disagreements=kept,
            agreement_bound=1.0 - worst,
        )


def sample_of(scores: np.ndarray, agrees: np.ndarray) -> ScoreSample:
    """What to keep of one score's samples.

    Args:
        scores: Shape (samples,); minus infinity is never kept.
        agrees: Whether both models gave the same answer, shape (samples,).
    """
    lowest = -float(np.finfo(np.float64).max)
    levels = np.linspace(0.0, 1.0, _QUANTILES)
    return ScoreSample(
        disagreements=tuple(
            sorted((float(s) for s in scores[~agrees] if np.isfinite(s)), reverse=True)
        ),
        quantiles=tuple(
            float(x) for x in np.quantile(np.maximum(scores, lowest), levels, method="lower")
        ),
    )


def digest_of(manifest: Manifest, variant_id: str) -> VariantKey:
    """A variant by its content: files, shared files, and how inputs and outputs are read.

    Raises:
        CalibrationError: The manifest has no such variant.
    """
    variant = manifest.variant(variant_id)
    if variant is None:
        raise CalibrationError(
            f"{manifest.name!r} has no variant {variant_id!r}", fix="Calibrate the model again"
        )
    content = {
        "entry": variant.entry,
        "files": sorted(
            (e.path, e.size_bytes, e.sha256) for e in (*variant.files, *manifest.files)
        ),
        "inputs": manifest.inputs,
        "labels": manifest.labels,
        "outputs": (manifest.label_output, manifest.embedding_output, manifest.outputs),
        "preprocessing": manifest.preprocessing,
        "task": manifest.task,
    }
    digest = hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()
    return VariantKey(variant=variant_id, digest=digest)


def check_variant(calibration: Calibration, place: str, key: VariantKey) -> None:
    """Refuse a calibration that was made for another variant.

    Args:
        calibration: What is about to be used.
        place: ``edge`` or ``cloud``.
        key: The variant there now.

    Raises:
        CalibrationError: They differ in content.
    """
    wanted = calibration.edge if place == "edge" else calibration.cloud
    if wanted.digest != key.digest:
        raise CalibrationError(
            f"The calibration of {calibration.model!r} is for another {place} model: it was made "
            f"with variant {wanted.variant!r} ({wanted.digest[:12]}), and {key.variant!r} "
            f"({key.digest[:12]}) answers now",
            fix=f"Run `nearfar calibrate {calibration.model}` again",
        )


def load(path: Path) -> Calibration:
    """Read a calibration file.

    Raises:
        CalibrationError: It is missing, or not what it should be.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as exc:
        raise CalibrationError(
            f"The calibration {path} cannot be read: {exc.strerror}",
            fix="Make it with `nearfar calibrate MODEL --data …`",
        ) from exc
    fix = "Make it again with `nearfar calibrate`"
    if len(data) > MAX_BYTES:
        raise CalibrationError(f"The calibration {path} is larger than {MAX_BYTES} bytes", fix=fix)
    try:
        calibration = msgspec.json.decode(data, type=Calibration)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise CalibrationError(f"{path} is not a calibration: {exc}", fix=fix) from exc
    problem = _problem(calibration)
    if problem:
        raise CalibrationError(f"{path} is not a calibration: {problem}", fix=fix)
    return calibration


def save(calibration: Calibration, path: Path) -> None:
    """Write a calibration file whole or not at all.

    Raises:
        CalibrationError: It cannot be written, or could not be read again.
    """
    data = msgspec.json.encode(calibration, order="deterministic") + b"\n"
    if len(data) > MAX_BYTES:
        raise CalibrationError(
            f"The calibration would be larger than {MAX_BYTES} bytes",
            fix="Use fewer inputs: --limit",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data, mode=0o600)
    except OSError as exc:
        raise CalibrationError(
            f"The calibration cannot be written to {path}: {exc.strerror}",
            fix="Name another file with --output",
        ) from exc


def make(
    scores: Mapping[ScoreName, np.ndarray], agrees: np.ndarray
) -> dict[ScoreName, ScoreSample]:
    """The scores of a calibration from all samples' scores and agreements.

    Raises:
        CalibrationError: There are no samples.
    """
    if not len(agrees):
        raise CalibrationError("There is no sample to calibrate with", fix="Give more data")
    return {name: sample_of(values, agrees) for name, values in scores.items()}


def _problem(calibration: Calibration) -> str:
    """What is wrong with values that have the right types; ``""`` when nothing is."""
    if calibration.format_version != FORMAT_VERSION:
        return (
            f"it has format {calibration.format_version}, and this version reads {FORMAT_VERSION}"
        )
    if not calibration.scores:
        return "it has no scores"
    for name, sample in calibration.scores.items():
        if len(sample.disagreements) > calibration.samples:
            return f"{name} has more disagreements than there are samples"
        if list(sample.disagreements) != sorted(sample.disagreements, reverse=True):
            return f"the disagreements of {name} are not in order"
        if len(sample.quantiles) < 2 or list(sample.quantiles) != sorted(sample.quantiles):
            return f"the quantiles of {name} are not in order"
        if not _all_finite(sample.disagreements) or not _all_finite(sample.quantiles):
            return f"{name} holds something that is not a number"
    if (calibration.task == "embedding") != bool(calibration.centre):
        return "its centre does not fit its task"
    if (calibration.task == "text-generation") != (calibration.generation is not None):
        return "its options of generation do not fit its task"
    if not set(calibration.scores) <= set(SCORES_OF[calibration.task]):
        return "its scores do not fit its task"
    if not all(map(is_sound, calibration.audits.values())):
        return "what it says of an audit cannot be"
    return ""


def _all_finite(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values))
