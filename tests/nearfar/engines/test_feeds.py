"""The check of inputs: what is wrong is named, what is right passes."""

from __future__ import annotations

import numpy as np
import pytest

from nearfar.bundle.manifest import TensorSpec
from nearfar.engines.feeds import FeedCheck
from nearfar.errors import InvalidInput

SPECS = (
    TensorSpec(name="ids", datatype="INT64", shape=(-1, -1)),
    TensorSpec(name="mask", datatype="INT64", shape=(-1, -1)),
    TensorSpec(name="image", datatype="FP32", shape=(-1, 3, 4)),
)
CHECK = FeedCheck(SPECS, [["batch", "length"], ["batch", "length"], ["batch", 3, 4]])
GOOD = {
    "ids": np.zeros((2, 5), np.int64),
    "mask": np.ones((2, 5), np.int64),
    "image": np.zeros((2, 3, 4), np.float32),
}


def refused(changes, *, without=()):
    feeds = {**GOOD, **changes}
    for name in without:
        del feeds[name]
    with pytest.raises(InvalidInput) as caught:
        CHECK(feeds)
    return caught.value


def test_feeds_that_fit_pass():
    CHECK(GOOD)


def test_a_missing_input_is_named_with_what_the_model_takes():
    error = refused({}, without=["mask"])
    assert error.field == "mask"
    assert "'mask' is missing" in str(error)
    assert "ids INT64[-1, -1], mask INT64[-1, -1], image FP32[-1, 3, 4]" in str(error)


def test_a_misspelt_name_is_pointed_out():
    error = refused({"masks": GOOD["mask"]}, without=["mask"])
    assert "'masks' is there instead" in str(error)


def test_an_extra_input_is_named():
    error = refused({"extra": GOOD["mask"]})
    assert error.field == "extra"
    assert "no input 'extra'" in str(error)


def test_a_missing_value_counts_as_a_missing_input():
    assert refused({"ids": None}).field == "ids"


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((2, 5), np.int32), "has dtype int32, expected int64 (INT64)"),
        (np.zeros((2, 5), np.float64), "has dtype float64, expected int64 (INT64)"),
        (np.zeros((2, 5), ">i8"), "has dtype >i8, expected int64 (INT64)"),
        ([[1, 2]], "is of type list, expected a numpy array"),
    ],
)
def test_a_wrong_type_is_said_beside_the_right_one(array, said):
    error = refused({"ids": array})
    assert error.field == "ids"
    assert said in str(error)
    assert "int64" in error.fix


@pytest.mark.parametrize("shape", [(3, 4), (2, 3), (2, 3, 5), (2, 3, 4, 1), ()])
def test_a_wrong_shape_is_said_beside_the_right_one(shape):
    error = refused({"image": np.zeros(shape, np.float32)})
    assert error.field == "image"
    assert f"shape {list(shape)}, expected [-1, 3, 4] (-1 is any size)" in str(error)


def test_the_likeliest_mistake_has_its_own_fix():
    assert "newaxis" in refused({"image": np.zeros((3, 4), np.float32)}).fix


def test_axes_that_are_one_to_the_model_must_agree():
    error = refused({"mask": np.ones((2, 6), np.int64)})
    assert error.field == "mask"
    assert "has size 6" in str(error)
    assert "has 5" in str(error)


def test_subclasses_of_arrays_pass(tmp_path):
    mapped = np.memmap(tmp_path / "ids", dtype=np.int64, mode="w+", shape=(2, 5))
    CHECK({**GOOD, "ids": mapped})


@pytest.mark.parametrize(
    "array", [np.array(["a", "b"]), np.array([b"a"], object), np.array([b"a"])]
)
def test_strings_may_come_in_any_form(array):
    check = FeedCheck([TensorSpec(name="text", datatype="BYTES", shape=(-1,))])
    check({"text": array})
    assert check.has_strings
    with pytest.raises(InvalidInput, match="BYTES"):
        check({"text": np.zeros(2)})
