"""Transformer layers of one's own: what says least goes, and the rest learns to say the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.plan import plan
from converters.settings import PruneSettings, Settings, SlimSettings
from converters.slim.module import slim_module
from converters.sources.torch_module import TorchSource, TrainingData, open_torch
from nearfar.errors import ConfigError, ConversionError

torch = pytest.importorskip("torch")

NETS = '''
import torch
from torch import nn


class Net(nn.Module):
    """Three layers in a stack, one alone; layer 1 does nothing, nor do half of the channels."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True, norm_first=True)
        self.stack = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.alone = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 3)
        with torch.no_grad():
            for number, part in enumerate((*self.stack.layers, self.alone)):
                part.linear1.weight.normal_(0, 0.5)
                part.linear1.weight[::2] = 0
                part.linear1.bias[::2] = -1
                if number == 1:
                    part.linear2.weight.zero_(), part.linear2.bias.zero_()
                    part.self_attn.out_proj.weight.zero_(), part.self_attn.out_proj.bias.zero_()

    def forward(self, rows):
        return self.head(self.alone(self.stack(rows)).mean(1))


class Fixed(Net):
    """Knows its layers by number."""

    def forward(self, rows):
        for number in range(3):
            rows = self.stack.layers[number](rows)
        return self.head(rows.mean(1))


def make():
    torch.manual_seed(0)
    return Net()


def make_fixed():
    return Fixed()


def make_mlp():
    return nn.Sequential(nn.Linear(16, 3))


def example_inputs():
    return torch.randn(24, 5, 16, generator=torch.Generator().manual_seed(1))


def training_data():
    return torch.randn(64, 5, 16, generator=torch.Generator().manual_seed(2))
'''


@pytest.fixture(autouse=True)
def in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slimnets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)


def opened(factory: str = "make") -> TorchSource:
    return open_torch(f"slimnets:{factory}", axes="batch=0,tokens=1")


def test_a_layer_and_channels_that_do_nothing_go_and_nothing_is_lost():
    source = opened()
    settings = SlimSettings(drop_layers=1, keep_mlp=0.5, recovery_steps=0)
    made = slim_module(source, settings, 0, None)
    assert "1 of 4 layers dropped (1, counted from 0)" in made.said
    assert len(made.module.stack.layers) == made.module.stack.num_layers == 2
    for layer in (*made.module.stack.layers, made.module.alone):
        assert (layer.linear1.out_features, layer.linear2.in_features) == (32, 32)
    rows = source.inputs["rows"]
    with torch.no_grad():
        torch.testing.assert_close(made.module(rows), source.module(rows), rtol=1e-4, atol=1e-5)
    assert len(source.module.stack.layers) == 3  # the whole one is as it was


def test_training_brings_back_what_slicing_took_and_repeats_itself():
    source = opened()
    data = TrainingData(
        {"rows": torch.randn(64, 5, 16, generator=torch.Generator().manual_seed(2))}
    )
    cut = SlimSettings(drop_layers=(0,), recovery_steps=0)
    trained = SlimSettings(drop_layers=(0,), recovery_steps=60, learning_rate=3e-3)
    rows = source.inputs["rows"]
    errors, results = [], []
    for settings in (cut, trained, trained):
        made = slim_module(source, settings, 0, data)
        with torch.no_grad():
            results.append(made.module(rows))
            errors.append(float((results[-1] - source.module(rows)).square().mean()))
    assert errors[1] < 0.5 * errors[0]
    assert torch.equal(results[1], results[2])


@pytest.mark.parametrize(
    ("factory", "settings", "field"),
    [
        ("make_mlp", SlimSettings(drop_layers=1), "slim"),
        ("make", SlimSettings(drop_layers=3), "slim.drop_layers"),
        ("make", SlimSettings(drop_layers=(3,)), "slim.drop_layers"),  # alone: in no stack
        ("make", SlimSettings(drop_layers=(0, 1, 2)), "slim.drop_layers"),
        ("make", SlimSettings(keep_heads=1), "slim.keep_heads"),
        ("make", SlimSettings(keep_mlp=0.01), "slim.keep_mlp"),
    ],
)
def test_what_cannot_go_is_told_before_anything_is_done(
    factory: str, settings: SlimSettings, field: str
):
    options = ConversionOptions(settings=Settings(slim=settings))
    with pytest.raises(ConfigError) as caught:
        plan(opened(factory), options)
    assert caught.value.field == field


def test_a_module_is_not_pruned_and_sliced_at_once():
    both = Settings(slim=SlimSettings(drop_layers=1), prune=PruneSettings(ratio=0.5))
    with pytest.raises(ConfigError, match="not both"):
        plan(opened(), ConversionOptions(settings=both))


def test_a_module_that_counts_on_its_layers_says_so():
    with pytest.raises(ConversionError, match=r"does not run without its layers stack\.layers\."):
        slim_module(opened("make_fixed"), SlimSettings(drop_layers=1, recovery_steps=0), 0, None)


def test_the_sliced_module_and_what_is_made_of_it_are_in_the_bundle(tmp_path: Path):
    settings = Settings(
        slim=SlimSettings(drop_layers=1, keep_mlp=0.5, recovery_steps=5, learning_rate=1e-4)
    )
    options = ConversionOptions(
        name="net", axes="batch=0,tokens=1", train="slimnets:training_data", measure=False,
        variants=("fp32", "slim", "int8"), settings=settings,
    )  # fmt: skip
    assert plan(opened(), options).variants == ("fp32", "slim", "int8")
    bundle = convert_model(Path("slimnets:make"), tmp_path / "bundle", options)
    sizes = {one.id: one.size_bytes for one in bundle.manifest.variants}
    assert sizes["slim"] < 0.7 * sizes["fp32"]
    for one in bundle.manifest.variants:
        values = {figure.metric: figure.value for figure in one.quality}
        assert values["relative_error"] < 0.2
    assert "1 of 4 layers dropped" in (bundle.path / "report.html").read_text()
