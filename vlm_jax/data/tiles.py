"""An image of any size to square tiles, and the tokens that stand for them in a text.

Three ways: one square (LLaVA-1.5), a grid of tiles beside the whole image (LLaVA-NeXT's "anyres"), a resized image cut
into tiles with a marker before each (nanoVLM). Which features a tile gives is the model's business; here a slot
`tile * tokens_per_tile + feature` says which of them a token takes.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from vlm_jax.data.images import CLIP_MEAN, MAX_PIXELS, resize
from vlm_jax.schema import Choice

NO_SLOT = -1
"""A token of text."""
NEWLINE = -2
"""The slot of the learned vector that ends a row of features (LLaVA-NeXT's `image_newline`)."""
CLIP_GREY = (int(CLIP_MEAN[0] * 255), int(CLIP_MEAN[1] * 255), int(CLIP_MEAN[2] * 255))
"""(122, 116, 104): CLIP's mean colour, the ground on which LLaVA-1.5 pads an image to a square."""

Piece = str | np.ndarray


@dataclasses.dataclass(frozen=True)
class TilePlan:
    """What stands for an image in a text.

    Attributes:
        tiles: number of tiles.
        pieces: in order, names of marker tokens and int32 arrays of slots, counted from the image's first tile.
    """

    tiles: int
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Tiling(Choice):
    """How an image becomes tiles; pick a kind. The side of a tile in pixels and its tokens come from the model."""

    @classmethod
    def kinds(cls) -> Mapping[str, type[Any]]:
        """The table kind -> config."""
        return {"square": SquareTiling, "anyres": AnyresTiling, "split": SplitTiling}

    @property
    def needs_size(self) -> bool:
        """Whether the plan depends on the size of the image."""
        return True

    def markers(self, most: int) -> tuple[str, ...]:
        """Marker tokens that plans may hold, for grids of up to `most` rows and columns."""
        return ()

    def plan(self, height: int, width: int, tile_size: int, tokens_per_tile: int) -> TilePlan:
        """The tokens of an image of this size."""
        raise TypeError(f"{type(self).__name__} is a family of tilings; pick one of its kinds")

    def tiles(self, image: np.ndarray, tile_size: int) -> np.ndarray:
        """uint8 [H, W, 3] to uint8 [tiles, tile_size, tile_size, 3].

        Raises:
            ValueError: the image is so narrow that what it is resized to would not fit the memory.
        """
        raise TypeError(f"{type(self).__name__} is a family of tilings; pick one of its kinds")


@dataclasses.dataclass(frozen=True)
class SquareTiling(Tiling):
    """One tile: LLaVA-1.5 crops the middle of the image in stage 1 and pads the image to a square in stage 2."""

    # crop: shorter side to the tile's, then the middle. pad: whole image on a square ground, resized. squash: both
    # sides to the tile's
    fit: Literal["crop", "pad", "squash"] = "pad"
    # colour (0..255) of the ground
    fill: tuple[int, int, int] = CLIP_GREY

    @property
    def needs_size(self) -> bool:
        """See the base."""
        return False

    def plan(self, height: int, width: int, tile_size: int, tokens_per_tile: int) -> TilePlan:
        """See the base."""
        return TilePlan(1, (_tile_slots(0, tokens_per_tile),))

    def tiles(self, image: np.ndarray, tile_size: int) -> np.ndarray:
        """See the base."""
        if self.fit == "squash":
            return resize(image, tile_size, tile_size, "bicubic")[None]
        return shorter_side_crop(pad_to_square(image, self.fill) if self.fit == "pad" else image, tile_size)[None]


@dataclasses.dataclass(frozen=True)
class AnyresTiling(Tiling):
    """LLaVA-NeXT: the whole image squashed to a tile, then the image resized into a grid of tiles on black.

    Each row of features of the grid, without those of the black borders, ends with a learned newline.
    """

    # grids to choose from, as (columns, rows)
    grids: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))

    def problems(self) -> Iterator[tuple[str, str]]:
        """Grids that hold no tile."""
        if not self.grids or min(min(grid) for grid in self.grids) < 1:
            yield "grids", f"= {self.grids} must hold pairs (columns, rows) of 1 or more"

    def plan(self, height: int, width: int, tile_size: int, tokens_per_tile: int) -> TilePlan:
        """See the base; `tokens_per_tile` must be a square number."""
        side = math.isqrt(tokens_per_tile)
        columns, rows = best_grid(height, width, self.grids, tile_size)
        y_top, y_stop, x_left, x_stop = unpadded(height, width, rows * side, columns * side)
        y, x = np.mgrid[y_top:y_stop, x_left:x_stop]
        tile = 1 + (y // side) * columns + x // side
        slots = tile * tokens_per_tile + (y % side) * side + x % side
        lines = np.concatenate([slots, np.full((len(slots), 1), NEWLINE)], axis=1)
        return TilePlan(1 + rows * columns, (_tile_slots(0, tokens_per_tile), lines.reshape(-1).astype(np.int32)))

    def tiles(self, image: np.ndarray, tile_size: int) -> np.ndarray:
        """See the base."""
        columns, rows = best_grid(image.shape[0], image.shape[1], self.grids, tile_size)
        canvas = resize_and_pad(image, columns * tile_size, rows * tile_size)
        whole = resize(image, tile_size, tile_size, "bicubic")
        return np.concatenate([whole[None], cut(canvas, tile_size)])


@dataclasses.dataclass(frozen=True)
class SplitTiling(Tiling):
    """nanoVLM: both sides resized to multiples of a tile, cut into tiles, the whole image in front as one tile more.

    The aspect ratio is not kept: the shorter side is rounded up.
    """

    # longest side in pixels that an image is resized to
    max_side: int = 2048
    # whether small images are enlarged to that, too
    enlarge: bool = True
    # token before the tile of the whole image; empty: there is no such tile
    global_marker: str = "<|global_image|>"
    # token before every other tile; {row} and {column} count from 1
    tile_marker: str = "<row_{row}_col_{column}>"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Sides that can't be."""
        if self.max_side < 1:
            yield "max_side", f"= {self.max_side} must be 1 or more"

    def markers(self, most: int) -> tuple[str, ...]:
        """See the base."""
        cells = [self._marker(row, column) for row in range(most) for column in range(most)]
        return tuple(marker for marker in (self.global_marker, *cells) if marker)

    def _marker(self, row: int, column: int) -> str:
        return self.tile_marker.format(row=row + 1, column=column + 1)

    def plan(self, height: int, width: int, tile_size: int, tokens_per_tile: int) -> TilePlan:
        """See the base."""
        new_height, new_width = split_size(height, width, tile_size, self.max_side, self.enlarge)
        rows, columns = new_height // tile_size, new_width // tile_size
        single = rows * columns == 1
        names = [self.global_marker] * bool(self.global_marker)
        if not (single and names):
            names += [self._marker(row, column) for row in range(rows) for column in range(columns)]
        pieces: list[Piece] = []
        for tile, name in enumerate(names):
            pieces += [*([name] if name else []), _tile_slots(tile, tokens_per_tile)]
        return TilePlan(len(names), tuple(pieces))

    def tiles(self, image: np.ndarray, tile_size: int) -> np.ndarray:
        """See the base."""
        height, width = split_size(image.shape[0], image.shape[1], tile_size, self.max_side, self.enlarge)
        resized = resize(image, width, height, "bicubic")
        cells = cut(resized, tile_size)
        if len(cells) == 1 or not self.global_marker:
            return cells
        return np.concatenate([resize(resized, tile_size, tile_size, "bilinear")[None], cells])


def _tile_slots(tile: int, tokens_per_tile: int) -> np.ndarray:
    return np.arange(tile * tokens_per_tile, (tile + 1) * tokens_per_tile, dtype=np.int32)


def cut(image: np.ndarray, tile_size: int) -> np.ndarray:
    """uint8 [R * s, C * s, 3] to its tiles row by row, uint8 [R * C, s, s, 3]."""
    height, width = image.shape[:2]
    grid = image.reshape(height // tile_size, tile_size, width // tile_size, tile_size, 3)
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, tile_size, tile_size, 3)


def shorter_side_crop(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] to uint8 [size, size, 3] as transformers' CLIP processor makes it.

    It differs from `images.preprocess` in the corner of the crop, which is rounded down.
    """
    height, width = image.shape[:2]
    new_height = size if height <= width else int(size * height / width)
    new_width = size if width <= height else int(size * width / height)
    _check_pixels(height, width, new_height, new_width)
    resized = resize(image, new_width, new_height, "bicubic")
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return resized[top : top + size, left : left + size]


def pad_to_square(image: np.ndarray, fill: tuple[int, int, int]) -> np.ndarray:
    """The image in the middle of a square as large as its longer side (LLaVA-1.5, `expand2square`)."""
    height, width = image.shape[:2]
    side = max(height, width)
    _check_pixels(height, width, side, side)
    square = np.broadcast_to(np.asarray(fill, np.uint8), (side, side, 3)).copy()
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def _check_pixels(height: int, width: int, new_height: int, new_width: int) -> None:
    if new_height * new_width > MAX_PIXELS:
        raise ValueError(
            f"the image of {width}x{height} pixels is too narrow: it would be resized to {new_width}x{new_height}, "
            f"more than the {MAX_PIXELS} pixels allowed"
        )


def best_grid(height: int, width: int, grids: tuple[tuple[int, int], ...], tile_size: int) -> tuple[int, int]:
    """(columns, rows) of the grid that shows the most of an image's pixels, and of those the one with least waste.

    The first of equals (LLaVA-NeXT, `select_best_resolution`).
    """

    def rank(grid: tuple[int, int]) -> tuple[int, int]:
        grid_width, grid_height = grid[0] * tile_size, grid[1] * tile_size
        scale = min(grid_width / width, grid_height / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return -shown, grid_width * grid_height - shown

    return min(grids, key=rank)


def resize_and_pad(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """The image as large as it fits, in the middle of a black ground (LLaVA-NeXT)."""
    old_height, old_width = image.shape[:2]
    scale_width, scale_height = width / old_width, height / old_height
    if scale_width < scale_height:
        new_width, new_height = width, min(math.ceil(old_height * scale_width), height)
    else:
        new_width, new_height = min(math.ceil(old_width * scale_height), width), height
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    canvas[top : top + new_height, left : left + new_width] = resize(image, new_width, new_height, "bicubic")
    return canvas


def unpadded(height: int, width: int, grid_height: int, grid_width: int) -> tuple[int, int, int, int]:
    """(top, stop, left, stop) of the features that don't lie in the black borders alone (LLaVA-NeXT, `unpad_image`).

    Args:
        height: of the image in pixels; width: likewise.
        width: see `height`.
        grid_height: rows of features; grid_width: columns.
        grid_width: see `grid_height`.
    """
    if width / height > grid_width / grid_height:
        border = (grid_height - int(height * (grid_width / width))) // 2
        return border, grid_height - border, 0, grid_width
    border = (grid_width - int(width * (grid_height / height))) // 2
    return 0, grid_height, border, grid_width - border


def split_size(height: int, width: int, tile_size: int, max_side: int, enlarge: bool) -> tuple[int, int]:
    """(height, width), multiples of `tile_size`, that nanoVLM resizes an image to (its `DynamicResizeTransform`)."""
    longer, shorter = max(height, width), min(height, width)
    new_longer = max_side if enlarge else min(max_side, math.ceil(longer / tile_size) * tile_size)
    new_shorter = max(tile_size, math.ceil(shorter * (new_longer / longer) / tile_size) * tile_size)
    return (new_longer, new_shorter) if height >= width else (new_shorter, new_longer)
