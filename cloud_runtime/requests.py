"""One request of a client: what it asks for, how it is stopped, its line of the access log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cloud_runtime.answers import too_late
from cloud_runtime.executor import InferWork
from nearfar.errors import InvalidInput, NearfarError
from nearfar.units import Deadline
from nearfar.wire.codec import named
from nearfar.wire.messages import Generate, Infer

access_log = logging.getLogger("cloud_runtime.access")


@dataclass(slots=True, kw_only=True)
class OpenStream:
    """How to stop a request, and its line of the access log."""

    connection: int
    stream: int
    kind: str
    in_bytes: int
    started_s: float
    model: str = "-"  # only names of served models: any other is the client's text
    out_bytes: int = 0
    tokens: int = 0
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    aborted: NearfarError | None = None
    on_abort: Callable[[NearfarError], None] | None = None
    on_credit: Callable[[int], None] | None = None

    def abort(self, error: NearfarError) -> None:
        """Stop the work, or keep it from beginning; the first reason counts."""
        if self.aborted is None:
            self.aborted = error
            if self.on_abort is not None:
                self.on_abort(error)

    def log(self, status: str) -> None:
        access_log.info(
            "conn=%d stream=%d %s model=%s in=%dB out=%dB tokens=%d "
            "queue=%.1fms compute=%.1fms total=%.1fms %s",
            self.connection,
            self.stream,
            self.kind,
            self.model,
            self.in_bytes,
            self.out_bytes,
            self.tokens,
            self.queue_ms,
            self.compute_ms,
            (time.monotonic() - self.started_s) * 1000.0,
            status,
        )


def work_of(request: Infer, tensors: Sequence[np.ndarray]) -> InferWork:
    """Name the tensors of a request, or take the items out of its one BYTES tensor."""
    if request.form == "tensors":
        names = [header.name for header in request.tensors]
        if len(set(names)) != len(names):
            raise InvalidInput("An input is given twice", field="inputs", fix="Give each once")
        try:
            return InferWork(form="tensors", feeds=named(request.tensors, tensors))
        except InvalidInput as error:
            raise InvalidInput(
                f"The cloud cannot take this input: {error.problem}",
                field="inputs",
                fix="Ask its operator to install ml_dtypes, or use a model with other inputs",
            ) from error
    items: list[str | bytes] = list(tensors[0])  # one BYTES tensor: the session has checked
    if request.form == "text":
        try:
            items = [bytes(item).decode("utf-8") for item in tensors[0]]
        except UnicodeDecodeError as exc:
            raise InvalidInput(
                "A text is not valid UTF-8", field="input", fix="Send texts encoded as UTF-8"
            ) from exc
    return InferWork(form=request.form, feeds={}, items=items)


def deadline_of(request: Infer | Generate) -> Deadline:
    """The client's remaining time, counted from the arrival of its request."""
    if request.deadline_ms is not None and request.deadline_ms <= 0:
        raise too_late()
    return Deadline.after_ms(request.deadline_ms)
