"""Steps in processes of their own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import pytest

from converters.steps.apart import give_back, run_apart, run_apart_telling
from nearfar.errors import ConversionError, InvalidInput

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ends processes by signals")


def add(one: int, *, other: int) -> tuple[int, int]:
    print("what a step prints is not its answer")
    return one + other, os.getpid()


def refuse() -> None:
    raise InvalidInput("The number is odd", field="number", fix="Use an even one")


def fail() -> None:
    raise RuntimeError("no such thing")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_answer_comes_from_another_process():
    total, pid = run_apart(add, 2, other=3)
    assert total == 5
    assert pid != os.getpid()


def test_typed_errors_come_back_whole():
    with pytest.raises(InvalidInput, match="The number is odd") as caught:
        run_apart(refuse)
    assert (caught.value.field, caught.value.fix) == ("number", "Use an even one")


def test_other_errors_and_deaths_are_told():
    with pytest.raises(ConversionError, match="RuntimeError: no such thing"):
        run_apart(fail)
    with pytest.raises(ConversionError, match="status -9") as caught:
        run_apart(die)
    assert "memory" in caught.value.fix


def test_giving_memory_back_needs_no_memory():
    give_back()


def tell_and_add(tell: Callable[[str], None], one: int, *, other: int) -> int:
    tell("first")
    print("what a step prints is not its answer")
    tell("second")
    return one + other


def test_what_a_step_tells_arrives_before_its_answer():
    told: list[str] = []
    assert run_apart_telling(told.append, tell_and_add, 2, other=3) == 5
    assert told == ["first", "second"]
