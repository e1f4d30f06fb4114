"""A headless Chromium that opens one file, without a network."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_TIMEOUT_S = 120.0


def find_browser() -> str:
    """Its path; skips the test where there is none."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("there is no Chromium on this machine")
    return found


def opened(
    page: Path, profile: Path, *, screenshot: Path | None = None, is_dark: bool = False
) -> str:
    """The document as the browser understood it; see Chromium's --dump-dom.

    Args:
        page: The HTML file.
        profile: A new folder for the browser's own files.
        screenshot: Where to put a picture of it.
        is_dark: Whether the reader likes it dark.
    """
    command = [
        find_browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--disable-dev-shm-usage", "--window-size=1280,1600", f"--user-data-dir={profile}",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking",
        "--no-first-run",
    ]  # fmt: skip
    if is_dark:
        command.append("--blink-settings=preferredColorScheme=0")
    command.append(f"--screenshot={screenshot}" if screenshot else "--dump-dom")
    done = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
