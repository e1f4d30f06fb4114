"""`nearfar edge build`: engines of a bundle's ``tensorrt`` variants, made on this device."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from nearfar.bundle.hashing import sha256_of
from nearfar.engines import tensorrt_store
from nearfar.engines.tensorrt_build import BuildResult, Library, Progress, build
from nearfar.engines.tensorrt_store import BuiltEngine, TensorrtDevice
from nearfar.errors import EngineError, ModelNotFound

if TYPE_CHECKING:
    from nearfar.bundle import Bundle
    from nearfar.bundle.manifest import Variant


class EngineState(msgspec.Struct, frozen=True, kw_only=True):
    """One variant after building.

    Attributes:
        variant_id: Which.
        path: Its engine.
        size_bytes: Of the engine.
        build_s: Seconds that building took, now or earlier.
        is_new: Whether it was built now.
    """

    variant_id: str
    path: Path
    size_bytes: int
    build_s: float
    is_new: bool


def tensorrt_variants(bundle: Bundle, variant_id: str | None = None) -> tuple[Variant, ...]:
    """The variants to build.

    Raises:
        ModelNotFound: The bundle has none, or not that one.
    """
    found = tuple(
        variant
        for variant in bundle.manifest.variants
        if variant.engine == "tensorrt" and variant_id in (None, variant.id)
    )
    if not found:
        wished = f"no variant {variant_id!r}" if variant_id else "no variant"
        raise ModelNotFound(
            f"{bundle.manifest.name} has {wished} for TensorRT",
            fix="Convert it with --variants trt-fp16 (or trt-int8)",
        )
    return found


def build_engines(
    bundle: Bundle,
    variants: tuple[Variant, ...],
    *,
    is_forced: bool = False,
    timeout_s: float = 3600.0,
    progress: Progress | None = None,
    library: Library = "tensorrt",
    device: TensorrtDevice | None = None,
) -> Iterator[EngineState]:
    """Build what is not there yet, one variant after the other.

    Args:
        bundle: The opened bundle; files are verified before TensorRT sees them.
        variants: Of the engine ``tensorrt``.
        is_forced: Whether to build engines anew that are there.
        timeout_s: For each engine.
        progress: Called with TensorRT's phase, step and number of steps.
        library: Which TensorRT builds.
        device: What engines are built for; `None` looks.

    Raises:
        BundleError: A file is not what the manifest says.
        EngineError: TensorRT is not there, refuses a graph, or crashed.
    """
    device = device or tensorrt_store.probe_tensorrt()
    if device.why_not:
        raise EngineError(
            f"TensorRT does not work here: {device.why_not}",
            fix="See docs/how-to/run-on-jetson.md; other variants run with ONNX Runtime",
        )
    place = tensorrt_store.make_folder()
    for variant in variants:
        path = tensorrt_store.engine_path(variant, device)
        if path.is_file() and not is_forced:
            facts = msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=BuiltEngine)
            yield _state(variant, path, facts, is_new=False)
            continue
        model = bundle.variant_entry(variant)
        plan = variant.tensorrt
        assert plan is not None  # manifests of this engine have one
        with tempfile.TemporaryDirectory(prefix=".build-", dir=place) as work:
            made = Path(work) / "engine"
            result = build(
                model,
                library=library,
                profile=plan.profile,
                engine=made,
                timing_cache=tensorrt_store.timing_cache_path(device),
                workspace_bytes=plan.workspace_bytes,
                optimization_level=plan.optimization_level,
                timeout_s=timeout_s,
                progress=progress,
            )
            label = f"{bundle.manifest.name}/{variant.id}"
            if not result.is_built:
                raise _refused(label, result)
            facts = BuiltEngine(
                model=label,
                sha256=sha256_of(made),
                size_bytes=made.stat().st_size,
                library=result.library,
                gpu=device.gpu,
                build_s=result.build_s,
            )
            tensorrt_store.keep_engine(path, made, facts)
        yield _state(variant, path, facts, is_new=True)


def _state(variant: Variant, path: Path, facts: BuiltEngine, *, is_new: bool) -> EngineState:
    return EngineState(
        variant_id=variant.id,
        path=path,
        size_bytes=facts.size_bytes,
        build_s=facts.build_s,
        is_new=is_new,
    )


def _refused(label: str, result: BuildResult) -> EngineError:
    said = []
    for error in result.errors[:3]:
        words = error.text.strip().partition("\n")[0][:300]
        said.append(f"{error.operator} {error.node}: {words}".strip(" :") if error.node else words)
    fixes = {
        "timeout": "Allow more time with --timeout",
        "crash": "Free memory (close other programs, sudo systemctl isolate multi-user.target) and "
        "try again; or build a variant with smaller largest sizes",
        "library": "Install TensorRT for Python; on a Jetson it comes with JetPack",
    }
    return EngineError(
        f"TensorRT built no engine of {label} ({result.library}, {result.stage}): "
        + ("; ".join(said) or "it does not say why"),
        fix=fixes.get(
            result.stage or "",
            "Look at the graph where there is tensorrt-rtx: nearfar tensorrt check BUNDLE; other "
            "variants run with ONNX Runtime",
        ),
    )
