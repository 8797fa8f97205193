"""Targets and errors of pixel regression against plain numpy and the numbers of published code."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from vlm_jax.losses.pixels import masked_absolute_error, masked_square_error, patch_targets

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "aim_v1_pretrain.safetensors")


def test_targets_are_those_of_the_published_code() -> None:
    images = GOLDEN["inputs/image"].transpose(0, 2, 3, 1)
    for normalise, name in ((False, "target_raw"), (True, "target_norm")):
        np.testing.assert_allclose(patch_targets(images, 6, normalise), GOLDEN[f"outputs/{name}"], atol=2e-5)


@pytest.mark.parametrize(
    ("error", "power"), [(masked_square_error, 2), (masked_absolute_error, 1)], ids=["square", "absolute"]
)
def test_errors_count_the_masked_patches_alone(error, power) -> None:
    rng = np.random.default_rng(0)
    predicted, targets = rng.normal(size=(2, 3, 5, 12)).astype(np.float32)
    mask = np.asarray([[True, False, True, False, False], [False] * 5, [True] * 5])
    predicted[~mask] = 1e6
    sums, counts = error(predicted, targets, mask)
    by_hand = [
        sum(np.mean(np.abs(predicted[row, k] - targets[row, k]) ** power) for k in range(5) if mask[row, k])
        for row in range(3)
    ]
    np.testing.assert_allclose(sums, by_hand, rtol=1e-6)
    np.testing.assert_array_equal(counts, [2, 0, 5])
    # the whole batch as SimMIM adds it up: pixels, not patches, and their number
    pixels = np.abs(predicted - targets)[mask] ** power
    assert float(sums.sum() / counts.sum()) == pytest.approx(pixels.mean(), rel=1e-6)
