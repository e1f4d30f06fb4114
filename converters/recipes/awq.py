"""INT4 by AWQ in a conversion: its environment is made before minutes of work."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from converters.awq.calibrate import calibrate, round_scaled
from converters.awq.environment import Interpreter, ready, stated_versions
from converters.recipes.base import Workshop
from converters.reporting import Step
from converters.settings import Int4Settings
from converters.steps.genai_build import build_genai
from nearfar.bundle.manifest import Lineage


@dataclass(frozen=True, slots=True)
class Calibrator:
    """What finds AWQ's scales.

    Attributes:
        versions: Of the packages in its environment.
        interpreter: `None` where the result is in the cache.
    """

    versions: dict[str, str]
    interpreter: Interpreter | None


def versions_of(ids: tuple[str, ...], int4: Int4Settings) -> dict[str, str]:
    """Packages that ``int4`` depends on beside those of this environment; none without AWQ."""
    if "int4" not in ids or int4.algorithm != "awq" or int4.awq.scales == "none":
        return {}
    return stated_versions()


def calibrator(versions: dict[str, str], shop: Workshop, *, is_cached: bool) -> Calibrator | None:
    """AWQ's environment, before minutes of work; `None` where it is not used.

    Args:
        versions: From `versions_of`.
        shop: Where and how.
        is_cached: Whether the result is there already.

    Raises:
        ConversionError: It is not there and cannot be made.
    """
    if not versions:
        return None
    found = None if is_cached else ready(shop.options.cache, shop.reporter)
    return Calibrator(versions, found)


def with_modelopt(lineage: Lineage, awq: Calibrator | None) -> Lineage:
    """Its torch and transformers are other ones than ours; modelopt's version stands for them."""
    if awq is None:
        return lineage
    modelopt = {"nvidia-modelopt": awq.versions["nvidia-modelopt"]}
    return structs.replace(lineage, tools={**lineage.tools, **modelopt})


def make_scaled(
    awq: Calibrator, folder: Path, target: Path, int4: Int4Settings, shop: Workshop, step: Step
) -> str:
    """Write ``int4``: find scales, fold them into the weights, check that, build, and round.

    Args:
        awq: From `calibrator`.
        folder: The model as a Hugging Face folder in FP32.
        target: Folder to make.
        int4: How.
        shop: Where.
        step: Told what is being done.

    Returns:
        What there is to say about it.

    Raises:
        ConversionError: modelopt fails, or its scales change what the model says.
    """
    interpreter = awq.interpreter or ready(shop.options.cache, shop.reporter)
    model, full = shop.work / "scaled-hf", shop.work / "scaled"
    limit = shop.settings.gates.max_logit_error
    done = calibrate(folder, model, interpreter, int4, max_error=limit, step=step)
    step.tell("build")
    build_genai(model, {"fp32": full}, shop.work, int4.algorithm)
    shutil.rmtree(model)
    rounded = round_scaled(full, target, int4)
    shutil.rmtree(full)
    return (
        f"{rounded.carried} matrices in 4 bits, AWQ scaled {done.scaled} of "
        f"{done.scaled + done.unscaled}, logits differ by {done.max_error:.2g} before rounding"
    )
