"""Metrics of classification against scikit-learn and against their definitions, image by image."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from vlm_jax.evals.base import EvalError
from vlm_jax.evals.classification import (
    average_precision,
    label_ranks,
    multi_label_metrics,
    single_label_metrics,
    voc07_average_precision,
)


def voc07(scores, positive):
    """The devkit's loop: precision of each list of the first images, the best one at each of eleven recalls."""
    points = []
    for threshold in scores:
        kept = scores >= threshold
        points.append((int((kept & positive).sum()), (kept & positive).sum() / kept.sum()))
    best = [max(p for hits, p in points if 10 * hits >= tenths * positive.sum()) for tenths in range(11)]
    return sum(best) / 11


@pytest.mark.parametrize("levels", [3, 10**6])
@pytest.mark.parametrize("count", [1, 10, 57])
def test_average_precision_equals_its_definitions(levels, count):
    rng = np.random.default_rng(count)
    for _ in range(20):
        scores = rng.integers(0, levels, count) / levels  # three levels: many ties
        positive = rng.random(count) < 0.3
        positive[rng.integers(count)] = True
        assert average_precision(scores, positive) == pytest.approx(average_precision_score(positive, scores))
        assert voc07_average_precision(scores, positive) == pytest.approx(voc07(scores, positive))


def test_average_precision_of_a_list_by_hand():
    scores, positive = np.asarray([0.9, 0.8, 0.7, 0.6]), np.asarray([True, False, True, False])
    assert average_precision(scores, positive) == pytest.approx((1 + 2 / 3) / 2)
    # recalls 0 to 0.5 are reached by the first image (precision 1), 0.6 to 1 by the third (2/3)
    assert voc07_average_precision(scores, positive) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_broken_scores_are_at_chance():
    positive = np.arange(10) < 3
    assert average_precision(np.full(10, np.nan), positive) == pytest.approx(0.3)
    assert average_precision(np.where(positive, np.nan, 0.5), positive) == pytest.approx(0.3)


def test_classes_that_do_not_occur_are_left_out():
    rng = np.random.default_rng(0)
    scores, positive = rng.normal(size=(30, 4)), rng.random((30, 4)) < 0.4
    positive[:, 2] = False
    kept = [0, 1, 3]
    found = multi_label_metrics(scores, positive, "toy")
    assert found["mean_average_precision"] == pytest.approx(average_precision_score(positive[:, kept], scores[:, kept]))
    with pytest.raises(EvalError, match="'toy' found no record with a label among 30"):
        multi_label_metrics(scores, np.zeros_like(positive), "toy")


def test_ties_go_to_the_first_class_and_nan_loses():
    labels = np.asarray([0, 2, 4])
    assert label_ranks(np.ones((3, 5), np.float32), labels).tolist() == [0, 2, 4]
    assert label_ranks(np.full((3, 5), np.nan, np.float32), labels).tolist() == [4, 4, 4]


def test_mean_per_class_weighs_classes_evenly():
    found = single_label_metrics(np.asarray([0, 0, 0, 2]), np.asarray([0, 0, 1, 3]), class_count=3)
    assert found == {"top1": 0.5, "mean_per_class": pytest.approx((2 / 3 + 0) / 2), "examples": 4}
