"""The bundle manifest: what `manifest.json` says. Specification: docs/reference/bundle.md.

Fields are added only with defaults, so an old reader meets a new manifest without harm.
Unknown fields are ignored; an unknown `schema_version` is refused by the loader.
"""

from __future__ import annotations

from typing import Literal, Union

import msgspec

SCHEMA_VERSION = 1

Task = Literal["text-generation", "embedding", "classification", "tensor"]
EngineName = Literal["onnxruntime", "onnxruntime-genai", "tensorrt", "torch"]
Placement = Literal["edge", "cloud"]


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One input or output, in Open Inference Protocol terms.

    Attributes:
        name: Name of the tensor in the model's graph.
        datatype: ``BOOL UINT4 … INT64 FP16 BF16 FP32 FP64 BYTES``; see `nearfar.tensors`.
        shape: Sizes, with -1 where the size is free.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the bundle.

    Attributes:
        path: Relative POSIX path inside the bundle.
        size_bytes: Exact size.
        sha256: Lower-case hex digest.
    """

    path: str
    size_bytes: int
    sha256: str


class TextPreprocessing(msgspec.Struct, frozen=True, kw_only=True, tag="text", tag_field="kind"):
    """Text to `input_ids` / `attention_mask` (and `token_type_ids`) with a `tokenizers` file.

    Attributes:
        tokenizer: Path of ``tokenizer.json`` in the bundle (one of `Manifest.files`).
        max_length_tokens: Longer text is an error, or is cut when `truncate` is set.
        truncate: Whether the model was trained to see cut text (sentence embeddings are).
    """

    tokenizer: str
    max_length_tokens: int
    truncate: bool = True


class HeadTailPreprocessing(
    msgspec.Struct, frozen=True, kw_only=True, tag="head-tail", tag_field="kind"
):
    """Any bytes to a fixed row of integers: stripped head, then stripped tail (magika's scheme).

    Attributes:
        head_bytes: Integers taken from the start; right-padded with `padding_value`.
        tail_bytes: Integers taken from the end; left-padded with `padding_value`.
        block_bytes: How much of each end is looked at before white space is stripped.
        padding_value: Integer outside 0..255 that marks padding.
        min_bytes: Least number of bytes the stripped head must have; less says too little.
    """

    head_bytes: int
    tail_bytes: int
    block_bytes: int
    padding_value: int
    min_bytes: int = 0


class StreamRate(msgspec.Struct, frozen=True, kw_only=True):
    """How a signal of one rate is cut into windows.

    Attributes:
        sample_rate_hz: Samples in a second.
        window_samples: New samples of each call.
        context_samples: The last samples of the window before, put in front of the new ones; the
            first window has zeros there.
    """

    sample_rate_hz: int
    window_samples: int
    context_samples: int = 0


class StreamState(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that one call hands to the next.

    Attributes:
        input: Where it goes in; the first call is given zeros.
        output: Where it comes out.
        shape: Its sizes for one signal.
    """

    input: str
    output: str
    shape: tuple[int, ...]


class StreamPreprocessing(
    msgspec.Struct, frozen=True, kw_only=True, tag="stream", tag_field="kind"
):
    """A signal window by window, with state carried from call to call (silero-vad's scheme).

    Attributes:
        input: FP32 input with the samples, -1 to 1, of shape (1, context and window).
        rates: The rates that the model knows.
        states: What calls hand on.
        rate_input: INT64 input that is told the rate; `None` when there is none.
    """

    input: str
    rates: tuple[StreamRate, ...]
    states: tuple[StreamState, ...] = ()
    rate_input: str | None = None


class ImagePreprocessing(msgspec.Struct, frozen=True, kw_only=True, tag="image", tag_field="kind"):
    """An encoded image (JPEG, PNG, …) to FP32 pixels of shape (1, channels, height, width).

    A pixel becomes ``(value * scale - mean) / std``, for each channel.

    Attributes:
        input: Name of the input.
        resize: Height and width, whatever the image's; or one number: the length that its shorter
            side gets, the longer one in proportion.
        crop: Height and width that are cut out of the middle; `None` leaves all of it, which one
            number in `resize` does not allow.
        resample: Filter for resizing, as Pillow calls it.
        scale: What values of 0 to 255 are multiplied by.
        mean: Subtracted, one number for each channel.
        std: Divided by, likewise.
        channels: Order of the channels; ``L`` is grey.
    """

    input: str
    resize: tuple[int, ...]
    crop: tuple[int, int] | None = None
    resample: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bilinear"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    channels: Literal["RGB", "BGR", "L"] = "RGB"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width that the model is given."""
        height, width = self.crop or (self.resize[0], self.resize[-1])
        return len(self.channels), height, width


class AudioPreprocessing(msgspec.Struct, frozen=True, kw_only=True, tag="audio", tag_field="kind"):
    """A WAV file to FP32 samples of shape (1, samples), the mean of its channels.

    Attributes:
        input: Name of the input.
        sample_rate_hz: The rate that the file must have.
        normalize: Whether each file is given mean 0 and variance 1.
        min_samples: Shorter files are refused.
        max_samples: Longer files are refused.
    """

    input: str
    sample_rate_hz: int
    normalize: bool = False
    min_samples: int = 1
    max_samples: int = 1 << 20


Preprocessing = Union[
    TextPreprocessing,
    HeadTailPreprocessing,
    StreamPreprocessing,
    ImagePreprocessing,
    AudioPreprocessing,
]

#: Kinds whose raw input is a byte string.
BYTES_PREPROCESSING = (HeadTailPreprocessing, ImagePreprocessing, AudioPreprocessing)


class Requirements(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine must have to run a variant.

    Attributes:
        execution_provider: ONNX Runtime name, ``CPUExecutionProvider`` by default.
        sm_arch: CUDA compute capability such as ``87`` (Orin), when the files depend on it.
        tensorrt_version: Exact version, when the files depend on it.
        memory_bytes: Resident memory while loaded, as measured; 0 when not measured.
    """

    execution_provider: str = "CPUExecutionProvider"
    sm_arch: str | None = None
    tensorrt_version: str | None = None
    memory_bytes: int = 0


class QualityFigure(msgspec.Struct, frozen=True, kw_only=True):
    """One measured comparison with the reference.

    Attributes:
        metric: For example ``cosine_mean``, ``top1_agreement``, ``perplexity``, ``max_abs_error``.
        value: The figure.
        higher_is_better: Direction.
        samples: How many inputs (or tokens) it was measured on.
        reference: What it was compared with: a variant id or the source's name.
    """

    metric: str
    value: float
    higher_is_better: bool
    samples: int
    reference: str


class LatencyFigure(msgspec.Struct, frozen=True, kw_only=True):
    """Measured speed on one machine; seeds the router's predictions.

    Attributes:
        machine: CPU or GPU model and core count.
        execution_provider: Where it ran.
        p50_ms: Median of one call (batch 1); for text generation, time to first token.
        p99_ms: 99th percentile of the same.
        ms_per_token: For text generation: median time per output token after the first.
        calls: How many calls were timed.
        input_tokens: For text: how long the timed input was.
        rows_per_s: Throughput in calls of `batch_rows` rows; `None` for text generation.
        batch_rows: See there; 1 where the model takes no more.
        prefill_tokens_per_s: For text generation: tokens of the prompt by the time to the first one
            of the answer, over all timed prompts.
        decode_tokens_per_s: For text generation: tokens after the first by the time they took, over
            all timed answers.
    """

    machine: str
    execution_provider: str
    p50_ms: float
    p99_ms: float
    calls: int
    ms_per_token: float | None = None
    input_tokens: int | None = None
    rows_per_s: float | None = None
    batch_rows: int | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None


class ShapeRange(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of one input that a compiled engine must cover (a TensorRT optimization profile).

    Attributes:
        name: Input name.
        smallest: Least size of every axis.
        usual: The sizes to optimise for.
        largest: Greatest size of every axis.
    """

    name: str
    smallest: tuple[int, ...]
    usual: tuple[int, ...]
    largest: tuple[int, ...]


class TensorrtPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How a device builds its engine of a ``tensorrt`` variant, whose files hold typed ONNX.

    Attributes:
        profile: Sizes of every input with a free axis.
        fixed: Inputs of the manifest that the graph has no more, and the only value they may have.
        workspace_bytes: Most scratch memory of one layer; 0 leaves it to TensorRT.
        optimization_level: 0 to 5: how long TensorRT may search; `None` leaves it to TensorRT.
    """

    profile: tuple[ShapeRange, ...] = ()
    fixed: dict[str, float] = {}
    workspace_bytes: int = 0
    optimization_level: int | None = None


class TensorrtCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Whether TensorRT took a variant's graph, found out where there was no GPU.

    Attributes:
        library: What was asked, with its version: ``tensorrt_rtx 1.7.1.116``.
        accepted: Whether it built an engine, which was thrown away.
        findings: What it or the look at the graph found, each ``kind: problem``.
    """

    library: str
    accepted: bool
    findings: tuple[str, ...] = ()


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """One runnable form of the model.

    Attributes:
        id: Unique in the bundle, for example ``int4`` or ``fp32``.
        engine: Which `nearfar.engines` module runs it.
        precision: ``fp32 fp16 int8 int4 …``, for people.
        entry: The file (``onnxruntime``, ``tensorrt``: ONNX) or folder (``onnxruntime-genai``) the
            engine opens.
        files: The variant's own files.
        placement: Where it is meant to run, best first.
        quality_rank: Order of quality within the bundle; 0 is the best.
        saturation: Of variants that round activations to 8 bits too: kind of CPU (see
            `nearfar.engines.devices.cpu_kind`) to whether it was found to saturate there, that is,
            to lose in the CPU's 8-bit kernels what the model as it is written does not lose.
        tensorrt: For the engine ``tensorrt``: what the device builds. Language models as plain ONNX
            state their sizes there too.
        tensorrt_check: Whether TensorRT would take the graph, where that was checked.
    """

    id: str
    engine: EngineName
    precision: str
    entry: str
    files: tuple[FileEntry, ...]
    placement: tuple[Placement, ...] = ("edge", "cloud")
    quality_rank: int = 0
    requirements: Requirements = Requirements()
    quality: tuple[QualityFigure, ...] = ()
    latency: tuple[LatencyFigure, ...] = ()
    saturation: dict[str, bool] = {}
    tensorrt: TensorrtPlan | None = None
    tensorrt_check: TensorrtCheck | None = None

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files)


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """Where the bundle came from.

    Attributes:
        source: What was converted (file name, wheel name and version), never a local path.
        source_sha256: Digest of the source file, where it is one file.
        tools: Tool name to version.
    """

    source: str = ""
    source_sha256: str = ""
    tools: dict[str, str] = {}


class Golden(msgspec.Struct, frozen=True, kw_only=True):
    """A few inputs with the outputs they had where the bundle was made; see `engines.golden`.

    Attributes:
        inputs: Path of a shared file: ``.npz`` with tensors, ``.json`` with prompts.
        outputs: Path of another: what `reference` answered (tensors), or every variant (text).
        reference: Id of the variant whose outputs they are.
        relative_error: Variant id to how far its outputs were from them, as a share.
    """

    inputs: str
    outputs: str
    reference: str
    relative_error: dict[str, float] = {}


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`manifest.json`.

    Attributes:
        files: Files shared by all variants (tokenizer, licence, labels).
        labels: Class names in output order, for classification.
        label_output: Output tensor that holds class scores, for classification.
        multi_label: Whether any number of classes may be true of one input: each score then speaks
            for its own class, from 0.5 on with a yes.
        embedding_output: Output tensor that holds the vectors, for embeddings.
        context_length_tokens: Prompt and answer together, for text generation.
        mixed_routes: Whether vectors of different variants may be compared (embeddings).
        space: Name of the space that vectors lie in: those of bundles with another name here may
            never be compared. "" where nobody said.
        golden: Inputs and outputs to check an installation with.
    """

    name: str
    version: str
    task: Task
    variants: tuple[Variant, ...]
    schema_version: int = SCHEMA_VERSION
    description: str = ""
    license: str = ""
    lineage: Lineage = Lineage()
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    files: tuple[FileEntry, ...] = ()
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()
    label_output: str | None = None
    multi_label: bool = False
    embedding_output: str | None = None
    context_length_tokens: int | None = None
    mixed_routes: bool = False
    space: str = ""
    golden: Golden | None = None

    def variant(self, variant_id: str) -> Variant | None:
        """The variant with that id, or `None`."""
        return next((v for v in self.variants if v.id == variant_id), None)


def encode_manifest(manifest: Manifest) -> bytes:
    """Deterministic, indented JSON, as written to disk."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=2) + b"\n"


def decode_manifest(data: bytes) -> Manifest:
    """Parse and type-check; says nothing about the files. Raises `msgspec.ValidationError`."""
    return msgspec.json.decode(data, type=Manifest)
