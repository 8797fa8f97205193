"""Warm start: the parameters of another checkpoint as the initial ones of a new run.

Only parameters are taken: never the step, the optimiser or the data position. Resuming a run is
`vlm_jax.checkpoint.Checkpointer.restore`; files of other code bases are imported by `vlm_jax.interop` first.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
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

_STACK = re.compile(r"(.*/)?blocks/.*")  # leaves with a leading axis of layers


@dataclasses.dataclass(frozen=True)
class InitPart:
    """Some parameters from a source of their own: an image tower, half of a BERT, the other half of another one."""

    name: str  # stands in messages and in overrides (config.init_from.parts.NAME.path=...)
    pattern: str  # regular expression that the whole paths of this model's parameters match
    path: str = ""  # a workdir, one of its checkpoints, or an imported checkpoint; empty: this part does nothing
    map: tuple[tuple[str, str], ...] = ()  # as that of `InitFrom`
    layers: tuple[int, int] | None = None  # of the source's stack (`blocks/`): first, and one past the last
    weights: Literal["ema", "params"] = "ema"  # as that of `InitFrom`

    def problems(self) -> Iterator[tuple[str, str]]:
        """Patterns that aren't regular expressions, and layers that are none."""
        yield from _pattern_problems("pattern", (self.pattern,))
        yield from _map_problems(self.map)
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            yield "layers", f"= {self.layers} must be (first, one past the last), counted from 0"


@dataclasses.dataclass(frozen=True)
class InitFrom:
    """Which parameters come from where. Patterns are regular expressions that must match a whole path."""

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

    # parameters that come from other sources, before all else; the first part whose pattern matches
    parts: tuple[InitPart, ...] = ()
    # also what the source's method keeps beside its parameters: an averaged model, queues (ALBEF)
    extra: bool = False
    # the tokenizer of the source instead of the one that config.data.tokenizer describes
    tokenizer: bool = False

    @property
    def sources(self) -> bool:
        """Whether anything is loaded."""
        return bool(self.path or any(part.path for part in self.parts))

    def problems(self) -> Iterator[tuple[str, str]]:
        """Patterns that aren't regular expressions, and rules without a source."""
        yield from _map_problems(self.map)
        for key in ("skip", "ignore", "resize"):
            yield from _pattern_problems(key, getattr(self, key))
        for key, group in (("map", self.map), ("skip", self.skip), ("ignore", self.ignore)):
            if group and not self.path:
                yield key, "is given without a source; set init_from.path"
        for key in ("extra", "tokenizer"):
            if getattr(self, key) and not self.path:
                yield key, "is true without a source; set init_from.path"
        names = [part.name for part in self.parts]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield "parts", f"has two parts named {name!r}; give each its own name"


def _pattern_problems(key: str, patterns: Sequence[str]) -> Iterator[tuple[str, str]]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield key, f"has {pattern!r}, which is no regular expression: {error}"


def _map_problems(rules: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    yield from _pattern_problems("map", [pattern for pattern, _ in rules])
    for pattern, replacement in rules:
        with contextlib.suppress(re.error):  # of the pattern, which is reported above
            compiled = re.compile(pattern)
            try:
                compiled.sub(replacement, "")  # reads the replacement though nothing matches
            except (re.error, IndexError) as error:
                yield "map", f"has {replacement!r}, which can't be filled in from {pattern!r}: {error}"


def warm_start(params: Any, init_from: InitFrom, new_config: Mapping[str, Any]) -> Any:
    """The parameters with those of another checkpoint put in.

    Args:
        params: this model's initial parameters, a tree of jax arrays.
        init_from: the sources and the rules; without any source `params` are returned.
        new_config: this run's config as plain data. With the config stored in the source it gives the grids between
            which a position embedding is resized: its number of rows alone wouldn't tell 4 x 9 patches from 6 x 6.

    Returns:
        A tree like `params`, each leaf in the dtype and sharding that it had.

    Raises:
        ConfigError: lists every parameter that is missing, unused or of another shape, and every rule without use.
        CheckpointError: no checkpoint there, or a damaged one.
    """
    if not init_from.sources:
        return params
    orbax_noise.silence()
    ours, treedef = flatten_paths(params), jax.tree.structure(params)
    new, taken = dict(ours), set()
    for part in init_from.parts:
        if not part.path:
            continue
        chosen = [path for path in ours if path not in taken and re.fullmatch(part.pattern, path)]
        if not chosen:
            raise ConfigError(f"config.init_from.parts.{part.name}: {part.pattern!r} matches no parameter that is left")
        rules = InitFrom(part.path, part.map, resize=init_from.resize, weights=part.weights)
        new |= _loaded({path: ours[path] for path in chosen}, rules, new_config, part)
        taken.update(chosen)
    if init_from.path:
        rest = {path: leaf for path, leaf in ours.items() if path not in taken}
        new |= _loaded(rest, init_from, new_config, None)
    return jax.tree.unflatten(treedef, [new[path] for path in ours])


def warm_extra(extra: Any, init_from: InitFrom) -> Any:
    """What a method keeps beside its parameters, from the source of the parameters.

    Args:
        extra: this method's own, a tree of jax arrays.
        init_from: the source.

    Raises:
        ConfigError: lists every array that the source lacks or has in another shape.
        CheckpointError: no checkpoint there, or a damaged one.
    """
    directory = find_step(init_from.path)
    manifest, ours = read_meta(directory)["manifest"], flatten_paths(extra)
    problems = [f"{path}: not in the source" for path in ours if f"extra/{path}" not in manifest]
    for path, leaf in ours.items():
        shape = manifest.get(f"extra/{path}", {}).get("shape", list(leaf.shape))
        if shape != list(leaf.shape):
            problems.append(f"{path}: {list(leaf.shape)} in this method, {shape} in the source")
    if problems:
        raise ConfigError(
            f"config.init_from.extra: what {directory} holds beside its parameters doesn't fit this method; change the "
            "method's sizes, or set init_from.extra = false:\n  " + "\n  ".join(problems)
        )
    wanted = {
        f"extra/{path}": jax.ShapeDtypeStruct(leaf.shape, manifest[f"extra/{path}"]["dtype"], sharding=leaf.sharding)
        for path, leaf in ours.items()
    }
    arrays = read_arrays(directory, manifest, wanted)
    new = [arrays[f"extra/{path}"].astype(leaf.dtype) for path, leaf in ours.items()]
    return jax.tree.unflatten(jax.tree.structure(extra), new)


def _loaded(
    ours: Mapping[str, Any],
    init_from: InitFrom,
    new_config: Mapping[str, Any],
    part: InitPart | None,
) -> dict[str, Any]:
    """Path -> the leaf of one source, for the parameters `ours`: those of a part, or all that are left."""
    layers, where = (None, "config.init_from") if part is None else (part.layers, f"config.init_from.parts.{part.name}")
    directory = find_step(init_from.path)
    meta = read_meta(directory)
    stored = stored_params(directory, meta, init_from.weights)
    source = {name: meta["manifest"][path] for name, path in stored.items()}
    sources, problems = _match(init_from, list(ours), list(source), whole=part is None)
    resizes = {}
    for path, source_path in sources.items():
        old_shape, new_shape = tuple(source[source_path]["shape"]), ours[path].shape
        if layers is not None and _STACK.fullmatch(source_path):
            if layers[1] > old_shape[0]:
                problems.append(f"{path}: layers {layers} of {old_shape[0]} in the source")
            old_shape = (layers[1] - layers[0], *old_shape[1:])
        if any(re.fullmatch(pattern, path) for pattern in init_from.resize):
            resize = _resize_kind(path)(source_path, old_shape, path, new_shape, meta["config"], new_config)
            if resize.needed():
                resizes[path] = resize
                problems += resize.problems()
        elif old_shape != new_shape:
            problems.append(f"{path}: {list(new_shape)} in this model, {list(old_shape)} in the source")
    if problems:
        raise ConfigError(
            f"{where}: the parameters in {directory} don't fit this model. Rename by init_from.map, keep the "
            "random start by init_from.skip, leave out by init_from.ignore:\n  " + "\n  ".join(problems)
        )
    wanted = {}
    for path, source_path in sources.items():
        entry, sharding = source[source_path], ours[path].sharding
        sharding = _replicated(sharding) if path in resizes else sharding
        wanted[stored[source_path]] = jax.ShapeDtypeStruct(entry["shape"], entry["dtype"], sharding=sharding)
    arrays, new = read_arrays(directory, meta["manifest"], wanted), {}
    for path, source_path in sources.items():
        array = arrays[stored[source_path]]
        if layers is not None and _STACK.fullmatch(source_path):
            array = array[slice(*layers)]
        if path in resizes:
            array = resizes[path](np.asarray(array))
        new[path] = jax.device_put(array.astype(ours[path].dtype), ours[path].sharding)
    return new


def _match(init_from: InitFrom, ours: list[str], source: list[str], whole: bool) -> tuple[dict[str, str], list[str]]:
    """({our path: source path} of all that is found, sentences on all that isn't); the whole source must be used?"""
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
    for path in sorted(set(source) - set(sources.values())) if whole else ():
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


__all__ = ["InitFrom", "InitPart", "warm_extra", "warm_start"]
