"""Warm start: the parameters of another checkpoint as the initial ones of a new run.

Only parameters are taken: never the step, the optimiser or the data position. Resuming a run is
`vlm_jax.checkpoint.Checkpointer.restore`; files of other code bases are imported by `vlm_jax.interop` first.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from vlm_jax import orbax_noise
from vlm_jax.checkpoint_format import find_step, read_arrays, read_meta, stored_params
from vlm_jax.digest import flatten_paths
from vlm_jax.models.position import GridResize, resize_1d, resize_grid
from vlm_jax.models.relative_position import resize_relative
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class InitSource:
    """Which parameters come from one checkpoint. Patterns are regular expressions that must match a whole path."""

    path: str = ""  # a workdir, one of its checkpoints, or an imported checkpoint; empty: a random start
    # (pattern on a path of this model, path in the source, with \1 for the pattern's first group, ...): the first
    # match wins, and what no pattern matches has the same path in the source
    map: tuple[tuple[str, str], ...] = ()
    skip: tuple[str, ...] = ()  # patterns of this model's parameters that keep their random start
    ignore: tuple[str, ...] = ()  # patterns of the source's parameters that aren't needed
    # patterns of position embeddings and of tables of relative positions that may be resized; a table that all blocks
    # share in the source may be mapped to one for each block
    resize: tuple[str, ...] = (r"(.*/)?pos_embed", r"(.*/)?(relative_position|position_bias)/table")
    # the averaged parameters where the source has them (a moving average, a teacher), or the raw ones
    weights: Literal["ema", "params"] = "ema"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Patterns that aren't regular expressions, and rules without a source."""
        patterns = {"map": [pattern for pattern, _ in self.map], "skip": self.skip, "ignore": self.ignore}
        for key, group in (patterns | {"resize": self.resize}).items():
            for pattern in group:
                try:
                    re.compile(pattern)
                except re.error as error:
                    yield key, f"has {pattern!r}, which is no regular expression: {error}"
        for pattern, replacement in self.map:
            with contextlib.suppress(re.error):  # of the pattern, which is reported above
                compiled = re.compile(pattern)
                try:
                    compiled.sub(replacement, "")  # reads the replacement though nothing matches
                except (re.error, IndexError) as error:
                    yield "map", f"has {replacement!r}, which can't be filled in from {pattern!r}: {error}"
        for key, group in patterns.items():
            if group and not self.path:
                yield key, "is given without a source; set init_from.path"


@dataclasses.dataclass(frozen=True)
class FurtherSource(InitSource):
    """One more checkpoint; what it doesn't give is skipped here and comes from the others."""

    name: str = "further"  # stands in overrides (config.init_from.also.NAME.path=...)


@dataclasses.dataclass(frozen=True)
class InitFrom(InitSource):
    """Which parameters come from where."""

    also: tuple[FurtherSource, ...] = ()  # further checkpoints, whose parameters are put in one after the other
    tokenizer: bool = False  # whether the tokenizer is that of the first checkpoint, not that of config.data.tokenizer

    def problems(self) -> Iterator[tuple[str, str]]:
        """More sources without the first."""
        yield from super().problems()
        if not self.path and (self.also or self.tokenizer):
            yield "also" if self.also else "tokenizer", "is given without a source; set init_from.path"
        for source in self.also:
            if not source.path:
                yield f"also.{source.name}.path", "is empty; name a checkpoint, or leave this source out"


def warm_start(params: Any, init_from: InitFrom, new_config: Mapping[str, Any]) -> Any:
    """The parameters with those of another checkpoint put in.

    Args:
        params: this model's initial parameters, a tree of jax arrays.
        init_from: the source and the rules; an empty path returns `params`.
        new_config: this run's config as plain data. With the config stored in the source it gives the grids between
            which a position embedding is resized: its number of rows alone wouldn't tell 4 x 9 patches from 6 x 6.

    Returns:
        A tree like `params`, each leaf in the dtype and sharding that it had.

    Raises:
        ConfigError: lists every parameter that is missing, unused or of another shape, and every rule without use.
        CheckpointError: no checkpoint there, or a damaged one.
    """
    if not init_from.path:
        return params
    orbax_noise.silence()
    params = _from_source(params, init_from, new_config, "config.init_from")
    for source in init_from.also:
        params = _from_source(params, source, new_config, f"config.init_from.also.{source.name}")
    return params


def _from_source(params: Any, init_from: InitSource, new_config: Mapping[str, Any], key: str) -> Any:
    """The parameters with those of one source."""
    ours, treedef = flatten_paths(params), jax.tree.structure(params)
    directory = find_step(init_from.path)
    meta = read_meta(directory)
    stored = stored_params(directory, meta, init_from.weights)
    source = {name: meta["manifest"][path] for name, path in stored.items()}
    sources, problems = _match(init_from, list(ours), list(source))
    resizes = {}
    for path, source_path in sources.items():
        old_shape, new_shape = tuple(source[source_path]["shape"]), ours[path].shape
        if any(re.fullmatch(pattern, path) for pattern in init_from.resize):
            resize = _resize_kind(path)(source_path, old_shape, path, new_shape, meta["config"], new_config)
            if resize.needed():
                resizes[path] = resize
                problems += resize.problems()
        elif old_shape != new_shape:
            problems.append(f"{path}: {list(new_shape)} in this model, {list(old_shape)} in the source")
    if problems:
        raise ConfigError(
            f"{key}: the parameters in {directory} don't fit this model. Rename by init_from.map, keep the "
            "random start by init_from.skip, leave out by init_from.ignore:\n  " + "\n  ".join(problems)
        )
    wanted = {}
    for path, source_path in sources.items():
        entry, sharding = source[source_path], ours[path].sharding
        sharding = _replicated(sharding) if path in resizes else sharding
        wanted[stored[source_path]] = jax.ShapeDtypeStruct(entry["shape"], entry["dtype"], sharding=sharding)
    arrays = read_arrays(directory, meta["manifest"], wanted)
    new = dict(ours)
    for path, source_path in sources.items():
        array = arrays[stored[source_path]]
        if path in resizes:
            array = resizes[path](np.asarray(array))
        new[path] = jax.device_put(array.astype(ours[path].dtype), ours[path].sharding)
    return jax.tree.unflatten(treedef, [new[path] for path in ours])


def _match(init_from: InitSource, ours: list[str], source: list[str]) -> tuple[dict[str, str], list[str]]:
    """({our path: source path} of all that is found, sentences on all that isn't)."""
    sources, problems, used = {}, [], set()
    for path in ours:
        if skipped := [pattern for pattern in init_from.skip if re.fullmatch(pattern, path)]:
            used.update(("skip", pattern) for pattern in skipped)
            continue
        source_path = path
        for pattern, replacement in init_from.map:
            if match := re.fullmatch(pattern, path):
                source_path = match.expand(replacement)
                used.add(("map", pattern))
                break
        if source_path in source:
            sources[path] = source_path
        else:
            problems.append(f"{path}: not in the source" + ("" if source_path == path else f" as {source_path}"))
    for path in sorted(set(source) - set(sources.values())):
        if ignored := [pattern for pattern in init_from.ignore if re.fullmatch(pattern, path)]:
            used.update(("ignore", pattern) for pattern in ignored)
        else:
            problems.append(f"{path}: in the source, but used by no parameter of this model")
    rules = [("map", pattern) for pattern, _ in init_from.map]
    rules += [(key, pattern) for key in ("skip", "ignore") for pattern in getattr(init_from, key)]
    problems += [
        f"init_from.{key}: {pattern!r} matches nothing" for key, pattern in rules if (key, pattern) not in used
    ]
    return sources, problems


class _Resize:
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
        match self.old_grid, self.new_grid:
            case (old_rows, old_columns), (rows, columns):
                prefix = self._prefix(self.old_shape, (old_rows, old_columns))
                return resize_grid(table, (old_rows, old_columns), (rows, columns), prefix, self.form)
            case _:
                return resize_1d(table, self.new_shape[0])


class _TableResize(_Resize):
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


def _resize_kind(path: str) -> type[_Resize]:
    """What resizes the parameter at a path of this model."""
    if path.endswith("/position_bias/table"):
        return _WindowResize
    return _TableResize if path.endswith("/table") else _Resize


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


def _replicated(sharding: Sharding) -> Sharding:
    """Whole on every device of the same mesh, so that the host can read it and one digest covers all arrays."""
    return NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else sharding


__all__ = ["FurtherSource", "InitFrom", "warm_start"]
