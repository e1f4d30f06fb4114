"""What an app asks for, as one checked value; the checks use the model's manifest and nothing else.

Everything that can be seen to be wrong is refused here, before a route is chosen and before
anything leaves the device.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from nearfar.bundle.manifest import (
    BYTES_PREPROCESSING,
    Manifest,
    StreamPreprocessing,
    TensorSpec,
    TextPreprocessing,
)
from nearfar.errors import InvalidInput
from nearfar.generation import ChatMessage, GenerationOptions, Prompt
from nearfar.units import Deadline
from sdk.routing.types import MODES, OBJECTIVES, Mode, Objective, RequestSize

if TYPE_CHECKING:
    import numpy as np

Method = Literal["infer", "embed", "classify", "generate"]
Form = Literal["tensors", "text", "bytes"]

#: Task that a method implies when no manifest is known yet (policy may have rules about tasks).
TASK_OF_METHOD = {
    "infer": "tensor",
    "embed": "embedding",
    "classify": "classification",
    "generate": "text-generation",
}
_METHODS_OF_TASK = {
    "text-generation": "generate() or chat()",
    "embedding": "embed()",
    "classification": "classify()",
    "tensor": "infer()",
}
_ROLES = ("system", "user", "assistant")

#: English runs at 4 to 5 bytes per token; a low guess of the length is the safe one to predict by.
_BYTES_PER_TOKEN = 4


class Request(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One request; made by the functions below.

    Attributes:
        method: Which client method it came from.
        model: Name of the model.
        sensitivity: Data class; `None` takes the client's default.
        deadline: When the answer is due.
        form: What `feeds` or `items` hold.
        feeds: Input name to array, for ``tensors``.
        items: Texts or byte strings, one per row, for ``text`` and ``bytes``.
        prompt: For generation.
        options: For generation.
        top_k: Labels wanted, for classification.
        min_agreement: How often answers must agree with the cloud model's; 0 for no cascade,
            `None` for what the configuration says.
        require_agreement: Whether an answer that may not agree is an error; `None` as before.
        size: What predictions are a function of.
        request_id: For a request that may be sent again after a restart: 16 bytes that stay the
            same; `None` draws some for each call.
    """

    method: Method
    model: str
    deadline: Deadline
    version: str | None = None
    sensitivity: str | None = None
    purpose: str | None = None
    tenant: str | None = None
    mode: Mode = "auto"
    objective: Objective = "latency"
    priority: int = 5
    form: Form = "tensors"
    feeds: Mapping[str, np.ndarray] | None = None
    items: tuple[str | bytes, ...] = ()
    prompt: Prompt | None = None
    options: GenerationOptions = GenerationOptions()
    top_k: int = 1
    min_agreement: float | None = None
    require_agreement: bool | None = None
    size: RequestSize = RequestSize()
    request_id: bytes | None = None

    @property
    def has_content(self) -> bool:
        """Whether it could be answered; one for `explain` may have a size only."""
        return bool(self.items) or self.feeds is not None or self.prompt is not None

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        if self.items:
            return len(self.items)
        if self.feeds:
            for array in self.feeds.values():
                return len(array) if array.ndim else 1
        return 1


def request_id_of(request: Request, variant: str | None = None) -> bytes:
    """Id under which the cloud is asked, 16 bytes; another variant is another request."""
    given = request.request_id
    if given is None:
        return os.urandom(16)
    if variant is None:
        return given
    return hashlib.blake2b(variant.encode(), key=given, digest_size=16).digest()


def check_settings(mode: str, objective: str, priority: int) -> None:
    """Refuse routing settings that do not exist.

    Raises:
        InvalidInput: Names the setting and what it may be.
    """
    if mode not in MODES:
        raise InvalidInput(
            f"There is no mode {mode!r}", field="mode", fix=f"Use one of: {', '.join(MODES)}"
        )
    if objective not in OBJECTIVES:
        raise InvalidInput(
            f"There is no objective {objective!r}",
            field="objective",
            fix=f"Use one of: {', '.join(OBJECTIVES)}",
        )
    if not 0 <= priority <= 9:
        raise InvalidInput(
            f"priority is {priority}", field="priority", fix="Use 0 (background) to 9 (urgent)"
        )


def tensor_size(feeds: Mapping[str, np.ndarray]) -> RequestSize:
    """Size of a request of tensors.

    Raises:
        InvalidInput: Something among them is no array.
    """
    # Here and not above: numpy is half of what `from sdk import Client` would take.
    import numpy as np

    size_bytes = elements = 0
    for name, array in feeds.items():
        if not isinstance(array, np.ndarray):
            raise InvalidInput(
                f"Input {name!r} is a {type(array).__name__}",
                field=name,
                fix="Give numpy arrays: numpy.asarray(…, dtype=…)",
            )
        size_bytes += array.nbytes
        if array.size > elements:
            elements = array.size
    return RequestSize(upload_bytes=size_bytes, input_elements=elements)


def items_size(items: Sequence[str | bytes]) -> RequestSize:
    """Size of a request of texts or byte strings.

    How many elements a model makes of byte strings only its manifest says.
    """
    lengths = [len(item) for item in items]
    elements = 0
    if items and isinstance(items[0], str):
        # A batch is as wide as its longest text.
        elements = len(lengths) * (1 + max(lengths) // _BYTES_PER_TOKEN)
    return RequestSize(upload_bytes=sum(lengths), input_elements=elements)


def prompt_size(prompt: Prompt, options: GenerationOptions) -> RequestSize:
    """Size of a generation."""
    size_bytes = len(prompt.text or "") + sum(len(m.content) for m in prompt.messages)
    return RequestSize(
        input_tokens=1 + size_bytes // _BYTES_PER_TOKEN,
        max_new_tokens=options.max_new_tokens,
        upload_bytes=size_bytes,
    )


def texts_of(texts: Sequence[str]) -> tuple[str, ...]:
    """Texts to embed.

    Raises:
        InvalidInput: There are none, or something else is among them.
    """
    if isinstance(texts, (str, bytes)):
        raise InvalidInput(
            "texts is a single string",
            field="texts",
            fix='Give a list: embed(model, ["…"])',
        )
    items = tuple(texts)
    if not items:
        raise InvalidInput("texts is empty", field="texts", fix="Give at least one text")
    for index, item in enumerate(items):
        if not isinstance(item, str):
            raise InvalidInput(
                f"texts[{index}] is a {type(item).__name__}", field="texts", fix="Give str objects"
            )
        _check_unicode(item, "texts")
    return items


def data_of(data: bytes | bytearray | memoryview | Path | str) -> str | bytes:
    """What to classify: bytes as they are, a path's content, or text.

    Raises:
        InvalidInput: The file cannot be read, `data` is of another type or is not Unicode.
    """
    if isinstance(data, Path):
        try:
            return data.read_bytes()
        except OSError as exc:
            raise InvalidInput(
                f"The file {data} cannot be read: {exc.strerror}",
                field="data",
                fix="Check the path and its permissions",
            ) from exc
    if isinstance(data, (bytearray, memoryview)):
        return bytes(data)
    if isinstance(data, str):
        _check_unicode(data, "data")
        return data
    if isinstance(data, bytes):
        return data
    raise InvalidInput(
        f"data is a {type(data).__name__}", field="data", fix="Give bytes, a pathlib.Path or text"
    )


def _check_unicode(text: str, field: str) -> None:
    if text.isascii():  # which strings know of themselves
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidInput(
            "The text holds characters that are not Unicode (lone surrogates)",
            field=field,
            fix="Decode it with errors='replace'",
        ) from None


def text_prompt(text: str) -> Prompt:
    """Raw text to continue.

    Raises:
        InvalidInput: It is empty or not text, or not Unicode.
    """
    if not isinstance(text, str) or not text:
        raise InvalidInput(
            "The prompt is empty" if text == "" else f"The prompt is a {type(text).__name__}",
            field="prompt",
            fix="Give a string with at least one character; chat() takes messages",
        )
    _check_unicode(text, "prompt")
    return Prompt(text=text)


def chat_prompt(messages: Sequence[Mapping[str, str] | ChatMessage]) -> Prompt:
    """A conversation to answer.

    Raises:
        InvalidInput: A message lacks its role or content, or the order makes no sense, or a text
            is not Unicode.
    """
    if isinstance(messages, (str, bytes)) or not messages:
        raise InvalidInput(
            "messages is a string" if messages else "messages is empty",
            field="messages",
            fix='Give a list such as [{"role": "user", "content": "…"}]',
        )
    turns = []
    for index, message in enumerate(messages):
        if isinstance(message, ChatMessage):
            role, content = message.role, message.content
        else:
            try:
                role, content = message["role"], message["content"]
            except (KeyError, TypeError) as exc:
                raise InvalidInput(
                    f"messages[{index}] lacks role or content",
                    field="messages",
                    fix='Write each as {"role": "user", "content": "…"}',
                ) from exc
        if role not in _ROLES or not isinstance(content, str):
            raise InvalidInput(
                f"messages[{index}] has role {role!r} and {type(content).__name__} content",
                field="messages",
                fix=f"Roles are {', '.join(_ROLES)}; content is text",
            )
        _check_unicode(content, "messages")
        turns.append(ChatMessage(role=role, content=content))
    if turns[-1].role == "assistant":
        raise InvalidInput(
            "The last message is the assistant's own",
            field="messages",
            fix="End with the user's message; to continue an answer use generate()",
        )
    return Prompt(messages=tuple(turns))


def generation_options(
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    stop: str | Sequence[str],
) -> GenerationOptions:
    """Checked sampling options.

    Raises:
        InvalidInput: Names the option that is out of its range.
    """
    if max_new_tokens < 1:
        raise _out_of_range("max_new_tokens", max_new_tokens, "1 or more")
    if not 0.0 <= temperature <= 100.0:
        raise _out_of_range("temperature", temperature, "0 (greedy) or more")
    if not 0.0 < top_p <= 1.0:
        raise _out_of_range("top_p", top_p, "above 0 and up to 1")
    if top_k < 0:
        raise _out_of_range("top_k", top_k, "0 (off) or more")
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in strings):
        raise InvalidInput(
            "stop holds something that is not a non-empty string",
            field="stop",
            fix="Give strings, or leave it out",
        )
    for string in strings:
        _check_unicode(string, "stop")
    return GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=strings,
    )


def check(request: Request, manifest: Manifest) -> None:
    """Refuse a request that does not fit its model.

    Raises:
        InvalidInput: Names what does not fit: task, input name, dtype, shape, length.
    """
    task, method = manifest.task, request.method
    if method == "infer":
        if task == "text-generation":
            raise _wrong_task(request, manifest)
        assert request.feeds is not None
        check_feeds(manifest.inputs, request.feeds, model=manifest.name)
        return
    if TASK_OF_METHOD[method] != task:
        raise _wrong_task(request, manifest)
    if method == "generate":
        _check_length(request, manifest)
    else:
        _check_items(request, manifest)


def check_feeds(
    specs: Sequence[TensorSpec], feeds: Mapping[str, np.ndarray], *, model: str
) -> None:
    """Compare names, dtypes and shapes with the model's inputs.

    Raises:
        InvalidInput: Names the first input that does not fit, and what would.
    """
    from nearfar.tensors import numpy_of, spell

    for spec in specs:
        array = feeds.get(spec.name)
        if array is None:
            raise InvalidInput(
                f"Input {spec.name!r} of model {model!r} is missing",
                field=spec.name,
                fix=f"Its inputs are: {_describe(specs)}",
            )
        wanted = numpy_of(spec.datatype)
        if array.dtype != wanted and not _is_text(array, spec):
            raise InvalidInput(
                f"Input {spec.name!r} of model {model!r} has dtype {array.dtype}, not {wanted}",
                field=spec.name,
                fix=f"Convert it with .astype({spell(spec.datatype)})",
            )
        if len(spec.shape) != array.ndim or any(
            size not in (-1, got) for size, got in zip(spec.shape, array.shape, strict=True)
        ):
            raise InvalidInput(
                f"Input {spec.name!r} of model {model!r} has shape {list(array.shape)}, "
                f"not {list(spec.shape)}",
                field=spec.name,
                fix="-1 stands for any size; the first one is usually the batch",
            )
    if specs and len(feeds) > len(specs):
        names = {spec.name for spec in specs}
        extra = next(name for name in feeds if name not in names)
        raise InvalidInput(
            f"Model {model!r} has no input {extra!r}",
            field=extra,
            fix=f"Its inputs are: {_describe(specs)}",
        )


def _is_text(array: np.ndarray, spec: TensorSpec) -> bool:
    return spec.datatype == "BYTES" and array.dtype.kind in "SU"


def _check_items(request: Request, manifest: Manifest) -> None:
    preprocessing = manifest.preprocessing
    if preprocessing is None:
        raise InvalidInput(
            f"Model {manifest.name!r} takes tensors, it does no preprocessing of its own",
            field="model",
            fix=f"Use infer(); its inputs are: {_describe(manifest.inputs)}",
        )
    if isinstance(preprocessing, StreamPreprocessing):
        raise InvalidInput(
            f"Model {manifest.name!r} takes a signal piece by piece",
            field="model",
            fix="Use stream_audio()",
        )
    wants_bytes = isinstance(preprocessing, BYTES_PREPROCESSING)
    if wants_bytes and request.form != "bytes":
        raise InvalidInput(
            f"Model {manifest.name!r} takes bytes, and data is text",
            field="data",
            fix="Give bytes, or pathlib.Path(…) to read a file",
        )
    if isinstance(preprocessing, TextPreprocessing) and request.form != "text":
        raise InvalidInput(
            f"Model {manifest.name!r} takes text, and data is bytes",
            field="data",
            fix="Decode it first: data.decode(); on the command line it is --text",
        )
    if request.method == "classify" and not manifest.labels:
        raise InvalidInput(
            f"Model {manifest.name!r} has no labels", field="model", fix="Use infer() instead"
        )


def _check_length(request: Request, manifest: Manifest) -> None:
    context, wanted = manifest.context_length_tokens, request.options.max_new_tokens
    if context is not None and wanted >= context:
        raise InvalidInput(
            f"max_new_tokens is {wanted}, and the context of {manifest.name!r} holds "
            f"{context} tokens, prompt included",
            field="max_new_tokens",
            fix=f"Ask for fewer than {context} tokens",
        )


def _wrong_task(request: Request, manifest: Manifest) -> InvalidInput:
    return InvalidInput(
        f"{manifest.name!r} is a {manifest.task} model, which {request.method}() cannot use",
        field="model",
        fix=f"Use {_METHODS_OF_TASK[manifest.task]}, or name another model",
    )


def _out_of_range(name: str, value: object, allowed: str) -> InvalidInput:
    return InvalidInput(f"{name} is {value}", field=name, fix=f"It must be {allowed}")


def _describe(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.datatype}{list(spec.shape)}" for spec in specs)
