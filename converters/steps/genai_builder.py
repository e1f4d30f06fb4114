"""Run onnxruntime-genai's model builder, of a version that may be older than transformers 5.

transformers 5 keeps a model's rotary base in ``config.rope_parameters``. Builders up to
onnxruntime-genai 0.11 (the last for Python 3.10) look for ``config.rope_theta`` and quietly take
10,000 where it is missing, which makes another model. So the old name is given back, in this
process only: ``python -m converters.steps.genai_builder ARGUMENTS-OF-THE-BUILDER``.
"""

from __future__ import annotations

import runpy
from typing import Any

from converters.steps.apart import end_with_parent


class RopeTheta:
    """``config.rope_theta`` as it was before transformers 5; an attribute of that name wins."""

    def __get__(self, config: Any, owner: type) -> Any:
        parameters = getattr(config, "rope_parameters", None)
        if not isinstance(parameters, dict) or "rope_theta" not in parameters:
            raise AttributeError("rope_theta")
        return parameters["rope_theta"]


def main() -> None:
    """Run the builder with this process's arguments."""
    from transformers import PretrainedConfig

    end_with_parent()

    if not hasattr(PretrainedConfig, "rope_theta"):
        PretrainedConfig.rope_theta = RopeTheta()
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
