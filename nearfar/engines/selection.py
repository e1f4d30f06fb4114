"""Which variants of a bundle run on a device, and which to take first.

Pure functions, but that TensorRT's engines are looked for where there are variants for it.
"""

from __future__ import annotations

import functools

import msgspec

from nearfar.bundle.manifest import Manifest, Placement, Variant
from nearfar.engines.devices import Device, cpu_kind
from nearfar.engines.loading import PACKAGE_OF_ENGINE
from nearfar.units import format_bytes

_CPU = "CPUExecutionProvider"


class Candidate(msgspec.Struct, frozen=True):
    """One variant, and why it cannot run, if so.

    Attributes:
        variant: The variant.
        excluded: What is missing, for people; `None` when it can run.
    """

    variant: Variant
    excluded: str | None


def candidates(manifest: Manifest, device: Device, placement: Placement) -> tuple[Candidate, ...]:
    """All variants: first those that can run, best first for the placement, then the others.

    On the device (``edge``) a variant meant for it comes first, then one with an engine built
    here, then, for text, one for onnxruntime-genai, then the smaller one. In the cloud
    the better one comes first, then one for onnxruntime-genai, then the smaller one.
    """

    def order(candidate: Candidate) -> tuple[object, ...]:
        variant = candidate.variant
        excluded = candidate.excluded is not None
        # Text on plain ONNX Runtime, which copies its cache for every token, is for machines
        # without onnxruntime-genai.
        is_plain = manifest.task == "text-generation" and variant.engine == "onnxruntime"
        if placement == "edge":
            meant_elsewhere = variant.placement[:1] != ("edge",)
            # Who built an engine for this device wants it used, though others may be smaller.
            is_general = variant.engine != "tensorrt"
            return (
                excluded, meant_elsewhere, is_general, is_plain, variant.size_bytes,
                variant.quality_rank, variant.id,
            )  # fmt: skip
        return excluded, variant.quality_rank, is_plain, variant.size_bytes, variant.id

    broken = _genai_problem(manifest, device)
    found = (
        Candidate(
            variant,
            (broken if variant.engine == "onnxruntime-genai" else None)
            or _why_not(variant, device, placement),
        )
        for variant in manifest.variants
    )
    return tuple(sorted(found, key=order))


def _genai_problem(manifest: Manifest, device: Device) -> str | None:
    """Why onnxruntime-genai does not work here though it is installed, if so.

    Asked only where another variant could take its place: importing it costs time that is lost
    when it is not used.
    """
    engines = {variant.engine for variant in manifest.variants}
    if manifest.task != "text-generation" or not device.has_genai:
        return None
    return _import_problem() if {"onnxruntime", "onnxruntime-genai"} <= engines else None


@functools.lru_cache(maxsize=1)
def _import_problem() -> str | None:
    try:
        import nearfar.engines.genai_native  # noqa: F401
    except (ImportError, OSError) as exc:
        return f"onnxruntime-genai is installed, but cannot be imported here ({exc})"
    return None


def runnable_variants(
    manifest: Manifest, device: Device, placement: Placement
) -> tuple[Variant, ...]:
    """Variants that can run here, best first; empty when none can. See `candidates` for why."""
    return tuple(
        candidate.variant
        for candidate in candidates(manifest, device, placement)
        if candidate.excluded is None
    )


def _why_not(variant: Variant, device: Device, placement: Placement) -> str | None:
    if placement not in variant.placement:
        return f"it is meant for {' and '.join(variant.placement)} only"
    return why_not(variant, device)


def why_not(variant: Variant, device: Device) -> str | None:
    """Why a variant cannot run on a device, wherever it is meant to run; `None` when it can."""
    needs = variant.requirements
    provider = needs.execution_provider
    if variant.engine not in PACKAGE_OF_ENGINE:
        return f"this version does not run the engine {variant.engine}"
    if variant.engine == "tensorrt":
        from nearfar.engines.tensorrt_store import why_not

        return why_not(variant)
    if not device.execution_providers:
        return "onnxruntime is not installed (pip install 'nearfar[edge]')"
    if variant.engine == "onnxruntime-genai" and not device.has_genai:
        return "onnxruntime-genai is not installed (pip install 'nearfar[edge]')"
    if provider not in device.execution_providers:
        why = device.missing_providers.get(provider, "not installed")
        return f"it needs {provider}, which does not work here: {why}"
    if needs.sm_arch is not None and needs.sm_arch != device.sm_arch:
        return f"it is built for GPU architecture sm_{needs.sm_arch}, this is {_gpu(device)}"
    if needs.memory_bytes > device.memory_bytes:
        return (
            f"it needs {format_bytes(needs.memory_bytes)} of memory, "
            f"here are {format_bytes(device.memory_bytes)}"
        )
    return _saturation(variant, device)


def _saturation(variant: Variant, device: Device) -> str | None:
    """Why 8-bit kernels of this CPU cannot be trusted with the variant, if so."""
    if not variant.saturation or variant.requirements.execution_provider != _CPU:
        return None
    kind = cpu_kind(device)
    found = variant.saturation.get(kind)
    if found:
        return f"its 8-bit kernels were found to saturate on CPUs of this kind ({kind})"
    if found is None and kind == "x86":
        return (
            "this CPU has no VNNI instructions, without which its 8-bit kernels may saturate, and "
            "it was not tried on such a CPU"
        )
    return None


def _gpu(device: Device) -> str:
    return f"sm_{device.sm_arch}" if device.sm_arch else "a machine without GPU"
