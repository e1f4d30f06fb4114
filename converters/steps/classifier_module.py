"""A classifier of transformers as a module with named inputs and with scores."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from converters.libraries import load
from converters.sources.classifier import is_multi_label

SCORES, LOGITS = "scores", "logits"
#: Raw inputs other than text, and what each model calls its own.
_RAW = ("pixel_values", "input_values")


def classifier_module(model: Any, config: Mapping[str, Any]) -> Any:
    """A torch module from a model's inputs to ``scores`` and ``logits``.

    Its `input_names` says which inputs it takes, in the order of `forward`.
    """
    torch = load("torch")
    accepted = inspect.signature(model.forward).parameters
    multi_label = is_multi_label(config)
    raw = next((name for name in _RAW if name in accepted), None)
    # Segments of models that know one kind only are inputs without a use.
    has_segments = "token_type_ids" in accepted and int(config.get("type_vocab_size") or 0) > 1

    class Classifier(torch.nn.Module):  # type: ignore[misc, name-defined]
        input_names: tuple[str, ...] = ()

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def answer(self, **inputs: Any) -> dict[str, Any]:
            logits = self.model(**inputs).logits  # (batch, classes)
            scores = logits.sigmoid() if multi_label else logits.softmax(dim=-1)
            return {SCORES: scores, LOGITS: logits}

    # The exporter takes the names of inputs from the signature of forward.
    class OfTokens(Classifier):
        input_names = ("input_ids", "attention_mask")

        def forward(self, input_ids: Any, attention_mask: Any) -> dict[str, Any]:
            return self.answer(input_ids=input_ids, attention_mask=attention_mask)

    class OfSegments(Classifier):
        input_names = ("input_ids", "attention_mask", "token_type_ids")

        def forward(
            self, input_ids: Any, attention_mask: Any, token_type_ids: Any
        ) -> dict[str, Any]:
            return self.answer(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            )

    class OfPixels(Classifier):
        input_names = ("pixel_values",)

        def forward(self, pixel_values: Any) -> dict[str, Any]:
            return self.answer(pixel_values=pixel_values)

    class OfSamples(Classifier):
        input_names = ("input_values",)

        def forward(self, input_values: Any) -> dict[str, Any]:
            return self.answer(input_values=input_values)

    if raw is not None:
        return (OfPixels if raw == "pixel_values" else OfSamples)().eval()
    return (OfSegments if has_segments else OfTokens)().eval()
