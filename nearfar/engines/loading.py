"""Choose and load the engine a variant asks for."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from nearfar.engines.base import Engine, SessionOptions
from nearfar.errors import EngineError

if TYPE_CHECKING:
    from nearfar.bundle import Bundle

logger = logging.getLogger(__name__)

#: Engines this version runs, and the package each needs.
PACKAGE_OF_ENGINE = {
    "onnxruntime": "onnxruntime",
    "onnxruntime-genai": "onnxruntime_genai",
    "tensorrt": "tensorrt",
}


def load_engine(bundle: Bundle, variant_id: str, options: SessionOptions | None = None) -> Engine:
    """Load one variant. Its files are verified against the manifest before any library sees them.

    Args:
        bundle: The opened bundle.
        variant_id: Which variant.
        options: Engine settings; `None` takes the defaults.

    Returns:
        A `TensorEngine` or a `GenerationEngine`.

    Raises:
        ModelNotFound: The bundle has no such variant.
        BundleError: A file is not what the manifest says, or the library cannot read it.
        EngineError: This version does not run that engine, its package is not installed, or the
            library failed.
    """
    options = options or SessionOptions()
    variant = bundle.variant(variant_id)
    label = f"{bundle.manifest.name}/{variant.id}"
    if variant.engine not in PACKAGE_OF_ENGINE:
        raise EngineError(
            f"Variant {label} needs the engine {variant.engine!r}, which this version does not run",
            fix=f"Choose a variant for one of: {', '.join(PACKAGE_OF_ENGINE)}",
        )
    entry = bundle.variant_entry(variant)
    started_s = time.monotonic()
    engine: Engine
    try:
        if variant.engine == "onnxruntime" and bundle.manifest.task == "text-generation":
            from nearfar.engines.cached_engine import CachedTextEngine

            engine = CachedTextEngine(entry, variant, options, manifest=bundle.manifest)
        elif variant.engine == "onnxruntime":
            from nearfar.engines.onnxruntime_engine import OnnxRuntimeEngine

            engine = OnnxRuntimeEngine(entry, variant, options, manifest=bundle.manifest)
        elif variant.engine == "tensorrt":
            from nearfar.engines import tensorrt_store
            from nearfar.engines.tensorrt_engine import TensorrtEngine

            device = tensorrt_store.probe_tensorrt()
            problem = tensorrt_store.why_not(variant)
            if problem is not None:
                raise EngineError(
                    f"Variant {label} cannot run: {problem}",
                    fix=f"Run nearfar edge build {bundle.path} on a device with TensorRT, or "
                    "choose another variant",
                )
            built = tensorrt_store.read_engine(tensorrt_store.engine_path(variant, device))
            engine = TensorrtEngine(built, variant, manifest=bundle.manifest)
        else:
            from nearfar.engines.genai_engine import GenaiEngine

            engine = GenaiEngine(entry, variant, options, manifest=bundle.manifest)
    except ImportError as exc:
        raise EngineError(
            f"Variant {label} needs {exc.name or variant.engine}, which cannot be imported here "
            f"({exc})",
            fix="Install the engines: pip install 'nearfar[edge]'",
        ) from exc
    logger.info(
        "loaded %s on %s in %.2f s", label, engine.execution_provider, time.monotonic() - started_s
    )
    return engine
