"""What nearfar's pages for people have in common: one stylesheet, and charts as inline SVG.

Pages are one file each: no script, no font, no picture and no style from elsewhere, so that they
open without a network and may lie in a signed bundle.
"""

from __future__ import annotations

from importlib.resources import files


def house_style() -> str:
    """The stylesheet of all pages; light and dark by the reader's own setting."""
    return files("nearfar.pages").joinpath("house.css").read_text(encoding="utf-8")
