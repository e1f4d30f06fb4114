from __future__ import annotations

import numpy as np
import pytest

from nearfar.errors import EngineError, InvalidInput
from nearfar.processing.classification import top_labels

LABELS = ("a", "b", "c")


def test_best_labels_come_first_with_the_scores_of_the_model():
    assert top_labels(np.array([0.25, 0.5, 0.125], np.float32), LABELS, 2) == [
        ("b", 0.5),
        ("a", 0.25),
    ]


def test_equal_scores_keep_the_order_of_the_labels():
    assert [label for label, _ in top_labels(np.ones(3), LABELS, 3)] == ["a", "b", "c"]


def test_a_batch_of_one_is_taken_as_its_row():
    assert top_labels(np.array([[0.0, 0.0, 1.0]]), LABELS) == [("c", 1.0)]


def test_asking_for_more_labels_than_there_are_gives_all():
    assert len(top_labels(np.arange(3.0), LABELS, 10)) == 3


def test_unsigned_scores_are_ordered_as_numbers():
    assert top_labels(np.array([3, 250, 7], np.uint8), LABELS)[0] == ("b", 250.0)


@pytest.mark.parametrize("shape", [(2,), (2, 3), (4,), ()])
def test_scores_that_do_not_fit_the_labels_are_refused(shape):
    with pytest.raises(InvalidInput, match="3 labels"):
        top_labels(np.zeros(shape), LABELS)


def test_asking_for_no_label_is_refused():
    with pytest.raises(InvalidInput, match="top_k is 0"):
        top_labels(np.zeros(3), LABELS, 0)


def test_no_label_is_the_best_of_scores_that_are_no_numbers():
    with pytest.raises(EngineError, match="NaN"):
        top_labels(np.full((1, 3), np.nan, np.float32), LABELS)
    assert top_labels(np.array([np.nan, 0.1, 0.2]), LABELS) == [("c", 0.2)]
