"""Which layers of a variant err, found where it differs from its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from converters.cache import digest_of_arrays, digest_of_path
from converters.recipes.base import Workshop
from converters.report.evidence import LayerErrors
from converters.report.words import damage_of, mending_of, method_of
from converters.steps.apart import run_apart
from converters.steps.layer_errors import Comparison, layer_errors
from nearfar.errors import ConversionError, NearfarError

_TOOLS = ("onnx", "onnxruntime", "numpy")
#: Larger models are compared in a process of their own, which gives its memory back.
_APART_BYTES = 256 << 20

Blame = Callable[[], LayerErrors | None]


def blame_layers(
    shop: Workshop,
    variant_id: str,
    reference: Path,
    variant: Path,
    feeds: Callable[[], Sequence[Mapping[str, np.ndarray]]],
) -> LayerErrors | None:
    """Compare a variant with its reference layer by layer, for the report and for a line of text.

    Args:
        shop: Where and how; the finding is added to its evidence.
        variant_id: Its id.
        reference: The graph it was made of.
        variant: Its graph.
        feeds: Makes inputs of one call each; best not those that the variant is judged on.

    Returns:
        What was found; `None` where the graphs cannot be compared.
    """
    with shop.reporter.step(f"find the layers where {variant_id} errs") as step:
        given = feeds()

        def compare() -> Comparison:
            arguments = (reference, variant, given, shop.work)
            is_large = sum(f.stat().st_size for f in reference.parent.glob("*")) > _APART_BYTES
            return run_apart(layer_errors, *arguments) if is_large else layer_errors(*arguments)

        try:
            parts = {
                "reference": digest_of_path(reference),
                "variant": digest_of_path(variant.parent),
                "feeds": digest_of_arrays(given),
            }
            found = shop.cache.value("layer-errors", parts, Comparison, compare, tools=_TOOLS)
        except NearfarError as exc:
            # The verdict stands without it; what is wrong with the graphs is told where they run.
            step.note(f"they cannot be compared ({exc})")
            return None
        if not found.layers:
            step.note("they have no layers in common")
            return None
        errors = LayerErrors(
            variant_id=variant_id,
            method=method_of(variant_id, shop.settings_found),
            kind="inside",
            errors=found.layers,
            error=found.error,
        )
        shop.evidence.layers.append(errors)
        step.note(damage_of(errors))
    return errors


@contextmanager
def explained(variant_id: str, blame: Blame) -> Iterator[None]:
    """Have an error that says a variant is another model name the layers too.

    Raises:
        ConversionError: The same, with the layers.
    """
    try:
        yield
    except ConversionError as exc:
        found = blame()
        if found is None:
            raise
        fixes = [mending_of(found, variant_id), exc.fix or ""]
        raise ConversionError(
            f"{exc.problem}; {damage_of(found)}",
            fix=", or: ".join(_capital(fix) for fix in fixes if fix),
        ) from exc


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
