"""One request through the cascade: the edge first, the cloud where the edge is not sure enough.

Sits on `Core.run`, which it uses once or twice: policy, router, repair and the one deadline are
those of any other request, and both attempts ask policy. Waits for nothing itself.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from nearfar.bundle.manifest import Manifest
from nearfar.errors import (
    AgreementNotMet,
    CalibrationError,
    Cancelled,
    ConfigError,
    LocalProtocolError,
    NearfarError,
    SecurityError,
)
from nearfar.units import Deadline
from sdk.cascade import audit, scores
from sdk.cascade.audit import AuditState
from sdk.cascade.calibration import (
    Calibration,
    Threshold,
    check_variant,
    digest_of,
    load,
    save,
)
from sdk.cascade.settings import AUDIT_SHARE, ModelCascade
from sdk.requests import Request
from sdk.results import Agreement, Route
from sdk.steps import Step

if TYPE_CHECKING:
    from sdk.cloud.egress import Permit
    from sdk.core import Completed, Core
    from sdk.routing.types import Mode

logger = logging.getLogger(__name__)

#: What the app's mode means for the first step; the others already say where to go.
_FIRST: dict[Mode, Mode] = {"auto": "prefer_edge"}
#: Audited requests after which what the audit knows is written down, alarms at once.
_SAVE_EVERY = 10
#: Longest wait for the cloud's answer to a request that the device could have kept.
_AUDIT_LIMIT_S = 2.0

_MAKING = threading.Lock()


class Watched:
    """A calibration in use: the threshold for a stated agreement, and the audit of it.

    Thread-safe.

    Args:
        calibration: What was measured.
        path: Its file.
    """

    def __init__(self, calibration: Calibration, path: Path) -> None:
        self.calibration = calibration
        self._path = path
        self._lock = threading.Lock()
        self._thresholds: dict[float, Threshold] = {}
        self._audits = dict(calibration.audits)
        self._checked: set[tuple[str, str, str]] = set()

    def threshold(self, target: float) -> tuple[Threshold, float]:
        """The threshold for an agreement as calibrated, and the bound that holds now.

        The bound is higher after alarms of the audit.
        """
        found = self._thresholds.get(target)
        if found is None:
            found = self._thresholds[target] = self.calibration.threshold(target)
        state = self._audits.get(_key(target))
        if state is None or not state.level:
            return found, found.bound
        sample = self.calibration.scores[found.score]
        kept = sample.bound_for_share(audit.kept_share(found.kept_share, state.level))
        return found, max(found.bound, kept)

    def check(self, place: str, manifest: Manifest, variant_id: str) -> None:
        """Refuse to be used with another variant.

        Raises:
            CalibrationError: It was made for another one.
        """
        key = (place, manifest.version, variant_id)
        if key not in self._checked:
            check_variant(self.calibration, place, digest_of(manifest, variant_id))
            self._checked.add(key)

    def observe(self, target: float, differed: float) -> None:
        """Tell the audit about one request that it picked."""
        name = _key(target)
        with self._lock:
            before = self._audits.get(name, AuditState())
            after = audit.observe(before, differed, 1.0 - target)
            self._audits[name] = after
            is_alarm = after.level > before.level
            if is_alarm:
                share = self.calibration.threshold(target).kept_share
                logger.warning(
                    "%s: answers kept on the device agree with the cloud less often than %s (%.1f "
                    "of %d audited differ): the device now keeps about %.0f %% of the traffic; "
                    "calibrate again",
                    self.calibration.model,
                    target,
                    after.differed,
                    after.audited,
                    100 * audit.kept_share(share, after.level),
                )
            if is_alarm or after.audited % _SAVE_EVERY == 0:
                self._save()

    def audit(self, target: float) -> AuditState:
        """What the audit of one agreement knows."""
        return self._audits.get(_key(target), AuditState())

    def _save(self) -> None:
        plain = msgspec.structs.replace(self.calibration, audits={})
        try:
            there = load(self._path)
            if msgspec.structs.replace(there, audits={}) != plain:
                return  # somebody calibrated again; what is known here is about the old one
            audits = dict(self._audits)
            for name, other in there.audits.items():
                mine = audits.get(name)
                if mine is None or mine.level < other.level:
                    audits[name] = other  # another process had an alarm: the stricter one holds
            self._audits = audits
            save(msgspec.structs.replace(plain, audits=audits), self._path)
        except CalibrationError as exc:
            logger.warning("what the audit found cannot be kept: %s", exc)


class Cascades:
    """The calibrations of one client, each read once.

    Args:
        folder: Where they are; `None` when the client was told of none.
        coin: Gives numbers from 0 to 1, for the choice of audited requests.
    """

    def __init__(self, folder: Path | None, coin: Callable[[], float] = random.random) -> None:
        self.coin = coin
        self._folder = folder
        self._watched: dict[str, Watched] = {}

    def of(self, model: str) -> Watched:
        """The calibration of a model.

        Raises:
            CalibrationError: There is none, or it is damaged.
        """
        found = self._watched.get(model)
        if found is not None:
            return found
        if self._folder is None:
            raise CalibrationError(
                f"An agreement is stated for {model!r}, and this client knows no calibrations",
                fix="Run `nearfar calibrate`, and set [cascade] calibrations or "
                "Client(calibrations=…)",
            )
        path = file_of(self._folder, model)
        calibration = load(path)
        if calibration.model != model:
            raise CalibrationError(
                f"{path} is the calibration of {calibration.model!r}",
                fix=f"Run `nearfar calibrate {model}`",
            )
        return self._watched.setdefault(model, Watched(calibration, path))


def file_of(folder: Path, model: str) -> Path:
    """The calibration file of a model.

    Raises:
        CalibrationError: The name cannot be a file's.
    """
    if not model or model.startswith(".") or "/" in model or "\0" in model:
        raise CalibrationError(f"{model[:40]!r} is no name of a model", fix="Check the name")
    return folder / f"{model}.json"


def run(core: Core, request: Request) -> Generator[Step, Any, Completed]:
    """The life of one request for which an agreement is stated.

    Raises:
        CalibrationError: There is no calibration, or it is for other variants.
        AgreementNotMet: The edge is not sure enough, the cloud cannot answer, and the app demands
            the agreement.
        NearfarError: As `Core.run`.
    """
    started_s = time.perf_counter()
    wish = wish_of(core, request)
    cascades = cascades_of(core)
    watched = applicable(core, cascades, request)
    permits: list[Permit] = []
    done = yield from core.run(first_step(core, request), permits)
    if done.route.name == "cloud" or watched is None:
        return _finish(
            done, Agreement(target=wish.min_agreement, outcome="cloud"), started_s, request
        )
    watched.check("edge", done.manifest, done.answer.variant)
    found, bound = watched.threshold(wish.min_agreement)
    confidence = _confidence(watched.calibration, found, done)
    is_sure = confidence > bound
    is_picked = wish.audit > 0.0 and cascades.coin() < wish.audit
    facts: dict[str, Any] = {
        "target": wish.min_agreement,
        "confidence": confidence,
        "threshold": bound,
    }
    far: Completed | None = None
    error: NearfarError | None = None
    if not is_sure or is_picked:
        far, error = yield from _ask_cloud(core, request, permits, is_audit=is_sure)
    if far is not None:
        watched.check("cloud", far.manifest, far.answer.variant)
        if is_picked:
            differed = _difference(watched.calibration, done, far) if is_sure else 0.0
            watched.observe(wish.min_agreement, differed)
        reason = unsure(found, facts)
        if is_sure:
            reason = f"picked to watch the agreement of {wish.min_agreement:g}"
        route = Route("cloud", reason, ("edge", *far.route.before))
        outcome = Agreement(outcome="audited" if is_sure else "escalated", **facts)
        return _finish(far, outcome, started_s, request, route, permits)
    if is_sure:
        route = Route("edge", sure(found, facts), done.route.before)
        kept = Agreement(outcome="kept", **facts)
        return _finish(done, kept, started_s, request, route, permits)
    why_not = "the mode is edge_only"
    if error is not None:
        why_not = f"the cloud could not be asked: {error.problem}"
    unmet = f"{unsure(found, facts)}, and {why_not}"
    if wish.require:
        raise AgreementNotMet(
            f"{request.model!r}: {unmet}",
            target=wish.min_agreement,
            fix="Try later, let policy allow the cloud, or take the edge's answer with "
            "require_agreement=False",
        ) from error
    before = (*done.route.before, "cloud") if permits else done.route.before
    route = Route("edge", f"agreement not guaranteed: {unmet}", before)
    outcome = Agreement(outcome="unmet", **facts)
    return _finish(done, outcome, started_s, request, route, permits)


def _ask_cloud(
    core: Core, request: Request, permits: list[Permit], *, is_audit: bool
) -> Generator[Step, Any, tuple[Completed | None, NearfarError | None]]:
    """The cloud's answer; or why there is none, if the edge's has to do."""
    if request.mode == "edge_only":
        return None, None
    deadline = request.deadline
    if is_audit:  # the app has an answer already; a cloud that hangs must not keep it for ever
        deadline = Deadline(min(deadline.at_s, time.monotonic() + _AUDIT_LIMIT_S))
    second = msgspec.structs.replace(
        request, min_agreement=0.0, mode="cloud_only", deadline=deadline
    )
    try:
        far = yield from core.run(second, permits)
    except (SecurityError, Cancelled, LocalProtocolError):
        raise  # somebody must look at it, or nobody wants an answer any more
    except NearfarError as error:
        if type(error) is ConfigError and core.known.link is not None:
            raise
        return None, error
    return far, None


def first_step(core: Core, request: Request) -> Request:
    """The request as it is asked first: of the device, if the app leaves the choice.

    A request for which nothing is stated comes back as it is.
    """
    if not (request.min_agreement or request.model in core.cascaded):
        return request
    mode = _FIRST.get(request.mode, request.mode)
    return msgspec.structs.replace(request, min_agreement=0.0, mode=mode)


def wish_of(core: Core, request: Request) -> ModelCascade:
    """What the request states, and the configuration where it states nothing."""
    told = core.cascaded.get(request.model)
    share = core.cascade.audit if core.cascade is not None else AUDIT_SHARE
    return ModelCascade(
        min_agreement=request.min_agreement or (told.min_agreement if told else 0.0),
        audit=told.audit if told is not None else share,
        require=(
            request.require_agreement
            if request.require_agreement is not None
            else told is not None and told.require
        ),
    )


def cascades_of(core: Core) -> Cascades:
    with _MAKING:
        if core.cascades is None:
            core.cascades = Cascades(core.cascade.calibrations if core.cascade else None)
        return core.cascades


def applicable(core: Core, cascades: Cascades, request: Request) -> Watched | None:
    """The calibration, checked against what is known of both variants before anything runs.

    `None` when the device does not have the model: then only the cloud can answer.
    """
    near = core.known.edge_model(request)
    if near is None:
        return None
    scores.task_of(near.manifest)
    watched = cascades.of(request.model)
    watched.check("edge", near.manifest, near.variant.id)
    for endpoint in core.known.endpoints:  # any of them may be asked
        offer = core.known.offer(request, endpoint)
        if offer is not None:
            watched.check("cloud", offer.manifest, offer.variant)
    return watched


def rows_of(
    task: scores.CascadeTask, manifest: Manifest, outputs: dict[str, np.ndarray]
) -> np.ndarray:
    """Class scores or vectors of an answer, shape (rows, …)."""
    if task == "embedding":
        return scores.vectors(outputs, manifest)
    return scores.class_scores(outputs, manifest)


def _confidence(calibration: Calibration, found: Threshold, done: Completed) -> float:
    """Score of an answer: of a batch the lowest, so that each kept row is sure enough."""
    rows = rows_of(calibration.task, done.manifest, done.answer.outputs)
    if calibration.task == "embedding":
        centre = np.asarray(calibration.centre)
        if rows.shape[1] != len(centre):
            return -math.inf
        return float(scores.typicality(rows, centre).min())
    return float(scores.confidence(found.score, rows).min())


def _difference(calibration: Calibration, near: Completed, far: Completed) -> float:
    """Part of the rows that both answered differently."""
    edge = rows_of(calibration.task, near.manifest, near.answer.outputs)
    cloud = rows_of(calibration.task, far.manifest, far.answer.outputs)
    if edge.shape != cloud.shape:
        return 1.0
    return float(1.0 - agreement(calibration.task, edge, cloud, calibration.min_cosine).mean())


def agreement(
    task: scores.CascadeTask, edge: np.ndarray, cloud: np.ndarray, min_cosine: float
) -> np.ndarray:
    """Whether both gave the same answer, row by row."""
    if task == "embedding":
        return np.asarray(scores.cosine(edge, cloud) >= min_cosine)
    return scores.same_class(edge, cloud)


def _finish(
    done: Completed,
    agreement: Agreement,
    started_s: float,
    request: Request,
    route: Route | None = None,
    permits: Sequence[Permit] = (),
) -> Completed:
    return msgspec.structs.replace(
        done,
        request=request,
        agreement=agreement,
        route=route or done.route,
        total_ms=(time.perf_counter() - started_s) * 1000.0,
        bytes_sent=sum(permit.bytes_sent for permit in permits) if permits else done.bytes_sent,
    )


def unsure(found: Threshold, facts: dict[str, Any]) -> str:
    target, bound = facts["target"], facts["threshold"]
    if bound == math.inf:
        return f"the calibration lets the device keep nothing at an agreement of {target:g}"
    return (
        f"{found.score} {facts['confidence']:.3g} is not above {bound:.3g}, which an agreement "
        f"of {target:g} needs"
    )


def sure(found: Threshold, facts: dict[str, Any]) -> str:
    target, bound = facts["target"], facts["threshold"]
    if bound == -math.inf:
        return f"the calibration lets the device keep everything at an agreement of {target:g}"
    return (
        f"{found.score} {facts['confidence']:.3g} is above {bound:.3g}, which holds an agreement "
        f"of {target:g}"
    )


def _key(target: float) -> str:
    return f"{target:.6g}"
