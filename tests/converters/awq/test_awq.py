"""AWQ: scales come from another environment, the rounding is ours."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from converters import texts
from converters.awq import calibrate as calibration
from converters.awq.blocks import round_to_nearest
from converters.awq.calibrate import WINDOW_TOKENS, calibrate, calibration_windows
from converters.awq.environment import INTERPRETER_VARIABLE, VERSIONS, Interpreter
from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.recipes import awq as recipe
from converters.reporting import Step
from converters.settings import AwqSettings, Int4Settings, Settings
from converters.steps.gguf_blocks import BLOCK, matrix_of
from nearfar.errors import ConversionError

pytest.importorskip("torch")
pytest.importorskip("onnxruntime_genai")

AWQ = Int4Settings(algorithm="awq", awq=AwqSettings(windows=1))
HERE = Interpreter(sys.executable, dict(VERSIONS))

#: Does as the worker does, without modelopt: the first norm's numbers are doubled, and what reads
#: them halved, so that the model stays the same.
SCALE = """
import json, shutil, sys
from pathlib import Path
from safetensors.numpy import load_file, save_file
job = json.load(sys.stdin)
shutil.copytree(job["model"], job["target"])
path = Path(job["target"]) / "model.safetensors"
tensors = dict(load_file(path))
layer = "model.layers.0."
tensors[layer + "input_layernorm.weight"] *= 2
for name in "qkv":
    tensors[f"{layer}self_attn.{name}_proj.weight"] /= 2
save_file(tensors, path, metadata={"format": "pt"})
print(json.dumps({"event": "progress", "text": "fold"}), flush=True)
print(json.dumps({"event": "done", "max_error": 1e-6, "scaled": 1, "unscaled": 7}))
"""


def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = tmp_path / "worker.py"
    path.write_text(script)
    monkeypatch.setattr(calibration, "_WORKER", path)


def test_weights_are_off_by_half_a_step_at_most():
    random = np.random.default_rng(0)
    weights = random.standard_normal((40, 96)).astype(np.float32)
    weights[3, :BLOCK] = 0
    blocks = round_to_nearest(weights)
    steps = np.abs(weights.reshape(40, -1, BLOCK)).max(axis=-1) / 7
    errors = np.abs(matrix_of(blocks, digits=0).effective() - weights).reshape(40, -1, BLOCK)
    # Steps in half precision add their own rounding, at most seven times.
    assert (errors.max(axis=-1) <= steps * (0.5 + 7 / 2048) + 1e-9).all()
    assert (blocks.bits, blocks.minima, blocks.scales.dtype) == (4, None, np.float16)
    np.testing.assert_array_equal(blocks.dequantized()[3, :BLOCK], 0)


def test_numbers_that_lie_on_the_grid_are_exact():
    random = np.random.default_rng(1)
    codes = random.integers(-7, 8, (8, 2, BLOCK))
    codes[..., 0] = 7
    scales = random.integers(1, 1000, (8, 2, 1)) / np.float32(1024)
    weights = (codes * scales).reshape(8, -1).astype(np.float32)
    np.testing.assert_array_equal(round_to_nearest(weights).dequantized(), weights)


def test_scales_beyond_half_precision_stay_in_single():
    weights = np.full((2, BLOCK), 1e-6, np.float32)
    blocks = round_to_nearest(weights)
    assert blocks.scales.dtype == np.float32
    np.testing.assert_allclose(blocks.dequantized(), weights, rtol=1e-6)


def test_it_is_calibrated_on_other_texts_than_it_is_judged_on(tiny_llama: Path):
    found = calibration_windows(tiny_llama / "tokenizer.json", 3)
    assert found.shape == (3, WINDOW_TOKENS)
    judged = texts.prose()
    assert not any(passage in judged for passage in texts.calibration_passages(200))


def test_a_language_model_gets_scaled_blocks(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    worker(tmp_path, monkeypatch, SCALE)
    monkeypatch.setattr(recipe, "ready", lambda root, reporter: HERE)
    options = ConversionOptions(measure=False, golden=False, settings=Settings(int4=AWQ))
    bundle = convert_model(tiny_llama, tmp_path / "tiny", options)
    fp32, int4 = ({f.metric: f.value for f in v.quality} for v in bundle.manifest.variants)
    assert 0.8 < int4["perplexity"] / fp32["perplexity"] < 1.25
    assert int4["top1_agreement"] > 0.7
    assert bundle.manifest.lineage.tools["nvidia-modelopt"] == VERSIONS["nvidia-modelopt"]
    graphs = {
        key: onnx.load(str(bundle.path / key / "model.onnx"), load_external_data=False).graph
        for key in ("fp32", "int4")
    }
    products = [node for node in graphs["int4"].node if node.op_type == "MatMulNBits"]
    bits = [next(a.i for a in node.attribute if a.name == "bits") for node in products]
    # Query, key and value are one; so are gate and up, here after they were rounded; and the head.
    assert sorted(bits) == [4] * 8 + [8]
    # The scale that was taken from the matrix is in the norm; full precision has neither.
    norms = {}
    for key, graph in graphs.items():
        (tensor,) = (t for t in graph.initializer if t.name.endswith("0.input_layernorm.weight"))
        norms[key] = onnx.numpy_helper.to_array(tensor, str(bundle.path / key))
    np.testing.assert_array_equal(norms["int4"], 2 * norms["fp32"])


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ('{"event": "failed", "text": "KeyError: experts"}', "KeyError: experts"),
        ('{"event": "done", "max_error": 3.0}', "another one: logits differ by 3"),
        ('{"event": "done", "max_error": NaN}', "could not scale"),
        ("", "status 0"),
    ],
)
def test_what_goes_wrong_there_is_told(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str, words: str
):
    worker(tmp_path, monkeypatch, f"import sys; sys.stdin.read(); print({event!r})")
    with pytest.raises(ConversionError, match=words):
        calibrate(tiny_llama, tmp_path / "scaled", HERE, AWQ, max_error=0.1, step=Step())


@pytest.mark.skipif(
    not os.environ.get(INTERPRETER_VARIABLE), reason=f"needs modelopt ({INTERPRETER_VARIABLE})"
)
@pytest.mark.parametrize("shared_heads", [2, 4])
def test_modelopt_leaves_the_model_what_it_was(tmp_path: Path, shared_heads: int):
    from tests.support.tiny_models import write_tiny_llama

    model = write_tiny_llama(tmp_path / "model", num_key_value_heads=shared_heads)
    python = Interpreter(os.environ[INTERPRETER_VARIABLE], {})
    done = calibrate(model, tmp_path / "scaled", python, AWQ, max_error=1e-4, step=Step())
    # Two layers; values that serve several heads cannot take the scales of what follows.
    assert (done.scaled, done.unscaled) == ((8, 0) if shared_heads == 4 else (6, 2))
