"""Warm start: the parameters of another checkpoint as the initial ones of a new run.

Only parameters are taken: never the step, the optimiser or the data position. Resuming a run is
`vlm_jax.checkpoint.Checkpointer.restore`; files of other code bases are imported by `vlm_jax.interop` first.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from vlm_jax import orbax_noise
from vlm_jax.checkpoint_format import find_step, read_arrays, read_meta, stored_params
from vlm_jax.digest import flatten_paths
from vlm_jax.schema import ConfigError
from vlm_jax.warm_resize import fit

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
    # also what the source's method keeps beside its parameters: an averaged model, queues (ALBEF); the rules of `map`
    # see its paths too
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


def warm_extra(extra: Any, init_from: InitFrom, new_config: Mapping[str, Any]) -> Any:
    """What a method keeps beside its parameters, from the source of the parameters.

    Args:
        extra: this method's own, a tree of jax arrays.
        init_from: the source, and what may be resized.
        new_config: as for `warm_start`.

    Raises:
        ConfigError: lists every array that the source lacks or has in another shape.
        CheckpointError: no checkpoint there, or a damaged one.
    """
    directory = find_step(init_from.path)
    meta, ours = read_meta(directory), flatten_paths(extra)
    manifest = meta["manifest"]
    # Copies of parameters come from where the parameters do.
    sources = {path: _mapped(init_from.map, path)[0] for path in ours}
    problems = [f"{path}: not in the source" for path in ours if f"extra/{sources[path]}" not in manifest]
    resizes = {}
    for path, leaf in ours.items():
        if entry := manifest.get(f"extra/{sources[path]}"):
            old, configs = (sources[path], entry["shape"]), (meta["config"], new_config)
            resize, sentences = fit(init_from.resize, old, (path, leaf.shape), configs)
            problems += sentences
            resizes |= {} if resize is None else {path: resize}
    if problems:
        raise ConfigError(
            f"config.init_from.extra: what {directory} holds beside its parameters doesn't fit this method; change the "
            "method's sizes, or set init_from.extra = false:\n  " + "\n  ".join(problems)
        )
    wanted = {}
    for path, leaf in ours.items():
        entry, sharding = manifest[f"extra/{sources[path]}"], leaf.sharding
        sharding = _replicated(sharding) if path in resizes else sharding
        wanted[f"extra/{sources[path]}"] = jax.ShapeDtypeStruct(entry["shape"], entry["dtype"], sharding=sharding)
    found = read_arrays(directory, manifest, wanted)
    arrays = _each_its_own({path: found[f"extra/{source}"] for path, source in sources.items()})
    for path, resize in resizes.items():
        arrays[path] = jax.device_put(resize(np.asarray(arrays[path])), ours[path].sharding)
    new = [arrays[path].astype(leaf.dtype) for path, leaf in ours.items()]
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
        resize, sentences = fit(
            init_from.resize, (source_path, old_shape), (path, new_shape), (meta["config"], new_config)
        )
        problems += sentences
        resizes |= {} if resize is None else {path: resize}
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
    found, new = read_arrays(directory, meta["manifest"], wanted), {}
    arrays = _each_its_own({path: found[stored[source_path]] for path, source_path in sources.items()})
    for path, source_path in sources.items():
        array = arrays[path]
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
        source_path, pattern = _mapped(init_from.map, path)
        if pattern is not None:
            used.add(("map", pattern))
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


def _each_its_own(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays, copied where one stands for several parameters: the step gives each buffer away once."""
    seen: set[int] = set()
    for path, array in arrays.items():
        arrays[path] = jnp.copy(array) if id(array) in seen else array
        seen.add(id(array))
    return arrays


def _mapped(rules: Sequence[tuple[str, str]], path: str) -> tuple[str, str | None]:
    """(path in the source, the pattern that says so, if one does)."""
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, path):
            return match.expand(replacement), pattern
    return path, None


def _replicated(sharding: Sharding) -> Sharding:
    """Whole on every device of the same mesh, so that the host can read it and one digest covers all arrays."""
    return NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else sharding


__all__ = ["InitFrom", "InitPart", "warm_extra", "warm_start"]
