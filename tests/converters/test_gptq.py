"""Codes of four bits chosen by error feedback."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.settings import GptqSettings, Int4Settings, Settings, SlimSettings
from converters.steps.error_feedback import feedback_factor, round_with_feedback
from converters.steps.gguf_blocks import packed, unpacked
from converters.steps.gptq import HEAD, ChosenCodes, choose_codes
from converters.steps.verify_generation import CachedLogits
from nearfar.errors import ConfigError

pytest.importorskip("torch")
pytest.importorskip("onnxruntime_genai")

OUTPUTS, INPUTS, BLOCK = 48, 128, 32
GPTQ = Int4Settings(algorithm="gptq", gptq=GptqSettings(windows=1))
OPTIONS = ConversionOptions(
    variants=("int4", "fp32"), measure=False, settings=Settings(int4=GPTQ), cache=None
)


def inputs(seed: int = 0) -> np.ndarray:
    """Inputs that have much to do with each other, as those of language models have."""
    random = np.random.default_rng(seed)
    few = random.standard_normal((2000, 12)) @ random.standard_normal((12, INPUTS))
    rows: np.ndarray = (few + 0.3 * random.standard_normal((2000, INPUTS))).astype(np.float32)
    return rows


def weights() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((OUTPUTS, INPUTS)).astype(np.float32)


def test_the_factor_is_that_of_the_inverse():
    x = inputs()
    gram = x.T @ x / len(x)
    factor = feedback_factor(gram, 0.1)
    damped = gram.astype(np.float64) + 0.1 * gram.diagonal().mean() * np.eye(INPUTS)
    np.testing.assert_array_equal(factor, np.triu(factor))
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(INPUTS), atol=1e-3)


def test_products_lose_less_than_by_rounding_to_the_nearest():
    x, w = inputs(), weights()
    other = inputs()[1000:] + inputs(2)[:1000] / 10
    factor = feedback_factor(x.T @ x / len(x), 0.01)
    chosen = round_with_feedback(w, factor, block=BLOCK).dequantized()
    nearest = round_with_feedback(w, np.eye(INPUTS, dtype=np.float32), block=BLOCK).dequantized()
    assert (
        np.square(other @ (chosen - w).T).mean() < 0.3 * np.square(other @ (nearest - w).T).mean()
    )
    # What makes up for something is itself further off.
    assert np.square(chosen - w).mean() > np.square(nearest - w).mean()


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_the_nearest():
    w = weights()
    blocks = round_with_feedback(w, np.eye(INPUTS, dtype=np.float32), block=BLOCK)
    assert blocks.zero_points is not None
    steps = np.repeat(blocks.scales.astype(np.float32), BLOCK, axis=1)
    inside = (blocks.codes.reshape(OUTPUTS, -1) % 15) != 0
    assert (np.abs(blocks.dequantized() - w) <= 0.501 * steps)[inside].all()
    assert blocks.zero_points.max() <= 15


def test_an_input_that_is_always_zero_harms_nothing():
    x = inputs()
    x[:, 5] = 0
    factor = feedback_factor(x.T @ x / len(x), 0.01)
    w = weights()
    assert np.isfinite(factor).all()
    lost = round_with_feedback(w, factor, block=BLOCK).dequantized() - w
    assert np.square(x @ lost.T).mean() < 0.01 * np.square(x @ w.T).mean()


def test_a_matrix_of_zeros_stays_one():
    factor = feedback_factor(np.eye(INPUTS), 0.01)
    blocks = round_with_feedback(np.zeros((4, INPUTS), np.float32), factor, block=BLOCK)
    assert not blocks.dequantized().any()


def test_codes_are_packed_and_unpacked():
    codes = np.random.default_rng(0).integers(0, 16, (3, 2, BLOCK)).astype(np.uint8)
    np.testing.assert_array_equal(unpacked(packed(codes)), codes)


def test_codes_are_the_same_every_time(tiny_llama: Path, tmp_path: Path):
    told: list[str] = []
    for name in ("first.npz", "second.npz"):
        choose_codes(told.append, tiny_llama, tmp_path / name, GptqSettings(windows=1))
    first, second = (np.load(tmp_path / name) for name in ("first.npz", "second.npz"))
    assert sorted(first) == sorted(second)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert told[:2] == ["choose codes, layer 1 of 2", "choose codes, layer 2 of 2"]
    chosen = ChosenCodes(tmp_path / "first.npz")
    assert chosen["model.layers.1.mlp.down_proj.weight"] is not None
    assert chosen["model.layers.2.mlp.down_proj.weight"] is None
    head = chosen[HEAD]
    assert head is not None
    assert head.codes.shape == (512, 1, 64)


def test_a_head_of_eight_bits_is_not_chosen(tiny_llama: Path, tmp_path: Path):
    settings = GptqSettings(windows=1, head_bits=8)
    choose_codes(lambda _: None, tiny_llama, tmp_path / "codes.npz", settings)
    assert ChosenCodes(tmp_path / "codes.npz")[HEAD] is None


def test_a_conversion_takes_chosen_codes(tiny_llama: Path, tmp_path: Path):
    bundle = convert_model(tiny_llama, tmp_path / "bundle", OPTIONS)
    folder = bundle.variant_entry(bundle.variant("int4"))
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    # Query, key and value are one, gate and up are one; with the head nine.
    assert len(products) == 9
    numbers = {a.name: a.i for a in products[0].attribute}
    assert (numbers["bits"], numbers["block_size"]) == (4, 64)
    assert not [node for node in graph.node if node.op_type == "AveragePool"]
    ids = np.random.default_rng(0).integers(3, 512, 64)
    exact = CachedLogits(bundle.variant_entry(bundle.variant("fp32")))(ids)
    chosen = CachedLogits(folder)(ids)
    assert np.square(chosen - exact).mean() < 0.05 * np.square(exact).mean()


def test_codes_are_not_chosen_in_a_sliced_model(tiny_llama: Path, tmp_path: Path):
    settings = Settings(int4=GPTQ, slim=SlimSettings(drop_layers=1, recovery_steps=0))
    with pytest.raises(ConfigError, match="GPTQ does not look at texts"):
        convert_model(tiny_llama, tmp_path / "b", replace(OPTIONS, settings=settings))
