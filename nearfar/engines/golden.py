"""Golden inputs and outputs: does a variant compute here what it computed where it was made?

Tensors: every variant's outputs are held against those of the bundle's best variant, and may be
farther from them than they were at the converter's by a margin for other kernels. Text: every
variant continues a few prompts greedily, and is held against its own answer of then; roundings of
other kernels may turn an answer at some token, so a beginning in common is what is asked for.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import msgspec
import numpy as np

from nearfar.engines.base import SessionOptions
from nearfar.errors import BundleError
from nearfar.generation import GenerationOptions, Prompt

if TYPE_CHECKING:
    from nearfar.bundle import Bundle

INPUTS, OUTPUTS = "golden/inputs.npz", "golden/outputs.npz"
PROMPTS, ANSWERS = "golden/prompts.json", "golden/answers.json"
#: Golden files are for checking, not for testing quality: they shall not weigh.
MAX_GOLDEN_BYTES = 4 << 20
ANSWER_TOKENS = 16

#: Other CPUs add in another order: FP32 differs by 1e-6, INT8 by single steps of its scales. A
#: CPU that saturates is off by ten percent and more.
_MARGIN, _FACTOR = 0.02, 2.0
_LEAST_IN_COMMON = 0.25

Case = dict[str, np.ndarray]
_T = TypeVar("_T")


class GoldenResult(msgspec.Struct, frozen=True, kw_only=True):
    """How one variant did.

    Attributes:
        variant_id: Which.
        cases: How many inputs were run.
        difference: Tensors: relative error against the reference's outputs. Text: share of the
            answers that is another one.
        allowed: How much that may be.
    """

    variant_id: str
    cases: int
    difference: float
    allowed: float

    @property
    def is_good(self) -> bool:
        """Whether the variant can be trusted here."""
        return self.difference <= self.allowed


def check_golden(bundle: Bundle, variant_id: str) -> GoldenResult:
    """Run the golden inputs of a bundle through one variant.

    Raises:
        BundleError: The bundle has no golden data, or it is damaged.
        EngineError: The variant does not run here.
    """
    golden = bundle.manifest.golden
    if golden is None:
        raise BundleError(
            f"Bundle {bundle.path} has no golden inputs", fix="Convert the model again"
        )
    if golden.inputs.endswith(".json"):
        prompts = _read_json(bundle, golden.inputs, list[str])
        answers = _read_json(bundle, golden.outputs, dict[str, list[str]]).get(variant_id)
        if answers is None or len(answers) != len(prompts):
            raise _damaged(bundle, golden.outputs, f"no answers of {variant_id}")
        found = run_prompts(bundle, variant_id, prompts)
        same = [_in_common(one, other) for one, other in zip(found, answers)]  # noqa: B905
        return GoldenResult(
            variant_id=variant_id,
            cases=len(prompts),
            difference=1.0 - float(np.mean(same)),
            allowed=1.0 - _LEAST_IN_COMMON,
        )
    cases, expected = _read_npz(bundle, golden.inputs), _read_npz(bundle, golden.outputs)
    if not cases or len(cases) != len(expected):
        raise _damaged(bundle, golden.outputs, f"{len(expected)} cases for {len(cases)} inputs")
    difference = relative_error(run_cases(bundle, variant_id, cases), expected)
    then = golden.relative_error.get(variant_id)
    if then is None:
        raise BundleError(
            f"Bundle {bundle.path} does not say how {variant_id} does on the golden inputs: it did "
            "not run where the bundle was made",
            fix="Convert the model on a machine that runs it",
        )
    return GoldenResult(
        variant_id=variant_id,
        cases=len(cases),
        difference=difference,
        allowed=_FACTOR * then + _MARGIN,
    )


def is_known(bundle: Bundle, variant_id: str) -> bool:
    """Whether it was recorded how the variant does on the golden inputs.

    Raises:
        BundleError: The recorded answers are damaged.
    """
    golden = bundle.manifest.golden
    if golden is None:
        return False
    if golden.inputs.endswith(".json"):
        return variant_id in _read_json(bundle, golden.outputs, dict[str, list[str]])
    return variant_id in golden.relative_error


def run_cases(bundle: Bundle, variant_id: str, cases: Sequence[Case]) -> list[Case]:
    """Outputs of one variant, as it is served here."""
    from nearfar.engines.model import LoadedModel

    model = LoadedModel(bundle, variant_id, _options())
    try:
        return [model.infer(feeds) for feeds in cases]
    finally:
        model.close()


def run_prompts(bundle: Bundle, variant_id: str, prompts: Sequence[str]) -> list[str]:
    """Greedy answers of one variant, `ANSWER_TOKENS` long at most."""
    from nearfar.engines.model import LoadedModel

    model = LoadedModel(bundle, variant_id, _options())
    options = GenerationOptions(max_new_tokens=ANSWER_TOKENS)
    try:
        return [
            "".join(chunk.text for chunk in model.generate(Prompt(text=prompt), options))
            for prompt in prompts
        ]
    finally:
        model.close()


def relative_error(found: Sequence[Case], expected: Sequence[Case]) -> float:
    """Root of the mean squared difference of all numbers, as a share of the expected ones' size."""
    lost = power = 0.0
    for one, other in zip(found, expected):  # noqa: B905
        for name, array in other.items():
            if array.dtype.kind not in "fiub":
                continue
            wide = array.astype(np.float64)
            here = one[name].astype(np.float64)
            if here.shape != wide.shape or not np.isfinite(here).all():
                return float(np.finfo(np.float64).max)
            lost += float(np.square(wide - here).sum())
            power += float(np.square(wide).sum())
    return float(np.sqrt(lost / power)) if power else float(lost > 0)


def to_npz(cases: Sequence[Case]) -> bytes:
    """The file of some cases: uncompressed, arrays named ``NUMBER/TENSOR``, always the same."""
    stream = io.BytesIO()
    arrays = {f"{place}/{name}": case[name] for place, case in enumerate(cases) for name in case}
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def _options() -> SessionOptions:
    return SessionOptions(execution_providers=("CPUExecutionProvider",), allow_spinning=False)


def _read_npz(bundle: Bundle, path: str) -> list[Case]:
    file = bundle.shared_file(path)
    try:
        if os.path.getsize(file) > MAX_GOLDEN_BYTES:
            raise ValueError(f"it has more than {MAX_GOLDEN_BYTES} bytes")
        with zipfile.ZipFile(file) as archive:
            # What is stored plainly cannot become larger than the file.
            if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
                raise ValueError("it is compressed")
        found: dict[int, Case] = {}
        with np.load(file, allow_pickle=False) as stored:
            for key in stored.files:
                number, _, name = key.partition("/")
                found.setdefault(int(number), {})[name] = stored[key]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as exc:
        raise _damaged(bundle, path, str(exc)) from exc
    return [found[number] for number in sorted(found)]


def _read_json(bundle: Bundle, path: str, kind: type[_T]) -> _T:
    data = bundle.shared_file(path).read_bytes()
    try:
        return msgspec.json.decode(data[:MAX_GOLDEN_BYTES], type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise _damaged(bundle, path, str(exc)) from exc


def _damaged(bundle: Bundle, path: str, why: str) -> BundleError:
    return BundleError(
        f"{path!r} of bundle {bundle.path} is not golden data ({why})",
        fix="Convert the model again",
    )


def _in_common(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    same = next(
        (place for place, (a, b) in enumerate(zip(one, other)) if a != b),  # noqa: B905
        min(len(one), len(other)),
    )
    return same / longest if longest else 1.0
