"""The sigmoid loss against float64 numpy from its definition, on every mesh. What it shares is in test_forms.py."""

import functools

import numpy as np
import pytest
from pair_cases import BATCH, FORMS, MASKS, SHARDED, features, relative_error, value_and_gradients

from vlm_jax.losses.sigmoid import sigmoid_loss

# (scale, bias, towers): the start of a SigLIP run, of a run with small batches, its end, and a scale as large as CLIP's
CASES = [(10.0, -10.0, "random"), (10.0, -2.7, "aligned"), (117.3, -12.9, "aligned"), (100.0, 0.0, "random")]

LAYOUTS = [("global", "1"), ("global", "8"), ("ring", "1")]
LAYOUTS += [(impl, mesh) for impl in SHARDED for mesh in ("2", "4", "8", "2x2x2")]


def definition(image, text, scale, bias, groups, valid):
    """(sum, gradients) in float64 over the whole matrix with signs z, as the paper's pseudo-code has it."""
    image, text = image.astype(np.float64), text.astype(np.float64)
    cosines = image @ text.T
    logits = scale * cosines + bias
    own = np.eye(len(image), dtype=bool)
    sign = np.where(own, 1.0, -1.0)
    counts = valid[:, None] & valid[None, :] & (own | (groups[:, None] != groups[None, :]))
    total = np.sum(np.logaddexp(0.0, -sign * logits)[counts])
    d_logits = np.where(counts, -sign * np.exp(-np.logaddexp(0.0, sign * logits)), 0.0)
    return total, (
        scale * d_logits @ text,
        scale * d_logits.T @ image,
        np.sum(d_logits * cosines),
        np.sum(d_logits),
    )


@functools.cache
def expected_of(scale: float, bias: float, kind: str, masks: str):
    return definition(*features(kind), scale, bias, *MASKS[masks])


@pytest.mark.parametrize(("impl", "mesh"), LAYOUTS)
def test_value_and_gradients_equal_the_definition(impl, mesh):
    for scale, bias, kind in CASES:
        for masks in MASKS:
            expected, expected_gradients = expected_of(scale, bias, kind, masks)
            (total, count), gradients = value_and_gradients(
                sigmoid_loss, impl, mesh, *features(kind), (scale, bias), masks
            )
            assert float(count) == MASKS[masks][1].sum()
            assert relative_error(total, expected) < 2e-6
            for actual, reference in zip(gradients, expected_gradients, strict=True):
                assert relative_error(actual, reference) < 1e-5


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_extreme_logits_neither_overflow_nor_lose_their_gradient(impl, bias):
    """Far from zero the loss is linear: every wrong pair costs |logit|, and its gradient has size 1."""
    image, text = features("aligned")
    (total, count), (*_, d_scale, d_bias) = value_and_gradients(sigmoid_loss, impl, "8", image, text, (1e3, bias))
    cosines = image.astype(np.float64) @ text.T
    wrong = np.eye(BATCH, dtype=bool) if bias < 0 else ~np.eye(BATCH, dtype=bool)
    sign = -1.0 if bias < 0 else 1.0
    np.testing.assert_allclose(total, np.sum(sign * (1e3 * cosines + bias)[wrong]), rtol=1e-6)
    np.testing.assert_allclose(d_bias, sign * wrong.sum(), rtol=1e-6)
    np.testing.assert_allclose(d_scale, sign * cosines[wrong].sum(), rtol=1e-5)
    assert float(count) == BATCH


@pytest.mark.parametrize("impl", FORMS)
def test_captions_of_one_image_are_no_negatives(impl):
    """Without negatives only the own pairs are left, and padding leaves nothing."""
    image, text = features("random")
    one_group = (np.zeros(BATCH, int), np.ones(BATCH, bool))
    (total, _), (*_, d_bias) = value_and_gradients(sigmoid_loss, impl, "4", image, text, (10.0, -10.0), one_group)
    own = 10.0 * np.sum(image.astype(np.float64) * text, axis=1) - 10.0
    np.testing.assert_allclose(total, np.logaddexp(0, -own).sum(), rtol=1e-6)
    np.testing.assert_allclose(d_bias, -np.sum(1 / (1 + np.exp(own))), rtol=1e-6)
    padding = (np.arange(BATCH), np.zeros(BATCH, bool))
    (total, count), gradients = value_and_gradients(sigmoid_loss, impl, "4", image, text, (10.0, -10.0), padding)
    assert float(total) == float(count) == 0.0
    assert all(not np.asarray(g).any() for g in gradients)
