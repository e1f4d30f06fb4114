"""Stands where an `edge_runtime.EdgeRuntime` stands, and does what a test tells it to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import numpy as np

from nearfar.bundle.manifest import Manifest
from nearfar.errors import Cancelled, ModelNotFound, NearfarError
from nearfar.generation import GenerationChunk, Usage


class ScriptedEdge:
    """Models that answer like `tests.support.scripted_cloud` does, but say ``e0 e1 …``.

    Attributes:
        fail_with: Raised by every call while it is set.
        cut_after: A generation fails with `fail_with` after so many tokens.
        calls: What was asked: ("infer" | "generate", model, prompt or None, options or None).
        wait_s: Expected wait for a slot, as the router sees it.
        pause_s: Between tokens, and before an answer to `infer`.
        margins: Of the tokens, in their order, as a watch sees them; 10 for those after the last.
        answering: Generations that have begun and not ended.
    """

    def __init__(self, models: Sequence[Manifest]) -> None:
        self._models = {manifest.name: manifest for manifest in models}
        self.fail_with: NearfarError | None = None
        self.cut_after: int | None = None
        self.calls: list[tuple[object, ...]] = []
        self.wait_s = 0.0
        self.pause_s = 0.0
        self.closed = False
        self.cancelled = 0
        self.margins: tuple[float, ...] = ()
        self.answering = 0

    def models(self) -> list[Manifest]:
        return list(self._models.values())

    def describe(self, model: str, version: str | None = None) -> SimpleNamespace:
        found = self._models.get(model)
        if found is None or version not in (None, found.version):
            raise ModelNotFound(f"There is no model {model!r} here", fix="Convert one")
        return SimpleNamespace(manifest=found, variant=found.variants[0])

    def state(self, model: str, version: str | None = None) -> SimpleNamespace:
        return SimpleNamespace(running=0, waiting=0, expected_wait_s=self.wait_s)

    def direct(self, model: str, version: str | None = None) -> None:
        """No plan is made: what is scripted shall be asked each time."""

    def is_loaded(self, model: str, version: str | None = None) -> bool:
        return True

    def warm_up(self, model: str) -> None:
        self.describe(model)

    def close(self) -> None:
        self.closed = True

    def infer(self, model, feeds=None, *, items=None, cancel=None, **_: object) -> SimpleNamespace:
        self.calls.append(("infer", model, None, None))
        until_s = time.monotonic() + self.pause_s
        while time.monotonic() < until_s:
            if cancel is not None and cancel.is_cancelled:
                self.cancelled += 1
                raise Cancelled("cancelled while it ran")
            time.sleep(min(0.002, self.pause_s))
        if self.fail_with is not None:
            raise self.fail_with
        if items is None:
            outputs = {"y": next(iter(feeds.values()))}
        else:
            outputs = {"vectors": np.zeros((len(items), 3), np.float32)}
        return SimpleNamespace(
            outputs=outputs,
            variant=self._models[model].variants[0].id,
            execution_provider="CPUExecutionProvider",
            queue_s=0.0,
            compute_s=0.0001,
        )

    def generate(
        self, model, prompt, options, *, cancel=None, watch=None, **_: object
    ) -> ScriptedGeneration:
        self.calls.append(("generate", model, prompt, options))
        if self.fail_with is not None and self.cut_after is None:
            raise self.fail_with
        return ScriptedGeneration(self, options.max_new_tokens, cancel, watch)


class ScriptedGeneration:
    """Stands where an `EdgeGeneration` stands."""

    variant = "int4"
    execution_provider = "CPUExecutionProvider"
    queue_s = 0.0
    prefill_s = 0.001
    decode_s = 0.001
    pause_s = 0.001

    def __init__(self, edge: ScriptedEdge, count: int, cancel, watch=None) -> None:
        self._pieces = self._run(edge, count, cancel, watch)

    def __next__(self) -> GenerationChunk:
        return next(self._pieces)

    def close(self) -> None:
        with contextlib.suppress(ValueError):  # it runs in another thread right now
            self._pieces.close()

    @staticmethod
    def _run(edge: ScriptedEdge, count: int, cancel, watch) -> Iterator[GenerationChunk]:
        edge.answering += 1
        try:
            yield from ScriptedGeneration._tokens(edge, count, cancel, watch)
        finally:
            edge.answering -= 1

    @staticmethod
    def _tokens(edge: ScriptedEdge, count: int, cancel, watch) -> Iterator[GenerationChunk]:
        for index in range(count):
            if edge.cut_after is not None and index >= edge.cut_after:
                assert edge.fail_with is not None
                raise edge.fail_with
            if cancel is not None and cancel.is_cancelled:
                edge.cancelled += 1
                yield GenerationChunk(index=index, text="", finish_reason="cancelled")
                return
            if edge.pause_s:
                time.sleep(edge.pause_s)
            if watch is not None:
                margin = edge.margins[index] if index < len(edge.margins) else 10.0
                watch(np.array([0.0, margin], np.float32), 1)
            yield GenerationChunk(index=index, text=f"e{index} ")
        yield GenerationChunk(
            index=count,
            text="",
            finish_reason="length",
            usage=Usage(prompt_tokens=3, completion_tokens=count),
        )


def put_into(client, edge: ScriptedEdge) -> ScriptedEdge:
    """Let a client use it instead of a real runtime."""
    client._edge._runtime = edge
    return edge
