"""The gate without a GPU: would TensorRT take this graph?

TensorRT RTX parses and builds without one. It is NVIDIA's library for RTX cards and not the one on
a Jetson: the parser and most of the builder are the same, kernels are not. So a refusal here is
telling, and an acceptance says much, but is no run.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from converters.libraries import load
from converters.tensorrt.findings import Finding, explain, merged
from converters.tensorrt.ranges import (
    ANY_SIZE,
    Bounds,
    Three,
    bounds_of,
    profile_of,
    usual_of,
)
from converters.tensorrt.repair import repair
from converters.tensorrt.scan import scan
from nearfar.bundle import Bundle
from nearfar.bundle.manifest import ShapeRange, TensorrtCheck, Variant
from nearfar.engines.tensorrt_build import BuildResult, Library, build, find_interpreter
from nearfar.errors import ConversionError

LIBRARY: Library = "tensorrt_rtx"
#: The largest graph tried took 20 s on two cores; an endless one must not hang the conversion.
TIMEOUT_S = 600.0


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate says about one graph.

    Attributes:
        library: What was asked, with its version; "" when only the graph was looked at.
        accepted: Whether an engine was built and nothing fatal is known.
        findings: What was found in the graph as it was given.
        fixed_accepted: The same of the repaired graph; `None` when nothing was repaired.
        engine_bytes: Size of the engine that was built last.
        build_s: Seconds it took.
    """

    library: str = ""
    accepted: bool = False
    findings: tuple[Finding, ...] = ()
    fixed_accepted: bool | None = None
    engine_bytes: int = 0
    build_s: float = 0.0

    @property
    def is_unavailable(self) -> bool:
        """Whether the library could not be asked at all."""
        return any(finding.kind == "library" for finding in self.findings)

    def facts(self) -> TensorrtCheck:
        """For the manifest."""
        return TensorrtCheck(
            library=self.library,
            accepted=self.accepted,
            findings=tuple(str(finding) for finding in self.findings),
        )


def check_graph(
    path: Path,
    *,
    axes: Mapping[str, Three] | None = None,
    fixed: Mapping[str, float] | None = None,
    sample: Mapping[str, Sequence[int]] | None = None,
    bounds: Bounds = ANY_SIZE,
    profile: Sequence[ShapeRange] | None = None,
    try_repair: bool = True,
    save_fixed: Path | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Verdict:
    """Look at a graph, have it built, and where that fails repair it and have it built again.

    Args:
        path: ONNX file.
        axes: See `profile_of`.
        fixed: Inputs to replace by a value before anything else is judged.
        sample: See `profile_of`.
        bounds: See `profile_of`.
        profile: Ranges that are known already; the three above do not count then.
        try_repair: Whether to repair.
        save_fixed: Where to write the repaired graph, if it is accepted.
        timeout_s: For each build.

    Raises:
        ConfigError: `axes` do not fit the graph.
        ConversionError: The file is no ONNX model, or `fixed` does not fit it.
    """
    model = _opened(path)
    found = scan(model)

    if profile is not None:
        ranges = tuple(profile)
    else:
        ranges = profile_of(model, axes or {}, sample=sample, bounds=bounds)
    if fixed:
        # The graph is meant with these values: it is judged as it is then.
        result: BuildResult | None = None
        refusals: list[Finding] = []
    else:
        result = build(path, library=LIBRARY, profile=ranges, timeout_s=timeout_s)
        refusals = explain(result)
    findings = merged(_telling(found, refusals, is_built=result is not None and result.is_built))
    is_clean = result is not None and result.is_built and not any(f.is_fatal for f in findings)
    library = result.library if result is not None else LIBRARY
    if is_clean or not try_repair or any(one.kind == "library" for one in refusals):
        return Verdict(
            library=library,
            accepted=is_clean,
            findings=tuple(findings),
            engine_bytes=result.engine_bytes if result else 0,
            build_s=result.build_s if result else 0.0,
        )
    marked = repair(model, list(findings), fixed=fixed, ranges=ranges)
    if not fixed and not any(one.is_fixed for one in marked):
        return Verdict(library=library, findings=tuple(marked))
    again, trial_findings = _trial(model, ranges, save_fixed, timeout_s)
    is_taken = again.is_built and not any(one.is_fatal for one in (*marked, *trial_findings))
    marked = merged(marked, trial_findings)
    return Verdict(
        library=again.library,
        accepted=is_taken if fixed else False,
        findings=tuple(marked),
        fixed_accepted=is_taken,
        engine_bytes=again.engine_bytes,
        build_s=again.build_s,
    )


def check_variant(
    bundle: Bundle,
    variant: Variant,
    *,
    axes: Mapping[str, Three] | None = None,
    fixed: Mapping[str, float] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Verdict:
    """`check_graph` of a variant, with its own ranges of sizes or those that its bundle knows.

    Args:
        bundle, variant: What is asked about.
        axes, fixed, timeout_s: See `check_graph`.

    Raises:
        ConfigError, ConversionError: See `check_graph`.
    """
    spec = bundle.manifest.preprocessing
    usual = usual_of(spec)
    return check_graph(
        bundle.variant_entry(variant),
        axes=axes,
        fixed=fixed,
        sample=usual,
        bounds=bounds_of(spec, usual),
        profile=variant.tensorrt.profile if variant.tensorrt is not None else None,
        timeout_s=timeout_s,
    )


def _telling(found: list[Finding], refusals: list[Finding], *, is_built: bool) -> list[Finding]:
    """What the look at the graph found, and of the refusals what that does not explain."""
    if is_built:
        return found
    certain = [one for one in found if one.is_fatal]
    by_kind = {one.kind: one for one in refusals}
    # The same thing said by both: the graph knows all nodes, TensorRT stops at the first.
    joined = [
        msgspec.structs.replace(one, is_refusal=True) if one.kind in by_kind else one
        for one in found
    ]
    known = {one.kind for one in found}
    if certain:
        return joined + [one for one in refusals if one.kind not in known and one.kind != "refused"]
    return joined + [one for one in refusals if one.kind not in known]


def _trial(
    model: Any,
    ranges: tuple[ShapeRange, ...],
    save: Path | None,
    timeout_s: float,
) -> tuple[BuildResult, list[Finding]]:
    """Build the repaired graph; keeps it where that is wished and works."""
    onnx = load("onnx")
    # Beside the target, so that it can be moved there; sources may lie where nobody may write.
    with tempfile.TemporaryDirectory(dir=save.parent if save is not None else None) as folder:
        trial = Path(folder) / "model.onnx"
        is_large = model.ByteSize() > 1 << 30
        onnx.save(
            model, str(trial), save_as_external_data=is_large, location=f"{trial.name}.data"
        ) if is_large else onnx.save(model, str(trial))
        result = build(trial, library=LIBRARY, profile=ranges, timeout_s=timeout_s)
        refusals = explain(result)
        left = _telling(scan(model), refusals, is_built=result.is_built)
        if save is not None and result.is_built and not any(one.is_fatal for one in left):
            for file in Path(folder).iterdir():
                os.replace(file, save if file == trial else save.parent / file.name)
    return result, left


def _opened(path: Path) -> Any:
    onnx = load("onnx")
    try:
        return onnx.load(str(path))
    except Exception as exc:  # protobuf's errors and the checker's have no common base
        raise ConversionError(
            f"{path} cannot be read as an ONNX model ({exc})",
            fix="Give an .onnx file, or the folder of a bundle",
        ) from exc


def require_library() -> None:
    """Refuse to go on where the gate cannot ask anybody.

    Raises:
        ConversionError: There is no TensorRT RTX for the interpreter that would be asked.
    """
    result = build(Path(os.devnull), library=LIBRARY, timeout_s=120.0)
    if result.stage == "library":
        words = "; ".join(error.text for error in result.errors)
        raise ConversionError(
            f"TensorRT cannot be asked: {find_interpreter()} has no tensorrt_rtx ({words})",
            fix="Install it into an environment of its own (pip install tensorrt-rtx), read its "
            "licence, and set NEARFAR_TENSORRT_PYTHON to that environment's python; or leave "
            "--check-tensorrt out",
        )
