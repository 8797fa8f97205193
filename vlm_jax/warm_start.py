"""Warm start: the parameters of another checkpoint as the initial ones of a new run.

Only parameters are taken: never the step, the optimiser or the data position. Resuming a run is
`vlm_jax.checkpoint.Checkpointer.restore`; files of other code bases are imported by `vlm_jax.interop` first.
"""

import contextlib
import dataclasses
import logging
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

_log = logging.getLogger(__name__)
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
    # also what the source's method keeps beside its parameters: an averaged model, queues (ALBEF); `map` and `skip` are
    # for these paths too
    extra: bool = False
    # the tokenizer of the source instead of the one that config.data.tokenizer describes
    tokenizer: bool = False

    @property
    def sources(self) -> bool:
        """Whether anything is loaded."""
        return bool(self.path or any(part.path for part in self.parts))

    @property
    def random_start(self) -> str:
        """A sentence on what this describes the source of without naming it; empty where there is no such thing."""
        idle = [part.name for part in self.parts if not part.path]
        if self.path or not (idle or self.map or self.skip or self.ignore or self.extra):
            return ""
        if self.sources:
            return f"config.init_from.parts: {', '.join(idle)} without a path, so that they start at random"
        return "config.init_from names no path: all parameters start at random, not from a checkpoint as its rules mean"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Patterns that aren't regular expressions, and a tokenizer of no source."""
        yield from _map_problems(self.map)
        for key in ("skip", "ignore", "resize"):
            yield from _pattern_problems(key, getattr(self, key))
        if self.tokenizer and not self.path:
            yield "tokenizer", "is true without a source; set init_from.path"
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

    Returns:
        A tree like `extra`. What `init_from.skip` names is as it was; so is all where the source keeps nothing.

    Raises:
        ConfigError: lists every array that the source lacks or has in another shape.
        CheckpointError: no checkpoint there, or a damaged one.
    """
    directory = find_step(init_from.path)
    meta, whole = read_meta(directory), flatten_paths(extra)
    manifest = meta["manifest"]
    if not any(path.startswith("extra/") for path in manifest):
        _log.info("%s keeps nothing beside its parameters: an averaged model begins as the model", directory)
        return extra
    ours = {path: leaf for path, leaf in whole.items() if not any(re.fullmatch(rule, path) for rule in init_from.skip)}
    sources = {path: f"extra/{_mapped(init_from.map, path)[0]}" for path in ours}
    problems = [f"{path}: not in the source" for path, source in sources.items() if source not in manifest]
    resizes = {}
    for path, leaf in ours.items():
        if entry := manifest.get(sources[path]):
            old, configs = (sources[path].removeprefix("extra/"), entry["shape"]), (meta["config"], new_config)
            resize, sentences = fit(init_from.resize, old, (path, leaf.shape), configs)
            problems += sentences
            resizes |= {} if resize is None else {path: resize}
    if problems:
        raise ConfigError(
            f"config.init_from.extra: what {directory} holds beside its parameters doesn't fit this method; change the "
            "method's sizes, or set init_from.extra = false:\n  " + "\n  ".join(problems)
        )
    new = whole | _read(directory, manifest, sources, ours, resizes)
    return jax.tree.unflatten(jax.tree.structure(extra), [new[path] for path in whole])


def _read(
    directory: Any,
    manifest: Mapping[str, Any],
    sources: Mapping[str, str],
    ours: Mapping[str, Any],
    resizes: Mapping[str, Any],
    layers: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """{our path: the leaf stored at its source path, of `layers` of a stack, resized, in our dtype and sharding}."""
    wanted = {}
    for path, source in sources.items():
        entry, sharding = manifest[source], ours[path].sharding
        sharding = _replicated(sharding) if path in resizes else sharding
        wanted[source] = jax.ShapeDtypeStruct(entry["shape"], entry["dtype"], sharding=sharding)
    found, new = read_arrays(directory, manifest, wanted), {}
    arrays = _each_its_own({path: found[source] for path, source in sources.items()})
    for path, source in sources.items():
        array = arrays[path]
        if layers is not None and _STACK.fullmatch(source):
            array = array[slice(*layers)]
        if path in resizes:
            array = resizes[path](np.asarray(array))
        new[path] = jax.device_put(array.astype(ours[path].dtype), ours[path].sharding)
    return new


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
    places = {path: stored[source_path] for path, source_path in sources.items()}
    return _read(directory, meta["manifest"], places, ours, resizes, layers)


def _match(init_from: InitFrom, ours: list[str], source: list[str], whole: bool) -> tuple[dict[str, str], list[str]]:
    """({our path: source path} of all that is found, sentences on all that isn't); the whole source must be used?"""
    sources, problems, used = {}, [], set()
    for path in ours:
        if skipped := [pattern for pattern in init_from.skip if re.fullmatch(pattern, path)]:
            used.update(("skip", pattern) for pattern in skipped)
            continue
        source_path, rule = _mapped(init_from.map, path)
        used.add(("map", rule))
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
    """(the path in the source, the pattern of the rule that says so)."""
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, path):
            return match.expand(replacement), pattern
    return path, None


def _replicated(sharding: Sharding) -> Sharding:
    """Whole on every device of the same mesh, so that the host can read it and one digest covers all arrays."""
    return NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else sharding


__all__ = ["InitFrom", "InitPart", "warm_extra", "warm_start"]
