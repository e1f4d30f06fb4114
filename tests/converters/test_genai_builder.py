"""What old model builders need of new transformers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from converters.steps.genai_builder import RopeTheta


class Config(SimpleNamespace):
    """A configuration in the manner of transformers 5."""

    rope_theta = RopeTheta()


def test_rope_theta_is_read_from_the_rope_parameters():
    assert Config(rope_parameters={"rope_theta": 100_000.0}).rope_theta == 100_000.0


def test_an_attribute_of_its_own_wins():
    config = Config(rope_parameters={"rope_theta": 1.0})
    config.rope_theta = 2.0
    assert config.rope_theta == 2.0


@pytest.mark.parametrize("fields", [{}, {"rope_parameters": None}, {"rope_parameters": {}}])
def test_a_model_without_rotary_base_has_no_such_attribute(fields):
    assert not hasattr(Config(**fields), "rope_theta")
