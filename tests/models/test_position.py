import importlib.util

import numpy as np
import pytest

from vlm_jax.models.position import resize_1d, resize_grid, sincos_2d

CASES = [((7, 7), (12, 12)), ((4, 9), (9, 4)), ((14, 14), (5, 7)), ((16, 16), (24, 24)), ((2, 3), (1, 1))]


def table(grid, prefix=1, width=6, seed=0):
    return np.random.default_rng(seed).normal(size=(prefix + grid[0] * grid[1], width)).astype(np.float32)


if importlib.util.find_spec("torch"):
    import torch

    @pytest.mark.parametrize(("old", "new"), CASES)
    def test_resize_is_torch_bicubic_with_antialias(old, new):
        pos = table(old)
        image = torch.from_numpy(pos[1:]).reshape(1, *old, -1).permute(0, 3, 1, 2)
        expected = torch.nn.functional.interpolate(
            image, size=new, mode="bicubic", antialias=True, align_corners=False
        ).permute(0, 2, 3, 1)
        ours = resize_grid(pos, old, new, prefix_tokens=1)
        np.testing.assert_array_equal(ours[:1], pos[:1])
        np.testing.assert_allclose(ours[1:], expected.reshape(-1, pos.shape[1]).numpy(), atol=1e-5)

    @pytest.mark.parametrize(("old", "new"), [(77, 32), (16, 77), (5, 6)])
    def test_resize_1d_is_torch_linear(old, new):
        pos = np.random.default_rng(1).normal(size=(old, 4)).astype(np.float32)
        expected = torch.nn.functional.interpolate(torch.from_numpy(pos.T[None]), size=new, mode="linear")
        np.testing.assert_allclose(resize_1d(pos, new), expected[0].T.numpy(), atol=1e-5)


def test_resize_to_a_larger_grid_keeps_a_plane_in_the_middle():
    """Cubic interpolation reproduces linear functions away from the border."""
    rows, columns = np.meshgrid(np.arange(8.0), np.arange(8.0), indexing="ij")
    pos = np.stack([rows.ravel(), columns.ravel()], axis=1)
    resized = resize_grid(pos, (8, 8), (16, 16)).reshape(16, 16, 2)
    expected = (np.arange(16) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(resized[5:11, 5:11, 0], np.broadcast_to(expected[5:11, None], (6, 6)), atol=1e-6)
    np.testing.assert_allclose(resized[5:11, 5:11, 1], np.broadcast_to(expected[None, 5:11], (6, 6)), atol=1e-6)


def test_resize_keeps_a_constant_and_the_dtype():
    resized = resize_grid(np.full((1 + 20, 3), 2.5, np.float16), (4, 5), (9, 3), prefix_tokens=1)
    assert resized.dtype == np.float16
    np.testing.assert_allclose(resized, np.full((28, 3), 2.5))


def test_a_wrong_grid_is_an_error():
    with pytest.raises(ValueError, match="36 positions, but grid 4x8 with 0 prefix tokens has 32"):
        resize_grid(np.zeros((36, 2)), (4, 8), (8, 8))


def test_sincos_is_the_formula():
    grid, width = (3, 5), 16
    ours = sincos_2d(grid, width, prefix_tokens=2)
    assert ours.shape == (17, width)
    np.testing.assert_array_equal(ours[:2], np.zeros((2, width)))
    for row, column in np.ndindex(grid):
        expected = []
        for position in (column, row):
            angles = [position / 10000 ** (k / (width // 4)) for k in range(width // 4)]
            expected += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
        np.testing.assert_allclose(ours[2 + row * 5 + column], expected, atol=1e-6)
