"""The two things a new user tries first: `nearfar quickstart` and the README's example."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nearfar.bundle import BundleStore

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def quickstart(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Terminal output and report of one run in the shared workspace."""
    report = tmp_path_factory.mktemp("quickstart") / "report.html"
    done = subprocess.run(
        [sys.executable, "-m", "nearfar", "quickstart", "--workspace", str(workspace),
         "--report", str(report)],
        capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, report.read_text(encoding="utf-8")


def test_every_promise_of_the_quickstart_is_kept(quickstart):
    terminal, report = quickstart
    assert "✗" not in terminal
    assert terminal.count("✓") >= 15
    assert "15/15" in report


def test_personal_data_stays_and_unmatched_requests_are_denied(quickstart):
    terminal, _ = quickstart
    rows = [line for line in terminal.splitlines() if re.match(r"\s+✓ \w+ +\([a-e]\)", line)]
    assert [row.split()[-1] for row in rows if "(b)" in row] == ["edge"] * 3
    assert [row.split()[-1] for row in rows if "(e)" in row] == ["denied"] * 3


def test_the_cloud_is_stopped_at_the_end(quickstart, workspace):
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    servers = [line for line in processes.stdout.splitlines() if "cloud_runtime serve" in line]
    # Others of this machine may serve as well.
    assert not [line for line in servers if str(workspace) in line]


def test_every_variant_carries_figures_against_its_reference(bundles_dir):
    manifests = {m.name: m for m in BundleStore(bundles_dir).models()}
    assert set(manifests) == {"assistant", "minilm", "file-type"}
    assert {v.id for v in manifests["assistant"].variants} == {"int4", "fp32"}
    assert {v.id for v in manifests["minilm"].variants} == {"int8", "fp32"}
    for manifest in manifests.values():
        for variant in manifest.variants:
            assert variant.quality, f"{manifest.name}/{variant.id} was not compared"
            assert variant.latency, f"{manifest.name}/{variant.id} was not timed"


def test_the_readme_example_runs_as_it_stands(quickstart, workspace, tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", readme, re.S).group(1)
    (tmp_path / ".nearfar").symlink_to(workspace)
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("markdown edge")
    assert "personal-stays-here" in done.stdout
