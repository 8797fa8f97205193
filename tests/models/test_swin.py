"""Swin: published sizes, windows against brute force, and what drops nothing at evaluation."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax import schema
from vlm_jax.models.swin import SWIN, Swin, SwinConfig
from vlm_jax.models.windows import Windows, merge_windows, partition_windows, relative_index

# Parameters with the classifier of 1000 classes, and 10^9 multiply-adds, at 224 pixels: torchvision's swin_t, swin_s
# and swin_b, and for Swin-L the 197 M and 34.5 G of Liu et al. 2021, table 1.
PUBLISHED = {
    "Swin-T": (28_288_354, 4.49),
    "Swin-S": (49_606_258, 8.74),
    "Swin-B": (87_768_224, 15.43),
    "Swin-L": (196_532_476, 34.5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str) -> None:
    config, (parameters, giga_mult_adds) = SWIN[name], PUBLISHED[name]
    schema.validate(config)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    abstract = nn.unbox(jax.eval_shape(Swin(config).init, jax.random.key(0), images))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))
    assert count + 1000 * (config.pooled_width + 1) == parameters
    assert config.forward_flops(1000) / 2e9 == pytest.approx(giga_mult_adds, rel=0.02)
    assert (config.token_count, config.stride) == (49, 32)


@pytest.mark.parametrize(("grid", "window"), [((8, 8), 4), ((10, 7), 3), ((4, 4), 4), ((3, 5), 4)])
def test_windows_are_what_lies_together(grid: tuple[int, int], window: int) -> None:
    """Cut out one after the other from a grid that was padded and rolled."""
    windows, (rows, columns) = Windows.of(grid, window), grid
    assert (windows.side, windows.shift) == ((min(grid), 0) if min(grid) <= window else (window, window // 2))
    tokens = np.arange(1, rows * columns + 1, dtype=np.float32).reshape(1, -1, 1)
    height, width = windows.padded
    padded = np.zeros((height, width))
    padded[:rows, :columns] = tokens.reshape(rows, columns)
    for shift in {0, windows.shift}:
        cut = np.asarray(partition_windows(jnp.asarray(tokens), windows, shift))
        rolled, side = np.roll(padded, (-shift, -shift), axis=(0, 1)), windows.side
        corners = [(top, left) for top in range(0, height, side) for left in range(0, width, side)]
        expected = [rolled[top : top + side, left : left + side].reshape(-1) for top, left in corners]
        np.testing.assert_array_equal(cut[..., 0], expected)
        np.testing.assert_array_equal(merge_windows(jnp.asarray(cut), windows, shift), tokens)


def test_shifted_windows_see_no_further_than_plain_ones_would() -> None:
    """Two tokens of a shifted window attend to each other unless the roll brought them together around an edge."""
    windows = Windows.of((8, 8), 4)
    places = np.stack(np.meshgrid(np.arange(8), np.arange(8), indexing="ij"), axis=-1).reshape(1, -1, 2)
    cut = np.asarray(partition_windows(jnp.asarray(places), windows, windows.shift))
    apart = np.abs(cut[:, :, None] - cut[:, None, :]).max(axis=-1)
    np.testing.assert_array_equal(windows.mask(), apart < windows.side)


def test_the_index_is_one_of_offsets() -> None:
    index, side = relative_index(3), 3
    for query in range(side * side):
        for key in range(side * side):
            down, right = query // side - key // side, query % side - key % side
            assert index[query, key] == (down + side - 1) * (2 * side - 1) + right + side - 1


TINY = SwinConfig(image_size=16, patch_size=2, width=8, depths=(2, 4), heads=(2, 2), window=3, drop_path=0.5)


@pytest.fixture(scope="module")
def built() -> tuple[Any, np.ndarray]:
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    return nn.unbox(jax.jit(Swin(TINY).init)(jax.random.key(0), images))["params"], images


def test_scan_and_remat_change_nothing_and_parameters_are_the_same(built: Any) -> None:
    params, images = built
    expected = jax.jit(Swin(TINY).apply)({"params": params}, images)
    other = schema.override(TINY, {"scan": False, "remat": "full"})
    outputs = jax.jit(Swin(other).apply)({"params": params}, images)
    np.testing.assert_allclose(outputs["pooled"], expected["pooled"], atol=1e-6)
    np.testing.assert_allclose(expected["pooled"], expected["tokens"].mean(axis=1), atol=1e-6)


def test_drop_path_is_of_each_row_s_key(built: Any) -> None:
    params, images = built
    keys = jax.random.split(jax.random.key(1), 2)
    run = jax.jit(lambda images, keys: Swin(TINY).apply({"params": params}, images, keys)["pooled"])  # pyright: ignore
    both, swapped = run(images, keys), run(images[::-1], keys[::-1])
    np.testing.assert_allclose(both, swapped[::-1], atol=1e-6)
    assert np.abs(both - run(images, keys[::-1])).max() > 1e-3


def test_images_of_another_size_are_refused(built: Any) -> None:
    with pytest.raises(ValueError, match=r"takes images of 16x16 \(height x width\), not 16x32"):
        Swin(TINY).apply({"params": built[0]}, np.zeros((1, 16, 32, 3), np.float32))
