"""Linear probes: the search for the penalty against trying all, the whole evaluation against scikit-learn."""

import dataclasses

import numpy as np
import pytest
from fake_encoder import FakeEncoder, ListSource, image_vectors, make_params, random_records
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from vlm_jax import schema
from vlm_jax.data.sources import DigitsConfig, ShapesConfig
from vlm_jax.data.sources.class_folders import ClassFoldersConfig
from vlm_jax.evals.base import EvalConfig, EvalError
from vlm_jax.evals.frozen import Sources
from vlm_jax.evals.linear_probe import LinearProbeConfig, LinearProbeEvaluator, best_of, binary_search

NAMES = ("cat", "dog", "horse", "ship", "truck", "frog", "plane")
CONFIG = LinearProbeConfig(name="toy", source=DigitsConfig(), train_source=DigitsConfig(), features="embedding")


def coloured_records(count, seed):
    """Labels that the image tells in part."""
    records = random_records(count, seed)
    for record in records:
        record["label"] = int(record["image"].reshape(-1)[:3].astype(int).sum() * 7 // 766)
    return records


def evaluate(train, test, encoder=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    sources = Sources(ListSource(train, NAMES), ListSource(test, NAMES), NAMES)
    return LinearProbeEvaluator(config, encoder or FakeEncoder(device_count=1), sources).run(make_params(), step=1)


def vectors(records, which="embedding"):
    images = np.stack([record["image"] for record in records])
    return np.asarray(image_vectors(make_params(), images, which), np.float64)


def test_the_search_finds_the_peak_at_an_eighth_of_a_decade():
    for peak in (-6, -3.33, 0.0, 1.9, 6.0):
        asked = []

        def score(value, peak=peak, asked=asked):
            asked.append(value)
            return -abs(np.log10(value) - peak)

        found, best = binary_search(score)
        assert abs(np.log10(found) - peak) <= 1 / 16 + 1e-9
        assert best == score(found)
        assert len(set(asked)) <= 15
        np.testing.assert_allclose(np.log10(asked[:7]), [-6, -4, -2, 0, 2, 4, 6], atol=1e-12)


def test_of_equal_scores_the_stronger_penalty_wins():
    assert binary_search(lambda value: float(value < 500))[0] == pytest.approx(10**2.625)
    assert best_of((0.1, 10.0, 1.0), lambda value: 1.0) == (10.0, 1.0)


@pytest.mark.parametrize("which", ["pooled", "embedding"])
def test_a_fixed_penalty_gives_scikit_learns_numbers(which):
    train, test = coloured_records(120, 1), coloured_records(61, 2)
    train[7]["bad"] = test[9]["bad"] = True
    result = evaluate(train, test, lambdas=(2.0,), features=which)
    train, test = ([record for record in part if "bad" not in record] for part in (train, test))
    labels = [record["label"] for record in test]
    model = LogisticRegression(C=0.5, tol=1e-8, max_iter=5000).fit(
        vectors(train, which), [record["label"] for record in train]
    )
    scores = np.full((60, 7), -1.0)  # the train set may lack a class
    scores[:, model.classes_] = model.predict_proba(vectors(test, which))
    recalls = [np.mean(scores[np.equal(labels, c)].argmax(axis=1) == c) for c in set(labels)]
    assert result.metrics == {
        "linear_probe/toy/top1": pytest.approx(np.mean(scores.argmax(axis=1) == labels)),
        "linear_probe/toy/top5": pytest.approx(np.mean((np.argsort(-scores)[:, :5] == np.c_[labels]).any(axis=1))),
        "linear_probe/toy/mean_per_class": pytest.approx(np.mean(recalls)),
        "linear_probe/toy/examples": 60,
        "linear_probe/toy/train_examples": 119,
        "linear_probe/toy/lambda": 2.0,
        "linear_probe/toy/iterations": result.metrics["linear_probe/toy/iterations"],
        "linear_probe/toy/converged": 1.0,
    }
    assert result.benchmark.task == "linear_probe"
    assert result.benchmark.metrics["lp_acc1"] == result.metrics["linear_probe/toy/top1"]


def test_the_penalty_is_chosen_on_held_out_training_images():
    """Against scikit-learn on the same split; the test images play no part in the choice."""
    train, penalties = coloured_records(90, 1), (0.1, 10.0, 300.0)
    config = dataclasses.replace(CONFIG, lambdas=penalties, validation_share=0.3, seed=5)
    held_out = np.zeros(90, bool)
    held_out[np.random.default_rng(5).permutation(90)[:27]] = True
    x, y = vectors(train), np.asarray([record["label"] for record in train])
    scores = []
    for penalty in penalties:
        model = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=5000).fit(x[~held_out], y[~held_out])
        scores.append((model.score(x[held_out], y[held_out]), penalty))
    for seed in (2, 3):
        sources = Sources(ListSource(train, NAMES), ListSource(coloured_records(40, seed), NAMES), NAMES)
        metrics = LinearProbeEvaluator(config, FakeEncoder(device_count=1), sources).run(make_params(), 0).metrics
        assert (metrics["linear_probe/toy/validation"], metrics["linear_probe/toy/lambda"]) == max(scores)
        assert metrics["linear_probe/toy/train_examples"] == 90


def test_several_labels_a_record():
    def several(count, seed):
        records = random_records(count, seed)
        for record in records:
            record["label"] = tuple(np.flatnonzero(record["image"].reshape(-1)[:7] > 150).tolist())
        return records

    train, test = several(100, 1), several(50, 2)
    metrics = evaluate(train, test, labels="multi", lambdas=(3.0,)).metrics
    truth = [np.asarray([[c in r["label"] for c in range(7)] for r in part]) for part in (train, test)]
    scores = np.stack(
        [
            LogisticRegression(C=1 / 3, tol=1e-8, max_iter=5000)
            .fit(vectors(train), truth[0][:, c])
            .decision_function(vectors(test))
            for c in range(7)
        ],
        axis=1,
    )
    expected = average_precision_score(truth[1], scores)
    assert expected > 0.6
    assert metrics["linear_probe/toy/mean_average_precision"] == pytest.approx(expected, abs=2e-3)


def test_wrong_data_is_named():
    train, test = coloured_records(20, 1), coloured_records(10, 2)
    test[3]["label"] = 7
    with pytest.raises(EvalError, match=r"Record 3 of evaluation 'toy' has label 7.* 0 to 6"):
        evaluate(train, test)
    with pytest.raises(EvalError, match="can't split its 1 training images"):
        evaluate(train[:1], coloured_records(10, 2))
    with pytest.raises(EvalError, match="'toy' found no image with a label among 20"):
        evaluate([{**record, "bad": True} for record in train], test)
    broken = FakeEncoder()
    broken.image_vectors = lambda params, images, which: images.reshape(len(images), -1) * np.nan
    with pytest.raises(EvalError, match="vectors are not finite"):
        evaluate(train, coloured_records(10, 2), encoder=broken)


def test_sources_that_do_not_fit_are_named(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "pets" / name / "1.png")
    pets = dataclasses.replace(CONFIG, train_source=ClassFoldersConfig(path=str(tmp_path / "pets")))
    with pytest.raises(schema.ConfigError, match=r"train_source names the classes \(cat, dog; 2 in all\)"):
        pets.build(FakeEncoder(), str(tmp_path))
    unnamed = dataclasses.replace(CONFIG, source=ShapesConfig(), train_source=ShapesConfig(), labels="multi")
    with pytest.raises(schema.ConfigError, match="needs a source that names its classes"):
        unnamed.build(FakeEncoder(), str(tmp_path))


def test_config_round_trip_and_its_errors(tmp_path):
    schema.validate(CONFIG)
    assert schema.from_dict(EvalConfig, schema.to_dict(CONFIG)) == CONFIG
    with pytest.raises(schema.ConfigError, match="train_source must be set"):
        schema.from_dict(EvalConfig, {"kind": "linear_probe", "name": "toy", "source": "digits"})
    for changes, message in (
        ({"lambdas": (0.0,)}, r"config\.lambdas"),
        ({"validation_share": 1.0}, r"config\.validation_share"),
        ({"tolerance": 0.0}, r"config\.tolerance"),
        ({"max_iterations": 0}, r"config\.max_iterations"),
        ({"train_limit": -1}, r"config\.train_limit"),
    ):
        with pytest.raises(schema.ConfigError, match=message):
            schema.validate(dataclasses.replace(CONFIG, **changes))
    image_only = FakeEncoder()
    image_only.reads_text = False
    evaluator = dataclasses.replace(CONFIG, train_limit=30, limit=20).build(image_only, str(tmp_path))
    assert (len(evaluator._sources.train), len(evaluator._sources.test)) == (30, 20)
