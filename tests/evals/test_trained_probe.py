"""Probes of a real tower: what they see, that they learn, their choice among a grid, and what is refused."""

import dataclasses
from typing import Any

import image_models
import jax
import numpy as np
import pytest
import tiny

from vlm_jax.data.images import AugmentConfig
from vlm_jax.data.sources import DigitsConfig
from vlm_jax.evals.accuracy import AccuracyConfig
from vlm_jax.evals.attentive_probe import AttentiveProbeConfig
from vlm_jax.evals.knn import KnnConfig
from vlm_jax.evals.probe_training import ProbeTraining
from vlm_jax.evals.reconstructions import ReconstructionsConfig
from vlm_jax.evals.sgd_probe import SgdProbeConfig
from vlm_jax.schema import ConfigError
from vlm_jax.train import train

TRAIN, TEST = DigitsConfig(), DigitsConfig(split="test")
FAST = ProbeTraining("adamw", (1e-4, 0.03), epochs=6, batch_size=64)
LIMITS = {"train_source": TRAIN, "train_limit": 500, "limit": 80, "training": FAST}
IMAGES = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def model() -> Any:
    return image_models.encoder(image_models.CLASSIFY, batch_size=80)


def run(config: Any, model: Any) -> dict[str, float]:
    metrics = config.build(model[0], "").run(model[1], 0).metrics
    prefix = f"{config.kind()}/{config.name}/"
    assert all(name.startswith(prefix) for name in metrics)
    return {name.removeprefix(prefix): value for name, value in metrics.items()}


def test_what_probes_see(model: Any) -> None:
    """Class tokens and means of the patches by layer, with and without the last norm; chosen layers averaged."""
    encoder, params, program = model
    named = program.objective.encode(params, IMAGES, intermediates=True)
    blocks, tokens = np.asarray(named["blocks"]), np.asarray(named["tokens"])
    plain = np.asarray(encoder.layer_vectors(params, IMAGES, False))
    np.testing.assert_allclose(plain[:, 2, 0], blocks[2, :, 0], atol=1e-5)
    np.testing.assert_allclose(plain[:, 3, 1], blocks[3, :, 1:].mean(axis=1), atol=1e-5)
    normed = np.asarray(encoder.layer_vectors(params, IMAGES, True))
    np.testing.assert_allclose(normed[:, 3, 0], tokens[:, 0], atol=1e-5)
    np.testing.assert_allclose(normed[:, 3, 1], tokens[:, 1:].mean(axis=1), atol=1e-5)
    averaged = (blocks[1, :, 1:] + blocks[3, :, 1:]) / 2
    np.testing.assert_allclose(encoder.image_tokens(params, IMAGES, (1, -1)), averaged, atol=1e-5)
    np.testing.assert_allclose(encoder.image_tokens(params, IMAGES, ()), tokens[:, 1:], atol=1e-5)
    for which, vectors in (("cls", tokens[:, 0]), ("mean", tokens[:, 1:].mean(axis=1)), ("pooled", named["pooled"])):
        np.testing.assert_allclose(encoder.image_vectors(params, IMAGES, which), vectors, atol=1e-5)
    means = np.concatenate([block[:, 1:].mean(axis=1) for block in blocks], axis=1)
    np.testing.assert_allclose(encoder.image_vectors(params, IMAGES, "blocks"), means, atol=1e-5)


def test_linear_probes_learn_and_the_better_rate_is_chosen(model: Any) -> None:
    layers = run(SgdProbeConfig("d", TEST, inputs="layers", batch_norm=False, **LIMITS), model)
    assert layers["top1"] > 0.5
    assert layers["learning_rate"] == pytest.approx(0.03)
    assert layers["train_examples"] == 450
    assert {f"layer{i}_top1" for i in range(4)} < set(layers)
    last = run(SgdProbeConfig("d", TEST, inputs="last_blocks", **LIMITS), model)
    assert {"blocks1_top1", "blocks1_mean_top1", "blocks4_top1", "blocks4_mean_top1", "validation"} < set(last)
    everything = run(SgdProbeConfig("d", TEST, validation_share=0.0, **LIMITS), model)
    assert "validation" not in everything
    assert everything["train_examples"] == 500


def test_an_attentive_probe_on_any_mesh(model: Any) -> None:
    config = AttentiveProbeConfig("d", TEST, heads=2, layers=(-2, -1), **LIMITS)
    alone = run(config, model)
    shared = run(config, image_models.encoder(image_models.CLASSIFY, tiny.mesh(2, 2, 2), 80))
    assert alone["top1"] > 0.5
    assert shared["top1"] == pytest.approx(alone["top1"], abs=0.03)
    assert shared["learning_rate"] == alone["learning_rate"]


def test_random_views_in_every_epoch(model: Any) -> None:
    """Views that are no views give the numbers of one kind of image; real ones others. Both learn."""
    settings = LIMITS | {"training": dataclasses.replace(FAST, epochs=3)}
    found = run(SgdProbeConfig("d", TEST, augment=AugmentConfig(scale=(0.5, 1.0)), **settings), model)
    assert found["top1"] > 0.3
    assert found["train_examples"] == 450


def test_accuracy_is_that_of_the_models_own_scores(model: Any) -> None:
    encoder, params, program = model
    found = run(AccuracyConfig("d", TEST, limit=50), model)
    source = TEST.build("")
    images = np.stack([program.config.objective.make_example(None, program.config.data)(source[i], None)["image"]
                       for i in range(50)])  # fmt: skip
    scores = jax.jit(program.objective.class_scores)(params, images)
    labels = np.asarray([source[i]["label"] for i in range(50)])
    assert found["top1"] == pytest.approx(np.mean(np.argmax(scores, axis=1) == labels))
    assert encoder.class_count == 10


def test_pictures_of_reconstructions() -> None:
    """One row an image; what is drawn depends on the record's place, not on the batch."""
    config = ReconstructionsConfig("d", TEST, limit=5, pictured=3)
    encoder, params, _ = image_models.encoder(image_models.MAE, batch_size=2)
    (name, picture), *_ = config.build(encoder, "").run(params, 7).images.items()
    wide, params, _ = image_models.encoder(image_models.MAE, tiny.mesh(4), batch_size=16)
    (_, again), *_ = config.build(wide, "").run(params, 7).images.items()
    assert (name, picture.dtype) == ("reconstructions/d/rows", np.uint8)
    assert picture.shape == again.shape
    assert np.mean(np.abs(picture.astype(int) - again) > 8) < 0.01
    assert np.mean(np.all(picture == 128, axis=-1)) > 0.1, "hidden pixels are grey"


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (AttentiveProbeConfig("own", TEST, **LIMITS), r"'own' \(attentive_probe\) needs the tokens of an image tower"),
        (SgdProbeConfig("own", TEST, inputs="layers", **LIMITS), r"inputs = 'layers' needs the class tokens"),
        (ReconstructionsConfig("own", TEST), r"'own' \(reconstructions\) is for methods that predict pixels"),
        (KnnConfig("own", TEST, train_source=TRAIN, features="cls"), r"features = 'cls' is for models of images alone"),
    ],
)
def test_what_a_model_does_not_offer_is_said(evaluation: Any, message: str, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tiny.config(evals=(evaluation,), train__steps=1), str(tmp_path))


def test_blocks_and_heads_that_a_tower_does_not_have(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"layers = \(4,\) must be blocks of the image tower, 0 to 3"):
        run(AttentiveProbeConfig("d", TEST, layers=(4,), heads=2, **LIMITS), model)
    with pytest.raises(ConfigError, match=r"of 3 heads needs a width that they divide, not 16"):
        run(AttentiveProbeConfig("d", TEST, heads=3, **LIMITS), model)
