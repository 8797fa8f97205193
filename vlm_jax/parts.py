"""Parts: one ordered list of named path rules that decides how each parameter is trained.

First match wins, every parameter must be covered, and a rule that covers nothing is an error, so a renamed module can
never silently lose its learning rate or its freeze. Learning rate, weight decay, freezing and layer-wise decay come
from here; the optimiser's mathematics does not.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vlm_jax.mesh import tree_path
from vlm_jax.schema import ConfigError

PyTree = Any

# Gains, biases, scalars and the class token: what the CLIP paper (2.5) and its reproductions leave undecayed, and the
# running statistics of batch norms. By name, not by number of axes: in a stack of layers a bias has two.
GAINS_AND_BIASES = (
    r"(.*/)?(bias|scale|layer_scale\w*|class_token|registers|logit_scale|logit_bias|running_mean|running_variance)"
)
# What stands before the first block, for layer-wise decay (BEiT, MAE: layer 0).
_EMBEDDINGS = re.compile(
    r"(.*/)?(patch_embed|patch_norm|pos_embed|class_token|mask_token|registers|token_embed|ln_pre)(/.*)?"
)
_BLOCKS = re.compile(r"(.*/)?blocks/.*")
# Swin: blocks in stages, even and odd ones in stacks of their own; what merges patches belongs to the stage before it.
_STAGE = re.compile(r"(?:.*/)?stage(\d+)/blocks/(regular|shifted)/.*")
_MERGE = re.compile(r"(?:.*/)?merge(\d+)/.*")


@dataclasses.dataclass(frozen=True)
class Part:
    """A named rule over parameter paths such as `image/blocks/attn/query/kernel`."""

    name: str  # stands in messages, in metrics and in overrides (config.parts.NAME.frozen=true)
    pattern: str  # regular expression that the whole path must match
    lr: float = 1.0  # multiplies the learning rate
    weight_decay: float = 1.0  # multiplies the weight decay
    no_decay: str = GAINS_AND_BIASES  # regular expression of the paths without weight decay
    frozen: bool = False  # neither differentiated nor updated, and without optimiser slots
    start_step: int = 0  # first step that moves it; before, only its moments follow the gradient (DINO's last layer)
    # factor on the learning rate from one layer to the one below it (fine-tuning of BEiT, MAE, SimMIM)
    layer_decay: float = 1.0

    def problems(self) -> Iterator[tuple[str, str]]:
        """Patterns that don't compile and factors out of range."""
        for key in ("pattern", "no_decay"):
            try:
                re.compile(getattr(self, key))
            except re.error as error:
                yield key, f"= {getattr(self, key)!r} is no regular expression: {error}"
        for key in ("lr", "weight_decay"):
            if getattr(self, key) < 0:
                yield key, f"= {getattr(self, key)} must not be negative; to stop training set frozen = true"
        if self.start_step < 0:
            yield "start_step", f"= {self.start_step} must not be negative; 0 moves it from the start"
        if not 0 < self.layer_decay <= 1:
            yield "layer_decay", f"= {self.layer_decay} must lie in (0, 1]"


EVERYTHING = (Part("all", ".*"),)


class Parts:
    """The rules resolved for one set of parameters.

    Args:
        rules: in order; the first match wins.
        names: parameter path -> logical names of its axes (`vlm_jax.mesh.logical_names`).
        shapes: parameter path -> shape.
        without_gradient: regular expressions of the parameters that the loss gives no gradient to: weight decay alone
            would wear them away.

    Raises:
        ConfigError: two rules of one name, a parameter that no rule covers, a rule that covers none, all frozen, or
            one without a gradient that isn't.
    """

    def __init__(
        self,
        rules: Sequence[Part],
        names: Mapping[str, Sequence[str | None]],
        shapes: Mapping[str, tuple[int, ...]],
        without_gradient: Sequence[str] = (),
    ):
        self.names, self.shapes = dict(names), dict(shapes)
        self.part_of = {path: _first_match(rules, path) for path in names}
        _check(rules, self.part_of)
        self.frozen = {path for path, part in self.part_of.items() if part.frozen}
        for pattern in without_gradient:
            _check_frozen(pattern, self.part_of)

    def split(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """(live, frozen): two trees of the same structure with None, which is no leaf, in place of the other's."""
        live = jax.tree_util.tree_map_with_path(lambda p, x: None if tree_path(p) in self.frozen else x, params)
        frozen = jax.tree_util.tree_map_with_path(lambda p, x: x if tree_path(p) in self.frozen else None, params)
        return live, frozen

    def learning_rate_factors(self, live: PyTree) -> PyTree:
        """Per live leaf the factor on the learning rate: a float, or [layers, 1, ...] for a stack with layer decay."""
        return jax.tree_util.tree_map_with_path(lambda p, x: self._factor(tree_path(p), np.ndim(x)), live)

    def decay_factors(self, live: PyTree) -> PyTree:
        """Per live leaf the factor on the weight decay: 0 for gains and biases."""

        def factor(path: Sequence[Any], _: Any) -> float:
            name = tree_path(path)
            part = self.part_of[name]
            return 0.0 if re.fullmatch(part.no_decay, name) else part.weight_decay

        return jax.tree_util.tree_map_with_path(factor, live)

    def first_steps(self, live: PyTree) -> PyTree:
        """Per live leaf the first step that moves it."""
        return jax.tree_util.tree_map_with_path(lambda p, _: self.part_of[tree_path(p)].start_step, live)

    def counts(self) -> dict[str, int]:
        """Part name -> number of parameters."""
        totals: dict[str, int] = {}
        for path, part in self.part_of.items():
            totals[part.name] = totals.get(part.name, 0) + int(np.prod(self.shapes[path]))
        return totals

    def _factor(self, path: str, ndim: int) -> Any:
        part = self.part_of[path]
        if part.layer_decay == 1.0:
            return part.lr
        depths = self._depths(path)
        above = sum(depths) + 1 - self._layers(path, depths)
        if isinstance(above, int):
            return part.lr * part.layer_decay**above
        exponents = above.astype(np.float32)
        return (part.lr * part.layer_decay**exponents).reshape(-1, *[1] * (ndim - 1)).astype(np.float32)

    def _layers(self, path: str, depths: Sequence[int]) -> Any:
        """The layer of a parameter, or of each row of a stack: 0 below the blocks, 1, ..., and one more above them."""
        if _EMBEDDINGS.fullmatch(path):
            return 0
        if merge := _MERGE.fullmatch(path):
            return sum(depths[: int(merge[1])])
        if staged := _STAGE.fullmatch(path):
            stage, odd = int(staged[1]), staged[2] == "shifted"
            return np.arange(sum(depths[: stage - 1]) + 1 + odd, sum(depths[:stage]) + 1, 2)
        if _BLOCKS.fullmatch(path) and self.names[path][0] == "layers":
            return np.arange(1, sum(depths) + 1)
        return sum(depths) + 1

    def _depths(self, path: str) -> list[int]:
        """Blocks of each stage of the tower that a parameter belongs to; without stages, of the deepest stack there."""
        tower, depths = path.partition("/")[0] + "/", {}
        for other, names in self.names.items():
            if names and names[0] == "layers" and other.startswith(tower):
                staged = _STAGE.fullmatch(other)
                stage, blocks = (int(staged[1]), 2) if staged else (1, 1)
                depths[stage] = max(depths.get(stage, 0), blocks * self.shapes[other][0])
        return [depths[stage] for stage in sorted(depths)]


def merge(live: PyTree, frozen: PyTree) -> PyTree:
    """The parameters again, from what `Parts.split` gave."""
    return jax.tree.map(lambda a, b: b if a is None else a, live, frozen, is_leaf=lambda x: x is None)


def _first_match(rules: Sequence[Part], path: str) -> Part:
    for part in rules:
        if re.fullmatch(part.pattern, path):
            return part
    known = ", ".join(f"{part.name} ({part.pattern})" for part in rules)
    raise ConfigError(f"config.parts holds no rule for the parameter {path}; the rules are {known}; add one for it")


def _check(rules: Sequence[Part], part_of: Mapping[str, Part]) -> None:
    names = [part.name for part in rules]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"config.parts has two rules named {name!r}; give each its own name")
    used = {part.name for part in part_of.values()}
    for part in rules:
        if part.name not in used:
            examples = ", ".join(sorted(part_of)[:3])
            raise ConfigError(
                f"config.parts.{part.name}.pattern = {part.pattern!r} decides for no parameter: none matches it, or an "
                f"earlier rule takes them all; paths look like {examples}"
            )
    if all(part.frozen for part in part_of.values()):
        raise ConfigError("config.parts freezes every parameter; there is nothing to train")


def _check_frozen(pattern: str, part_of: Mapping[str, Part]) -> None:
    for path, part in part_of.items():
        if re.fullmatch(pattern, path) and not part.frozen:
            alone = all(re.fullmatch(pattern, other) for other, its in part_of.items() if its == part)
            remedy = f"set config.parts.{part.name}.frozen = true"
            if not alone:
                remedy = f"put a rule for {pattern!r} with frozen = true before it"
            raise ConfigError(
                f"config.parts.{part.name} trains the parameter {path}, to which the loss of this method gives no "
                f"gradient, so that it would only decay; {remedy}"
            )
