"""What every engine can do, whatever library runs it.

An engine runs one variant of one bundle on this machine. Engines are blocking and thread-safe:
runtimes call them from worker threads and decide how many calls run at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from nearfar.bundle.manifest import ShapeRange as ShapeRange  # users import it from here
from nearfar.bundle.manifest import TensorSpec
from nearfar.generation import GenerationChunk, GenerationOptions, Prompt


@dataclass(slots=True)
class CancelToken:
    """Lets one thread stop work that another thread does.

    Engines that generate text look at it between tokens, those that run tensors are told of it.

    Attributes:
        handle: What an engine's library is told by, once one was; serves calls one after another.
    """

    _event: threading.Event = field(default_factory=threading.Event)
    _listeners: list[Callable[[], None]] = field(default_factory=list)
    handle: Any = None

    def cancel(self) -> None:
        self._event.set()
        for listener in tuple(self._listeners):
            listener()

    def on_cancel(self, listener: Callable[[], None]) -> None:
        """Have a function called at `cancel`, in its thread; at once when that was before.

        It may be called twice, and must neither wait nor raise.
        """
        self._listeners.append(listener)
        if self._event.is_set():
            listener()

    @property
    def is_cancelled(self) -> bool:
        return self._event.is_set()


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """Engine settings that matter in practice.

    Attributes:
        threads: Compute threads for one call; 0 takes the physical cores this process may use.
        execution_providers: Wished order of ONNX Runtime providers; empty picks by device:
            TensorRT, then CUDA, then CPU, as far as installed.
        use_arena: Keep freed memory for reuse: faster, larger. Turn off on small devices.
        require_execution_provider: Raise `EngineError` rather than fall back to another provider.
        cache_dir: Where compiled engines (TensorRT) are kept between runs.
        allow_spinning: Let idle compute threads wait in a loop between operators: lower latency,
            one busy core more. Turn off on battery or where other work shares the cores.
        shape_ranges: Optimization profiles for TensorRT; without them it builds an engine for each
            range of shapes as it meets them.
    """

    threads: int = 0
    execution_providers: tuple[str, ...] = ()
    use_arena: bool = True
    require_execution_provider: bool = False
    cache_dir: str | None = None
    allow_spinning: bool = True
    shape_ranges: tuple[ShapeRange, ...] = ()


#: Told the model's logits (float32, shape (vocabulary,), valid during the call) and the token that
#: was chosen by them.
TokenWatch = Callable[[np.ndarray, int], None]


@runtime_checkable
class Engine(Protocol):
    """Common part of all engines.

    Attributes:
        variant_id: Which variant is loaded.
        execution_provider: Where it really runs, as the library reports it, not as asked for.
    """

    variant_id: str
    execution_provider: str

    def close(self) -> None:
        """Free the model; idempotent."""
        ...


@runtime_checkable
class TensorEngine(Engine, Protocol):
    """Runs tensors to tensors.

    Attributes:
        inputs: Input specs in model order.
        outputs: Output specs in model order.
    """

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]

    def infer(
        self, feeds: Mapping[str, np.ndarray], cancel: CancelToken | None = None
    ) -> dict[str, np.ndarray]:
        """Run one call.

        Args:
            feeds: Input name to array; dtype and shape as in `inputs`.
            cancel: Ends the call as soon as the library can.

        Returns:
            Output name to array, in model order; the arrays belong to the caller.

        Raises:
            InvalidInput: A name, dtype or shape does not fit; the error names it.
            EngineError: The engine failed.
            Cancelled: `cancel` was set before it was done.
        """
        ...


@runtime_checkable
class GenerationEngine(Engine, Protocol):
    """Continues text.

    Attributes:
        context_length_tokens: Prompt and answer together.
    """

    context_length_tokens: int

    def count_prompt_tokens(self, prompt: Prompt) -> int:
        """Number of tokens the prompt becomes, chat template included."""
        ...

    def generate(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        *,
        cancel: CancelToken | None = None,
        watch: TokenWatch | None = None,
    ) -> Generator[GenerationChunk, None, None]:
        """Stream an answer; closing the generator frees the KV cache at once.

        The request is checked at the call; the prompt is processed (prefill) when the first chunk
        is asked for. One chunk comes per token, then a last one with `finish_reason` and `usage`.

        Args:
            prompt: What to continue.
            options: How.
            cancel: Ends the answer at the next token.
            watch: Called for each token, and for the one that ends the answer, before its chunk.

        Raises:
            InvalidInput: The prompt is empty, or with `max_new_tokens` exceeds the context, or an
                option is out of range.
            EngineError: The engine failed.
        """
        ...
