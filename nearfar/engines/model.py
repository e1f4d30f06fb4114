"""One loaded variant with everything around it: preprocessing, tensors, text generation."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from nearfar.bundle.manifest import (
    AudioPreprocessing,
    ImagePreprocessing,
    Manifest,
    StreamPreprocessing,
    TextPreprocessing,
    Variant,
)
from nearfar.engines.base import (
    CancelToken,
    Engine,
    GenerationEngine,
    SessionOptions,
    TensorEngine,
    TokenWatch,
)
from nearfar.engines.loading import load_engine
from nearfar.errors import BundleError, InvalidInput
from nearfar.generation import GenerationChunk, GenerationOptions, Prompt
from nearfar.tensors import numpy_of

if TYPE_CHECKING:
    from nearfar.bundle import Bundle

RawForm = Literal["text", "bytes"]
_Preprocess = Callable[[Sequence[str | bytes]], dict[str, np.ndarray]]


class LoadedModel:
    """One variant of one bundle, loaded and ready. Blocking and thread-safe.

    Args:
        bundle: The opened bundle; its files are verified here.
        variant_id: Which variant.
        options: Engine settings; `None` takes the defaults.

    Attributes:
        manifest: The bundle's manifest.
        variant: The loaded variant.
        engine: What runs it.

    Raises:
        ModelNotFound, BundleError, EngineError: See `load_engine`.
    """

    def __init__(
        self, bundle: Bundle, variant_id: str, options: SessionOptions | None = None
    ) -> None:
        self.manifest: Manifest = bundle.manifest
        self.variant: Variant = bundle.variant(variant_id)
        self.engine: Engine = load_engine(bundle, variant_id, options)
        self._tensors = self.engine if isinstance(self.engine, TensorEngine) else None
        self._text = self.engine if isinstance(self.engine, GenerationEngine) else None
        try:
            self._preprocess = _preprocessor(bundle, self._tensors)
        except BaseException:
            self.engine.close()
            raise

    def infer(
        self, feeds: Mapping[str, np.ndarray], cancel: CancelToken | None = None
    ) -> dict[str, np.ndarray]:
        """Run one batch of tensors; see `TensorEngine.infer`.

        Raises:
            InvalidInput: A tensor does not fit, or the model generates text.
            EngineError: The engine failed.
        """
        if cancel is None:
            return self.tensor_engine.infer(feeds)
        return self.tensor_engine.infer(feeds, cancel)

    def infer_raw(
        self,
        form: RawForm,
        items: Sequence[str] | Sequence[bytes] | Sequence[str | bytes],
        cancel: CancelToken | None = None,
    ) -> dict[str, np.ndarray]:
        """Preprocess one batch as the bundle says, and run it.

        Args:
            form: What the items are: ``text`` (str) or ``bytes``.
            items: One per row of the batch.
            cancel: As for `infer`.

        Raises:
            InvalidInput: The model takes something else, or an item does not fit.
            EngineError: The engine failed.
        """
        return self.infer(self.preprocess(form, items), cancel)

    def preprocess(
        self, form: RawForm, items: Sequence[str] | Sequence[bytes] | Sequence[str | bytes]
    ) -> dict[str, np.ndarray]:
        """Turn texts or byte strings into the model's inputs, without running it.

        Raises:
            InvalidInput: The model takes something else, or an item does not fit.
        """
        if self._preprocess is None:
            raise self._wrong_call("generate()" if self._text is not None else "tensors")
        takes = "text" if isinstance(self.manifest.preprocessing, TextPreprocessing) else "bytes"
        wanted: type = str if takes == "text" else bytes
        if form != takes or not all(isinstance(item, wanted) for item in items):
            raise InvalidInput(
                f"Model {self.manifest.name!r} takes {takes}, and this is something else",
                field="input",
                fix=f"Give a list of {wanted.__name__}",
            )
        if not items:
            raise InvalidInput("The batch is empty", field="input", fix="Give at least one item")
        return self._preprocess(items)

    def generate(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        cancel: CancelToken | None = None,
        watch: TokenWatch | None = None,
    ) -> Generator[GenerationChunk, None, None]:
        """Stream an answer; see `GenerationEngine.generate`.

        Raises:
            InvalidInput: The prompt or an option does not fit, or the model takes tensors.
            EngineError: The engine failed.
        """
        if watch is None:
            return self.text_engine.generate(prompt, options, cancel=cancel)
        return self.text_engine.generate(prompt, options, cancel=cancel, watch=watch)

    @property
    def tensor_engine(self) -> TensorEngine:
        """The engine, when it takes tensors.

        Raises:
            InvalidInput: It does not.
        """
        if self._tensors is None:
            raise self._wrong_call("generate()")
        return self._tensors

    @property
    def text_engine(self) -> GenerationEngine:
        """The engine, when it generates text.

        Raises:
            InvalidInput: It does not.
        """
        if self._text is None:
            raise self._wrong_call("infer()")
        return self._text

    def close(self) -> None:
        """Free the model; idempotent."""
        self.engine.close()

    def _wrong_call(self, right: str) -> InvalidInput:
        return InvalidInput(
            f"{self.manifest.name!r} is a {self.manifest.task} model, which cannot be called "
            "like this",
            field="model",
            fix=f"Use {right}",
        )


def _preprocessor(bundle: Bundle, engine: TensorEngine | None) -> _Preprocess | None:
    """The bundle's preprocessing as a function from items to feeds."""
    spec = bundle.manifest.preprocessing
    if spec is None or engine is None or isinstance(spec, StreamPreprocessing):
        return None  # what a signal leaves behind is kept by the client, not by the model
    if isinstance(spec, TextPreprocessing):
        from nearfar.processing.text import TextEncoder

        encoder = TextEncoder(bundle.shared_file(spec.tokenizer), spec)
        names = [tensor.name for tensor in engine.inputs]
        unknown = set(names) - set(encoder.names)
        if unknown:
            raise BundleError(
                f"Model {bundle.manifest.name!r} has inputs that text does not become: "
                f"{', '.join(sorted(unknown))}",
                fix="Convert it again, or remove `preprocessing` from the manifest",
            )

        def encode(items: Sequence[str | bytes]) -> dict[str, np.ndarray]:
            encoded = encoder([str(item) for item in items])
            return {name: encoded[name] for name in names}

        return encode
    if isinstance(spec, ImagePreprocessing):
        from nearfar.processing.image import pixels_of

        image = spec
        return lambda items: {image.input: pixels_of(_only_bytes(items), image)}
    if isinstance(spec, AudioPreprocessing):
        from nearfar.processing.audio import samples_of

        sound = spec
        return lambda items: {sound.input: samples_of(_only_bytes(items), sound)}

    from nearfar.processing import head_tail

    if len(engine.inputs) != 1:
        raise BundleError(
            f"Model {bundle.manifest.name!r} has {len(engine.inputs)} inputs; head-tail "
            "preprocessing makes one",
            fix="Convert it again, or remove `preprocessing` from the manifest",
        )
    (tensor,) = engine.inputs
    dtype = numpy_of(tensor.datatype)

    def extract(items: Sequence[str | bytes]) -> dict[str, np.ndarray]:
        rows = [head_tail.features(item, spec) for item in _only_bytes(items)]
        return {tensor.name: np.stack(rows).astype(dtype, copy=False)}

    return extract


def _only_bytes(items: Sequence[str | bytes]) -> list[bytes]:
    return [item for item in items if isinstance(item, bytes)]
