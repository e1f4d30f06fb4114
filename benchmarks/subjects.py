"""What a benchmark runs on: settings, and one model of each task from a folder of bundles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Bar, Figure
from nearfar.bundle import Bundle, BundleStore
from nearfar.bundle.manifest import Manifest, Variant
from nearfar.errors import EngineError, InvalidInput
from sdk import Client

#: Starts a part of the benchmark; returns what to call after each of its steps.
Begin = Callable[[str, int], Callable[[], None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        models: Folder of bundles.
        tokens: Length of each LLM answer.
        rounds: How often each side is measured.
        threads: Compute threads of both sides; 0 takes what nearfar takes, the physical cores.
        seed: The order of the sides is drawn from it.
    """

    models: Path
    tokens: int = 64
    rounds: int = 12
    threads: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Subject:
    """A bundle, and the variant of it that runs on this device."""

    bundle: Bundle
    variant: Variant

    @property
    def name(self) -> str:
        return self.bundle.manifest.name

    @property
    def entry(self) -> Path:
        """The file or folder that the engine opens, verified."""
        return self.bundle.variant_entry(self.variant)


@dataclass(frozen=True, slots=True)
class Part:
    """What one comparison found out."""

    bars: tuple[Bar, ...]
    figures: tuple[Figure, ...]


def find_models(store: Path) -> list[Manifest]:
    """One model of each task that is compared; those of the quickstart where there are several.

    Raises:
        InvalidInput: There is no such folder, or a task has no model in it.
    """
    fix = "Make the models with `nearfar quickstart`, or name another folder: --models DIR"
    if not store.is_dir():
        raise InvalidInput(f"There is no model store {store}", field="--models", fix=fix)
    manifests = BundleStore(store).models()
    found = []
    for task, usual in (
        ("text-generation", "assistant"),
        ("classification", "file-type"),
        ("embedding", "minilm"),
    ):
        fitting = [manifest for manifest in manifests if manifest.task == task]
        if not fitting:
            raise InvalidInput(
                f"The model store {store} has no {task} model, such as {usual}",
                field="--models",
                fix=fix,
            )
        found.append(next((m for m in fitting if m.name == usual), fitting[0]))
    return found


def subject_of(client: Client, store: Path, manifest: Manifest) -> Subject:
    """The bundle, and the variant that the client would run here.

    Raises:
        EngineError: None runs on this device.
    """
    info = next(info for info in client.models() if info.name == manifest.name)
    bundle = BundleStore(store).open(manifest.name, manifest.version)
    if info.edge_variant is None:
        raise EngineError(
            f"No variant of {manifest.name!r} runs on this device",
            fix="`nearfar doctor` says what is missing",
        )
    return Subject(bundle, bundle.variant(info.edge_variant))
