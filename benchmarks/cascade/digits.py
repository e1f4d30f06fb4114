"""Handwritten digits: a small CNN in 8 bits on the device, a larger one in the cloud.

scikit-learn's digits are 1,797 real images of 8 x 8 pixels (the test set of Alpaydin and Kaynak's
"Optical Recognition of Handwritten Digits", UCI). 600 train both models, 1,197 are the pool.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cascade.pairs import Pair, load, outputs_of

TRAINING_IMAGES = 600
#: (channels of both convolutions, width of the hidden layer, epochs)
SMALL, LARGE = ((8, 16), 32, 30), ((32, 64), 128, 30)
_INPUT, _OUTPUT = "image", "probability"


def digits(folder: Path, seed: int) -> list[Pair]:
    """Train, convert and run both models.

    Args:
        folder: Where bundles go.
        seed: Of weights, order of training, and choice of training images.

    Raises:
        EngineError: torch or scikit-learn is not installed.
        ConversionError: The models cannot be converted.
    """
    images, labels, training, pool = digit_images(seed)
    answers: dict[tuple[str, str], np.ndarray] = {}
    for name, size, variants in (("small", SMALL, ("int8",)), ("large", LARGE, ("int8", "fp32"))):
        source = folder / f"{name}.onnx"
        _export(source, trained(images[training], labels[training], size, seed), images[:2])
        _convert(source, folder / name, images[training], variants)
        for variant in variants:
            answers[name, variant] = outputs_of(
                folder / name, variant, _OUTPUT, lambda model: model.infer({_INPUT: images[pool]})
            )
    cloud = answers["large", "fp32"]
    return [
        Pair(
            name="digits CNN",
            edge=answers["small", "int8"],
            cloud=cloud,
            truth=labels[pool],
            detail=f"small CNN INT8 against large CNN FP32, trained on {len(training)} images",
        ),
        Pair(
            name="digits, one CNN",
            edge=answers["large", "int8"],
            cloud=cloud,
            truth=labels[pool],
            detail="large CNN INT8 against itself FP32",
        ),
    ]


def digit_images(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(images, labels, numbers of the training images, numbers of the others), drawn by `seed`."""
    data = load("sklearn.datasets").load_digits()
    images = (data.images[:, None] / 16.0).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(images))
    labels = data.target.astype(np.int64)
    return images, labels, order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]


def trained(
    images: np.ndarray, labels: np.ndarray, size: tuple[tuple[int, int], int, int], seed: int
) -> Any:
    """A CNN of that size, trained in seconds; a torch module."""
    torch = load("torch")
    (first, second), hidden, epochs = size
    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # batches this small take longer on several threads
    model = _network(torch, first, second, hidden)
    inputs, targets = torch.from_numpy(images), torch.from_numpy(labels)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(32):
            optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(model.scores(inputs[batch]), targets[batch])
            loss.backward()
            optimiser.step()
    torch.set_num_threads(threads)
    return model.eval()


def _export(path: Path, model: Any, images: np.ndarray) -> None:
    from converters.libraries import quiet

    torch = load("torch")
    axes = {0: torch.export.Dim("batch")}
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (torch.from_numpy(images),),
            dynamo=True,
            opset_version=18,
            input_names=[_INPUT],
            output_names=[_OUTPUT],
            dynamic_shapes=(axes,),
            verbose=False,
        )
    program.save(str(path), external_data=False)


def _network(torch: Any, first: int, second: int, hidden: int) -> Any:
    nn: Any = torch.nn

    class Network(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(1, first, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(first, second, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                nn.Linear(second * 4, hidden), nn.ReLU(), nn.Linear(hidden, 10),
            )  # fmt: skip

        def scores(self, image: Any) -> Any:
            return self.body(image)

        def forward(self, image: Any) -> Any:
            return torch.softmax(self.scores(image), dim=-1)

    return Network()


def _convert(source: Path, bundle: Path, samples: np.ndarray, variants: tuple[str, ...]) -> None:
    from converters.options import ConversionOptions
    from converters.pipeline import convert_model

    stored = source.with_suffix(".npz")
    np.savez(stored, **{_INPUT: samples[:256]})  # type: ignore[arg-type]
    options = ConversionOptions(
        name=source.stem,
        labels=tuple("0123456789"),
        variants=variants,
        samples=stored,
        measure=False,
        replace=True,
    )
    convert_model(source, bundle, options)
