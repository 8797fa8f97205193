"""Windows of tokens for attention inside of them (Liu et al. 2021, section 3.2): cutting, shifting, position bias."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vlm_jax.models.initializers import Initializers
from vlm_jax.models.weights import weight


@dataclasses.dataclass(frozen=True)
class Windows:
    """How a grid of tokens is cut.

    Attributes:
        grid: (rows, columns) of tokens.
        side: of a window in tokens.
        shift: of every other block's windows; 0 where the grid is one window or a row of them.
    """

    grid: tuple[int, int]
    side: int
    shift: int

    @classmethod
    def of(cls, grid: tuple[int, int], window: int) -> "Windows":
        """Windows of side `window`, or of the grid's shorter side where that is not larger; then nothing shifts."""
        if min(grid) <= window:
            return cls(grid, min(grid), 0)
        return cls(grid, window, window // 2)

    @property
    def padded(self) -> tuple[int, int]:
        """The grid with what is added at its right and lower edge to fill the last windows."""
        rows, columns = (-(-size // self.side) * self.side for size in self.grid)
        return rows, columns

    def mask(self) -> np.ndarray:
        """bool [windows, S, S]: which tokens of a shifted window were neighbours before the shift.

        The added tokens at the edges take part, as in the published code.
        """
        region = np.zeros(self.padded, np.int32)
        for axis, size in enumerate(self.padded):
            place = np.arange(size)
            bands = (place >= size - self.side).astype(np.int32) + (place >= size - self.shift)
            region += 3**axis * np.expand_dims(bands, 1 - axis)
        cut = _cut(region[None, :, :, None], self.side)[..., 0]
        return cut[:, :, None] == cut[:, None, :]


def partition_windows(x_BxTxD: jax.Array, windows: Windows, shift: int) -> jax.Array:
    """[B, T, D] -> [B W, S, D]: the tokens of each window, window after window in raster order, rows outermost."""
    (rows, columns), padded = windows.grid, windows.padded
    x = x_BxTxD.reshape(x_BxTxD.shape[0], rows, columns, -1)
    if padded != windows.grid:
        x = jnp.pad(x, ((0, 0), (0, padded[0] - rows), (0, padded[1] - columns), (0, 0)))
    if shift:
        x = jnp.roll(x, (-shift, -shift), axis=(1, 2))
    return _cut(x, windows.side)


def merge_windows(x_MxSxD: jax.Array, windows: Windows, shift: int) -> jax.Array:
    """The inverse of `partition_windows`: [B W, S, D] -> [B, T, D]."""
    (rows, columns), (height, width), side = windows.grid, windows.padded, windows.side
    x = x_MxSxD.reshape(-1, height // side, width // side, side, side, x_MxSxD.shape[-1])
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, x_MxSxD.shape[-1])
    if shift:
        x = jnp.roll(x, (shift, shift), axis=(1, 2))
    return x[:, :rows, :columns].reshape(-1, rows * columns, x_MxSxD.shape[-1])


def _cut(x_BxHxWxD: Any, side: int) -> Any:
    batch, height, width, channels = x_BxHxWxD.shape
    x = x_BxHxWxD.reshape(batch, height // side, side, width // side, side, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side * side, channels)


def relative_index(side: int) -> np.ndarray:
    """int [S, S]: which row of a table of (2 side - 1)^2 offsets stands for query and key of a window."""
    place = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij")).reshape(2, -1)
    offset = place[:, :, None] - place[:, None, :] + side - 1
    return offset[0] * (2 * side - 1) + offset[1]


class WindowBias(nn.Module):
    """A learned bias on the attention logits for each head and each offset of two tokens of a window.

    Attributes:
        side: of the window.
        heads: attention heads.
        initializers: those of the tower.
    """

    side: int
    heads: int
    initializers: Initializers

    @nn.compact
    def __call__(self) -> jax.Array:
        """fp32 [1, heads, S, S]."""
        shape = ((2 * self.side - 1) ** 2, self.heads)
        table = weight(self, "table", self.initializers.position, (None, "heads"), shape)
        return table[relative_index(self.side)].transpose(2, 0, 1)[None]


__all__ = ["WindowBias", "Windows", "merge_windows", "partition_windows", "relative_index"]
