"""The laboratory's figures as pictures, for places where a page cannot go."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from benchmarks.routing.bench import ORACLE, Outcome
from benchmarks.routing.policies import OURS
from nearfar.errors import ConfigError

#: Field of a score -> what its picture is called and shows.
PICTURES = {
    "attainment": ("routing-attainment.png", "answered in time, %"),
    "p95_ms": ("routing-p95.png", "p95, ms"),
    "energy_j": ("routing-energy.png", "energy of the device for a request, J"),
    "cloud_calls": ("routing-cost.png", "cloud calls for 100 requests"),
}
_SHOWN = ((OURS, "#2563eb"), ("best static", "#94a3b8"), (ORACLE, "#16a34a"))
_INCHES_A_SCENARIO = 0.42


def require() -> None:
    """Say early that pictures cannot be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "Pictures are drawn with matplotlib, which is not installed",
            field="--plot",
            fix="pip install 'nearfar[plots]'",
        )


def write_pictures(outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """Write one PNG for each of `PICTURES`: scenarios from top to bottom, three bars each.

    Raises:
        ConfigError: matplotlib is not installed.
        OSError: The folder cannot be made or written to.
    """
    require()
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for field, (name, title) in PICTURES.items():
        figure = Figure(figsize=(9, 1.2 + _INCHES_A_SCENARIO * len(outcomes)), layout="constrained")
        axes = figure.subplots()
        for row, (shown, colour) in enumerate(_SHOWN):
            values = [
                outcome.mean(outcome.best_static if shown == "best static" else shown, field)
                for outcome in outcomes
            ]
            places = [index + (row - 1) * 0.27 for index in range(len(outcomes))]
            axes.barh(places, values, height=0.25, color=colour, label=shown)
        axes.set_yticks(range(len(outcomes)), [outcome.scenario.name for outcome in outcomes])
        axes.invert_yaxis()
        axes.set_xlabel(title)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
        path = folder / name
        figure.savefig(path, dpi=120)
        written.append(path)
    return written
