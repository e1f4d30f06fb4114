"""Calibrate a language model: both sides answer the same prompts, compared word for word."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from nearfar.errors import InvalidInput
from nearfar.generation import GenerationOptions
from sdk import requests
from sdk.cascade import calibration as calibrations
from sdk.cascade.calibration import Calibration, VariantKey, digest_of
from sdk.cascade.measure import names_of, only_pair
from sdk.cascade.scores import AnswerScores, same_text

if TYPE_CHECKING:
    from sdk.cascade.measure import Data, Settings
    from sdk.client import Client
    from sdk.requests import Request
    from sdk.streams import GenerationStream


def calibrate_text(
    client: Client,
    model: str,
    data: Data,
    settings: Settings,
    *,
    on_input: Callable[[int], None],
    **options: Any,
) -> Calibration:
    """As `sdk.cascade.measure.calibrate`, for a model that generates text.

    Raises:
        As there.
    """
    names = names_of("text-generation", settings)
    values: list[list[float]] = []
    agrees: list[bool] = []
    keys: set[tuple[VariantKey, VariantKey]] = set()
    for request in _requests(client, model, data, settings, options):
        # The cloud first: if policy says no, it says so before the device has worked.
        far = client._stream(msgspec.structs.replace(request, mode="cloud_only"))
        far_text = far.text()
        scores = AnswerScores()
        near = client._stream(msgspec.structs.replace(request, mode="edge_only"), scores)
        near_text = near.text()
        keys.add((_key(client, request, near, "edge"), _key(client, request, far, "cloud")))
        values.append([scores.value(name) for name in names])
        agrees.append(same_text(near_text, far_text))
        on_input(1)
    edge_key, cloud_key = only_pair(keys, model)
    table = np.asarray(values)
    return Calibration(
        model=model,
        task="text-generation",
        edge=edge_key,
        cloud=cloud_key,
        samples=len(agrees),
        scores=calibrations.make(
            {name: table[:, column] for column, name in enumerate(names)}, np.asarray(agrees)
        ),
        confidence=settings.confidence,
        horizon_requests=settings.horizon_requests,
        generation=GenerationOptions(max_new_tokens=settings.max_new_tokens, stop=settings.stop),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _requests(
    client: Client, model: str, data: Data, settings: Settings, options: dict[str, Any]
) -> Iterator[Request]:
    if data.feeds is not None:
        raise InvalidInput(
            f"{model!r} generates text, and the data are tensors",
            field="data",
            fix="Give prompts with --texts, one in each line",
        )
    given: Any = {
        **options,
        "min_agreement": 0.0,
        "deadline_ms": math.inf,
        "max_new_tokens": settings.max_new_tokens,
        "stop": settings.stop,
    }
    for item in data.items:
        text = item.read_text(encoding="utf-8") if isinstance(item, Path) else item
        text = text.decode() if isinstance(text, bytes) else text
        prompt = (
            requests.chat_prompt([{"role": "user", "content": text}])
            if settings.is_chat
            else requests.text_prompt(text)
        )
        yield client._generate_request(model, prompt, given)


def _key(client: Client, request: Request, stream: GenerationStream, place: str) -> VariantKey:
    """The variant that answered."""
    info = next(info for info in client.models() if info.name == request.model)
    manifest = info.manifest
    if place == "cloud":
        offer = client._known.offer(request)
        manifest = offer.manifest if offer is not None else manifest
    return digest_of(manifest, stream.variant)
