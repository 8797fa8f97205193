"""A learned bias on the attention logits for each offset of two patches (BEiT's ViT), and the resize of its table.

Windows have a bias of their own, in `windows`. Positions that are added to the patches are in `position`.
"""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np
from flax import linen as nn
from jax.nn.initializers import zeros
from jax.typing import ArrayLike

from vlm_jax.models.weights import weight

RelativePositionName = Literal["none", "shared", "per_block"]
CLASS_ROWS = 3  # class token to patch, patch to class token, class token to itself


@dataclasses.dataclass(frozen=True)
class RelativeGrid:
    """Between which tokens the offsets are.

    Attributes:
        grid: (rows, columns) of patches.
        class_token: whether a class token stands before them; it has no place, so its three pairs have rows of theirs.
    """

    grid: tuple[int, int]
    class_token: bool

    @property
    def rows(self) -> int:
        """Of the table: all offsets, and the pairs with the class token."""
        return offsets(self.grid) + CLASS_ROWS * self.class_token

    def index(self) -> np.ndarray:
        """int [T, T]: the row of the table for a query and a key; the pairs with the class token have the last."""
        place = np.stack(np.meshgrid(*map(np.arange, self.grid), indexing="ij")).reshape(2, -1)
        down, right = place[:, :, None] - place[:, None, :] + np.asarray(self.grid)[:, None, None] - 1
        index = down * (2 * self.grid[1] - 1) + right
        if not self.class_token:
            return index
        index = np.pad(index, ((1, 0), (1, 0)))
        index[0, :], index[:, 0], index[0, 0] = self.rows - 3, self.rows - 2, self.rows - 1
        return index


def offsets(grid: tuple[int, int]) -> int:
    """How many offsets two patches of a grid can have."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


class RelativePositionBias(nn.Module):
    """The table, which starts at zero (Bao et al. 2022, published code).

    Attributes:
        relative: the tokens.
        heads: attention heads.
    """

    relative: RelativeGrid
    heads: int

    @nn.compact
    def __call__(self) -> jax.Array:
        """fp32 [1, heads, T, T]."""
        table = weight(self, "table", zeros, (None, "heads"), (self.relative.rows, self.heads))
        return table[self.relative.index()].transpose(2, 0, 1)[None]


def resize_relative(table: ArrayLike, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> np.ndarray:
    """Cubic resize of a table of offsets between grids, dense near offset 0 (the published fine-tuning of BEiT).

    The old offsets are laid at distances that grow geometrically from 1 by the ratio that lets them reach the new
    grid's farthest one; between them stands the interpolating cubic spline. Near patches so keep nearly the bias that
    they had, and far ones share the rest.

    Args:
        table: [offsets of the old grid (+ rows of the class token, which are copied), heads].
        old_grid: (rows, columns) that it was made for.
        new_grid: (rows, columns) wanted.

    Returns:
        [offsets of the new grid (+ those rows), heads] in the dtype of the input.

    Raises:
        ValueError: the table has another number of rows than the old grid.
    """
    # Here and not on top: only this needs it, and it takes its time to import.
    from scipy.interpolate import RectBivariateSpline

    table = np.asarray(table)
    count = offsets(old_grid)
    if table.shape[0] not in (count, count + CLASS_ROWS):
        raise ValueError(
            f"the table of relative positions has {table.shape[0]} rows, but a grid of {old_grid[0]}x{old_grid[1]} has "
            f"{count}, or {count + CLASS_ROWS} with a class token; pass the grid that it was trained with"
        )
    if old_grid == new_grid:
        return table
    heads = table[:count].astype(np.float64).reshape(2 * old_grid[0] - 1, 2 * old_grid[1] - 1, -1)
    old = [_stretched(old_side, new_side) for old_side, new_side in zip(old_grid, new_grid, strict=True)]
    new = [np.arange(1 - side, side, dtype=np.float64) for side in new_grid]
    degrees = [min(3, places.size - 1) for places in old]
    spline: Any = RectBivariateSpline
    resized = [
        spline(*old, heads[:, :, head], kx=degrees[0], ky=degrees[1], s=0)(*new).reshape(-1)
        for head in range(table.shape[1])
    ]
    return np.concatenate([np.stack(resized, axis=1).astype(table.dtype), table[count:]])


def _stretched(old: int, new: int) -> np.ndarray:
    """Where the 2 old - 1 offsets of one axis are laid: 0, +-1, +-(1 + q), +-(1 + q + q^2), ..., to +-(new - 1)."""
    low, high = 0.0, 64.0
    for _ in range(100):
        ratio = (low + high) / 2
        if (ratio ** np.arange(old - 1)).sum() > new - 1:
            high = ratio
        else:
            low = ratio
    distances = np.cumsum(low ** np.arange(old - 1))
    return np.concatenate([-distances[::-1], [0.0], distances])


__all__ = ["CLASS_ROWS", "RelativeGrid", "RelativePositionBias", "RelativePositionName", "resize_relative"]
