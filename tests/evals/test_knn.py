"""k-nearest neighbours against the votes counted one by one."""

import dataclasses

import numpy as np
import pytest
from fake_encoder import FakeEncoder, ListSource, image_vectors, make_params, random_records

from vlm_jax import schema
from vlm_jax.data.sources import DigitsConfig
from vlm_jax.evals.base import EvalConfig
from vlm_jax.evals.frozen import Sources
from vlm_jax.evals.knn import KnnConfig, KnnEvaluator, nearest, vote_ranks

NAMES = ("cat", "dog", "horse", "ship", "truck", "frog", "plane")
CONFIG = KnnConfig(name="toy", source=DigitsConfig(), train_source=DigitsConfig(), k=(1, 5, 20))


def votes(train_x, train_y, test_x, k, temperature, class_count):
    """DINO's rule for one test image at a time."""
    counted = []
    for query in test_x / np.linalg.norm(test_x, axis=1, keepdims=True):
        similarity = train_x / np.linalg.norm(train_x, axis=1, keepdims=True) @ query
        found = np.zeros(class_count)
        for row in np.argsort(-similarity, kind="stable")[:k]:
            found[train_y[row]] += np.exp(similarity[row] / temperature)
        counted.append(found)
    return np.stack(counted)


@pytest.mark.parametrize("device_count", [1, 4])
def test_it_equals_counting_the_votes(device_count):
    train, test = random_records(90, 1), random_records(37, 2)
    for record in (*train, *test):  # labels that the image tells in part
        record["label"] = int(record["image"].reshape(-1)[:2].astype(int).sum() * 7 // 511)
    config = dataclasses.replace(CONFIG, temperature=0.2)
    sources = Sources(ListSource(train, NAMES), ListSource(test, NAMES), NAMES)
    metrics = KnnEvaluator(config, FakeEncoder(device_count), sources).run(make_params(), 0).metrics
    x, queries = (
        np.asarray(image_vectors(make_params(), np.stack([r["image"] for r in part]), "pooled"), np.float64)
        for part in (train, test)
    )
    labels = np.asarray([record["label"] for record in test])
    for k in (1, 5, 20):
        counted = votes(x, [record["label"] for record in train], queries, k, 0.2, 7)
        order = np.argsort(-counted, axis=1, kind="stable")
        assert metrics[f"knn/toy/k{k}_top1"] == pytest.approx(np.mean(order[:, 0] == labels))
        found = (order[:, :5] == labels[:, None]) & (np.take_along_axis(counted, order[:, :5], axis=1) > 0)
        assert metrics[f"knn/toy/k{k}_top5"] == pytest.approx(found.any(axis=1).mean())
        hits = [np.mean(order[labels == c, 0] == c) for c in np.unique(labels)]
        assert metrics[f"knn/toy/k{k}_mean_per_class"] == pytest.approx(np.mean(hits))
    assert metrics["knn/toy/k20_top1"] > 0.3, "twice as good as chance"
    assert metrics["knn/toy/examples"] == 37


@pytest.mark.parametrize("train_at_a_time", [1, 7, 64, 1000])
def test_chunks_change_nothing(train_at_a_time):
    rng = np.random.default_rng(0)
    train = rng.integers(-2, 3, (64, 3)).astype(np.float32) + 0.01  # directions repeat: ties
    queries, labels = rng.normal(size=(21, 3)).astype(np.float32), np.arange(64)
    similarity, found = nearest(FakeEncoder(), queries, train, labels, 9, train_at_a_time)
    unit, unit_queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, queries))
    scores = unit_queries @ unit.T
    np.testing.assert_allclose(similarity, -np.sort(-scores, axis=1)[:, :9], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(scores, found, axis=1), similarity, atol=1e-6)
    equal = np.isclose(similarity[:, 1:], similarity[:, :-1], rtol=0, atol=0)
    assert (np.diff(found, axis=1)[equal] > 0).all(), "of equal ones the earlier training image is the nearer one"


def test_fewer_training_images_than_neighbours():
    similarity, found = nearest(
        FakeEncoder(), np.ones((2, 3), np.float32), np.ones((4, 3), np.float32), np.arange(4), 9
    )
    assert similarity.shape == found.shape == (2, 4)


def test_a_class_without_a_vote_is_not_found_and_small_temperatures_do_not_overflow():
    similarity, labels = np.asarray([[0.9, 0.8]], np.float32), np.asarray([[4, 1]])
    ranks = [int(vote_ranks(similarity, labels, np.asarray([c]), 6, 1e-3)[0]) for c in (4, 1, 0)]
    assert ranks == [0, 1, 6]


def test_config_round_trip_and_its_errors():
    schema.validate(CONFIG)
    assert schema.from_dict(EvalConfig, schema.to_dict(CONFIG)) == CONFIG
    for changes, message in (({"k": (0,)}, r"config\.k"), ({"temperature": 0.0}, r"config\.temperature")):
        with pytest.raises(schema.ConfigError, match=message):
            schema.validate(dataclasses.replace(CONFIG, **changes))
