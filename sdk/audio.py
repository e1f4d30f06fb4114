"""Signals that a model hears piece by piece: what the answers need of the past is kept here.

The state lives in this object and travels with every window, so each window may be answered by
another route: a stream survives the loss of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from nearfar.errors import InvalidInput
from nearfar.processing.windows import Samples, SignalWindows

if TYPE_CHECKING:
    from nearfar.bundle.manifest import Manifest
    from sdk.aio import AsyncClient
    from sdk.calls import RequestOptions
    from sdk.client import Client
    from sdk.results import InferResult, Route


class AudioAnswer(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a model says about one window of a signal.

    Attributes:
        start_s: Where the window begins, in seconds from the start of the signal.
        end_s: Where it ends.
        outputs: Output name to array, without the states.
        result: The result of the call: `route`, `timings`, `variant` and so on.
    """

    start_s: float
    end_s: float
    outputs: dict[str, np.ndarray]
    result: InferResult

    @property
    def score(self) -> float:
        """The number that a model with one number for a window gives, such as a probability.

        Raises:
            InvalidInput: It gives more than one; see `outputs`.
        """
        arrays = list(self.outputs.values())
        if len(arrays) != 1 or arrays[0].size != 1:
            raise InvalidInput(
                "The model gives more than one number for a window",
                field="score",
                fix=f"Read answer.outputs: {', '.join(self.outputs)}",
            )
        return float(arrays[0].item())

    @property
    def route(self) -> Route:
        """Where this window was answered."""
        return self.result.route


class _Stream:
    """What both kinds of streams share."""

    def __init__(self, manifest: Manifest, sample_rate_hz: int | None) -> None:
        self._windows = SignalWindows(manifest, sample_rate_hz)
        # Answers that nobody was given yet: a later window of the same call failed.
        self._ready: list[AudioAnswer] = []

    @property
    def state(self) -> dict[str, np.ndarray]:
        """Input name to the state that the next window is given; copies."""
        return {name: array.copy() for name, array in self._windows.state.items()}

    @property
    def position_s(self) -> float:
        """Seconds of the signal that have been answered."""
        return self._windows.taken_samples / self._windows.rate.sample_rate_hz

    def reset(self) -> None:
        """Forget everything: what comes next is another signal."""
        self._windows.reset()
        self._ready = []

    def _keep(self, result: InferResult) -> None:
        start_s = self.position_s
        outputs = self._windows.took(result.outputs)
        self._ready.append(
            AudioAnswer(start_s=start_s, end_s=self.position_s, outputs=outputs, result=result)
        )

    def _given(self) -> list[AudioAnswer]:
        ready, self._ready = self._ready, []
        return ready


class AudioStream(_Stream):
    """One signal and one model; made by `Client.stream_audio`. For one thread at a time."""

    def __init__(
        self,
        client: Client,
        manifest: Manifest,
        sample_rate_hz: int | None,
        options: RequestOptions,
    ) -> None:
        super().__init__(manifest, sample_rate_hz)
        self._client = client
        self._model = manifest.name
        self._options = options

    def feed(self, samples: Samples) -> list[AudioAnswer]:
        """Give the next piece of the signal, of any length.

        Args:
            samples: One channel: floats from -1 to 1, 16-bit integers, or bytes of 16-bit
                little-endian PCM, as microphones give them.

        Returns:
            An answer for each window that became full; none, one or several.

        Raises:
            InvalidInput: The samples are of another kind; nothing was taken.
            NearfarError: As `Client.infer`. Nothing is lost: ``feed(b"")`` tries the window that
                failed again, and returns the answers before it, too.
        """
        self._windows.add(samples)
        return self._run()

    def finish(self) -> list[AudioAnswer]:
        """Fill the window that was begun with silence, and answer it."""
        self._windows.pad()
        return self._run()

    def _run(self) -> list[AudioAnswer]:
        while (feeds := self._windows.feeds()) is not None:
            self._keep(self._client.infer(self._model, feeds, **self._options))
        return self._given()


class AsyncAudioStream(_Stream):
    """As `AudioStream`, for `AsyncClient.stream_audio`; one task at a time."""

    def __init__(
        self,
        client: AsyncClient,
        manifest: Manifest,
        sample_rate_hz: int | None,
        options: RequestOptions,
    ) -> None:
        super().__init__(manifest, sample_rate_hz)
        self._client = client
        self._model = manifest.name
        self._options = options

    async def feed(self, samples: Samples) -> list[AudioAnswer]:
        """As `AudioStream.feed`."""
        self._windows.add(samples)
        return await self._run()

    async def finish(self) -> list[AudioAnswer]:
        """As `AudioStream.finish`."""
        self._windows.pad()
        return await self._run()

    async def _run(self) -> list[AudioAnswer]:
        while (feeds := self._windows.feeds()) is not None:
            self._keep(await self._client.infer(self._model, feeds, **self._options))
        return self._given()
