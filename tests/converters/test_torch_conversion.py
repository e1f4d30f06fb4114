"""PyTorch modules of a person's own: one command each, or an error that teaches."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from converters.commands import convert
from converters.sources.torch_module import TorchSource, is_spec, open_torch
from nearfar.bundle import Bundle, open_bundle
from nearfar.cli import run
from nearfar.errors import ConversionError

torch = pytest.importorskip("torch")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def in_the_examples_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)


def nearfar_convert(*arguments: object) -> int:
    texts = [str(argument) for argument in arguments]
    return run(convert, texts, program="nearfar convert")


def commands() -> list[str]:
    """The commands that the example's own text shows."""
    text = (EXAMPLES / "nets.py").read_text().partition('"""')[2].partition('"""')[0]
    return re.findall(r"nearfar convert (.*)", text.replace("\\\n", " "))


def outputs(bundle: Bundle, variant_id: str, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    path = bundle.variant_entry(bundle.variant(variant_id))
    session = onnxruntime.InferenceSession(str(path))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("command", commands())
def test_each_network_of_the_example_converts_with_its_one_command(command: str, tmp_path: Path):
    arguments = command.split()
    arguments[arguments.index("-o") + 1] = str(tmp_path / "bundle")
    assert nearfar_convert(*arguments, "--no-measure") == 0
    bundle = open_bundle(tmp_path / "bundle")
    bundle.verify()
    import nets

    module = getattr(nets, arguments[0].partition(":")[2])().eval()
    # Another batch, and for the encoder another length, than the example inputs have.
    feeds: dict[str, np.ndarray] = {
        "make_mlp": {"input": np.ones((3, 30), np.float32)},
        "make_cnn": {"image": np.ones((3, 1, 8, 8), np.float32)},
        "make_encoder": {
            "ids": np.arange(1, 22).reshape(3, 7), "mask": np.ones((3, 7), np.int64),
        },
    }[arguments[0].partition(":")[2]]  # fmt: skip
    with torch.no_grad():
        made = module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    expected = made if isinstance(made, dict) else {"output": made}
    for variant in bundle.manifest.variants:
        found = outputs(bundle, variant.id, **feeds)
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            limit = 1e-5 if variant.id == "fp32" else 0.1
            np.testing.assert_allclose(found[name], tensor.numpy(), atol=limit)
    assert bundle.manifest.lineage.source == arguments[0]
    assert "torch" in bundle.manifest.lineage.tools


def test_free_sizes_have_the_names_that_were_given(tmp_path: Path):
    status = nearfar_convert(
        "nets:make_encoder", "-o", tmp_path / "b", "--no-measure",
        "--inputs", "nets:encoder_inputs", "--axes", "batch=0,tokens=1",
    )  # fmt: skip
    assert status == 0
    model = onnx.load(tmp_path / "b" / "fp32" / "model.onnx")
    assert [opset.version for opset in model.opset_import if not opset.domain] == [20]
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "ids": ["batch", "tokens"], "mask": ["batch", "tokens"],
        "vector": ["batch", 32], "score": ["batch", 1],
    }  # fmt: skip
    # Stack traces of the exporter name files of the converting machine.
    assert os.fsencode(EXAMPLES) not in (tmp_path / "b" / "fp32" / "model.onnx").read_bytes()


def test_a_recipe_repeats_it_byte_for_byte(tmp_path: Path):
    np.savez(tmp_path / "rows.npz", input=np.ones((4, 30), np.float32))
    first = ("-o", tmp_path / "a", "--inputs", tmp_path / "rows.npz", "--no-measure")
    recipe = tmp_path / "mlp.toml"
    assert nearfar_convert("nets:make_mlp", *first, "--save-recipe", recipe) == 0
    assert str(tmp_path) not in recipe.read_text()
    assert nearfar_convert("nets:make_mlp", "-o", tmp_path / "b", "--recipe", recipe) == 0
    for name in ("manifest.json", "fp32/model.onnx"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_dry_run_shows_the_plan(tmp_path: Path, capsys):
    arguments = ("nets:make_mlp", "--inputs", "nets:mlp_inputs", "--dry-run")
    assert nearfar_convert(*arguments) == 0
    assert "export to ONNX" in capsys.readouterr().out


NETS = """
import torch
from torch import nn

class Sorted(nn.Module):
    def forward(self, x, flag=None):
        while x.sum() > 0:
            x = x - x.sort().values
        return x

class Two(nn.Module):
    def forward(self, x, y):
        return x + y

class Odd(nn.Module):
    def forward(self, x):
        return "text"

class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(4, 3) * 2.0

def make():
    return nn.Linear(3, 2)

def nan():
    made = make()
    nn.init.constant_(made.weight, float("nan"))
    return made

def number():
    return 3

def failing():
    raise RuntimeError("no weights here")

def needs(path):
    return make()

def example_inputs():
    return torch.ones(4, 3)

def wrong():
    return torch.ones(4, 5)

def words():
    return "hello"

def pair():
    return torch.ones(2, 3), torch.ones(4, 3)

def too_many():
    return torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3)

def other_name():
    return {"z": torch.ones(2, 3)}
"""


@pytest.fixture
def nets_of_mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"nets_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("factory", "inputs", "axes", "says"),
    [
        ("nothing", None, None, "cannot be imported (AttributeError"),
        ("number", None, None, "gives int, which is no torch.nn.Module"),
        ("failing", None, None, "RuntimeError: no weights here"),
        ("needs", None, None, "cannot be called without arguments"),
        ("nan", None, None, "Weight 'weight' of"),
        ("make", "wrong", None, "does not take its example inputs (input [4, 5])"),
        ("make", "words", None, "is str, not a tensor"),
        ("make", "too_many", None, "There are 3 example inputs"),
        ("make", "other_name", None, "has no parameter 'z'; it has input"),
        ("make", "absent", None, "cannot be imported"),
        ("make", None, "batch", "'batch' does not name a free size"),
        ("make", None, "batch=y.0", "does not name a free size"),
        ("make", None, "batch=7", "No example input has an axis 7"),
        ("Two", "pair", None, "does not take its example inputs"),
        ("Odd", None, None, "it gives str"),
        ("Sorted", None, None, "torch.onnx cannot export"),
        ("Fixed", None, None, "torch.onnx cannot export"),
    ],
)
def test_what_cannot_be_converted_is_said(
    nets_of_mine: str, tmp_path: Path, capsys, factory: str, inputs, axes, says: str
):
    spec = f"{nets_of_mine}:{factory}"
    arguments: list[object] = [spec, "-o", tmp_path / "out" / "b", "--no-measure"]
    arguments += ["--inputs", f"{nets_of_mine}:{inputs}"] if inputs else []
    arguments += ["--axes", axes] if axes else []
    assert nearfar_convert(*arguments) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert says in said
    # Nothing half made is left.
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_sizes_that_differ_cannot_have_one_name(tmp_path: Path, monkeypatch):
    (tmp_path / "nets_sizes.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Cell(nn.Module):\n    def forward(self, x, state):\n        return x + state[0]\n"
        "def example_inputs():\n    return torch.ones(4, 3), torch.ones(1, 4, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionError, match="Size 'batch' is 1 and 4"):
        open_torch("nets_sizes:Cell")
    source = open_torch("nets_sizes:Cell", axes="batch=x.0,batch=state.1")
    assert source.axes == {("x", 0): "batch", ("state", 1): "batch"}


def test_a_file_of_that_name_is_a_file(tmp_path: Path):
    assert is_spec(Path("nets:make_mlp"))
    assert not is_spec(Path("nets.py"))
    assert not is_spec(Path("C:/models/nets.onnx"))
    (tmp_path / "a:b").write_text("")
    assert not is_spec(tmp_path / "a:b")


def test_the_digest_tells_weights_and_inputs_apart():
    def digest(spec: str, inputs: str) -> str:
        source = open_torch(spec, inputs)
        assert isinstance(source, TorchSource)
        return source.digest()

    first = digest("nets:make_mlp", "nets:mlp_inputs")
    assert first == digest("nets:make_mlp", "nets:mlp_inputs")
    assert first != digest("nets:make_cnn", "nets:cnn_inputs")


def test_options_of_modules_are_refused_for_files(tmp_path: Path, capsys):
    (tmp_path / "m.onnx").write_bytes(b"x")
    assert nearfar_convert(tmp_path / "m.onnx", "-o", tmp_path / "b", "--axes", "batch=0") == 1
    assert "for PyTorch modules" in capsys.readouterr().err
