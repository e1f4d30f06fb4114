"""The child that finds AWQ's scales with ``nvidia-modelopt`` and folds them into the weights.

The file is run by path, with an interpreter that has modelopt and not nearfar. A job comes as JSON
on stdin: ``model`` and ``target``, folders; ``tokens``, an ``.npy`` of token ids, shape (windows,
length); ``block``, how many weights share a step. Events go to stdout, one JSON object a line:
``progress``, and last ``done`` or ``failed``. What libraries print goes to stderr.

AWQ (Lin et al. 2023, arXiv:2306.00978) multiplies each input channel of a matrix by a number ``s``
and divides what comes in by it, so that the channels with large activations are rounded finely.
The division is folded into what is before: a norm, or the rows of another matrix. The model then
computes the same as before, which is measured here, and only its rounding gets better.

The model goes through one layer at a time. Its weights are mapped from the file and read when they
are computed with; a layer is searched when the model first comes to it, written at once and given
back. So memory holds one layer and not the model, and what a layer is searched on is what the model
in full precision gives it, as it would be if all were searched together.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import shutil
import signal
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

#: Tokens on which the folded model is compared with the original; their logits are kept.
_COMPARED_TOKENS = 64


def main() -> int:
    """Run one job."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # modelopt's own prints must not mix with the events
    warnings.simplefilter("ignore")

    def emit(event: str, **fields: Any) -> None:
        events.write(json.dumps({"event": event, **fields}) + "\n")

    job = json.load(sys.stdin)
    _end_with_parent()
    try:
        emit("done", **_calibrate(job, emit))
    except Exception as exc:  # noqa: BLE001 (the libraries' own errors have no common base)
        emit("failed", text=f"{type(exc).__name__}: {exc}")
    return 0


def _calibrate(job: dict[str, Any], emit: Any) -> dict[str, Any]:
    emit("progress", text="load modelopt")
    np: Any = importlib.import_module("numpy")
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    importlib.import_module("modelopt.torch.quantization")  # before anything is computed
    source, target = Path(job["model"]), Path(job["target"])
    tokens = torch.from_numpy(np.load(job["tokens"]))
    emit("progress", text="run the model")
    before = _logits(torch, transformers, source, tokens)
    counts = _scale(torch, _load(torch, transformers, source), tokens, job, emit)
    gc.collect()
    emit("progress", text="compare")
    after = _logits(torch, transformers, target, tokens)
    return {"max_error": float((after - before).abs().max()), **counts}


def _scale(torch: Any, model: Any, tokens: Any, job: dict[str, Any], emit: Any) -> dict[str, int]:
    """Write the model again with scales folded in, and take it to pieces meanwhile.

    Returns:
        What `_fold` counts, of all layers.
    """
    mtq: Any = importlib.import_module("modelopt.torch.quantization")
    # As modelopt's INT4_AWQ_CFG, with smaller blocks.
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {
                "quantizer_name": "*weight_quantizer",
                "cfg": {"num_bits": 4, "block_sizes": {-1: job["block"], "type": "static"}},
                "enable": True,
            },
        ],
        "algorithm": {"method": "awq_lite", "alpha_step": 0.1},
    }
    shutil.copytree(job["model"], job["target"])
    layers, weights = layers_of(torch, model), _Weights(Path(job["target"]))
    done: list[dict[str, int]] = []

    def search(name: str, layer: Any, run: Any) -> Any:
        """Scale one layer, write it, and forget it; returns what it gives in full precision."""
        emit("progress", text=f"search for scales, layer {1 + len(done)} of {len(layers)}")
        mapped = [weight.data for weight in layer.parameters()]
        groups = _grouped(torch, layer, run)
        outputs: list[Any] = []

        def loop(_: Any) -> None:
            """Run the texts at once: for each run all weights are rounded eleven times."""
            outputs[:] = [run()]

        mtq.quantize(layer, config, loop)
        done.append(_fold(torch, layer, groups))
        mtq.disable_quantizer(layer, "*")
        weights.put(f"{name}.", layer.state_dict())
        layer.to_empty(device="meta")
        for weight in mapped:
            let_go(weight)
        return outputs[0]

    for name, layer in layers.items():
        layer.forward = _Once(search, name, layer)
    with torch.no_grad():
        # Not the head: its logits would be larger than the model.
        model.base_model(input_ids=tokens, use_cache=False)
    if len(done) != len(layers):
        raise ValueError(f"{len(done)} of {len(layers)} layers were run")
    return {key: sum(counts[key] for counts in done) for key in done[0]}


def _load(torch: Any, transformers: Any, folder: Path) -> Any:
    """The model, its weights mapped from the file."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()


def layers_of(torch: Any, model: Any) -> dict[str, Any]:
    """The model's layers by their names.

    Raises:
        ValueError: It has none.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return {f"{name}.{place}": layer for place, layer in enumerate(module)}
    raise ValueError(f"no list of {count} layers in {type(model).__name__}")


class _Once:
    """In place of a layer's `forward`: searches for scales with what the model gives the layer."""

    def __init__(self, search: Any, name: str, layer: Any) -> None:
        self._search, self._name, self._layer = search, name, layer
        self._forward = layer.forward
        self._is_done = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_done:
            raise ValueError(f"{self._name} is run twice")
        self._is_done = True
        return self._search(self._name, self._layer, lambda: self._forward(*args, **kwargs))


def _logits(torch: Any, transformers: Any, folder: Path, tokens: Any) -> Any:
    """What a model says, one layer in memory at a time."""
    model = _load(torch, transformers, folder)

    def give_back(module: Any, *_: Any) -> None:
        for weight in module.parameters():
            let_go(weight.data)

    for layer in layers_of(torch, model).values():
        layer.register_forward_hook(give_back)
    with torch.no_grad():
        return model(tokens[:1, :_COMPARED_TOKENS], use_cache=False).logits[0].clone()


class _Group:
    """Matrices with the same input, as one: they must share the scales that a norm can take.

    modelopt searches scales for each matrix and averages them where a norm is to take them. On
    SmolLM2-135M (2,048 tokens, blocks of 32) that was worse than no scales at all: perplexity of
    other texts 40.2, rounded without scales 39.4, full precision 32.2. Searched together as AWQ's
    authors do, nothing has to be averaged.
    """

    def __init__(self, torch: Any, norm: Any, members: list[tuple[Any, str, Any]]) -> None:
        self.norm = norm
        self._members = members
        rows = [linear.weight.shape[0] for _, _, linear in members]
        has_bias = any(linear.bias is not None for _, _, linear in members)
        self.linear = torch.nn.Linear(members[0][2].in_features, sum(rows), has_bias, device="meta")
        self.linear.weight = torch.nn.Parameter(
            torch.cat([linear.weight.data for _, _, linear in members]), requires_grad=False
        )
        if has_bias:
            biases = [
                linear.bias.data if linear.bias is not None else torch.zeros(count)
                for count, (_, _, linear) in zip(rows, members, strict=True)
            ]
            self.linear.bias = torch.nn.Parameter(torch.cat(biases), requires_grad=False)
        ends = [sum(rows[: place + 1]) for place in range(len(rows))]
        self._slices = [slice(end - count, end) for end, count in zip(ends, rows, strict=True)]
        group = self

        class Part(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
            """Stands for one member; the first holds the matrix, so that modelopt finds it."""

            def __init__(self, place: int) -> None:
                super().__init__()
                self.place = place
                if place == 0:
                    self.joint = group.linear

            def forward(self, x: Any) -> Any:
                if group.last is None or group.last[0] is not x:
                    group.last = (x, group.first.joint(x))
                output = group.last[1][..., group._slices[self.place]]
                if self.place == len(group._members) - 1:
                    group.last = None
                return output

        self.last: Any = None
        for place, (parent, name, linear) in enumerate(members):
            part = Part(place)
            if place == 0:
                self.first = part
            let_go(linear.weight.data)
            linear.weight = linear.bias = None
            setattr(parent, name, part)

    def part_of(self, parent: Any) -> dict[str, Any]:
        """Names of the members below `parent`, and their rows of the matrix."""
        rows = zip(self._members, self._slices, strict=True)
        return {name: at for (owner, name, _), at in rows if owner is parent}

    def split(self, torch: Any) -> None:
        """Put the members back, with rows of the matrix as it is now."""
        joint = self.first.joint
        for (parent, name, linear), at in zip(self._members, self._slices, strict=True):
            linear.weight = torch.nn.Parameter(joint.weight.data[at], requires_grad=False)
            if joint.bias is not None:
                linear.bias = torch.nn.Parameter(joint.bias.data[at], requires_grad=False)
            setattr(parent, name, linear)


def let_go(tensor: Any) -> None:
    """Give back the memory of a weight that was copied, if it is a mapped part of a file (Linux).

    The mapping lives as long as any tensor in it, and so would the pages that were read. They are
    as in the file, so they come back from there should anybody read them again.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if sys.platform != "linux" or start >= end:
        return
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            place, _, rest = line.partition(" ")
            first, last = (int(part, 16) for part in place.split("-"))
            if first <= start and end <= last and rest.strip().endswith(".safetensors"):
                libc = ctypes.CDLL(None)
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 4)  # DONTNEED


def _grouped(torch: Any, layer: Any, run: Any) -> list[_Group]:
    """Join all matrices of a layer that read what a norm gives, by a look at a run."""
    made: dict[int, Any] = {}
    read: dict[int, list[tuple[Any, str, Any]]] = {}
    alive: list[Any] = []
    hooks = []

    def note_norm(module: Any, _: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            alive.append(output)  # ids of living tensors are distinct
            made[id(output)] = module

    for parent in layer.modules():
        for name, child in parent.named_children():
            if type(child).__name__.endswith("Norm"):
                hooks.append(child.register_forward_hook(note_norm))
            elif isinstance(child, torch.nn.Linear):

                def note_linear(
                    module: Any, inputs: Any, _: Any, parent: Any = parent, name: str = name
                ) -> None:
                    alive.append(inputs[0])
                    read.setdefault(id(inputs[0]), []).append((parent, name, module))

                hooks.append(child.register_forward_hook(note_linear))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [_Group(torch, made[key], found) for key, found in read.items() if key in made]


def _fold(torch: Any, layer: Any, groups: list[_Group]) -> dict[str, int]:
    """Give every scale to the norm or matrix before it; take back those that have none.

    Returns:
        How many matrices are ``scaled``, and of how many it was taken back (``unscaled``); those
        of a group count as one.
    """
    export: Any = importlib.import_module("modelopt.torch.export.quant_utils")
    calibration: Any = importlib.import_module("modelopt.torch.quantization.model_calib")

    def has_scale(module: Any) -> bool:
        return hasattr(getattr(module, "input_quantizer", None), "_pre_quant_scale")

    found = sum(has_scale(module) for module in layer.modules())
    for group in groups:
        export.fuse_prequant_layernorm(group.norm, [group.first.joint])
    for parent in list(layer.modules()):
        for into, behind in (("v_proj", "o_proj"), ("up_proj", "down_proj")):
            last: Any = getattr(parent, behind, None)
            # An MLP without a gate has its activation function between the two.
            if not has_scale(last) or (into == "up_proj" and not hasattr(parent, "gate_proj")):
                continue
            for group in groups:
                rows = group.part_of(parent).get(into)
                scale = last.input_quantizer._pre_quant_scale.flatten()
                # Heads that share values would have to share scales.
                if rows is None or rows.stop - rows.start != len(scale):
                    continue
                joint = group.first.joint
                joint.weight.data[rows] *= scale[:, None]
                if joint.bias is not None:
                    joint.bias.data[rows] *= scale
                del last.input_quantizer._pre_quant_scale
                break
    left = [module for module in layer.modules() if has_scale(module)]
    for module in left:
        calibration.disable_pre_quant_scale_and_resmooth(module, delete_pre_quant_scale=True)
    for group in groups:
        group.split(torch)
    return {"scaled": found - len(left), "unscaled": len(left)}


class _Weights:
    """Weights of a folder in 32 bits, whose numbers are exchanged in their places.

    Format: 8 bytes with the header's length, header, data (safetensors).
    """

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, tuple[Path, int, list[int]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            path.chmod(0o600)
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                if entry["dtype"] != "F32":
                    raise ValueError(f"{name} is not in 32 bits")
                self._places[name] = path, 8 + length + entry["data_offsets"][0], entry["shape"]

    def put(self, prefix: str, state: dict[str, Any]) -> None:
        """Write all weights whose names begin with `prefix`.

        Raises:
            ValueError: There are none, or one is not in `state`, or is of another form there.
        """
        names = [name for name in self._places if name.startswith(prefix)]
        if not names:
            raise ValueError(f"the file has no weights {prefix}…")
        for name in names:
            path, offset, shape = self._places[name]
            tensor = state.get(name.removeprefix(prefix))
            if tensor is None:
                raise ValueError(f"{name} is not a weight of the loaded model")
            array = tensor.detach().contiguous().numpy()
            if list(array.shape) != shape:
                raise ValueError(f"{name} has another form than in the file")
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(memoryview(array).cast("B"))


def _end_with_parent() -> None:
    """Have the kernel end this process when the one that started it is killed (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
