"""Few-shot regression against the normal equations, with the bias as a column."""

import dataclasses

import numpy as np
import pytest
from fake_encoder import FakeEncoder, ListSource, make_params, random_records

from vlm_jax import schema
from vlm_jax.data.sources import DigitsConfig
from vlm_jax.evals.base import EvalConfig, EvalError
from vlm_jax.evals.few_shot import FewShotConfig, FewShotEvaluator, solve_ridge
from vlm_jax.evals.frozen import Sources

NAMES = ("cat", "dog", "horse", "ship", "truck", "frog", "plane")
CONFIG = FewShotConfig(name="toy", source=DigitsConfig(), train_source=DigitsConfig(), shots=(1, 5), seeds=2)


@pytest.mark.parametrize(("count", "width"), [(50, 8), (12, 30), (20, 20)])
@pytest.mark.parametrize("l2", [1e-3, 1.0, 1024.0])
def test_it_solves_the_normal_equations(count, width, l2):
    rng = np.random.default_rng(count)
    vectors, labels = rng.normal(size=(count, width)) * 3 + 2, rng.integers(0, 4, count)
    weights, bias = solve_ridge(vectors.astype(np.float32), labels, 4).weights(l2)
    vectors = vectors.astype(np.float32).astype(np.float64)
    mean, std = vectors.mean(axis=0), vectors.std(axis=0) + 1e-5
    x = np.concatenate([(vectors - mean) / std, np.full((count, 1), 100.0)], axis=1)
    y = 2.0 * np.eye(4)[labels] - 1
    solution = np.linalg.solve(x.T @ x + l2 * np.eye(width + 1), x.T @ y)
    np.testing.assert_allclose(vectors @ weights + bias, x @ solution, rtol=1e-6, atol=1e-8)


def evaluate(train, test, **changes):
    sources = Sources(ListSource(train, NAMES), ListSource(test, NAMES), NAMES)
    return (
        FewShotEvaluator(dataclasses.replace(CONFIG, **changes), FakeEncoder(), sources).run(make_params(), 0).metrics
    )


def flat(records):
    return np.stack([record["image"].reshape(-1) / 127.5 - 1 for record in records])


def test_metrics_equal_the_protocol_step_by_step():
    train, test = random_records(70, 1), random_records(40, 2)
    train[4]["bad"] = True
    metrics = evaluate(train, test, l2=(0.5, 1024.0))
    train = [record for record in train if "bad" not in record]
    labels, truth = np.asarray([r["label"] for r in train]), np.asarray([r["label"] for r in test])
    for shots in (1, 5):
        for l2 in (0.5, 1024.0):
            found = []
            for seed in (0, 1):
                chosen = [
                    np.random.default_rng((seed, c)).permutation(np.flatnonzero(labels == c))[:shots] for c in range(7)
                ]
                rows = np.concatenate(chosen)
                x = flat(train)[rows]
                mean, std = x.mean(axis=0), x.std(axis=0) + 1e-5
                x, queries = ((v - mean) / std for v in (x, flat(test)))
                x, queries = (np.pad(v, ((0, 0), (0, 1)), constant_values=100.0) for v in (x, queries))
                y = 2.0 * np.eye(7)[labels[rows]] - 1
                solution = np.linalg.solve(x.T @ x + l2 * np.eye(13), x.T @ y)
                found.append(np.mean((queries @ solution).argmax(axis=1) == truth))
            assert metrics[f"few_shot/toy/{shots}shot_l2_{l2:g}_top1"] == pytest.approx(np.mean(found))
            assert metrics[f"few_shot/toy/{shots}shot_l2_{l2:g}_top1_std"] == pytest.approx(np.std(found))
    assert metrics["few_shot/toy/examples"] == 40


def test_one_penalty_has_short_names():
    metrics = evaluate(random_records(70, 1), random_records(40, 2))
    keys = ("top1", "top1_std", "mean_per_class")
    expected = {f"few_shot/toy/{shots}shot_{key}" for shots in (1, 5) for key in keys}
    assert set(metrics) == expected | {"few_shot/toy/examples"}


def test_too_few_training_images_are_named():
    train = [record for index, record in enumerate(random_records(70, 1)) if record["label"] != 3 or index < 20]
    with pytest.raises(EvalError, match="'toy' has 3 training images of class 'ship', fewer than 5 shots"):
        evaluate(train, random_records(20, 2))


def test_config_round_trip_and_its_errors():
    schema.validate(CONFIG)
    assert schema.from_dict(EvalConfig, schema.to_dict(CONFIG)) == CONFIG
    for changes, message in (({"shots": (5, 5)}, "shots"), ({"l2": (0.0,)}, "l2"), ({"seeds": 0}, "seeds")):
        with pytest.raises(schema.ConfigError, match=rf"config\.{message}"):
            schema.validate(dataclasses.replace(CONFIG, **changes))
