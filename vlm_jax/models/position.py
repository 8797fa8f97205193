"""Position embeddings with an explicit grid, and their resize. Relative position biases are built elsewhere."""

from typing import Literal

import numpy as np
from jax.typing import ArrayLike

# How a grid of positions is brought to another one: "antialias", as PIL and open_clip do; "bicubic", as torch does by
# default; "bicubic_offset", the same with 0.1 added to the wanted size, as DINO and DINOv2 without registers do.
GridResize = Literal["antialias", "bicubic", "bicubic_offset"]


def sincos_2d(grid: tuple[int, int], width: int, prefix_tokens: int = 0) -> np.ndarray:
    """Fixed 2-D sine-cosine embedding as in MAE (He et al. 2022) and MoCo v3.

    The first half of the channels encodes the column, the second the row; each half is [sin | cos] of the raw integer
    position times 10000^(-k / (width / 4)).

    Args:
        grid: (rows, columns) of patches.
        width: channels; a multiple of 4.
        prefix_tokens: tokens before the patches, which get zeros.

    Returns:
        [prefix + rows * columns, width] fp32, rows in raster order.

    Raises:
        ValueError: width is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine embedding needs a width divisible by 4, not {width}")
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    angles = [position.reshape(-1, 1) * frequencies for position in (column, row)]
    table = np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))], axis=1)
    return np.concatenate([np.zeros((prefix_tokens, width)), table]).astype(np.float32)


def resize_grid(
    pos_embed: ArrayLike,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    prefix_tokens: int = 0,
    form: GridResize = "antialias",
) -> np.ndarray:
    """Bicubic resize of a learned 2-D position embedding, antialiased as open_clip and big_vision do when loading.

    Equal to `torch.nn.functional.interpolate(mode="bicubic", antialias=form == "antialias")`. The grids are arguments
    because the number of positions alone does not tell 4 x 9 from 6 x 6.

    Args:
        pos_embed: [prefix + old rows * old columns, D].
        old_grid: (rows, columns) that it was made for.
        new_grid: (rows, columns) wanted.
        prefix_tokens: leading positions (class token) that are copied.
        form: of the resize.

    Returns:
        [prefix + new rows * new columns, D] in the dtype of the input.

    Raises:
        ValueError: `pos_embed` has another number of positions than prefix and old grid.
    """
    table = np.asarray(pos_embed)
    expected = prefix_tokens + old_grid[0] * old_grid[1]
    if table.shape[0] != expected:
        raise ValueError(
            f"the position embedding has {table.shape[0]} positions, but grid {old_grid[0]}x{old_grid[1]} with "
            f"{prefix_tokens} prefix tokens has {expected}; pass the grid that it was trained with"
        )
    if old_grid == new_grid:
        return table
    prefix, patches = table[:prefix_tokens], table[prefix_tokens:].astype(np.float64)
    patches = patches.reshape(*old_grid, -1)
    rows, columns = resize_matrices(old_grid, new_grid, form)
    resized = np.einsum("ah,bw,hwd->abd", rows, columns, patches, optimize=True)
    return np.concatenate([prefix, resized.reshape(-1, table.shape[1]).astype(table.dtype)])


def resize_matrices(
    old_grid: tuple[int, int], new_grid: tuple[int, int], form: GridResize
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the old rows in the new ones and of the old columns in the new ones, [new, old] fp64 each."""
    matrix = {
        "antialias": _cubic_matrix,
        "bicubic": lambda old, new: _point_cubic_matrix(old, float(new)),
        "bicubic_offset": lambda old, new: _point_cubic_matrix(old, new + 0.1),
    }[form]
    rows, columns = (matrix(old, new) for old, new in zip(old_grid, new_grid, strict=True))
    return rows, columns


def resize_1d(pos_embed: ArrayLike, length: int) -> np.ndarray:
    """Linear resize of a text position embedding, as `interpolate(mode="linear", align_corners=False)`.

    Args:
        pos_embed: [L, D].
        length: positions wanted.

    Returns:
        [length, D] in the dtype of the input.
    """
    table = np.asarray(pos_embed)
    old = table.shape[0]
    if old == length:
        return table
    # Clipping at 0 is torch's treatment of the half pixel that lies before the first sample.
    source = np.clip((np.arange(length) + 0.5) * (old / length) - 0.5, 0, None)
    low = np.minimum(source.astype(int), old - 1)
    high = np.minimum(low + 1, old - 1)
    weight = (source - low)[:, None]
    return (table[low] * (1 - weight) + table[high] * weight).astype(table.dtype)


def _cubic_matrix(old: int, new: int) -> np.ndarray:
    """[new, old] weights of Keys' cubic kernel with a = -0.5, stretched by the scale when shrinking."""
    scale = old / new
    stretch = max(scale, 1.0)
    centre = (np.arange(new) + 0.5) * scale
    weights = np.zeros((new, old))
    for i, c in enumerate(centre):
        # The support is cut to whole samples exactly where PIL and torch cut it.
        start = max(int(c - 2 * stretch + 0.5), 0)
        stop = min(int(c + 2 * stretch + 0.5), old)
        taps = _keys((np.arange(start, stop) - c + 0.5) / stretch)
        weights[i, start:stop] = taps / taps.sum()
    return weights


def _point_cubic_matrix(old: int, size: float) -> np.ndarray:
    """[new, old] weights of Keys' cubic kernel with a = -0.75, four samples wide whatever the scale, as torch's.

    `size` is the new size, which may have a fraction: it then decides the scale, and its whole part the samples. A
    sample beyond the edge is the one at the edge.
    """
    new = int(size)
    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / size - 0.5
        for sample in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            weights[i, min(max(sample, 0), old - 1)] += _keys(np.asarray(sample - centre), a=-0.75)
    return weights


def _keys(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys 1981, eq. 15."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


__all__ = ["GridResize", "resize_1d", "resize_grid", "resize_matrices", "sincos_2d"]
