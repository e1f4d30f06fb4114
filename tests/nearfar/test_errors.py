"""The error tree: texts, codes, and survival of the wire and of pickling."""

from __future__ import annotations

import pickle

import pytest

from nearfar import errors
from nearfar.errors import NearfarError, StreamInterrupted, from_code


def every_error() -> list[type[NearfarError]]:
    return errors._all_subclasses(NearfarError)


def test_codes_are_unique_and_lead_back_to_the_class():
    classes = every_error()
    assert len({cls.code for cls in classes}) == len(classes)
    for cls in classes:
        assert type(from_code(cls.code, "It broke", "Mend it")) is cls


def test_unknown_code_becomes_the_root_error():
    assert type(from_code("from_the_future", "It broke")) is NearfarError


@pytest.mark.parametrize("cls", every_error())
def test_text_says_the_problem_then_the_fix(cls):
    assert str(cls("It broke", fix="Mend it")) == "It broke. Mend it."
    assert str(cls("It broke")) == "It broke."


def test_pickling_keeps_the_fields():
    error = StreamInterrupted("The cloud went away", received_tokens=7, fix="Ask again")
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, StreamInterrupted)
    assert (copy.problem, copy.fix, copy.received_tokens) == (error.problem, error.fix, 7)


def test_every_class_of_the_tree_is_drawn_in_the_module_docstring():
    assert errors.__doc__ is not None
    for cls in every_error():
        assert cls.__name__ in errors.__doc__


def test_refusals_are_never_retryable():
    for cls in (errors.PolicyDenied, errors.SecurityError, errors.InvalidInput):
        assert not cls.retryable
