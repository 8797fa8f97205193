"""Blockwise masks of patches (Bao et al. 2022, algorithm 1), drawn on the host with an example's own generator."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np

TRIES = 10  # to place one block


class Draws(Protocol):
    """What is asked of a random generator; numpy's has it."""

    def random(self) -> float:
        """Uniform in [0, 1)."""
        ...

    def integers(self, low: int, high: int) -> int | np.integer:
        """Uniform in low..high - 1."""
        ...


@dataclasses.dataclass(frozen=True)
class BlockMasks:
    """Rectangles of random size and place until `count` patches are masked or no more fits.

    As in the published code: the paper's algorithm goes on past its bound, this one stops at or below it. On a grid of
    14 x 14 two masks in three have 75 patches, the mean is 74.5.
    """

    count: int = 75  # the most patches that are masked
    least: int = 16  # patches of a block; a block may be smaller when less than that is left to mask
    aspect: float = 0.3  # least height over width of a block; the most is its inverse

    def problems(self) -> Iterator[tuple[str, str]]:
        """Numbers out of range."""
        if not 1 <= self.least <= self.count:
            yield "least", f"= {self.least} must lie in 1..count = {self.count}"
        if not 0 < self.aspect <= 1:
            yield "aspect", f"= {self.aspect} must lie in (0, 1]"

    def draw(self, grid: tuple[int, int], rng: Draws) -> np.ndarray:
        """bool [rows, columns], True where masked."""
        mask, left = np.zeros(grid, bool), self.count
        while left > 0:
            new = self._add_block(mask, left, rng)
            if not new:
                break
            left -= new
        return mask

    def _add_block(self, mask: np.ndarray, left: int, rng: Draws) -> int:
        """Masks one more block of at most `left` new patches; returns how many are new, 0 if none was found."""
        (rows, columns), widest = mask.shape, math.log(1 / self.aspect)
        for _ in range(TRIES):
            # Where less than `least` is left the interval is upside down, as published: between the two all the same.
            area = self.least + (left - self.least) * rng.random()
            ratio = math.exp(-widest + 2 * widest * rng.random())
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height >= rows or width >= columns:
                continue
            top, start = int(rng.integers(0, rows - height + 1)), int(rng.integers(0, columns - width + 1))
            block = mask[top : top + height, start : start + width]
            new = block.size - int(block.sum())
            if 0 < new <= left:
                block[:] = True
                return new
        return 0


__all__ = ["TRIES", "BlockMasks"]
