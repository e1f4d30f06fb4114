"""Weights that no training meant: found before anything is computed with them."""

from __future__ import annotations

from typing import Any

from nearfar.errors import ConversionError


def check_weights(module: Any, name: str) -> None:
    """Refuse parameters and buffers that are not finite.

    Args:
        module: A torch module.
        name: What to call it.

    Raises:
        ConversionError: One has NaN or infinite numbers; names it.
    """
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ConversionError(
                f"Weight {key!r} of {name} has NaN or infinite numbers",
                fix="Fetch the file again, or take weights of a training run that did not diverge",
            )
