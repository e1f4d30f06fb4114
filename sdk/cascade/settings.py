"""What a client was told about the cascade; all that is imported when nobody asks for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from nearfar.errors import ConfigError, InvalidInput

#: Part of the requests that are audited; at 200 requests a minute two of them.
AUDIT_SHARE = 0.01


class ModelCascade(msgspec.Struct, frozen=True, kw_only=True):
    """The cascade of one model, for requests that say nothing about it.

    Attributes:
        min_agreement: How often answers must agree with the cloud model's, above 0 and below 1.
        audit: Part of the requests on which the cloud is asked although the edge is sure, 0 to 1.
        require: Whether an answer that may not agree is an error instead of being marked.

    Raises:
        ConfigError: A field does not fit; `ConfigError.field` names it.
    """

    min_agreement: float
    audit: float = AUDIT_SHARE
    require: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.min_agreement < 1.0:
            raise ConfigError(
                f"'min_agreement' is {self.min_agreement!r}",
                field="min_agreement",
                fix="Give a number above 0 and below 1, as in min_agreement = 0.98",
            )
        if not 0.0 <= self.audit <= 1.0:
            raise ConfigError(
                f"'audit' is {self.audit!r}",
                field="audit",
                fix="Give a part of the requests, as in audit = 0.01; 0 turns it off",
            )


class CascadeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The ``[cascade]`` section.

    Attributes:
        calibrations: Folder of calibration files, ``MODEL.json`` each; `None` when there is none.
        audit: As in `ModelCascade`, for models without a section of their own.
        models: Model name to its cascade.
    """

    calibrations: Path | None = None
    audit: float = AUDIT_SHARE
    models: dict[str, ModelCascade] = {}


def checked(min_agreement: float | None, require_agreement: bool | None) -> dict[str, Any]:
    """What a call states, as fields of a `Request`; an agreement of 0 turns the cascade off.

    Raises:
        InvalidInput: The agreement is not a number from 0 to below 1.
    """
    if min_agreement is not None and not 0.0 <= min_agreement < 1.0:  # also catches NaN
        raise InvalidInput(
            f"min_agreement is {min_agreement!r}",
            field="min_agreement",
            fix="Give a number below 1 such as 0.98; 0 turns the cascade off. Only the cloud "
            "itself agrees always: mode='cloud_only'",
        )
    return {"min_agreement": min_agreement, "require_agreement": require_agreement}
