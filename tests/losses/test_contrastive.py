"""InfoNCE against float64 loops in numpy, on every mesh. What it shares with other losses is in test_forms.py.

The loops know only the definition: a row's cross-entropy over its own pair and its negatives.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from pair_cases import BATCH, FORMS, MASKS, MESHES, SHARDED, features, relative_error, value_and_gradients

from vlm_jax.losses.contrastive import info_nce

CASES = [(scale, kind) for scale in (14.3, 100.0) for kind in ("random", "aligned")]


def brute_force(image, text, scale, groups, valid):
    """(sum, gradients) in float64, by loops over the pairs: d loss_i / d logit is softmax minus one-hot."""
    image, text, scale = image.astype(np.float64), text.astype(np.float64), float(scale)
    total, d_image, d_text, d_scale = 0.0, np.zeros_like(image), np.zeros_like(text), 0.0
    rows = [i for i in range(len(image)) if valid[i]]
    for i in rows:
        negatives = [j for j in rows if groups[j] != groups[i]]
        for by_column in (False, True):
            pairs = [(j, i) if by_column else (i, j) for j in negatives]
            ratios = np.exp([scale * (image[a] @ text[b] - image[i] @ text[i]) for a, b in pairs])
            total += 0.5 * np.log1p(ratios.sum())  # log1p: a trained batch's loss is below float64's epsilon
            d_logits = 0.5 * ratios / (1.0 + ratios.sum())
            for (a, b), d_logit in [*zip(pairs, d_logits, strict=True), ((i, i), -d_logits.sum())]:
                d_image[a] += d_logit * scale * text[b]
                d_text[b] += d_logit * scale * image[a]
                d_scale += d_logit * (image[a] @ text[b])
    return total, (d_image, d_text, d_scale)


@functools.cache
def expected_of(scale: float, kind: str, masks: str):
    return brute_force(*features(kind), scale, *MASKS[masks])


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("impl", FORMS)
def test_value_and_gradients_equal_a_float64_loop(impl, mesh):
    for scale, kind in CASES:
        for masks in MASKS:
            expected, expected_gradients = expected_of(scale, kind, masks)
            (total, count), gradients = value_and_gradients(info_nce, impl, mesh, *features(kind), (scale,), masks)
            assert float(count) == MASKS[masks][1].sum()
            # fp32 logits near 100 are known to 4e-6; a loss far below 1 inherits that as its relative error.
            assert relative_error(total, expected) < 2e-5
            for actual, reference in zip(gradients, expected_gradients, strict=True):
                assert relative_error(actual, reference) < 2e-5


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("impl", SHARDED)
def test_sharded_forms_equal_the_global_one_on_every_mesh(impl, mesh):
    for scale, kind in CASES:
        for masks in ("plain", "both"):
            arguments = (*features(kind, seed=1), (scale,), masks)
            (expected, _), expected_gradients = value_and_gradients(info_nce, "global", "1", *arguments)
            (total, _), gradients = value_and_gradients(info_nce, impl, mesh, *arguments)
            assert relative_error(total, expected) < 1e-5
            for actual, reference in zip(gradients, expected_gradients, strict=True):
                assert relative_error(actual, reference) < 1e-5


@pytest.mark.parametrize("impl", FORMS)
def test_nothing_overflows_where_towers_coincide_at_scale_100(impl):
    image, text = features("same")
    (total, _), gradients = value_and_gradients(info_nce, impl, "8", image, text, (100.0,))
    assert 0.0 <= float(total) < 1e-3
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)
    # All images and texts alike: every row is a guess among the batch. Logits of 100 are known to 1e-5.
    alike = np.repeat(image[:1], BATCH, axis=0)
    (total, count), _ = value_and_gradients(info_nce, impl, "8", alike, alike, (100.0,))
    np.testing.assert_allclose(total / count, np.log(BATCH), rtol=1e-5)


@pytest.mark.parametrize("impl", FORMS)
def test_a_batch_of_one_group_or_of_padding_has_no_loss(impl):
    image, text = features("random")
    for masks in ((np.zeros(BATCH, int), np.ones(BATCH, bool)), (np.arange(BATCH), np.zeros(BATCH, bool))):
        (total, count), gradients = value_and_gradients(info_nce, impl, "4", image, text, (100.0,), masks)
        assert float(total) == 0.0
        assert float(count) == masks[1].sum()
        assert all(not np.asarray(g).any() for g in gradients)
