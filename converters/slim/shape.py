"""How large a transformer is, and what of it a recipe takes away: decided before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from converters.options import ConversionOptions
from converters.settings import SlimSettings
from converters.sources.base import Source
from nearfar.errors import ConfigError

#: Two blocks of 32 weights.
_PAIR = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of a layer are, as transformers names them.

    Attributes:
        layers: Path of the list of layers in the model.
        inner_in: Matrices with a row for each MLP channel, in a layer.
        inner_out: The one with a column for each.
        inner_key: What the configuration calls their number.
        queries: Matrix with rows for each attention head; "" where heads cannot go.
        keys: Matrices with rows for each key-value head.
        heads_out: The one with columns for each attention head.
    """

    layers: str
    inner_in: tuple[str, ...]
    inner_out: str
    inner_key: str = "intermediate_size"
    queries: str = ""
    keys: tuple[str, ...] = ()
    heads_out: str = ""


_DECODER = Layout(
    layers="model.layers",
    inner_in=("mlp.gate_proj", "mlp.up_proj"),
    inner_out="mlp.down_proj",
    queries="self_attn.q_proj",
    keys=("self_attn.k_proj", "self_attn.v_proj"),
    heads_out="self_attn.o_proj",
)
# The width of a head is hidden_size / num_attention_heads here, so that fewer heads would be wider
# ones: no configuration says that some are missing.
_ENCODER = Layout(
    layers="encoder.layer", inner_in=("intermediate.dense",), inner_out="output.dense"
)
_DISTILBERT = Layout(
    layers="transformer.layer", inner_in=("ffn.lin1",), inner_out="ffn.lin2", inner_key="hidden_dim"
)
#: By `model_type`. What has another form inside (fused projections, experts) is refused by name.
LAYOUTS: Mapping[str, Layout] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _DECODER),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "mpnet"), _ENCODER),
    "distilbert": _DISTILBERT,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes that slicing changes.

    Attributes:
        layers: How many.
        heads: Attention heads of a layer.
        groups: Key-value heads; as many attention heads share one.
        inner: MLP channels of a layer.
        head_width: Numbers that a head says; does not change.
    """

    layers: int
    heads: int
    groups: int
    inner: int
    head_width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What is to be left.

    Attributes:
        before: The whole model.
        after: The sliced one.
        dropped: Layers that go, counted from 0; empty leaves the choice to their influence.
    """

    before: Shape
    after: Shape
    dropped: tuple[int, ...] = ()

    @property
    def share(self) -> float:
        """About the share of the layers' weights that is left, attention counted as a third."""
        heads, inner = self.after.heads / self.before.heads, self.after.inner / self.before.inner
        return self.after.layers / self.before.layers * (heads / 3 + inner * 2 / 3)


def layout_of(model_type: str) -> Layout:
    """The names of a kind of model.

    Raises:
        ConfigError: It is not known.
    """
    if model_type not in LAYOUTS:
        raise ConfigError(
            f"Models of the type {model_type!r} cannot be sliced",
            field="slim",
            fix=f"Leave slim out; sliced can be: {', '.join(LAYOUTS)}",
        )
    return LAYOUTS[model_type]


def shape_of(config: Mapping[str, Any], layout: Layout) -> Shape:
    """Sizes by a ``config.json`` of transformers."""
    layers = config.get("num_hidden_layers", config.get("n_layers"))
    heads = config.get("num_attention_heads", config.get("n_heads"))
    inner = config.get(layout.inner_key)
    if not all(isinstance(size, int) and size > 0 for size in (layers, heads, inner)):
        raise ConfigError(
            "The model's config.json does not say how many layers, heads and MLP channels it has",
            field="slim",
            fix="Correct the file, or leave slim out",
        )
    assert isinstance(layers, int)
    assert isinstance(heads, int)
    assert isinstance(inner, int)
    groups = config.get("num_key_value_heads") or heads
    width = config.get("head_dim") or int(config.get("hidden_size", config.get("dim", 0))) // heads
    return Shape(layers=layers, heads=heads, groups=int(groups), inner=inner, head_width=int(width))


def plan_cut(source: Source, settings: SlimSettings) -> Cut:
    """What slicing a source would leave; only its header is looked at.

    Raises:
        ConfigError: The source is no transformer that can be sliced, or a setting does not fit it;
            names the setting.
    """
    from converters.sources.gguf import GgufSource
    from converters.sources.huggingface import HuggingFaceSource

    if isinstance(source, GgufSource):
        layout = layout_of(source.architecture)
        return cut_of(_gguf_shape(source), layout, settings)
    if not isinstance(source, HuggingFaceSource):
        raise ConfigError(
            f"{source.path} is not a transformer whose layers are known, so it cannot be sliced",
            field="slim",
            fix="Give a Hugging Face folder, a GGUF file or a PyTorch module, or leave slim out",
        )
    if source.task == "classification":
        raise ConfigError(
            f"{source.path} is a classifier, and sliced are language models and sentence encoders",
            field="slim",
            fix="Leave slim out; classifiers get smaller by --variants int8",
        )
    layout = layout_of(str(source.config.get("model_type")))
    return cut_of(shape_of(source.config, layout), layout, settings)


def check_slim(source: Source, options: ConversionOptions) -> Cut | None:
    """Refuse slicing that cannot be, before anything is done; `None` where none is wished.

    Raises:
        ConfigError: See `plan_cut`; or a variant is wished that is not made of sliced models.
    """
    from converters.slim.module import check_module
    from converters.sources.torch_module import TorchSource

    settings = options.settings.slim
    if not settings.is_wished:
        return None
    if isinstance(source, TorchSource):
        check_module(source, settings)
        if options.settings.prune.ratio:
            raise ConfigError(
                "A module is pruned or sliced, not both at once",
                field="slim",
                fix="Leave one of --prune and --drop-layers, --keep-mlp out",
            )
        return None
    plain = [one for one in options.variants or () if one.startswith("onnx-")]
    if plain:
        raise ConfigError(
            f"variants wishes for {', '.join(plain)}, and slim for a sliced model: plain graphs "
            "with a KV cache are made of whole models",
            field="variants",
            fix="Leave them out or leave slim out; or slice first, with --keep-work, and convert "
            "the folder slim in the kept work",
        )
    cut = plan_cut(source, settings)
    if "int4" in (options.variants or ("int4",)) and _is_text(source):
        _check_pairs(cut, options.settings.int4.algorithm)
    return cut


def _is_text(source: Source) -> bool:
    from converters.sources.huggingface import HuggingFaceSource

    return not isinstance(source, HuggingFaceSource) or source.task == "text-generation"


def _check_pairs(cut: Cut, algorithm: str) -> None:
    """Refuse widths that blocks of 4 bits with minima cannot have.

    ONNX Runtime's quantizer packs two minima of a row into a byte, so that a row needs an even
    number of blocks.
    """
    if algorithm == "rtn":  # has no minima
        return
    before, after = cut.before, cut.after
    heads = before.heads * before.head_width, after.heads * after.head_width
    for name, (whole, left), what, fix in (
        ("slim.keep_mlp", (before.inner, after.inner), "MLP channels",
         f"Make slim.round_to {_PAIR}"),
        ("slim.keep_heads", heads, "numbers of all heads", "Keep another number of heads"),
    ):  # fmt: skip
        if left != whole and left % _PAIR:
            raise ConfigError(
                f"{left} {what} are no multiple of {_PAIR}, which int4 wants with {algorithm!r}",
                field=name,
                fix=f"{fix}, or leave int4 out (variants)",
            )


def cut_of(before: Shape, layout: Layout, settings: SlimSettings) -> Cut:
    """See `plan_cut`."""
    dropped: tuple[int, ...] = ()
    count = settings.drop_layers
    if not isinstance(count, int):
        dropped = tuple(sorted(set(count)))
        if dropped and dropped[-1] >= before.layers:
            raise ConfigError(
                f"The model has no layer {dropped[-1]}: they are counted from 0 to "
                f"{before.layers - 1}",
                field="slim.drop_layers",
                fix="Name layers that it has, or how many shall go",
            )
        count = len(dropped)
    if count >= before.layers:
        raise ConfigError(
            f"Of {before.layers} layers {count} cannot go",
            field="slim.drop_layers",
            fix=f"Use at most {before.layers - 1}, better a tenth to a third of them",
        )
    heads = _heads(before, layout, settings)
    after = replace(
        before,
        layers=before.layers - count,
        heads=heads,
        groups=heads * before.groups // before.heads,
        inner=_inner(before, settings),
    )
    return Cut(before=before, after=after, dropped=dropped)


def _heads(before: Shape, layout: Layout, settings: SlimSettings) -> int:
    keep = settings.keep_heads
    if keep is None or keep == before.heads:
        return before.heads
    if not layout.queries:
        raise ConfigError(
            "Heads of this architecture cannot go: they share the hidden size evenly, and no "
            "configuration says that some are missing",
            field="slim.keep_heads",
            fix="Leave it out; drop layers (slim.drop_layers) or MLP channels (slim.keep_mlp)",
        )
    together = before.heads // before.groups
    if keep > before.heads or keep % together:
        possible = ", ".join(str(n * together) for n in range(1, before.groups + 1))
        raise ConfigError(
            f"Of {before.heads} heads {keep} cannot stay: {together} share one key-value head, and "
            "go together",
            field="slim.keep_heads",
            fix=f"Use one of {possible}",
        )
    return keep


def _inner(before: Shape, settings: SlimSettings) -> int:
    if settings.keep_mlp == 1:
        return before.inner
    step = settings.round_to
    kept = round(before.inner * settings.keep_mlp / step) * step
    if not 0 < kept <= before.inner:
        raise ConfigError(
            f"{settings.keep_mlp:.0%} of {before.inner} MLP channels is no multiple of {step} "
            f"between {step} and {before.inner}",
            field="slim.keep_mlp",
            fix="Raise it, or lower slim.round_to",
        )
    return kept


def _gguf_shape(source: Any) -> Shape:
    def number(key: str) -> int:
        field = source.reader.fields.get(f"{source.architecture}.{key}")
        value = field.contents() if field is not None else None
        return value if isinstance(value, int) else 0

    shape = Shape(
        layers=number("block_count"),
        heads=number("attention.head_count"),
        groups=number("attention.head_count_kv") or number("attention.head_count"),
        inner=number("feed_forward_length"),
        head_width=number("attention.key_length")
        or number("embedding_length") // max(1, number("attention.head_count")),
    )
    if not (shape.layers and shape.heads and shape.inner):
        raise ConfigError(
            f"{source.path} does not say how many layers, heads and MLP channels it has, one "
            "number for all layers",
            field="slim",
            fix="Leave slim out",
        )
    return shape
