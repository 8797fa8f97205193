"""Position embeddings and tables of relative positions of another model, resized to this one's (see `warm_start`)."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from vlm_jax.models.position import GridResize, resize_1d, resize_grid
from vlm_jax.models.relative_position import resize_relative


def fit(
    patterns: Sequence[str],
    old: tuple[str, Sequence[int]],
    new: tuple[str, Sequence[int]],
    configs: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> tuple["Resize | None", list[str]]:
    """(the resize that makes the source's array one of this model, if it needs one; why it can't be one).

    Args:
        patterns: regular expressions of this model's paths that may be resized.
        old: path and shape of the source's array.
        new: those of this model's.
        configs: of the source and of this run.
    """
    (old_path, old_shape), (path, new_shape) = (old[0], tuple(old[1])), (new[0], tuple(new[1]))
    if any(re.fullmatch(pattern, path) for pattern in patterns):
        resize = _resize_kind(path)(old_path, old_shape, path, new_shape, *configs)
        return (resize, list(resize.problems())) if resize.needed() else (None, [])
    if old_shape != new_shape:
        return None, [f"{path}: {list(new_shape)} in this model, {list(old_shape)} in the source"]
    return None, []


class Resize:
    """The resize of one position embedding [positions, D]: of a grid for images, of a length for texts."""

    def __init__(
        self,
        old_path: str,
        old_shape: tuple[int, ...],
        new_path: str,
        new_shape: tuple[int, ...],
        old_config: Mapping[str, Any],
        new_config: Mapping[str, Any],
    ) -> None:
        self.path, self.old_shape, self.new_shape = new_path, old_shape, new_shape
        self.old_grid, self.new_grid = _grid(old_config, old_path), _grid(new_config, new_path)
        self.form: GridResize = _form(new_config, new_path)

    def needed(self) -> bool:
        """Equal shapes may still be of different grids: 36 patches are 4 x 9 or 6 x 6."""
        known = self.old_grid is not None and self.new_grid is not None
        return self.old_shape != self.new_shape or (known and self.old_grid != self.new_grid)

    def problems(self) -> Iterator[str]:
        """Why it can't be done."""
        what = f"{self.path}: {list(self.new_shape)} in this model, {list(self.old_shape)} in the source; "
        if not (len(self.old_shape) == len(self.new_shape) == 2 and self.old_shape[1] == self.new_shape[1]):
            yield what + "only the number of positions can be resized"
        elif self.old_grid is None or self.new_grid is None:
            where = "source's" if self.old_grid is None else "new"
            yield what + f"the {where} config has no single tower with image_size and patch_size, or length, for it"
        elif len(self.old_grid) != len(self.new_grid):
            yield what + "one is a grid of patches and the other a row of tokens"
        elif self._prefix(self.old_shape, self.old_grid) != self._prefix(self.new_shape, self.new_grid):
            yield what + f"beside the grids {self.new_grid} and {self.old_grid} they have different class tokens"

    @staticmethod
    def _prefix(shape: tuple[int, ...], grid: tuple[int, ...]) -> int:
        return shape[0] - int(np.prod(grid))

    def __call__(self, table: np.ndarray) -> np.ndarray:
        """The source's array -> one of the new shape."""
        match self.old_grid, self.new_grid:
            case (old_rows, old_columns), (rows, columns):
                prefix = self._prefix(self.old_shape, (old_rows, old_columns))
                return resize_grid(table, (old_rows, old_columns), (rows, columns), prefix, self.form)
            case _:
                return resize_1d(table, self.new_shape[0])


class _TableResize(Resize):
    """The resize of one table of relative positions ([layers,] offsets, heads), or its copies for every layer."""

    def problems(self) -> Iterator[str]:
        """Why it can't be done."""
        what = f"{self.path}: {list(self.new_shape)} in this model, {list(self.old_shape)} in the source; "
        copied = len(self.new_shape) == 3 and len(self.old_shape) == 2
        layers_agree = copied or self.old_shape[:-2] == self.new_shape[:-2]
        if not layers_agree or self.old_shape[-1] != self.new_shape[-1]:
            yield what + "only the number of offsets can be resized"
        elif self.old_grid is None or self.new_grid is None:
            where = "source's" if self.old_grid is None else "new"
            yield what + f"the {where} config has no single tower with image_size and patch_size for it"
        elif self._beside(self.old_shape, self.old_grid) != self._beside(self.new_shape, self.new_grid):
            yield what + f"beside the grids {self.new_grid} and {self.old_grid} they have different class tokens"

    @staticmethod
    def _beside(shape: tuple[int, ...], grid: tuple[int, ...]) -> int:
        return shape[-2] - int(np.prod(2 * np.asarray(grid) - 1))

    def __call__(self, table: np.ndarray) -> np.ndarray:
        assert self.old_grid is not None and self.new_grid is not None, "see `problems`"
        (old_rows, old_columns), (rows, columns) = self.old_grid, self.new_grid
        stacked = table.reshape(-1, *table.shape[-2:])
        resized = np.stack([resize_relative(one, (old_rows, old_columns), (rows, columns)) for one in stacked])
        return np.broadcast_to(resized if len(self.new_shape) == 3 else resized[0], self.new_shape)


class _WindowResize(_TableResize):
    """That of tables of offsets in a window, which is square and has no class token: its rows tell its side."""

    def __init__(
        self, old_path: str, old_shape: tuple[int, ...], new_path: str, new_shape: tuple[int, ...], *configs: Any
    ) -> None:
        super().__init__(old_path, old_shape, new_path, new_shape, *configs)
        self.old_grid, self.new_grid = (((math.isqrt(rows) + 1) // 2,) * 2 for *_, rows, _ in (old_shape, new_shape))


def _resize_kind(path: str) -> type[Resize]:
    """What resizes the parameter at a path of this model."""
    if path.endswith("/position_bias/table"):
        return _WindowResize
    return _TableResize if path.endswith("/table") else Resize


def _grid(config: Mapping[str, Any], path: str) -> tuple[int, ...] | None:
    """(rows, columns) or (length,) of the tower to which the positions at `path` belong; None if unknown."""
    sizes = [_size(node) for node in _towers(config, path)]
    return sizes[0] if len(set(sizes)) == 1 else None


def _form(config: Mapping[str, Any], path: str) -> GridResize:
    """How the tower of a position embedding resizes it; antialiased unless it says otherwise."""
    named = [form for node in _towers(config, path) if (form := node.get("pos_resize"))]
    return cast(GridResize, named[0]) if named else "antialias"


def _towers(config: Mapping[str, Any], path: str) -> list[Mapping[str, Any]]:
    """The configs that may be that of the tower to which the positions at `path` belong."""
    towers = [(name, node) for name, node in _nodes("", config) if _size(node) is not None]
    parents = path.split("/")[:-1]
    named = [[node for name, node in towers if name == parent] for parent in reversed(parents)]
    return next(filter(None, named), [node for _, node in towers])


def _size(node: Mapping[str, Any]) -> tuple[int, ...] | None:
    match node:
        case {"image_size": int(side), "patch_size": int(patch)}:
            return side // patch, side // patch
        case {"image_size": [int(height), int(width)], "patch_size": int(patch)}:
            return height // patch, width // patch
        case {"length": int(length), "vocab_size": int()}:
            return (length,)
    return None


def _nodes(name: str, node: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield name, node
    for key, child in node.items():
        if isinstance(child, Mapping):
            yield from _nodes(key, child)


__all__ = ["Resize", "fit"]
