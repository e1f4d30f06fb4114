"""The commands `nearfar infer`, `nearfar chat` and `nearfar explain`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    import numpy as np

    from sdk.client import Client
    from sdk.results import Answered, ModelInfo
    from sdk.streams import GenerationStream

# Optional[…] instead of `… | None`: typer reads these annotations at run time, on Python 3.10 too.
_Config = Annotated[
    Path, typer.Option("--config", "-c", help="Configuration file (see `nearfar doctor`).")
]
_Sensitivity = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Data class of the content; the strictest one when it is not given."),
]
_Deadline = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--deadline-ms", help="Milliseconds until the answer is due."),
]
_Mode = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="auto, edge_only, prefer_edge, prefer_cloud or cloud_only."),
]
_Objective = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="latency, quality, cost or energy."),
]
_Purpose = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="What the answer is for; policy may ask."),
]
_Tenant = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="On whose behalf; policy may ask."),
]
_DEFAULT_CONFIG = Path("nearfar.toml")


def infer(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    inputs: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Argument(help="Files to classify, or one .npz file of input tensors."),
    ] = None,
    text: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--text", "-t", help="Text to embed or classify; repeat it for more."),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Write outputs (vectors, tensors) to this .npz file."),
    ] = None,
    top_k: Annotated[int, typer.Option(help="Labels to show per file or text.")] = 3,
    config: _Config = _DEFAULT_CONFIG,
    sensitivity: _Sensitivity = None,
    deadline_ms: _Deadline = None,
    mode: _Mode = None,
    objective: _Objective = None,
    purpose: _Purpose = None,
    tenant: _Tenant = None,
    min_agreement: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="How often answers must agree with the cloud's (see calibrate)."),
    ] = None,
) -> None:
    """Classify files or texts, embed texts, or run tensors through a model.

    nearfar infer file-type report.pdf photo.jpg · nearfar infer mood -t "What a day!" ·
    nearfar infer minilm -t near -t far -o v.npz · nearfar infer tiny input.npz -o output.npz
    """
    from nearfar.errors import InvalidInput
    from sdk.client import Client

    options = _options(sensitivity, deadline_ms, mode, objective, purpose, tenant)
    if min_agreement is not None:
        options["min_agreement"] = min_agreement
    if bool(inputs) == bool(text):
        raise InvalidInput(
            "Give either files or --text", field="inputs", fix="See nearfar infer --help"
        )
    with Client.from_config(config) as client:
        if text and _task(client, model) == "classification":
            for one in text:
                _classify(client, model, one, repr(one[:40]), top_k, options)
        elif text:
            _embed(client, model, text, output, options)
        elif inputs and inputs[0].suffix == ".npz":
            if len(inputs) > 1:
                raise InvalidInput(
                    "More than one .npz file", field="inputs", fix="Run them one by one"
                )
            _tensors(client, model, inputs[0], output, options)
        else:
            for path in inputs or ():
                _classify(client, model, path, str(path), top_k, options)


def chat(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="What you say; without it, it is read from standard input."),
    ] = None,
    system: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Instruction that comes before the conversation."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text; no chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Upper bound of the answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1 turns it off.")] = 1.0,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Makes sampling reproducible."),
    ] = None,
    stop: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="String that ends the answer; repeat it for more."),
    ] = None,
    config: _Config = _DEFAULT_CONFIG,
    sensitivity: _Sensitivity = None,
    deadline_ms: _Deadline = None,
    mode: _Mode = None,
    objective: _Objective = None,
    purpose: _Purpose = None,
    tenant: _Tenant = None,
) -> None:
    """Ask a language model; the answer streams to standard output, the route to standard error."""
    from sdk.client import Client

    options: dict[str, Any] = {
        **_options(sensitivity, deadline_ms, mode, objective, purpose, tenant),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    prompt = sys.stdin.read() if prompt is None else prompt
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    with Client.from_config(config) as client:
        stream = (
            client.generate(model, prompt, **options)
            if raw
            else client.chat(model, messages, **options)
        )
        with stream:
            for chunk in stream:
                if chunk.handover:
                    _say(f"\n({stream.route.path}: {stream.reason})")
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
        sys.stdout.write("\n")
        _say(_stream_summary(stream))


def explain(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    prompt: Annotated[Optional[str], typer.Option(help="As for chat.")] = None,  # noqa: UP045
    text: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--text", "-t", help="As for infer --text."),
    ] = None,
    file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="As for infer FILE: something to classify, or an .npz of tensors."),
    ] = None,
    tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Instead of an input: how many tokens it has."),
    ] = None,
    size_bytes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--bytes", help="Instead of an input: how many bytes it has."),
    ] = None,
    max_new_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="As for chat (256)."),
    ] = None,
    connect: Annotated[
        bool,
        typer.Option("--connect", help="Ask the cloud first what it serves; sends no content."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    config: _Config = _DEFAULT_CONFIG,
    sensitivity: _Sensitivity = None,
    deadline_ms: _Deadline = None,
    mode: _Mode = None,
    objective: _Objective = None,
    purpose: _Purpose = None,
    tenant: _Tenant = None,
) -> None:
    """Say where a request would go, and why. Nothing runs and no content leaves the device.

    nearfar explain assistant --tokens 200 --max-new-tokens 64 --deadline-ms 800 ·
    nearfar explain file-type --bytes 1500 · nearfar explain minilm --text "near and far"
    """
    from nearfar.errors import NearfarError
    from sdk.client import Client
    from sdk.explained import print_json, print_table

    options = _options(sensitivity, deadline_ms, mode, objective, purpose, tenant)
    with Client.from_config(config) as client:
        if connect:
            try:
                client.models(refresh=True)
            except NearfarError as error:
                _say(f"cloud: {error}")
        info = _info(client, model)
        is_sized = tokens is not None or size_bytes is not None
        if not (prompt or text or file or is_sized):
            # No input given: take the smallest that fits the model.
            if info is None:
                prompt = " "
            else:
                size_bytes, is_sized = 1, True
        given: dict[str, Any]
        if max_new_tokens is not None and (prompt or is_sized):
            options["max_new_tokens"] = max_new_tokens
        if prompt:
            given = {"prompt": prompt}
        elif is_sized and not (text or file):
            given = {}
        elif text and info is not None and info.task == "classification":
            given = {"data": text[0]}
        elif text:
            given = {"texts": text}
        elif file is not None and file.suffix == ".npz":
            given = {"feeds": load_tensors(file)}
        else:
            given = {"data": file}
        given |= {"input_tokens": tokens, "upload_bytes": size_bytes}
        decision = client.explain(model, **given, **options)
        others = [
            client.explain(model, **given, **options, cloud=name)
            for name in client.clouds
            if name != decision.inputs.endpoint
        ]
    (print_json if json else print_table)(decision, others)
    decision.raise_if_denied()


def _options(
    sensitivity: str | None,
    deadline_ms: float | None,
    mode: str | None,
    objective: str | None,
    purpose: str | None,
    tenant: str | None,
) -> dict[str, Any]:
    return {
        "sensitivity": sensitivity,
        "deadline_ms": deadline_ms,
        "mode": mode,
        "objective": objective,
        "purpose": purpose,
        "tenant": tenant,
    }


def _info(client: Client, model: str) -> ModelInfo | None:
    """What is known of a model, without asking anybody."""
    return next((info for info in client.models() if info.name == model), None)


def _task(client: Client, model: str) -> str:
    """The task of a model; the clouds are asked when the device does not have it."""
    from nearfar.errors import NearfarError

    info = _info(client, model)
    if info is None:
        with contextlib.suppress(NearfarError):  # the request will say what is wrong
            client.models(refresh=True)
        info = _info(client, model)
    return "" if info is None else info.task


def _classify(
    client: Client, model: str, data: Path | str, name: str, top_k: int, options: dict[str, Any]
) -> None:
    from nearfar.errors import about

    with about(name):
        result = client.classify(model, data, top_k=top_k, **options)
    labels = "  ".join(f"{label} {score:.1%}" for label, score in result.top)
    _print(f"{name}: {labels}")
    _say(_summary(result))


def _embed(
    client: Client, model: str, texts: list[str], output: Path | None, options: dict[str, Any]
) -> None:
    import numpy as np

    result = client.embed(model, texts, **options)
    if output is not None:
        np.savez(output, vectors=result.vectors)
        _print(f"{output}: vectors {result.vectors.shape}")
    else:
        for text, vector in zip(texts, result.vectors, strict=True):
            head = " ".join(f"{value:+.4f}" for value in vector[:6])
            _print(f"{text[:40]!r}: {head} … ({vector.size} dimensions)")
    _say(_summary(result))


def _tensors(
    client: Client, model: str, path: Path, output: Path | None, options: dict[str, Any]
) -> None:
    import numpy as np

    result = client.infer(model, load_tensors(path), **options)
    for name, array in result.outputs.items():
        _print(f"{name} {array.dtype}{list(array.shape)}")
        if output is None:
            _print(np.array2string(array, threshold=20))
    if output is not None:
        arrays: dict[str, Any] = dict(result.outputs)
        np.savez(output, **arrays)
        _print(f"written to {output}")
    _say(_summary(result))


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an .npz file.

    Raises:
        InvalidInput: It cannot be read as one.
    """
    import zipfile

    import numpy as np

    from nearfar.errors import InvalidInput

    try:
        # No pickled objects: an .npz from elsewhere must not run code here.
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, zipfile.BadZipFile) as exc:
        raise InvalidInput(
            f"{path} cannot be read as .npz: {exc}",
            field="inputs",
            fix="Write it with numpy.savez(path, input_name=array)",
        ) from exc


def _summary(result: Answered) -> str:
    from nearfar.units import format_bytes, format_ms

    text = (
        f"{result.route} · {result.variant} · {format_ms(result.timings.total_ms)} · "
        f"{format_bytes(result.bytes_sent)} sent"
    )
    agreement = result.agreement
    return f"{text} · agreement {agreement.target:g}: {agreement.outcome}" if agreement else text


def _stream_summary(stream: GenerationStream) -> str:
    from nearfar.units import format_bytes, format_ms

    timings, usage = stream.timings, stream.usage
    parts = [str(stream.route)]
    if stream.variant:
        parts.append(stream.variant)
    if usage is not None:
        parts.append(f"{usage.completion_tokens} tokens")
    parts.append(f"first after {format_ms(timings.ttft_ms)}, all in {format_ms(timings.total_ms)}")
    parts.append(f"{format_bytes(stream.bytes_sent)} sent")
    if stream.finish_reason not in ("stop", "stop_string"):
        parts.append(f"ended by: {stream.finish_reason}")
    return " · ".join(parts)


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")


def _say(line: str) -> None:
    """Facts about the answer go to standard error, so that the answer can be piped."""
    sys.stderr.write(line + "\n")
