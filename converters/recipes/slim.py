"""The sliced model that variants ``slim``, ``int8`` and ``int4`` are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from msgspec import to_builtins

from converters import texts
from converters.recipe_file import fingerprint
from converters.recipes.base import Workshop
from converters.slim.corpus import Corpus, read_texts
from converters.slim.make import Job, SlimFacts, make_slim, read_facts
from converters.sources.base import Source
from converters.sources.huggingface import HuggingFaceSource, open_huggingface
from converters.steps.apart import give_back
from converters.steps.export_encoder import Pooling
from nearfar.errors import ConfigError

#: Id of the sliced model in full precision.
SLIM = "slim"
_TOOLS = ("torch", "transformers", "tokenizers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slimmed:
    """A sliced model.

    Attributes:
        source: Its folder, as any Hugging Face folder.
        facts: What was done.
    """

    source: HuggingFaceSource
    facts: SlimFacts


def sliced_model(
    shop: Workshop,
    source: HuggingFaceSource,
    origin: Source,
    corpus: Callable[[list[str]], Corpus],
    *,
    pooling: Pooling | None = None,
    windows: np.ndarray | None = None,
) -> Slimmed:
    """Slice and train a model, with a line of progress, or take it from the cache.

    Args:
        shop: Where and how.
        source: The whole model as a folder.
        origin: What the person gave.
        corpus: Makes inputs of texts to train on.
        pooling: Of a sentence encoder.
        windows: Language models: the tokens that they are verified on.

    Raises:
        ConfigError: A setting does not fit the model.
        ConversionError: It cannot be sliced or trained.
    """
    settings, seed = shop.settings.slim, shop.settings.seed
    if shop.options.variants and set(shop.options.variants) <= {"fp32"}:
        raise ConfigError(
            "No variant is asked for that would be made of the sliced model",
            field="variants",
            fix=f"Add {SLIM}, int8 or int4, or leave slim out",
        )
    folder = shop.work / SLIM
    stated = shop.options.train
    trained = read_texts(Path(stated) if stated is not None else None, settings)
    with shop.reporter.step("slice the model, and train what is left") as step:

        def make(target: Path) -> None:
            job = Job(
                source=source, origin=origin, settings=settings, seed=seed,
                corpus=corpus(trained), pooling=pooling, windows=windows,
            )  # fmt: skip
            make_slim(job, target, lambda done, _: step.progress(done / settings.recovery_steps))
            give_back()

        parts = {
            "source": fingerprint(origin),
            "settings": to_builtins(settings),
            "seed": seed,
            "texts": _digest([*trained, *texts.calibration_passages(settings.texts)]),
            "windows": [] if windows is None else windows.tolist(),
            "pooling": None if pooling is None else asdict(pooling),
        }
        shop.cache.output("slim", parts, folder, make, tools=_TOOLS)
        facts = read_facts(folder)
        step.note(
            f"{facts}; {facts.parameters_before / 1e6:.1f} M weights become "
            f"{facts.parameters / 1e6:.1f} M, loss on other texts {facts.loss_before:.3g} becomes "
            f"{facts.loss:.3g}"
        )
    shop.evidence.changed = f"{SLIM} and what is made of it: {facts}"
    return Slimmed(source=open_huggingface(folder), facts=facts)


def _digest(passages: list[str]) -> str:
    return hashlib.sha256("\0".join(passages).encode()).hexdigest()
