"""The numbers a conversion goes by. Defaults are measured ones; a recipe file may state others."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec

#: Matrices of a layer, as the model builder names them.
Matrix = Literal[
    "qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
]

_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Index = Annotated[int, msgspec.Meta(ge=0, le=10_000)]


class OptimiseSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is done to a graph before it is compressed.

    Attributes:
        fuse: Whether variants in 32 and 16 bits get ONNX Runtime's own operators (`Attention`,
            `SkipLayerNormalization`, `BiasGelu`); nothing else runs them. A session makes most of
            these when it loads a model: all-MiniLM-L6-v2 takes 1.04 times as long with them as
            without, which is noise.
        model_type: Whose graph it is like, as onnxruntime.transformers names them.
    """

    fuse: bool = False
    model_type: Literal["bert", "vit", "swin", "clip", "bart", "conformer"] = "bert"


class CalibrationSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How ``static`` INT8 finds the range of every activation, and what it is made for.

    Attributes:
        method: The range is the least and the greatest number seen (``minmax``), that which loses
            the least information (``entropy``, Kullback-Leibler), or that which holds `percentile`
            percent of all numbers.
        percentile: For that method.
        samples: How many inputs are run; they are never the ones that the variant is judged on.
        target: ``cpu``: unsigned activations with a zero point, biases in INT32. ``tensorrt``:
            signed and symmetric, biases left alone (`QuantizeBias=False`), as its parser wants.
    """

    method: Literal["minmax", "entropy", "percentile"] = "minmax"
    percentile: Annotated[float, msgspec.Meta(gt=50, le=100)] = 99.999
    samples: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 64
    target: Literal["cpu", "tensorrt"] = "cpu"


class Int8Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model becomes 8 bits.

    Attributes:
        method: ``weights``: weights in blocks (`MatMulNBits`), of convolutions with a scale for
            each channel; activations stay in float between the operators. ``dynamic``:
            activations are rounded too, with a range found in every call. ``static``: with a range
            found beforehand, on calibration data (QDQ).
        keep: Nodes of the graph that stay in full precision, by name.
        max_kept: How many nodes more may be kept to hold ``gates.max_quality_drop``: those whose
            rounding harms the output most, and as few as are needed.
        tables: Lookup tables of ``weights``: one scale for each ``row``, or one for the ``tensor``.
            all-MiniLM-L6-v2, ten nearest of 1,024 passages kept: 0.9735 and 0.9670.
        per_channel: ``dynamic`` and ``static``: one scale for each output channel of a weight.
        calibration: For ``static``.
        smooth: ``dynamic`` and ``static``: SmoothQuant's alpha; how much of what is hard to round
            moves from activations into the weights of products. `None` moves nothing.
        symmetric: ``weights``: whether blocks have no zero point.
        block_size: Weights of one block share a scale. Measured on all-MiniLM-L6-v2 with two
            AVX-512 VNNI cores: mean cosine to FP32, share of the ten nearest texts kept, median
            time for 64 tokens against FP32. Blocks of 32 in MatMul: 0.9995, 0.970, 83 %; blocks of
            128: 0.9991, 0.970, 64 %; one scale per channel (`quantize_dynamic`): 0.9937, 0.927,
            36 %; one per tensor: 0.954, 0.809, 35 %.
        accuracy_level: 4 rounds activations to 8 bits inside the kernel too, which is what makes
            it fast; 0 leaves that to ONNX Runtime.
    """

    method: Literal["weights", "dynamic", "static"] = "weights"
    keep: tuple[str, ...] = ()
    max_kept: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 8
    tables: Literal["row", "tensor"] = "row"
    per_channel: bool = True
    calibration: CalibrationSettings = CalibrationSettings()
    smooth: _Share | None = None
    symmetric: bool = True
    block_size: Literal[16, 32, 64, 128, 256] = 128
    accuracy_level: Literal[0, 1, 4] = 4


class AwqSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How ``awq`` finds its scales.

    Attributes:
        scales: ``search``: by AWQ, with nvidia-modelopt. ``none``: all are 1, which rounds to the
            nearest in the same form, to compare with.
        windows: How many texts of 512 tokens activations are looked at on; none of them is among
            those that perplexity is measured on.
    """

    scales: Literal["search", "none"] = "search"
    windows: Annotated[int, msgspec.Meta(ge=1, le=128)] = 4


class GptqSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How ``gptq`` chooses codes.

    Attributes:
        windows: How many texts of 512 tokens activations are looked at on; none of them is among
            those that perplexity is measured on.
        block_size: How many weights of a row share a scale and a zero point. Longer blocks are
            faster and smaller, and lose more.
        head_bits: Of the head, and of an embedding that shares its codes; 8 rounds them to the
            nearest in blocks of 32. SmolLM2-135M, 1,530 tokens, blocks of 64, perplexity and size:
            4 bits 19.30, 79 MB; 8 bits 18.53, 93 MB.
        damping: How much weight inputs get that the texts hardly ever use, as a share of what the
            others have.
    """

    windows: Annotated[int, msgspec.Meta(ge=1, le=128)] = 8
    block_size: Literal[32, 64] = 64
    head_bits: Literal[4, 8] = 4
    damping: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.01


class Int4Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How weights become 4 bits.

    Attributes:
        algorithm: Of language models; weights of others are rounded to the nearest (``auto``,
            ``rtn``). ``carry`` takes over the blocks of a GGUF file that is quantized already
            (Q4_0, Q4_1, Q4_K, Q8_0), so that nothing is lost a second time; matrices of other
            types get 8 bits. The others round, and are named as onnxruntime-genai's model builder
            names them: ``rtn`` to the nearest, ``k_quant`` with the best scale and zero point of
            each block, ``k_quant_last`` with the last matrix in 8 bits, ``k_quant_mixed`` with some
            layers in 8 bits too (Q4_K_M elsewhere). ``awq`` multiplies input channels by scales,
            found on real text, before it rounds to the nearest; head and embedding get 8 bits.
            ``gptq`` rounds one column after the other, and has later ones make up for what earlier
            ones lose on real text; the head too, whose codes a shared embedding reads. ``auto`` is
            ``carry`` where it is possible, else ``k_quant_mixed``.
        exact_minima: For ``carry``: matrices whose minima (Q4_1, Q4_K) are kept beyond the zero
            points, for a little time in every token.
        minima_digits: How exactly, in digits of four bits; see `converters.steps.gguf_blocks`.
            SmolLM2-135M, 1,530 tokens, perplexity and size: full precision 15.98, 544 MB; none
            19.65, 97 MB; one 16.09, 101 MB; two 16.04, 104 MB.
        block_size, symmetric, accuracy_level, keep, max_kept: As those of `Int8Settings`, of models
            that are no language models; tables and convolutions of these get 8 bits.
    """

    algorithm: Literal[
        "auto", "carry", "rtn", "k_quant", "k_quant_mixed", "k_quant_last", "awq", "gptq"
    ] = "auto"
    exact_minima: tuple[Matrix, ...] = get_args(Matrix)
    minima_digits: Annotated[int, msgspec.Meta(ge=0, le=3)] = 1
    block_size: Literal[16, 32, 64, 128, 256] = 32
    symmetric: bool = False
    accuracy_level: Literal[0, 1, 4] = 4
    keep: tuple[str, ...] = ()
    max_kept: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 8
    awq: AwqSettings = AwqSettings()
    gptq: GptqSettings = GptqSettings()


class PruneSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a PyTorch module is made narrower before it is exported.

    Attributes:
        ratio: Share of the channels or neurons of each layer that goes; 0 prunes nothing. Weights
            shrink by about the square of what is left.
        importance: What goes first: the group of weights of least ``magnitude``, or ``random`` ones
            to compare with.
        keep: Layers that stay as wide as they are, by their name in the module.
        round_to: Widths are made multiples of this, which some devices like.
        recovery_epochs: How often the training data is gone through afterwards.
        learning_rate: At the start of it; it falls to nothing (cosine).
        batch: Rows of one step.
    """

    ratio: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    importance: Literal["magnitude", "random"] = "magnitude"
    keep: tuple[str, ...] = ()
    round_to: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    recovery_epochs: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 20
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1)] = 2e-3
    batch: Annotated[int, msgspec.Meta(ge=1, le=65_536)] = 32


class SlimSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a transformer gets fewer layers, heads and MLP channels, and is trained afterwards.

    Attributes:
        drop_layers: How many layers go, those of least influence; or which, counted from 0.
        keep_heads: How many attention heads each layer keeps; with grouped queries whole groups.
            `None` keeps all.
        keep_mlp: Share of each layer's MLP channels that stays.
        round_to: Channels become a multiple of this. Blocks of 4 bits have 32 weights, and some
            ways to round want pairs of them.
        texts: How many texts importance is measured on.
        recovery_steps: Of training afterwards; 0: none.
        recovery_limit_s: It also ends after so many seconds, and then is not the same every time.
        learning_rate: The highest; it rises over the first steps and falls to nothing (cosine).
        batch: Texts or windows of one step.
        tokens: Longest text, or length of a window.
    """

    drop_layers: _Index | tuple[_Index, ...] = 0
    keep_heads: Annotated[int, msgspec.Meta(ge=1, le=4096)] | None = None
    keep_mlp: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    round_to: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 64
    texts: Annotated[int, msgspec.Meta(ge=8, le=100_000)] = 128
    recovery_steps: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 200
    recovery_limit_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1)] = 2e-4
    batch: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 8
    tokens: Annotated[int, msgspec.Meta(ge=8, le=8192)] = 128

    @property
    def is_wished(self) -> bool:
        """Whether anything goes."""
        return bool(self.drop_layers) or self.keep_heads is not None or self.keep_mlp < 1


class EmbeddingSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How vectors of sentence encoders become shorter.

    Attributes:
        dimensions: How many numbers are left; `None` leaves all.
        method: ``pca`` turns vectors so that the first numbers say most, for any model;
            ``truncate`` takes the first as they are, for models trained for it (Matryoshka).
        passages: How many texts ``pca`` looks at; none of them is judged on.
    """

    dimensions: Annotated[int, msgspec.Meta(ge=2, le=65_536)] | None = None
    method: Literal["pca", "truncate"] = "pca"
    passages: Annotated[int, msgspec.Meta(ge=32, le=100_000)] = 1024


class TensorrtSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Variants that devices build TensorRT engines of, and the gate without a GPU.

    Attributes:
        check: Whether TensorRT is asked about every graph (`--check-tensorrt`).
        axes: Smallest, usual and largest size of free axes, by the axis' name or ``INPUT.AXIS``.
            Not stated: 1, 4, 16 of the first; of others 1, that of a sample, four times that.
        fixed: Inputs of one number that always have this value; they are no inputs of the engine.
        rest: Precision of what ``trt-int8`` does not round.
        keep: Nodes that ``trt-int8`` leaves alone.
        workspace_bytes: Most scratch memory of one layer; 0 leaves it to TensorRT.
        optimization_level: How long the device may search for fast kernels.
    """

    check: bool = False
    axes: dict[str, tuple[int, int, int]] = {}
    fixed: dict[str, float] = {}
    rest: Literal["fp16", "fp32"] = "fp16"
    keep: tuple[str, ...] = ()
    workspace_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    optimization_level: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None


class Gates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a variant must reach.

    All but the first four are against absurd results: sound conversions are far inside.

    Attributes:
        max_quality_drop: How much worse than its reference a compressed variant may be, as a share;
            a worse one is left out of the bundle. Held against ``1 - top1_agreement`` of
            classifiers, ``1 - recall_at_10`` of sentence encoders, ``relative_error`` of plain
            tensors, and how much the perplexity of language models rises.
        max_size_bytes: Of a variant's files; a larger one is left out, full precision too.
        max_size_share: The same as a share of the model's weights in 32 bits.
        max_latency_ms: Median of a call on the converting machine (time to the first token, for
            language models); a slower variant is left out, full precision too.
        max_optimise_error: An optimised graph may differ from its source by float rounding only.
        min_top1_agreement: A variant that disagrees more often is not the same classifier.
        min_cosine_to_source: Exported sentence encoder against the source; sound: 1.0000.
        min_mean_cosine: Compressed sentence encoder against the best variant; sound: 0.999.
        max_logit_error: Exported language model against the source; sound: 0.002.
        max_perplexity_ratio: Compressed language model against the best variant; sound: 1.13.
    """

    max_quality_drop: _Share | None = None
    max_size_bytes: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_size_share: Annotated[float, msgspec.Meta(gt=0)] | None = None
    max_latency_ms: Annotated[float, msgspec.Meta(gt=0)] | None = None
    max_optimise_error: Annotated[float, msgspec.Meta(ge=0)] = 1e-4
    min_top1_agreement: _Share = 0.8
    min_cosine_to_source: _Share = 0.9999
    min_mean_cosine: _Share = 0.9
    max_logit_error: Annotated[float, msgspec.Meta(ge=0)] = 0.1
    max_perplexity_ratio: Annotated[float, msgspec.Meta(ge=1)] = 3.0

    def size_limit_bytes(self, full_bytes: int) -> int | None:
        """The lower of both limits of size, or `None` without one.

        Args:
            full_bytes: Size of the model's weights in 32 bits; 0 when that is not known.
        """
        limits = [self.max_size_bytes] if self.max_size_bytes is not None else []
        if self.max_size_share is not None and full_bytes:
            limits.append(int(self.max_size_share * full_bytes))
        return min(limits, default=None)


class Trial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way to make a variant, where a bundle holds several of one precision.

    Attributes:
        id: What the variant is called.
        variant: Its precision: the id that it has alone.
        int8, int4: How, in place of what `Settings` says.
        is_mixed: Whether sensitive nodes are looked for, to stay in full precision.
    """

    id: str
    variant: str
    int8: Int8Settings = Int8Settings()
    int4: Int4Settings = Int4Settings()
    is_mixed: bool = False


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of them.

    Attributes:
        seed: Of the random inputs that a model is verified with when nobody gave samples.
        passages: How many texts sentence encoders are verified on. With more of them the ten
            nearest are nearer to each other, and `recall_at_10` is lower.
    """

    seed: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)] = 20240607
    passages: Annotated[int, msgspec.Meta(ge=32, le=100_000)] = 128
    optimise: OptimiseSettings = OptimiseSettings()
    int8: Int8Settings = Int8Settings()
    int4: Int4Settings = Int4Settings()
    prune: PruneSettings = PruneSettings()
    slim: SlimSettings = SlimSettings()
    embedding: EmbeddingSettings = EmbeddingSettings()
    tensorrt: TensorrtSettings = TensorrtSettings()
    gates: Gates = Gates()
