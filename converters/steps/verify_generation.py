"""Compare language-model variants with their source and with each other, on real English text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters import texts
from converters.libraries import load
from converters.settings import Gates
from converters.sources.huggingface import read_json
from converters.steps.genai_build import CONFIG as GENAI_CONFIG
from converters.steps.onnx_session import check_finite, open_session, run
from nearfar.bundle.manifest import QualityFigure
from nearfar.engines.cached_graph import GRAPH, read_config
from nearfar.errors import ConversionError

WINDOWS = 6
WINDOW_TOKENS = 256
#: Windows that are run through the source as well; its logits stay in memory meanwhile.
SOURCE_WINDOWS = 1
GREEDY_TOKENS = 24
#: Variants that differ from the source by float rounding only.
_EXACT = ("fp32", "onnx-fp32")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLogits:
    """What the source says about the first windows.

    Attributes:
        name: What the source is called in the manifest.
        logits: float32, shape (windows, tokens, vocabulary).
    """

    name: str
    logits: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicedTruth:
    """What variants of a sliced model are held against.

    Attributes:
        logits: What the sliced model says about the first windows: its export must say the same.
        whole_perplexity: Of the whole model, on all windows.
    """

    logits: SourceLogits
    whole_perplexity: float


class CachedLogits:
    """All logits of a token sequence, from a graph with a KV cache: onnxruntime-genai's or plain.

    Args:
        folder: With ``model.onnx``.
    """

    def __init__(self, folder: Path) -> None:
        self._name = folder.name
        self._session = open_session(folder / GRAPH)
        self._cache = _empty_cache(
            folder,
            {
                argument.name: (
                    np.dtype(np.float16 if "float16" in argument.type else np.float32),
                    argument.shape,
                )
                for argument in self._session.get_inputs()
            },
        )

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """float32 logits of shape (len(tokens), vocabulary)."""
        feeds = {**_token_inputs(tokens), **self._cache}
        logits: np.ndarray = run(self._session, feeds, name=self._name)["logits"][0]
        return logits.astype(np.float32)


def first_call(folder: Path, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of a call that begins a text, for a graph with a KV cache."""
    onnx = load("onnx")
    inputs = {}
    for value in onnx.load(str(folder / GRAPH), load_external_data=False).graph.input:
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        inputs[value.name] = dtype, [dimension.dim_value for dimension in kind.shape.dim]
    return {**_token_inputs(tokens), **_empty_cache(folder, inputs)}


def _token_inputs(tokens: np.ndarray) -> dict[str, np.ndarray]:
    row = np.asarray(tokens, dtype=np.int64)[None, :]
    return {
        "input_ids": row,
        "attention_mask": np.ones_like(row),
        "position_ids": np.arange(row.shape[1], dtype=np.int64)[None, :],
    }


def _empty_cache(
    folder: Path, inputs: Mapping[str, tuple[np.dtype[Any], Sequence[Any]]]
) -> dict[str, np.ndarray]:
    """Keys and values of nothing, by input; genai's graphs do not state their shape."""
    sizes: tuple[int, int] | None = None
    if (folder / GENAI_CONFIG).is_file():
        decoder = read_json(folder / GENAI_CONFIG)["model"]["decoder"]
        sizes = decoder["num_key_value_heads"], decoder["head_size"]
    cache = {}
    for name, (dtype, shape) in inputs.items():
        if name not in ("input_ids", "attention_mask", "position_ids"):
            heads, width = sizes or (shape[1], shape[3])
            cache[name] = np.zeros((1, heads, 0, width), dtype)
    return cache


def windows(tokenizer: Path, vocabulary_size: int) -> np.ndarray:
    """Real text as token windows, int64 of shape (WINDOWS, WINDOW_TOKENS).

    Raises:
        ConversionError: The tokenizer makes tokens the model does not have.
    """
    tokenizers = load("tokenizers")
    encoder = tokenizers.Tokenizer.from_file(str(tokenizer))
    encoder.no_truncation()
    ids = encoder.encode(texts.prose(), add_special_tokens=False).ids
    count = WINDOWS * WINDOW_TOKENS
    if not ids or max(ids) >= vocabulary_size:
        raise ConversionError(
            f"The tokenizer makes token {max(ids, default=0)}, the model knows {vocabulary_size}",
            fix="The tokenizer belongs to another model; use the matching one",
        )
    return np.array((ids * (count // len(ids) + 1))[:count]).reshape(WINDOWS, WINDOW_TOKENS)


def source_logits(model: Any, token_windows: np.ndarray, name: str) -> SourceLogits:
    """Logits of a transformers model for the first windows."""
    torch = load("torch")
    with torch.no_grad():
        rows = [
            model(torch.from_numpy(window[None, :])).logits[0].float().numpy()
            for window in token_windows[:SOURCE_WINDOWS]
        ]
    logits = np.stack(rows) if len(rows) > 1 else rows[0][None]
    check_finite(logits, f"the output of {name}")
    return SourceLogits(name=name, logits=logits)


def source_perplexity(model: Any, token_windows: np.ndarray) -> float:
    """Perplexity of a transformers model, as `verify_generation` measures it of variants."""
    torch = load("torch")
    losses = []
    with torch.no_grad():
        for window in token_windows:
            logits = model(torch.from_numpy(window[None, :]), use_cache=False).logits[0]
            losses.append(_losses(logits.float().numpy(), window))
    return float(np.exp(np.mean(losses)))


def verify_generation(
    folders: dict[str, Path],
    token_windows: np.ndarray,
    source: SourceLogits,
    gates: Gates,
    *,
    sliced: SlicedTruth | None = None,
) -> dict[str, tuple[QualityFigure, ...]]:
    """Measure all variants.

    Args:
        folders: Variant id to folder, the reference (best) variant first.
        token_windows: From `windows`.
        source: From `source_logits`.
        gates: What variants must reach.
        sliced: Where variants are made of a sliced model: what they are held against beside.

    Returns:
        Variant id to figures.

    Raises:
        ConversionError: A variant is not what it should be: NaN, or far from its reference.
    """
    reference_id = next(iter(folders))
    figures: dict[str, tuple[QualityFigure, ...]] = {}
    best_tokens: list[np.ndarray] = []
    reference_perplexity = sliced.whole_perplexity if sliced is not None else 0.0
    exports = dict.fromkeys(_EXACT, source)
    if sliced is not None:
        exports["slim"] = sliced.logits
    greedy: list[tuple[int, list[int]]] = []
    for variant_id, folder in folders.items():
        if variant_id == reference_id and len(folders) > 1:
            # Before the model is opened a second time: the reference is the largest.
            greedy = _greedy_answers(folder)
        model = CachedLogits(folder)
        losses, top_tokens, errors = [], [], []
        for position, window in enumerate(token_windows):
            logits = model(window)
            losses.append(_losses(logits, window))
            top_tokens.append(logits.argmax(axis=-1))
            truth = exports.get(variant_id)
            if truth is not None and position < len(truth.logits):
                errors.append(float(np.abs(logits - truth.logits[position]).max()))
        perplexity = float(np.exp(np.mean(losses)))
        scored = int(np.size(losses))
        found = [_figure("perplexity", perplexity, scored, source.name, higher=False)]
        if variant_id in exports:
            worst, truth = max(errors), exports[variant_id]
            _gate(worst <= gates.max_logit_error, f"{variant_id}: logits differ by {worst:.3g}")
            count = truth.logits.shape[0] * truth.logits.shape[1]
            found.append(_figure("logit_max_abs_error", worst, count, truth.name, higher=False))
        if variant_id == reference_id and (sliced is None or variant_id == "fp32"):
            reference_perplexity, best_tokens = perplexity, top_tokens
        else:
            whole = reference_id if sliced is None or reference_id == "fp32" else source.name
            _gate(
                perplexity <= gates.max_perplexity_ratio * reference_perplexity,
                f"{variant_id}: perplexity {perplexity:.4g}, {whole} has "
                f"{reference_perplexity:.4g}",
            )
        if variant_id == reference_id:
            best_tokens = top_tokens
        else:
            agreement = float(np.mean([a == b for a, b in zip(top_tokens, best_tokens)]))  # noqa: B905
            found[0] = _figure("perplexity", perplexity, scored, reference_id, higher=False)
            found.append(
                _figure("top1_agreement", agreement, token_windows.size, reference_id, higher=True)
            )
            found.append(_greedy_agreement(model, greedy, reference_id))
        figures[variant_id] = tuple(found)
        del model
    return figures


def _losses(logits: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each next token, in nats."""
    losses = np.empty(len(window) - 1)
    for position in range(len(losses)):  # one at a time: all in float64 are large
        scores = logits[position].astype(np.float64)
        top = scores.max()
        total = top + np.log(np.exp(scores - top).sum())
        losses[position] = total - scores[window[position + 1]]
    return losses


def _greedy_answers(folder: Path) -> list[tuple[int, list[int]]]:
    """For each prompt: its length and the prompt with the reference's greedy answer."""
    return _genai_answers(folder) if (folder / GENAI_CONFIG).is_file() else _plain_answers(folder)


def _plain_answers(folder: Path) -> list[tuple[int, list[int]]]:
    from nearfar.engines.cached_engine import CachedDecoding, CachedModel
    from nearfar.engines.sampling import Sampler
    from nearfar.generation import GenerationOptions

    tokenizer = load("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = CachedModel(open_session(folder / GRAPH), label=folder.name)
    ends = read_config(folder).end_tokens
    answers = []
    for prompt in texts.PROMPTS:
        tokens: list[int] = tokenizer.encode(prompt).ids
        decoding = CachedDecoding(model, Sampler(GenerationOptions()))
        decoding.append_tokens(tokens)
        whole = list(tokens)
        for _ in range(GREEDY_TOKENS):
            decoding.generate_next_token()
            whole += decoding.get_next_tokens()
            if whole[-1] in ends:
                break
        answers.append((len(tokens), whole))
    return answers


def _genai_answers(folder: Path) -> list[tuple[int, list[int]]]:
    og = load("onnxruntime_genai")
    tokenizers = load("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    try:
        model = og.Model(str(folder))
        answers = []
        for prompt in texts.PROMPTS:
            tokens: list[int] = tokenizer.encode(prompt).ids
            parameters = og.GeneratorParams(model)
            parameters.set_search_options(max_length=len(tokens) + GREEDY_TOKENS, do_sample=False)
            generator = og.Generator(model, parameters)
            generator.append_tokens(tokens)
            while not generator.is_done():
                generator.generate_next_token()
            answers.append((len(tokens), [int(token) for token in generator.get_sequence(0)]))
            del generator
    except (RuntimeError, ValueError, TypeError) as exc:  # what its C++ exceptions become
        raise ConversionError(
            f"onnxruntime-genai cannot run the converted model ({exc})",
            fix="Use the version of onnxruntime-genai that nearfar asks for",
        ) from exc
    return answers


def _greedy_agreement(
    model: CachedLogits, answers: Sequence[tuple[int, list[int]]], reference_id: str
) -> QualityFigure:
    """Share of the reference's greedy answer that this variant would have chosen as well."""
    same = total = 0
    for prompt_tokens, sequence in answers:
        choices = model(np.array(sequence[:-1])).argmax(axis=-1)[prompt_tokens - 1 :]
        expected = np.array(sequence[prompt_tokens:])
        same += int((choices == expected).sum())
        total += len(expected)
    return _figure("greedy_token_agreement", same / max(1, total), total, reference_id, higher=True)


def _figure(
    metric: str, value: float, samples: int, reference: str, *, higher: bool
) -> QualityFigure:
    return QualityFigure(
        metric=metric,
        value=value,
        higher_is_better=higher,
        samples=samples,
        reference=reference,
    )


def _gate(is_fine: bool, problem: str) -> None:
    if not is_fine:
        raise ConversionError(
            f"The converted model is not the same model: {problem}",
            fix="Leave this variant out with --variants, or use another version of the tools",
        )
