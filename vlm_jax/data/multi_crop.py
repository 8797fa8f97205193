"""Several views of one image, large ones and small ones, and which patches of the large ones are masked (DINOv2)."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from vlm_jax.data import images
from vlm_jax.data.augment import Blur, ColorJitter
from vlm_jax.data.examples import Example
from vlm_jax.data.images import AugmentConfig, PreprocessConfig
from vlm_jax.data.sources.base import BadRecord, Record

GLOBAL_VIEWS = 2


def _view(scale: tuple[float, float], blur: float, solarize: float = 0.0) -> AugmentConfig:
    jitter = ColorJitter(probability=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    return AugmentConfig(scale, flip=0.5, color_jitter=jitter, grey=0.2, blur=Blur(blur), solarize=solarize)


@dataclasses.dataclass(frozen=True)
class MultiCropConfig:
    """Two global views of the model's image size and some small local ones (Caron et al. 2020).

    The published code states blurs of 1 and 0.1 for the first and the second view, as DINO has them, but takes them
    for the probability to leave an image alone; these defaults are what it does.
    """

    first: AugmentConfig = dataclasses.field(default_factory=lambda: _view((0.32, 1.0), blur=0.0))
    second: AugmentConfig = dataclasses.field(default_factory=lambda: _view((0.32, 1.0), blur=0.9, solarize=0.2))
    local: AugmentConfig = dataclasses.field(default_factory=lambda: _view((0.05, 0.32), blur=0.5))
    local_views: int = 8
    local_size: int = 98  # side of a local view in pixels

    def problems(self) -> Iterator[tuple[str, str]]:
        """Views that are none."""
        for key in ("local_views", "local_size"):
            if getattr(self, key) < 1:
                yield key, f"= {getattr(self, key)} must be at least 1"


@dataclasses.dataclass(frozen=True)
class BlockMaskConfig:
    """Which patches of the global views are masked: rectangles, up to a share that is drawn for each view.

    The published code masks a half of a batch's views, and spreads their shares evenly over the batch. Here an
    example knows of no other one: a half of its two views is masked, and the share is uniform.
    """

    views: int = 1  # how many of an image's two global views are masked
    share: tuple[float, float] = (0.1, 0.5)  # of the patches, least and most
    min_patches: int = 4  # least area of a rectangle
    min_aspect: float = 0.3  # least height over width of a rectangle; the most is its inverse

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values outside of their range."""
        if not 1 <= self.views <= GLOBAL_VIEWS:
            yield "views", f"= {self.views} must be 1 or {GLOBAL_VIEWS}"
        if not 0 <= self.share[0] <= self.share[1] <= 1:
            yield "share", f"= {self.share} must satisfy 0 <= least <= most <= 1"
        if self.min_patches < 1:
            yield "min_patches", f"= {self.min_patches} must be at least 1"
        if not 0 < self.min_aspect <= 1:
            yield "min_aspect", f"= {self.min_aspect} must lie in (0, 1]"

    def slots(self, patches: int) -> int:
        """The most patches of one image that can be masked, where a view has that many."""
        return self.views * int(patches * self.share[1])


def block_mask(grid: tuple[int, int], count: int, rng: np.random.Generator, config: BlockMaskConfig) -> np.ndarray:
    """Masks up to `count` patches by rectangles, as BEiT does (Bao et al. 2022, algorithm 1), bool [rows, columns].

    A rectangle that does not fit or adds nothing is drawn anew, ten times; after that the mask stays smaller.
    """
    mask = np.zeros(grid, bool)
    while (left := count - int(mask.sum())) > 0 and _add_block(mask, left, rng, config):
        pass
    return mask


def _add_block(mask: np.ndarray, left: int, rng: np.random.Generator, config: BlockMaskConfig) -> bool:
    """Adds one rectangle that masks at most `left` more patches; whether it could."""
    rows, columns = mask.shape
    log_aspect = -math.log(config.min_aspect)
    for _ in range(10):
        area = config.min_patches + (left - config.min_patches) * rng.random()
        aspect = math.exp(rng.uniform(-log_aspect, log_aspect))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, start = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
        block = mask[top : top + height, start : start + width]
        if 0 < block.size - int(block.sum()) <= left:
            block[:] = True
            return True
    return False


class MultiCropExamples:
    """The views of an image and its masked patches.

    `global_views` uint8 [2, size, size, 3]; `local_views` uint8 [L, local size, local size, 3]; `masked` int32 [S],
    the masked patches, numbered through both global views, and -1 where there are fewer than S.

    Args:
        size: side of a global view in pixels.
        grid: (rows, columns) of its patches.
        views: how views are made.
        masks: how patches are masked.
        preprocess: of evaluation, for the examples without randomness.
    """

    def __init__(
        self,
        size: int,
        grid: tuple[int, int],
        views: MultiCropConfig,
        masks: BlockMaskConfig,
        preprocess: PreprocessConfig,
    ):
        self.size, self.grid, self.views, self.masks, self.preprocess = size, grid, views, masks, preprocess

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """One row; without `rng` every view is that of evaluation and nothing is masked. Raises `BadRecord`."""
        try:
            image = images.decode(record["image"])
        except ValueError as error:
            raise BadRecord(record["where"], record["key"], str(error)) from error
        local, sides = [self.views.local] * self.views.local_views, (self.size, self.views.local_size)
        globals_, locals_ = (
            np.stack([self._view(image, rng, config, side) for config in configs])
            for configs, side in zip(([self.views.first, self.views.second], local), sides, strict=True)
        )
        return {"global_views": globals_, "local_views": locals_, "masked": self._masked(rng)}

    def _view(self, image: np.ndarray, rng: np.random.Generator | None, config: AugmentConfig, side: int) -> np.ndarray:
        if rng is None:
            return images.preprocess(image, self.preprocess, side)
        return images.training_view(image, rng, config, self.preprocess, side)

    def _masked(self, rng: np.random.Generator | None) -> np.ndarray:
        patches = self.grid[0] * self.grid[1]
        masked = np.full(self.masks.slots(patches), -1, np.int32)
        if rng is None:
            return masked
        found = np.zeros((GLOBAL_VIEWS, patches), bool)
        for view in rng.permutation(GLOBAL_VIEWS)[: self.masks.views]:
            count = int(patches * rng.uniform(*self.masks.share))
            found[view] = block_mask(self.grid, count, rng, self.masks).reshape(-1)
        places = np.flatnonzero(found)
        masked[: len(places)] = places
        return masked


__all__ = ["GLOBAL_VIEWS", "BlockMaskConfig", "MultiCropConfig", "MultiCropExamples", "block_mask"]
