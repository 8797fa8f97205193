"""The logistic regression against scikit-learn's, on any mesh and in any chunks."""

import jax
import numpy as np
import pytest
from fake_encoder import FakeEncoder
from sklearn.linear_model import LogisticRegression

from vlm_jax.evals.logistic import TrainingSet

ALL = np.ones(150, bool)


@pytest.fixture(scope="module")
def data():
    """Overlapping classes, so that a weak penalty has a minimum too; features of unequal sizes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 150).astype(np.int32)
    centres = rng.normal(size=(4, 12))
    vectors = (centres[labels] + rng.normal(size=(150, 12)) * 1.5) * np.linspace(0.3, 3, 12) + 0.5
    return vectors.astype(np.float32), labels


def reference(vectors, labels, c):
    return LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(vectors.astype(np.float64), labels)


@pytest.mark.parametrize("c", [1e-4, 0.316, 1e3])
def test_it_equals_scikit_learn(data, c):
    vectors, labels = data
    fit = TrainingSet(vectors, labels, 4, jax.numpy.asarray, 1).fit(1 / c, ALL, 1e-6, 1000)
    expected = reference(vectors, labels, c)
    assert fit.converged
    # A weak penalty leaves flat directions, in which float32 can't tell the minimum more closely.
    atol = (1e-2 if c > 1 else 1e-3) * np.abs(expected.coef_).max()
    np.testing.assert_allclose(fit.classifier.weights, expected.coef_.T, atol=atol)
    logits = vectors @ fit.classifier.weights + fit.classifier.bias
    np.testing.assert_allclose(
        np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True), expected.predict_proba(vectors), atol=2e-3
    )


def test_several_labels_are_independent_regressions(data):
    vectors, labels = data
    positive = np.stack([labels == 0, labels != 2, np.isin(labels, (1, 3))], axis=1)
    fit = TrainingSet(vectors, positive, 3, jax.numpy.asarray, 1).fit(2.0, ALL, 1e-6, 1000)
    for c in range(3):
        expected = reference(vectors, positive[:, c], 0.5)
        np.testing.assert_allclose(fit.classifier.weights[:, c], expected.coef_[0], atol=5e-3)
        np.testing.assert_allclose(fit.classifier.bias[c], expected.intercept_[0], atol=1e-2)


def test_mesh_and_chunks_change_nothing_and_unused_rows_do_not_count(data):
    vectors, labels = data
    used = np.arange(150) % 5 != 2
    whole = TrainingSet(vectors[used], labels[used], 4, jax.numpy.asarray, 1).fit(0.5, ALL[used], 1e-6, 1000)
    encoder = FakeEncoder(device_count=4)
    rows = TrainingSet(vectors, labels, 4, encoder.shard, encoder.shards, rows_at_a_time=30)
    np.testing.assert_allclose(rows.fit(0.5, used, 1e-6, 1000).classifier.weights, whole.classifier.weights, atol=1e-3)


def test_it_stops_where_it_is_told_to(data):
    vectors, labels = data
    rows = TrainingSet(vectors, labels, 4, jax.numpy.asarray, 1)
    stopped = rows.fit(1e-6, ALL, 1e-12, 3)
    assert (stopped.iterations, stopped.converged) == (3, False)
    # A tolerance that float32 can't reach ends the fit as well, long before the limit.
    assert rows.fit(10.0, ALL, 1e-12, 1000).iterations < 200
