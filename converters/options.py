"""What a person can choose about a conversion."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from converters.settings import Settings, Trial
from nearfar.bundle.manifest import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionOptions:
    """Settings of one conversion.

    Attributes:
        name: The bundle's name; `None` derives it from the source.
        version: The bundle's semantic version.
        task: `None` finds it out from the source.
        variants: Ids of the variants to make, such as ``int4``; empty takes the task's default.
        labels: Class names of a classifier, or a file with them: one a line, or a JSON list.
        preprocessing: JSON text, or a file with it, in the form the manifest has.
        samples: ``.npz`` with real inputs to verify an ONNX model with, one row each; of models
            that see or hear, a folder with images or WAV files; of those that read, a text file.
        inputs: Example inputs of a PyTorch module: ``package.module:function`` or an ``.npz``;
            `None` takes ``example_inputs`` beside the factory.
        axes: Its free sizes, such as ``batch=0,tokens=1``; `None` frees the first axis.
        train: What to train a pruned module on: ``package.module:function`` or an ``.npz``; `None`
            takes its example inputs.
        allow_pickle: Whether to read a folder's weights that exist as pickles only.
        license: SPDX expression; empty takes what the source states.
        description: One line for people.
        replace: Whether an existing bundle may be replaced.
        measure: Whether to measure speed and memory on this machine.
        keep_work: Whether to keep the intermediate files beside the bundle.
        sign: File of the private key to sign the bundle with; `None` leaves it unsigned.
        golden: Whether to put golden inputs and outputs into the bundle.
        cache: Folder with results of earlier steps, to take and to add to; `None` for none.
        trials: Variants to make with settings of their own and to put into one bundle; those that
            a search (`converters.search`) found, when its recipe is repeated.
        settings: Numbers of the steps: quantization, gates, seed.
    """

    name: str | None = None
    version: str = "1.0.0"
    task: Task | None = None
    variants: tuple[str, ...] = ()
    labels: Path | tuple[str, ...] | None = None
    preprocessing: str | None = None
    samples: Path | None = None
    inputs: str | None = None
    axes: str | None = None
    train: str | None = None
    allow_pickle: bool = False
    license: str = ""
    description: str = ""
    replace: bool = False
    measure: bool = True
    keep_work: bool = False
    sign: Path | None = None
    golden: bool = True
    cache: Path | None = None
    trials: tuple[Trial, ...] = ()
    settings: Settings = field(default_factory=Settings)
