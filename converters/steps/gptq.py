"""Four-bit codes for a language model's matrices, chosen by error feedback on real text.

The model goes through one layer at a time, as GPTQ's authors do it: a layer gets what the layers
before it, rounded already, make of the texts, so that it makes up for some of what they lose. Its
products are looked at in one run, its matrices are rounded (`error_feedback`), and what it gives
then goes to the next layer. Weights are mapped from the file and given back when their layer is
done, so memory holds a layer and not the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from converters.awq.calibrate import calibration_windows
from converters.awq.worker import layers_of, let_go
from converters.libraries import load, quiet
from converters.settings import GptqSettings, Int4Settings
from converters.steps.carry_gguf import Carried, Load, fill_graph, names_of
from converters.steps.error_feedback import feedback_factor, round_with_feedback
from converters.steps.gguf_blocks import Blocks, joined, packed, unpacked
from nearfar.errors import ConversionError

#: Rows of a head that are rounded at a time: they have nothing to do with each other.
_ROWS = 4096
HEAD = "head"

Tell = Callable[[str], None]


def choose_codes(tell: Tell, folder: Path, target: Path, settings: GptqSettings) -> None:
    """Write blocks for all matrices of a model's layers, and for a head of 4 bits, into a file.

    Args:
        tell: Told what is being done.
        folder: Hugging Face folder with float32 safetensors.
        target: The file, for `ChosenCodes`.
        settings: How, and on how many texts.

    Raises:
        ConversionError: The model is not made of layers as others are.
    """
    torch, transformers = load("torch"), load("transformers")
    tokens = torch.from_numpy(calibration_windows(folder / "tokenizer.json", settings.windows))
    arrays: dict[str, np.ndarray] = {}

    def put(name: str, blocks: Blocks) -> None:
        assert blocks.zero_points is not None
        arrays[f"{name}/codes"] = packed(blocks.codes)
        arrays[f"{name}/scales"] = blocks.scales
        arrays[f"{name}/zero_points"] = blocks.zero_points

    try:
        with quiet(), torch.no_grad():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False
            ).eval()
            layers = layers_of(torch, model)
            for place, (name, layer) in enumerate(layers.items()):
                tell_layer = f"choose codes, layer {place + 1} of {len(layers)}"
                layer.forward = _Once(torch, name, layer, settings, put, tell, tell_layer)
            last = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            head = model.get_output_embeddings().weight
    except ValueError as exc:  # a model that is built in another way
        raise ConversionError(
            f"The model's layers cannot be gone through ({exc})",
            fix="Use another algorithm for int4 in the recipe, such as k_quant_mixed",
        ) from exc
    left = [name for name in layers if not any(key.startswith(f"{name}.") for key in arrays)]
    if left:
        raise ConversionError(
            f"{left[0]} was not run, or has no matrices",
            fix="Use another algorithm for int4 in the recipe, such as k_quant_mixed",
        )
    if settings.head_bits == 4 and _can_round(head, settings):
        tell("choose codes of the head")
        factor = feedback_factor(_gram(last), settings.damping)
        rows = (head.data[start : start + _ROWS] for start in range(0, len(head), _ROWS))
        whole = joined(
            [round_with_feedback(w.numpy(), factor, block=settings.block_size) for w in rows]
        )
        assert whole is not None
        put(HEAD, whole)
    np.savez(target, **arrays)  # type: ignore[arg-type]


class ChosenCodes:
    """What `choose_codes` wrote, one matrix at a time."""

    def __init__(self, path: Path) -> None:
        self._arrays = np.load(path)

    def __getitem__(self, name: str) -> Blocks | None:
        """Blocks of a layer's matrix by its name, such as ``model.layers.0.mlp.up_proj.weight``.

        `HEAD` names the head's.
        """
        if f"{name}/codes" not in self._arrays:
            return None
        codes, scales, zero_points = (
            self._arrays[f"{name}/{part}"] for part in ("codes", "scales", "zero_points")
        )
        return Blocks(4, unpacked(codes), scales, None, zero_points)


class _Once:
    """In place of a layer's `forward`: rounds its matrices with what the model gives the layer."""

    def __init__(
        self,
        torch: Any,
        name: str,
        layer: Any,
        settings: GptqSettings,
        put: Callable[[str, Blocks], None],
        tell: Tell,
        doing: str,
    ) -> None:
        self._torch, self._name, self._layer = torch, name, layer
        self._settings, self._put = settings, put
        self._tell, self._doing = tell, doing
        self._forward = layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._tell(self._doing)
        mapped = [weight.data for weight in self._layer.parameters()]
        for gram, readers in self._inputs(*args, **kwargs):
            factor = feedback_factor(gram, self._settings.damping)
            for name, linear in readers:
                block = self._settings.block_size
                blocks = round_with_feedback(linear.weight.data.numpy(), factor, block=block)
                self._put(f"{self._name}.{name}.weight", blocks)
                linear.weight.data = self._torch.from_numpy(blocks.dequantized())
        output = self._forward(*args, **kwargs)
        self._layer.to_empty(device="meta")
        for weight in mapped:
            let_go(weight)
        return output

    def _inputs(
        self, *args: Any, **kwargs: Any
    ) -> Iterator[tuple[np.ndarray, list[tuple[str, Any]]]]:
        """Run the layer; of each input of products the mean of ``x xT``, and what reads it."""
        readers: dict[int, list[tuple[str, Any]]] = {}
        grams: dict[int, np.ndarray] = {}
        alive: list[Any] = []
        hooks = []
        for name, module in self._layer.named_modules():
            if not isinstance(module, self._torch.nn.Linear):
                continue
            if not _can_round(module.weight, self._settings):
                continue

            def note(module: Any, inputs: Any, name: str = name) -> None:
                key = id(inputs[0])
                if key not in grams:
                    alive.append(inputs[0])  # ids of living tensors are distinct
                    grams[key] = _gram(inputs[0])
                readers.setdefault(key, []).append((name, module))

            hooks.append(module.register_forward_pre_hook(note))
        try:
            self._forward(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        alive.clear()
        for key in list(grams):
            yield grams.pop(key), readers[key]


def _can_round(weight: Any, settings: GptqSettings) -> bool:
    return bool(weight.shape[1] % settings.block_size == 0)


def _gram(x: Any) -> np.ndarray:
    """The mean of ``x xT``, of inputs of shape (..., inputs)."""
    rows = x.reshape(-1, x.shape[-1])
    found: np.ndarray = (rows.T @ rows).numpy() / len(rows)
    return found


def carry_codes(full: Path, target: Path, codes: Path, settings: Int4Settings) -> Carried:
    """Make a 4-bit folder of a full-precision one, with the codes that `choose_codes` wrote.

    Args:
        full: What the model builder wrote in full precision.
        target: Folder to make.
        codes: The file.
        settings: As for `fill_graph`.
    """
    chosen = ChosenCodes(codes)

    def find(node: str, _: Load) -> Blocks | None:
        if "/lm_head/" in node:
            return chosen[HEAD]
        parts = [chosen[name] for _, name in names_of(node)]
        found = [part for part in parts if part is not None]
        return joined(found) if found and len(found) == len(parts) else None

    return fill_graph(full, target, find, settings)
