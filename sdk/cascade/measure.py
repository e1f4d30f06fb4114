"""Calibrate: run both models on unlabelled data, and note where they disagree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from nearfar.errors import CalibrationError, InvalidInput, about
from sdk.cascade import calibration as calibrations
from sdk.cascade import scores
from sdk.cascade.calibration import CONFIDENCE, HORIZON_REQUESTS, Calibration, digest_of
from sdk.cascade.run import agreement, rows_of

if TYPE_CHECKING:
    from pathlib import Path

    from sdk.client import Client
    from sdk.requests import Request

#: Cosine at which the vectors of two variants count as the same.
MIN_COSINE = 0.99

#: Inputs in one request, where the model takes batches.
_BATCH = 32
#: Part of the data, and at most how many vectors, that the centre of vectors is taken from.
_CENTRE_SHARE, _CENTRE_ROWS = 0.2, 500


class Data(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Unlabelled inputs of one kind; exactly one field is set.

    Attributes:
        items: Byte strings, paths of files, or texts, one for each input.
        feeds: Input name to array; the first axis counts the inputs.
    """

    items: Sequence[bytes | str | Path] = ()
    feeds: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        if self.feeds is None:
            return len(self.items)
        return min((len(array) for array in self.feeds.values() if array.ndim), default=0)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How to calibrate.

    Attributes:
        confidence: Probability with which a threshold holds its agreement.
        horizon_requests: Hold it also within so many next requests; `None`: in the long run only.
        score: The only score to look at; `None` takes, for each agreement, the best.
        min_cosine: For embeddings: vectors agree when their cosine is at least this.
        max_new_tokens: For text: as the app's requests will have it.
        stop: For text: likewise.
        is_chat: For text: whether the data are messages of a user, or raw text to continue.
    """

    confidence: float = CONFIDENCE
    horizon_requests: int | None = HORIZON_REQUESTS
    score: scores.ScoreName | None = None
    min_cosine: float = MIN_COSINE
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    is_chat: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.confidence < 1.0:
            raise _out_of_range("confidence", self.confidence, "above 0 and below 1")
        if self.horizon_requests is not None and self.horizon_requests < 1:
            raise _out_of_range("horizon_requests", self.horizon_requests, "1 or more")
        if not -1.0 <= self.min_cosine <= 1.0:
            raise _out_of_range("min_cosine", self.min_cosine, "-1 to 1")
        if self.max_new_tokens < 1:
            raise _out_of_range("max_new_tokens", self.max_new_tokens, "1 or more")


def calibrate(
    client: Client,
    model: str,
    data: Data,
    settings: Settings | None = None,
    *,
    on_input: Callable[[int], None] = lambda count: None,
    **options: Any,
) -> Calibration:
    """Run a model on the device and in the cloud, and compare.

    Every input goes to the cloud, by the same way as any other request: policy is asked each time,
    and the first input that it keeps on the device ends the calibration.

    Args:
        client: Has both routes.
        model: Name of the model.
        data: What the app's requests are like. The guarantee is about traffic like this.
        settings: How.
        on_input: Told how many more inputs are done.
        options: As for `Client.infer`: sensitivity, purpose, tenant, version.

    Raises:
        PolicyDenied: Policy keeps the data on the device; nothing has left it.
        InvalidInput: The model's answers cannot be compared or scored, or the data does not fit.
        CalibrationError: Different variants answered while it ran, or there is no data.
        NearfarError: As `Client.infer`.
    """
    settings = settings or Settings()
    if not len(data):
        raise CalibrationError("There is no data to calibrate with", field="data", fix="Give some")
    edge_rows: list[np.ndarray] = []
    cloud_rows: list[np.ndarray] = []
    keys: set[tuple[calibrations.VariantKey, calibrations.VariantKey]] = set()
    here = next((i for i in client.models() if i.name == model and i.edge_variant), None)
    if here is not None:  # what cannot cascade is said before anything leaves
        scores.task_of(here.manifest)
    if _task(client, model) == "text-generation":
        from sdk.cascade.measure_text import calibrate_text

        return calibrate_text(client, model, data, settings, on_input=on_input, **options)
    task: scores.CascadeTask | None = None
    for name, request in _requests(client, model, data, options):
        # The cloud first: if policy says no, it says so before the device has worked.
        with about(name):
            far = client._run(msgspec.structs.replace(request, mode="cloud_only"))
            near = client._run(msgspec.structs.replace(request, mode="edge_only"))
        task = scores.task_of(near.manifest)
        keys.add(
            (
                digest_of(near.manifest, near.answer.variant),
                digest_of(far.manifest, far.answer.variant),
            )
        )
        edge, cloud = (rows_of(task, done.manifest, done.answer.outputs) for done in (near, far))
        if edge.shape != cloud.shape:
            raise CalibrationError(
                f"The edge answers with shape {list(edge.shape)}, the cloud with "
                f"{list(cloud.shape)}: they are not the same model",
                fix="Convert both variants from one model",
            )
        edge_rows.append(edge)
        cloud_rows.append(cloud)
        on_input(request.rows)
    edge_key, cloud_key = only_pair(keys, model)
    assert task is not None
    return calibration_of(
        np.concatenate(edge_rows),
        np.concatenate(cloud_rows),
        settings,
        model=model,
        task=task,
        edge_key=edge_key,
        cloud_key=cloud_key,
    )


def calibration_of(
    edge: np.ndarray,
    cloud: np.ndarray,
    settings: Settings,
    *,
    model: str,
    task: scores.CascadeTask,
    edge_key: calibrations.VariantKey,
    cloud_key: calibrations.VariantKey,
) -> Calibration:
    """A calibration from both models' outputs.

    Args:
        edge: Class scores or vectors of the device, shape (samples, …).
        cloud: The same of the cloud.
        settings: How.
        model: Name of the model.
        task: What the outputs are.
        edge_key: Which variant answered on the device.
        cloud_key: Which one in the cloud.

    Raises:
        InvalidInput: The score does not fit the task.
        CalibrationError: There are no samples.
    """
    names = names_of(task, settings)
    centre: tuple[float, ...] = ()
    if task == "embedding":
        # From other samples than those that are compared, which the guarantee is about.
        count = max(1, min(_CENTRE_ROWS, int(len(edge) * _CENTRE_SHARE)))
        centre = tuple(float(x) for x in _middle(edge[:count]))
        edge, cloud = edge[count:], cloud[count:]
    agrees = agreement(task, edge, cloud, settings.min_cosine)
    values: dict[scores.ScoreName, np.ndarray] = {
        name: (
            scores.typicality(edge, np.asarray(centre))
            if task == "embedding"
            else scores.confidence(name, edge)
        )
        for name in names
    }
    return Calibration(
        model=model,
        task=task,
        edge=edge_key,
        cloud=cloud_key,
        samples=len(agrees),
        scores=calibrations.make(values, agrees),
        confidence=settings.confidence,
        horizon_requests=settings.horizon_requests,
        min_cosine=settings.min_cosine if task == "embedding" else 0.0,
        centre=centre,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def only_pair(
    keys: set[tuple[calibrations.VariantKey, calibrations.VariantKey]], model: str
) -> tuple[calibrations.VariantKey, calibrations.VariantKey]:
    """The variants that answered, on the device and in the cloud.

    Raises:
        CalibrationError: One was replaced meanwhile.
    """
    if len(keys) > 1:
        raise CalibrationError(
            f"More than one pair of variants of {model!r} answered while it was calibrated",
            fix="Calibrate again when no model is being replaced",
        )
    (pair,) = keys
    return pair


def names_of(task: scores.CascadeTask, settings: Settings) -> tuple[scores.ScoreName, ...]:
    """The scores to look at.

    Raises:
        InvalidInput: The one that is wished for does not fit the task.
    """
    fitting = scores.SCORES_OF[task]
    if settings.score is None:
        return fitting
    if settings.score not in fitting:
        raise InvalidInput(
            f"{settings.score} is no score of a {task} model",
            field="score",
            fix=f"Use one of: {', '.join(fitting)}",
        )
    return (settings.score,)


def _requests(
    client: Client, model: str, data: Data, options: dict[str, Any]
) -> Iterator[tuple[str, Request]]:
    """The data as requests, and what each is called; tensors and texts to embed in batches."""
    options = {**options, "min_agreement": 0.0, "deadline_ms": math.inf}
    feeds = data.feeds
    if feeds is not None:
        size = _batch_of(client, model)
        for start in range(0, len(data), size):
            stop = min(start + size, len(data))
            batch = {name: array[start:stop] for name, array in feeds.items()}
            yield f"Input {start}", client._infer_request(model, batch, options)  # type: ignore[arg-type]
        return
    if _task(client, model) == "embedding":
        texts: list[Any] = list(data.items)
        for start in range(0, len(texts), _BATCH):
            batch_of = texts[start : start + _BATCH]
            yield f"Text {start}", client._embed_request(model, batch_of, options)  # type: ignore[arg-type]
        return
    for number, item in enumerate(data.items):
        name = f"Input {number}" if isinstance(item, (str, bytes)) else str(item)
        yield name, client._classify_request(model, item, 1, options)  # type: ignore[arg-type]


def _task(client: Client, model: str) -> str:
    return next((info.task for info in client.models() if info.name == model), "")


def _batch_of(client: Client, model: str) -> int:
    """How many inputs fit into a request: as many as the model's first axis allows."""
    info = next((info for info in client.models() if info.name == model), None)
    first = [spec.shape[0] for spec in (info.manifest.inputs if info else ()) if spec.shape]
    return _BATCH if all(size == -1 for size in first) else max(1, min(first))


def _middle(rows: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        directions = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    good = directions[np.isfinite(directions).all(axis=-1)]
    return np.asarray(good.mean(axis=0) if len(good) else np.ones(rows.shape[-1]))


def _out_of_range(name: str, value: object, allowed: str) -> InvalidInput:
    return InvalidInput(f"{name} is {value}", field=name, fix=f"It must be {allowed}")
