"""A text file that a person names, read whole."""

from __future__ import annotations

from pathlib import Path

from nearfar.errors import ConversionError

_MAX_BYTES = 64 << 20


def read_text_file(path: Path, what: str, *, less: str, form: str) -> str:
    """The text of a UTF-8 file.

    Args:
        path: The file.
        what: What its contents are to be, for the error: "texts".
        less: Why a part of it is enough, where it is too large.
        form: How such a file looks.

    Raises:
        ConversionError: It is larger than 64 MiB, or cannot be read.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConversionError(
                f"{path} is larger than {_MAX_BYTES >> 20} MiB", fix=f"Give a part of it: {less}"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConversionError(f"{path} cannot be read as {what} ({exc})", fix=form) from exc
