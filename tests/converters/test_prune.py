"""Pruning: narrower modules that still say the same, made the same way every time."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from converters.commands import convert
from converters.recipe_file import options_of, read_recipe
from converters.settings import PruneSettings
from converters.sources.torch_module import open_torch, open_training, run_module
from converters.steps.prune import prune_module
from nearfar.bundle import open_bundle
from nearfar.cli import run
from nearfar.errors import ConversionError

torch = pytest.importorskip("torch")
pytest.importorskip("torch_pruning")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

NETS = '''
import torch
from torch import nn


class Net(nn.Module):
    """Which half of an image is brighter; two heads, one branch that adds up."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.side = nn.Linear(16 * 4, 2)
        self.level = nn.Linear(16 * 4, 1)

    def forward(self, image):
        hidden = self.first(image)
        hidden = torch.relu(self.second(hidden) + hidden)
        hidden = nn.functional.adaptive_avg_pool2d(hidden, 2).flatten(1)
        return {"side": torch.softmax(self.side(hidden), -1), "level": self.level(hidden)}


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 8, 8, generator=generator)
    labels = torch.arange(count) % 2
    images[labels == 0, :, :4] += 0.5
    images[labels == 1, :, 4:] += 0.5
    return images, labels


def make():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    net, (images, labels) = Net(), rows(128, 1)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(15):
        made = net(images)
        loss = nn.functional.nll_loss(made["side"].clamp(min=1e-6).log(), labels)
        loss = loss + (made["level"][:, 0] - images.mean((1, 2, 3))).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.set_num_threads(threads)
    return net.eval()


def example_inputs():
    return rows(32, 2)[0]


def training_data():
    return rows(128, 1)


def wrong_data():
    return torch.rand(4, 1, 9, 9), torch.zeros(3)


def tiny():
    return nn.Linear(4, 2)


def tiny_inputs():
    return torch.ones(4, 4)
'''


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = f"pruned_nets_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


def nearfar_convert(*arguments: object) -> int:
    texts = [str(argument) for argument in arguments]
    return run(convert, texts, program="nearfar convert")


def test_half_of_every_layer_goes_and_both_heads_keep_their_form(nets):
    source = open_torch(f"{nets}:make")
    data = open_training(source, f"{nets}:training_data")
    settings = PruneSettings(ratio=0.5, recovery_epochs=10)
    first, again = (prune_module(source, settings, 3, data) for _ in range(2))
    assert first.weights_after < 0.4 * first.weights_before
    assert first.module.second.weight.shape[:2] == (8, 8)
    outputs = run_module(first.module, source.inputs)
    assert {name: array.shape for name, array in outputs.items()} == {
        name: array.shape for name, array in source.outputs.items()
    }
    same = (outputs["side"].argmax(1) == source.outputs["side"].argmax(1)).mean()
    assert same >= 0.9
    for name, tensor in first.module.state_dict().items():
        torch.testing.assert_close(tensor, again.module.state_dict()[name], rtol=0, atol=0)
    # The module itself is as it was.
    assert source.module.second.weight.shape[:2] == (16, 16)


def test_recovery_brings_back_what_cutting_cost(nets):
    source = open_torch(f"{nets}:make")
    data = open_training(source, f"{nets}:training_data")

    def error(epochs: int) -> float:
        settings = PruneSettings(ratio=0.75, recovery_epochs=epochs)
        outputs = run_module(prune_module(source, settings, 0, data).module, source.inputs)
        return float(np.abs(outputs["side"] - source.outputs["side"]).mean())

    assert error(20) < error(0) / 2


def test_layers_that_are_named_keep_their_width(nets):
    source = open_torch(f"{nets}:make")
    settings = PruneSettings(ratio=0.5, recovery_epochs=0, keep=("first.0",))
    # They add up, so what the second gives is as wide as what the first gives.
    with pytest.raises(ConversionError, match="Nothing of"):
        prune_module(source, settings, 0, None)
    with pytest.raises(ConversionError, match="has no layer 'third'"):
        prune_module(source, PruneSettings(ratio=0.5, keep=("third",)), 0, None)


def test_an_attention_layer_of_ones_own_keeps_its_form(monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    source = open_torch("nets:make_encoder", "nets:encoder_inputs", "batch=0,tokens=1")
    settings = PruneSettings(ratio=0.5, recovery_epochs=2)
    made = prune_module(source, settings, 0, None)
    assert made.weights_after < made.weights_before
    outputs = run_module(made.module, source.inputs)
    assert outputs["vector"].shape == source.outputs["vector"].shape


def test_one_command_prunes_rounds_and_compares_with_the_wide_model(nets, tmp_path, capsys):
    status = nearfar_convert(
        f"{nets}:make", "-o", tmp_path / "a", "--no-measure", "--prune", 0.5, "--int8", "static",
        "--train", f"{nets}:training_data", "--variants", "int8,pruned,fp32",
        "--save-recipe", tmp_path / "r.toml", "--no-cache",
    )  # fmt: skip
    assert status == 0
    assert "weights become" in capsys.readouterr().out
    bundle = open_bundle(tmp_path / "a")
    sizes = {variant.id: variant.size_bytes for variant in bundle.manifest.variants}
    assert list(sizes) == ["fp32", "pruned", "int8"]
    assert max(sizes["int8"], sizes["pruned"]) < sizes["fp32"] / 1.5
    errors = {
        variant.id: next(f.value for f in variant.quality if f.metric == "relative_error")
        for variant in bundle.manifest.variants
    }
    assert errors["fp32"] < 1e-5 < errors["pruned"] < 0.3
    assert "torch-pruning" in bundle.manifest.lineage.tools
    # That the same seed gives the same module is another test; here, that the recipe says all.
    recipe = read_recipe(tmp_path / "r.toml")
    options = options_of(recipe, tmp_path / "r.toml")
    assert options.train == f"{nets}:training_data"
    assert (options.settings.prune.ratio, options.settings.int8.method) == (0.5, "static")
    assert recipe.versions["torch-pruning"]


@pytest.mark.parametrize(
    ("factory", "more", "says"),
    [
        ("make", ("--prune", "1.5"), "not a share that can go"),
        ("make", ("--prune", "0.5", "--train", "{}:wrong_data"), "does not fit"),
        ("make", ("--prune", "0.5", "--train", "{}:nothing"), "cannot be imported"),
        ("tiny", ("--prune", "0.5", "--inputs", "{}:tiny_inputs"), "Nothing of"),
        ("make", ("--variants", "pruned"), "cannot be made of this model"),
    ],
)
def test_what_cannot_be_pruned_is_said(nets, tmp_path, capsys, factory, more, says):
    arguments = [part.format(nets) for part in more]
    assert nearfar_convert(f"{nets}:{factory}", "-o", tmp_path / "a", *arguments) != 0
    assert says in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "a").exists()


def test_a_dry_run_shows_what_pruning_would_do(nets, capsys):
    assert nearfar_convert(f"{nets}:make", "--prune", 0.5, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "prune and train for 20 epochs" in said
    assert "pruned" in said
