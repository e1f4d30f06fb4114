"""What nearfar adds to the libraries it runs on: tokens per second, microseconds, import time.

Every figure is a comparison within one run: the bare library and nearfar take turns on the same
bundle, the same prompt, the same arrays.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.harness import Bar, Report, median, take_turns
from nearfar.errors import InvalidInput

if TYPE_CHECKING:
    from edge_runtime import EdgeRuntime
    from nearfar.bundle import Bundle
    from nearfar.bundle.manifest import Manifest
    from sdk import Client

NEW_TOKENS = 64
GENERATION_ROUNDS = 9
INFER_ROUNDS = 400
IMPORT_ROUNDS = 7
SEED = 7

_QUESTION = "Explain how a river becomes wide, from its spring to the sea, in many sentences."

_POLICY = """
version = 1
classes = ["public"]

[[rule]]
id = "bench"
when = { sensitivity = "public" }
effect = "edge_only"
"""

#: Imported names, because `import sdk` alone loads almost nothing.
_IMPORT = "from sdk import AsyncClient, Client"

_IMPORT_PROBE = """
import time
started_s = time.perf_counter()
{statement}
took_ms = (time.perf_counter() - started_s) * 1000
with open("/proc/self/status") as status:
    rss_kib = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
print(took_ms, rss_kib * 1024)
"""

Progress = Callable[[str], None]


def measure(models: Path | None, *, say: Progress = lambda _: None) -> Report:
    """Measure all three; without models only what importing costs.

    Raises:
        InvalidInput: The store holds no model to measure with.
        NearfarError: A model cannot be run.
    """
    bars: list[Bar] = []
    figures: dict[str, str] = {}
    samples: dict[str, list[float]] = {}
    if models is not None:
        from edge_runtime import EdgeRuntime
        from nearfar.bundle import BundleStore
        from sdk import Client, parse_policy

        store = BundleStore(models)
        with (
            EdgeRuntime(store) as runtime,
            Client(models=models, policy=parse_policy(_POLICY, source="bench")) as client,
        ):
            found = runtime.models()
            text = _first(found, models, "text-generation", lambda m: m.task == "text-generation")
            tensor = _first(found, models, "tensor", _is_small_tensor_model)
            _measure_generation(store.open(text), runtime, client, bars, figures, samples, say)
            _measure_infer(store.open(tensor), runtime, client, bars, figures, samples, say)
    _measure_import(bars, figures, samples, say)
    settings = {
        "seed": SEED,
        "new_tokens": NEW_TOKENS,
        "generation_rounds": GENERATION_ROUNDS,
        "infer_rounds": INFER_ROUNDS,
        "import_rounds": IMPORT_ROUNDS,
    }
    return Report("overhead", bars, figures, samples, settings)


def _first(
    manifests: list[Manifest], models: Path, kind: str, fits: Callable[[Manifest], bool]
) -> str:
    for manifest in manifests:
        if fits(manifest):
            return manifest.name
    raise InvalidInput(
        f"{models} holds no {kind} model to measure with",
        field="models",
        fix="Give a store with one, for example that of `nearfar quickstart`",
    )


def _is_small_tensor_model(manifest: Manifest) -> bool:
    """One batch axis at most is free, so that inputs can be made up."""
    return bool(manifest.inputs) and all(
        size > 0 for spec in manifest.inputs for size in spec.shape[1:]
    )


# -- text generation -------------------------------------------------------------------------------


def _measure_generation(
    bundle: Bundle,
    runtime: EdgeRuntime,
    client: Client,
    bars: list[Bar],
    figures: dict[str, str],
    samples: dict[str, list[float]],
    say: Progress,
) -> None:
    from nearfar.engines.chat_template import ChatTemplate
    from nearfar.generation import ChatMessage, GenerationOptions, Prompt

    name = bundle.manifest.name
    variant = runtime.describe(name).variant
    folder = bundle.variant_entry(variant)
    prompt = ChatTemplate(folder, label=name).render([ChatMessage("user", _QUESTION)])
    bare = _bare_generation(folder, prompt)

    def edge() -> tuple[int, float]:
        options = GenerationOptions(max_new_tokens=NEW_TOKENS)
        started_s = time.perf_counter()
        for chunk in runtime.generate(name, Prompt(text=prompt), options):
            count = chunk.index
        return count, time.perf_counter() - started_s

    def sdk() -> tuple[int, float]:
        started_s = time.perf_counter()
        answer = client.generate(
            name, prompt, max_new_tokens=NEW_TOKENS, sensitivity="public", deadline_ms=None
        )
        for _ in answer:
            pass
        took_s = time.perf_counter() - started_s
        return answer.usage.completion_tokens, took_s

    contenders = {"bare": bare, "edge runtime": edge, "sdk": sdk}
    say(f"loading {name}/{variant.id} once for each")
    for contender in contenders.values():
        contender()
    rounds = take_turns(
        contenders,
        GENERATION_ROUNDS,
        on_round=lambda done: say(f"generating, round {done} of {GENERATION_ROUNDS}"),
    )
    rates = {key: [count / took_s for count, took_s in found] for key, found in rounds.items()}
    counts = {count for found in rounds.values() for count, _ in found}
    if len(counts) != 1:
        raise InvalidInput(
            f"The answers have different lengths ({sorted(counts)} tokens), so their speeds do "
            "not compare",
            field="models",
            fix="Measure with a model that decodes greedily in a reproducible way",
        )
    for key, limit in (("sdk", 0.95), ("edge runtime", 0.95)):
        # Ratio within each round: what slows a whole round down falls out.
        ratios = [mine / base for mine, base in zip(rates[key], rates["bare"], strict=True)]
        bars.append(
            Bar(f"tokens/s, {key} to bare onnxruntime-genai", median(ratios), limit, "at_least")
        )
    for key, values in rates.items():
        samples[f"{name} {key} tokens_per_s"] = values
        figures[f"{name}/{variant.id}, {key}"] = f"{median(values):.1f} tokens/s"


def _bare_generation(folder: Path, prompt: str) -> Callable[[], tuple[int, float]]:
    """The loop of onnxruntime-genai's own examples."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    encode, new_stream = _bare_tokenizer(model, folder)

    def run() -> tuple[int, float]:
        started_s = time.perf_counter()
        tokens = encode(prompt)
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(tokens) + NEW_TOKENS, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(tokens)
        decode = new_stream()
        count = 0
        while not generator.is_done():
            generator.generate_next_token()
            decode(int(generator.get_next_tokens()[0]))
            count += 1
        took_s = time.perf_counter() - started_s
        del generator
        return count, took_s

    return run


def _bare_tokenizer(
    model: Any, folder: Path
) -> tuple[Callable[[str], Any], Callable[[], Callable[[int], Any]]]:
    """onnxruntime-genai's tokenizer; where it cannot read the file (0.11), the `tokenizers` one."""
    import onnxruntime_genai as og

    try:
        own = og.Tokenizer(model)
    except RuntimeError:
        from tokenizers import Tokenizer
        from tokenizers.decoders import DecodeStream

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

        def new_stream() -> Callable[[int], Any]:
            stream = DecodeStream(skip_special_tokens=True)
            return lambda token: stream.step(tokenizer, token)

        return lambda text: tokenizer.encode(text).ids, new_stream
    return own.encode, lambda: own.create_stream().decode


# -- tensors ---------------------------------------------------------------------------------------


def _measure_infer(
    bundle: Bundle,
    runtime: EdgeRuntime,
    client: Client,
    bars: list[Bar],
    figures: dict[str, str],
    samples: dict[str, list[float]],
    say: Progress,
) -> None:
    import onnxruntime as ort

    manifest = bundle.manifest
    name = manifest.name
    variant = runtime.describe(name).variant
    feeds = _made_up_feeds(manifest)
    session = ort.InferenceSession(
        str(bundle.variant_entry(variant)), providers=["CPUExecutionProvider"]
    )

    def timed(call: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            started_s = time.perf_counter()
            call()
            return (time.perf_counter() - started_s) * 1e6

        return run

    contenders = {
        "bare": timed(lambda: session.run(None, feeds)),
        "edge runtime": timed(lambda: runtime.infer(name, feeds)),
        "sdk": timed(lambda: client.infer(name, feeds, sensitivity="public")),
    }
    say(f"{name}/{variant.id}: {INFER_ROUNDS} calls of each")
    for contender in contenders.values():
        for _ in range(20):
            contender()
    times = take_turns(contenders, INFER_ROUNDS)
    for key in ("sdk", "edge runtime"):
        # Differences within each round: neighbours in time share the state of the machine.
        added = [mine - base for mine, base in zip(times[key], times["bare"], strict=True)]
        bars.append(
            Bar(
                f"infer, {key} adds to bare ONNX Runtime (p50)", median(added), 100, "at_most", "µs"
            )
        )
    for key, values in times.items():
        samples[f"{name} {key} us"] = values
        figures[f"{name}/{variant.id}, {key}"] = f"{median(values):.0f} µs"


def _made_up_feeds(manifest: Manifest) -> dict[str, np.ndarray]:
    from nearfar.tensors import NUMPY_OF

    random = np.random.default_rng(SEED)
    return {
        spec.name: random.integers(0, 100, [1, *spec.shape[1:]]).astype(NUMPY_OF[spec.datatype])
        for spec in manifest.inputs
    }


# -- import ----------------------------------------------------------------------------------------


def _measure_import(
    bars: list[Bar], figures: dict[str, str], samples: dict[str, list[float]], say: Progress
) -> None:
    say(f"importing, {IMPORT_ROUNDS} fresh processes of each")
    contenders = {"bare": lambda: _fresh("pass"), "sdk": lambda: _fresh(_IMPORT)}
    for contender in contenders.values():
        contender()  # the first one compiles and fills the file cache
    found = take_turns(contenders, IMPORT_ROUNDS)
    times = [took_ms for took_ms, _ in found["sdk"]]
    sizes = {key: [rss / 2**20 for _, rss in values] for key, values in found.items()}
    added_mib = median(sizes["sdk"]) - median(sizes["bare"])
    bars.append(Bar("import sdk, time", median(times), 200, "at_most", "ms"))
    # MB as in the bar: 40 MB are 38.1 MiB.
    bars.append(
        Bar("import sdk, memory above bare Python", added_mib * 2**20 / 1e6, 40, "at_most", "MB")
    )
    samples["import ms"] = times
    for key, values in sizes.items():
        samples[f"import {key} rss_mib"] = values
    figures["bare Python"] = f"{median(sizes['bare']):.1f} MiB"


def _fresh(statement: str) -> tuple[float, float]:
    """Milliseconds and resident bytes of a fresh process that ran one statement."""
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_PROBE.format(statement=statement)],
        capture_output=True,
        text=True,
        check=True,
    )
    took_ms, rss_bytes = done.stdout.split()
    return float(took_ms), float(rss_bytes)
