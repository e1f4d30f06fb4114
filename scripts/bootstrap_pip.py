"""Put pip into a virtual environment whose Python came without it (Debian splits it off).

Usage: VENV/bin/python scripts/bootstrap_pip.py

Runs before anything is installed, so it needs the standard library only. The newest wheel comes
from the package index over HTTPS, is compared with the SHA-256 stated there, and installs itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request

INDEX = "https://pypi.org/pypi/pip/json"
TIMEOUT_S = 60
MAX_BYTES = 32 << 20


def main() -> int:
    """Fetch, verify, install; 0 when pip is there."""
    try:
        wheel = next(
            item for item in json.loads(_get(INDEX))["urls"] if item["packagetype"] == "bdist_wheel"
        )
        data = _get(urllib.parse.urljoin(INDEX, wheel["url"]))
    except (urllib.error.URLError, OSError, ValueError, KeyError, StopIteration) as exc:
        return _fail(f"the package index cannot be read ({exc})")
    if hashlib.sha256(data).hexdigest() != wheel["digests"]["sha256"]:
        return _fail("the downloaded pip is not what the package index says it is")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, os.path.basename(wheel["filename"]))
        with open(path, "wb") as file:
            file.write(data)
        # A wheel is a zip archive, which Python runs from as it is.
        install = [sys.executable, os.path.join(path, "pip"), "install", "--quiet", "--no-index"]
        return subprocess.run([*install, path], check=False).returncode


def _get(url: str) -> bytes:
    if not url.startswith("https://"):
        raise ValueError(f"{url} is not an https address")
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:  # noqa: S310 (https, see above)
        data: bytes = answer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{url} is longer than {MAX_BYTES} bytes")
    return data


def _fail(problem: str) -> int:
    sys.stderr.write(
        f"error: {problem}. On Debian/Ubuntu `apt install python3-venv` brings pip along\n"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
