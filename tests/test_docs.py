"""The documentation: links lead somewhere, and every page can be found from the index."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]


def targets(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path):
    for target in targets(page):
        if "://" in target or target.startswith("#"):
            continue
        path = (page.parent / target.partition("#")[0]).resolve()
        assert path.exists(), f"{page.name} links to {target}"


def test_the_index_leads_to_every_page():
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target).resolve() for target in targets(index)}
    missing = [p for p in (ROOT / "docs").rglob("*.md") if p != index and p not in linked]
    assert missing == []


def test_every_command_the_readme_names_exists():
    from importlib.metadata import entry_points

    names = {point.name for point in entry_points(group="nearfar.commands")}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"`nearfar ([a-z]+)", text))
    assert used
    assert used <= names


def test_every_make_target_the_readme_names_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make ([a-z]+)", readme, re.M)):
        assert re.search(rf"^{target}:.*## ", makefile, re.M)
