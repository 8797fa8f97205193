"""Zero-shot classification against scikit-learn's metrics on features that numpy recomputes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from fake_encoder import (
    FakeEncoder,
    ListSource,
    embed_images,
    embed_texts,
    make_params,
    prompt_scores,
    random_records,
)
from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score

from vlm_jax import schema
from vlm_jax.data.sources import DigitsConfig, ShapesConfig
from vlm_jax.evals.base import EvalConfig
from vlm_jax.evals.zero_shot import ZeroShotConfig, ZeroShotEvaluator

NAMES = ("cat", "dog", "horse", "ship", "truck", "frog", "plane")
TEMPLATES = ("a photo of {}", "{} art", "the {}")
CONFIG = ZeroShotConfig(name="toy", source=DigitsConfig(), templates=TEMPLATES)


def evaluate(records, names=NAMES, encoder=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    evaluator = ZeroShotEvaluator(config, encoder or FakeEncoder(), ListSource(records, names))
    return evaluator.run(make_params(), step=1).metrics


def reference_logits(records, names=NAMES):
    """The protocol in the order of the paper, one class and one prompt at a time."""
    params, encoder, weights = make_params(), FakeEncoder(), []
    for name in names:
        prompts = [
            np.asarray(embed_texts(params, encoder.tokenize([template.format(name)])))[0].astype(np.float64)
            for template in TEMPLATES
        ]
        class_mean = np.mean([prompt / np.linalg.norm(prompt) for prompt in prompts], axis=0)
        weights.append(class_mean / np.linalg.norm(class_mean))
    images = np.asarray(embed_images(params, np.stack([record["image"] for record in records])), np.float64)
    return 100 * images @ np.stack(weights).T


@pytest.mark.parametrize(("count", "device_count", "batch_size"), [(61, 4, 8), (64, 1, 16), (61, 2, 64)])
def test_metrics_equal_scikit_learn_on_any_mesh(count, device_count, batch_size):
    records = random_records(count)
    metrics = evaluate(records, encoder=FakeEncoder(device_count, batch_size))
    labels, logits = [record["label"] for record in records], reference_logits(records)
    assert metrics == {
        "zero_shot/toy/top1": pytest.approx(top_k_accuracy_score(labels, logits, k=1)),
        "zero_shot/toy/top5": pytest.approx(top_k_accuracy_score(labels, logits, k=5)),
        "zero_shot/toy/mean_per_class": pytest.approx(balanced_accuracy_score(labels, logits.argmax(axis=1))),
        "zero_shot/toy/examples": count,
    }


@pytest.mark.parametrize(("device_count", "at_a_time"), [(4, 64), (1, 4), (2, 21), (4, 1)])
def test_without_a_joint_space_prompts_are_scored_one_by_one(device_count, at_a_time):
    """A class's score is the mean of its prompts', whatever the size of the chunks."""
    records, encoder = random_records(30), FakeEncoder(device_count)
    encoder.joint_space = False
    metrics = evaluate(records, encoder=encoder, prompts_at_a_time=at_a_time)
    prompts = [template.format(name) for name in NAMES for template in TEMPLATES]
    images = np.stack([record["image"] for record in records])
    scores = np.concatenate(
        [prompt_scores(make_params(), images, encoder.tokenize([prompt])) for prompt in prompts], axis=1
    )
    means = scores.reshape(30, len(NAMES), len(TEMPLATES)).mean(axis=-1)
    labels = [record["label"] for record in records]
    assert metrics["zero_shot/toy/top1"] == pytest.approx(top_k_accuracy_score(labels, means, k=1))
    assert metrics["zero_shot/toy/top1"] != pytest.approx(np.mean(reference_logits(records).argmax(axis=1) == labels))


def test_several_labels_a_record():
    rng, records = np.random.default_rng(3), random_records(40)
    for record in records:
        record["label"] = tuple(np.flatnonzero(rng.random(7) < 0.3).tolist())
    evaluator = ZeroShotEvaluator(
        dataclasses.replace(CONFIG, labels="multi"), FakeEncoder(), ListSource(records, NAMES)
    )
    result = evaluator.run(make_params(), 0)
    truth = np.asarray([[c in record["label"] for c in range(7)] for record in records])
    expected = average_precision_score(truth, reference_logits(records), average="macro")
    assert result.metrics["zero_shot/toy/mean_average_precision"] == pytest.approx(expected)
    assert set(result.metrics) == {
        f"zero_shot/toy/{key}" for key in ("mean_average_precision", "voc07_map", "examples")
    }
    assert result.benchmark.metrics == {"mean_average_precision": pytest.approx(expected)}
    for record in records:
        record["label"] = tuple(c for c in record["label"] if c != 2)
    with pytest.raises(ValueError, match=r"no example of 1 of its 7 classes \(horse\)"):
        evaluate(records, labels="multi")
    assert evaluate(records, labels="multi", empty_classes="skip")["zero_shot/toy/examples"] == 40


def test_its_numbers_by_the_names_of_clip_benchmark():
    evaluator = ZeroShotEvaluator(CONFIG, FakeEncoder(), ListSource(random_records(40), NAMES))
    result = evaluator.run(make_params(), 0)
    entry = result.benchmark
    assert (entry.task, entry.dataset, entry.language) == ("zeroshot_classification", "toy", "en")
    names = {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "mean_per_class"}
    assert entry.metrics == {name: result.metrics[f"zero_shot/toy/{key}"] for name, key in names.items()}


def test_the_thousand_classes_of_imagenet_by_one_word():
    encoder = FakeEncoder()
    changes = {"class_names": ("imagenet",), "templates": ("{}",), "empty_classes": "skip"}
    assert evaluate(random_records(20), (), encoder, **changes)["zero_shot/toy/examples"] == 20
    assert encoder.tokenized == 1000


def test_a_model_without_text_is_told_what_it_can_do(tmp_path):
    encoder = FakeEncoder()
    encoder.reads_text = False
    with pytest.raises(schema.ConfigError, match=r"'toy' \(zero_shot\) compares images with texts.*use linear_probe"):
        CONFIG.build(encoder, str(tmp_path))


def test_unusable_records_do_not_count():
    records = random_records(30)
    logits = reference_logits(records)
    for record, row in zip(records, logits, strict=True):
        record["bad"] = row.argmax() != record["label"] and record["label"] != 0
    kept = [record for record in records if not record["bad"]]
    metrics = evaluate(records, empty_classes="skip")
    assert metrics["zero_shot/toy/examples"] == len(kept) < len(records)
    expected = top_k_accuracy_score([r["label"] for r in kept], reference_logits(kept), k=1, labels=range(7))
    assert metrics["zero_shot/toy/top1"] == pytest.approx(expected)


def test_class_names_of_the_config_come_first():
    records = random_records(28)
    renamed = tuple(reversed(NAMES))
    expected = top_k_accuracy_score([r["label"] for r in records], reference_logits(records, renamed), k=1)
    assert evaluate(records, class_names=renamed)["zero_shot/toy/top1"] == pytest.approx(expected)


def test_five_classes_have_no_top5():
    assert "zero_shot/toy/top5" not in evaluate(random_records(20, classes=5), NAMES[:5])


def test_prompts_are_tokenised_once():
    encoder = FakeEncoder()
    evaluator = ZeroShotEvaluator(CONFIG, encoder, ListSource(random_records(14), NAMES))
    first, second = evaluator.run(make_params(), 1), evaluator.run(make_params(seed=5), 2)
    assert encoder.tokenized == len(NAMES) * len(TEMPLATES)
    assert first.metrics != second.metrics, "other parameters, other numbers"


def test_a_collapsed_model_is_at_chance_and_a_broken_one_at_zero():
    for value, expected in ((1.0, 1 / 7), (np.nan, 0.0)):
        encoder = FakeEncoder(image_features=lambda _, images, value=value: jnp.full((len(images), 16), value))
        encoder.text_features = lambda _, tokens, value=value: jnp.full((len(tokens), 16), value)
        assert evaluate(random_records(28), encoder=encoder)["zero_shot/toy/top1"] == pytest.approx(expected)


def test_a_label_outside_the_class_names_is_named():
    records = random_records(14)
    records[9]["label"] = 7
    with pytest.raises(ValueError, match=r"Record 9 of evaluation 'toy' has label 7.* 0 to 6"):
        evaluate(records)


def test_a_class_without_examples_is_named_or_skipped():
    records = [record for record in random_records(28) if record["label"] != 3]
    with pytest.raises(ValueError, match=r"no example of 1 of its 7 classes \(ship\)"):
        evaluate(records)
    labels, logits = [record["label"] for record in records], reference_logits(records)
    per_class = [np.mean(logits.argmax(axis=1)[np.equal(labels, c)] == c) for c in sorted(set(labels))]
    skipped = evaluate(records, empty_classes="skip")["zero_shot/toy/mean_per_class"]
    assert skipped == pytest.approx(np.mean(per_class))


def test_no_usable_record_is_named():
    with pytest.raises(ValueError, match="'toy' found no image with a label among 2 records"):
        evaluate([{**record, "bad": True} for record in random_records(2)])


def test_classes_that_nothing_names_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="'toy' names no classes; set class_names"):
        dataclasses.replace(CONFIG, source=ShapesConfig()).build(FakeEncoder(), str(tmp_path))


def test_build_reads_the_source_and_its_limit(tmp_path):
    evaluator = dataclasses.replace(CONFIG, source=DigitsConfig(split="test"), limit=33).build(
        FakeEncoder(), str(tmp_path)
    )
    assert len(evaluator._source) == 33
    assert evaluator._source.class_names == DigitsConfig().build(str(tmp_path)).class_names
    with pytest.raises(IndexError):
        evaluator._source[33]


def test_config_round_trip_and_its_errors():
    schema.validate(CONFIG)
    assert schema.from_dict(EvalConfig, schema.to_dict(CONFIG)) == CONFIG
    bad_template = dataclasses.replace(CONFIG, templates=("imagenet8",))
    with pytest.raises(schema.ConfigError, match=r"config\.templates .*did you mean 'imagenet80'"):
        schema.validate(bad_template)
    with pytest.raises(schema.ConfigError, match=r"config\.name"):
        schema.validate(dataclasses.replace(CONFIG, name="a/b"))
    with pytest.raises(schema.ConfigError, match=r"config\.limit"):
        schema.validate(dataclasses.replace(CONFIG, limit=-1))
