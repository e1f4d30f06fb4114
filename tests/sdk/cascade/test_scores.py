"""Scores of classifiers and vectors, and when two answers are the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nearfar.errors import BundleError, InvalidInput
from sdk.cascade.scores import (
    CLASS_SCORES,
    class_scores,
    confidence,
    cosine,
    probabilities,
    same_class,
    task_of,
    typicality,
    vectors,
)
from tests.support.scripted_cloud import EMBEDDING, STORY, TENSOR, manifest

ROWS = arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(2, 6)),
    elements=st.floats(-50, 50),
)


@given(ROWS)
def test_logits_become_probabilities_and_probabilities_stay(rows):
    share = probabilities(rows)
    assert np.allclose(share.sum(axis=-1), 1.0)
    assert np.allclose(probabilities(share), share)
    assert (share.argmax(-1) == rows.argmax(-1)).all() or np.isclose(
        np.sort(rows, -1)[:, -1], np.sort(rows, -1)[:, -2]
    ).any()


@pytest.mark.parametrize("name", CLASS_SCORES)
def test_surer_rows_score_higher_and_what_is_not_finite_scores_lowest(name):
    rows = np.array([[0.34, 0.33, 0.33], [0.6, 0.3, 0.1], [0.98, 0.01, 0.01], [np.nan, 1, 0]])
    unsure, surer, sure, broken = confidence(name, rows)
    assert unsure < surer < sure
    assert broken == -np.inf
    assert confidence(name, np.array([[np.inf, 0.0]]))[0] == -np.inf


def test_scores_are_the_textbooks():
    row = np.array([[0.7, 0.2, 0.1]])
    assert confidence("max_probability", row)[0] == pytest.approx(0.7)
    assert confidence("margin", row)[0] == pytest.approx(np.log(0.7 / 0.2))
    entropy = -(row * np.log(row)).sum()
    assert confidence("entropy", row)[0] == pytest.approx(1 - entropy / np.log(3))
    assert confidence("margin", np.array([[1.0, 0.0]]))[0] < np.inf
    assert confidence("margin", np.array([[1.0]]))[0] == -np.inf  # one class says nothing
    with pytest.raises(ValueError, match="typicality"):
        confidence("typicality", row)


def test_vectors_are_compared_by_their_direction():
    rows = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [np.nan, 1.0]])
    assert cosine(rows, rows).tolist() == [1.0, 1.0, -np.inf, -np.inf]
    assert typicality(rows, np.array([1.0, 0.0])).tolist() == [1.0, 0.0, -np.inf, -np.inf]


def test_answers_that_are_not_finite_never_agree():
    edge = np.array([[0.9, 0.1], [0.9, 0.1], [np.nan, 0.1]])
    cloud = np.array([[0.6, 0.4], [0.4, 0.6], [np.nan, 0.1]])
    assert same_class(edge, cloud).tolist() == [True, False, False]


def test_models_that_cannot_cascade_say_why():
    assert task_of(STORY) == "text-generation"
    with pytest.raises(InvalidInput, match="share one vector space"):
        task_of(EMBEDDING)
    with pytest.raises(InvalidInput, match="class scores"):
        task_of(TENSOR)
    assert task_of(manifest("e", "embedding", mixed_routes=True)) == "embedding"
    assert task_of(manifest("t", "tensor", label_output="y")) == "classification"
    with pytest.raises(InvalidInput, match="Several classes of 'm' may be true"):
        task_of(manifest("m", "classification", label_output="y", multi_label=True))


def test_outputs_are_found_by_the_manifest_or_refused():
    labelled = manifest("c", "classification", label_output="y")
    outputs = {"x": np.ones(2), "y": np.ones((1, 2), np.float32)}
    assert class_scores(outputs, labelled).dtype == np.float64
    with pytest.raises(BundleError, match="is missing"):
        class_scores({"x": np.ones((1, 2))}, labelled)
    with pytest.raises(BundleError, match=r"has shape \[2\]"):
        vectors({"x": np.ones(2)}, manifest("e", "embedding"))
