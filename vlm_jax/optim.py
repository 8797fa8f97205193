"""Optimisers: a direction from optax, and one tail for decay, learning rate and parts.

Stacks of layers are one leaf each with a leading `layers` axis. What works on matrices (Adafactor, Muon) must treat
every layer of a stack as its own matrix [fan in, fan out]; the logical names of the axes say which is which.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from vlm_jax.mesh import tree_path
from vlm_jax.parts import Parts
from vlm_jax.schedule import Constant, Cosine, ScheduleConfig
from vlm_jax.schema import Choice

PyTree = Any


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Choice):
    """Family of optimisers: what they share."""

    learning_rate: float = 1e-3  # peak
    weight_decay: float = 0.0  # decoupled from the gradient (Loshchilov & Hutter 2019)
    # What the decay is multiplied by: the learning rate (PyTorch's AdamW, CLIP), or the schedule's factor alone
    # (big_vision, SigLIP), where a weight decay of 1e-4 means a shrinkage of 1e-4 a step at the peak.
    decay_by: Literal["learning_rate", "schedule"] = "learning_rate"
    clip_norm: float | None = None  # largest norm of the gradients of the live parameters
    # whose norm that is: of all parameters together, or of each module of the model by itself (tower, heads: DINOv2)
    clip_by: Literal["all", "module"] = "all"
    schedule: ScheduleConfig = Cosine()  # of the learning rate
    # of the weight decay, as a factor on it; Cosine(final=5) raises it to five times (DINO, DINOv2)
    decay_schedule: ScheduleConfig = Constant()

    @classmethod
    def kinds(cls) -> Mapping[str, type[Any]]:
        """The optimisers by name."""
        return {"adamw": AdamW, "adafactor": Adafactor, "lion": Lion, "muon": Muon}

    def problems(self) -> Iterator[tuple[str, str]]:
        """Numbers out of range."""
        for key in ("learning_rate", "weight_decay"):
            if getattr(self, key) < 0:
                yield key, f"= {getattr(self, key)} must not be negative"
        if self.clip_norm is not None and self.clip_norm <= 0:
            yield "clip_norm", f"= {self.clip_norm} must be positive; None does not clip"
        for key in ("b1", "b2", "momentum"):
            value = vars(self).get(key)
            if value is not None and not 0 <= value < 1:
                yield key, f"= {value} must lie in [0, 1)"

    def direction(self, matrices: Mapping[str, "Matrix"]) -> optax.GradientTransformation:
        """Gradients -> descent direction before decay and learning rate; `matrices` by parameter path."""
        raise TypeError(f"{type(self).__name__} is a family of optimisers; use one of {', '.join(self.kinds())}")


@dataclasses.dataclass(frozen=True)
class AdamW(OptimizerConfig):
    """Adam (Kingma & Ba 2015) with decoupled weight decay."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    mu_dtype: Literal["float32", "bfloat16"] = "float32"  # of the first moment; bfloat16 saves a quarter of the state

    def direction(self, matrices: Mapping[str, "Matrix"]) -> optax.GradientTransformation:
        """See the base."""
        return optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.mu_dtype)


@dataclasses.dataclass(frozen=True)
class Adafactor(OptimizerConfig):
    """Factored second moments (Shazeer & Stern 2018); with the defaults, as modified for Scaling ViT (section 3.4)."""

    momentum: float | None = 0.9  # first moment; None for none
    mu_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the first moment
    decay_rate: float = 0.8  # exponent of the second moment's decay 1 - t^-rate
    b2: float = 0.999  # upper limit of that decay
    min_dim_size_to_factor: int = 32  # matrices with a smaller side keep whole second moments
    clip_threshold: float | None = None  # largest root mean square of a layer's update; 1.0 in the original

    def direction(self, matrices: Mapping[str, "Matrix"]) -> optax.GradientTransformation:
        """See the base."""

        def decay(step: Any, rate: Any) -> Any:
            return jnp.minimum(1.0 - (jnp.asarray(step, jnp.float32) + 1.0) ** -rate, self.b2)

        factored = optax.scale_by_factored_rms(
            decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_dim_size_to_factor, decay_rate_fn=decay
        )
        steps = [_on_matrices(factored, matrices)]
        if self.clip_threshold is not None:
            steps.append(_on_matrices(_clip_rms(self.clip_threshold), matrices))
        if self.momentum is not None:
            steps.append(optax.ema(self.momentum, debias=False, accumulator_dtype=jnp.dtype(self.mu_dtype)))
        return optax.chain(*steps)


@dataclasses.dataclass(frozen=True)
class Lion(OptimizerConfig):
    """Sign of an interpolated momentum (Chen et al. 2023); wants a learning rate 3 to 10 times below AdamW's."""

    b1: float = 0.9
    b2: float = 0.99
    mu_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the momentum

    def direction(self, matrices: Mapping[str, "Matrix"]) -> optax.GradientTransformation:
        """See the base."""
        return optax.scale_by_lion(self.b1, self.b2, mu_dtype=jnp.dtype(self.mu_dtype))


@dataclasses.dataclass(frozen=True)
class Muon(OptimizerConfig):
    """Orthogonalised momentum (Jordan 2024) for the kernels of the blocks, AdamW for everything else.

    Updates are scaled to AdamW's size, 0.2 sqrt(max(fan in, fan out)), so that one learning rate and one weight decay
    serve both (Liu et al. 2025, Muon is Scalable, section 2.2).
    """

    momentum: float = 0.95
    ns_steps: int = 5  # Newton-Schulz iterations
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def direction(self, matrices: Mapping[str, "Matrix"]) -> optax.GradientTransformation:
        """See the base."""

        def label(path: Sequence[Any], _: Any) -> str:
            name = tree_path(path)
            hidden = "blocks/" in name and name.endswith("/kernel") and matrices[name].is_matrix
            return "muon" if hidden else "adam"

        def dimensions(tree: PyTree) -> PyTree:
            return _map_leaves(lambda path, _: matrices[path].muon_dimensions(), tree)

        def rescale(tree: PyTree) -> PyTree:
            return _map_leaves(lambda path, x: x * (0.2 * math.sqrt(max(matrices[path].shape))), tree)

        muon = optax.chain(
            contrib.scale_by_muon(ns_steps=self.ns_steps, beta=self.momentum, weight_dimension_numbers=dimensions),
            optax.stateless(lambda updates, params: rescale(updates)),
        )
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        return optax.partition(
            {"muon": muon, "adam": adam}, lambda params: jax.tree_util.tree_map_with_path(label, params)
        )


class Matrix(NamedTuple):
    """How a leaf is read as matrices.

    Attributes:
        stacked: whether axis 0 counts layers.
        rows: the axes that make the fan in.
        columns: the axes that make the fan out.
        sizes: the leaf's shape.
    """

    stacked: bool
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, names: Sequence[str | None], sizes: tuple[int, ...]) -> "Matrix":
        """From logical names: a kernel that starts with `embed` reads it, one that ends with it writes it."""
        first = int(bool(names) and names[0] == "layers")
        axes = tuple(range(first, len(sizes)))
        split = first + 1 if len(axes) > 1 and names[first] == "embed" else len(sizes) - 1
        return cls(first == 1, axes[: split - first], axes[split - first :], tuple(sizes))

    @property
    def is_matrix(self) -> bool:
        """Whether there is a fan in and a fan out; a vector has none."""
        return bool(self.rows) and bool(self.columns)

    @property
    def shape(self) -> tuple[int, int]:
        """(fan in, fan out)."""
        return math.prod(self.sizes[a] for a in self.rows), math.prod(self.sizes[a] for a in self.columns)

    def muon_dimensions(self) -> contrib.MuonDimensionNumbers:
        """What optax's Muon wants to know."""
        return contrib.MuonDimensionNumbers(self.rows, self.columns)

    def flat(self) -> tuple[int, ...]:
        """The leaf's shape as ([layers,] fan in, fan out); vectors keep theirs."""
        return (*self.sizes[: int(self.stacked)], *self.shape) if self.is_matrix else self.sizes


def _map_leaves(function: Any, tree: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(lambda path, x: function(tree_path(path), x), tree)


def _on_matrices(inner: optax.GradientTransformation, matrices: Mapping[str, Matrix]) -> optax.GradientTransformation:
    """`inner` applied to the leaves as ([layers,] in, out), stacks mapped layer by layer.

    optax factors over a leaf's two largest axes: of a stack of attention kernels [24, 1024, 16, 64] none qualifies,
    and of a deep narrow one the layer axis would be one of them.
    """

    def view(tree: PyTree) -> PyTree:
        return _map_leaves(lambda path, x: x.reshape(matrices[path].flat()), tree)

    def back(tree: PyTree, like: PyTree) -> PyTree:
        return jax.tree.map(lambda x, y: x.reshape(y.shape), tree, like)

    def leafwise(path: str) -> bool:
        return matrices[path].stacked

    def init(params: PyTree) -> PyTree:
        return _map_leaves(lambda path, x: jax.vmap(inner.init)(x) if leafwise(path) else inner.init(x), view(params))

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        flat = view(updates)
        leaves, tree = jax.tree_util.tree_flatten_with_path(flat)
        states = tree.flatten_up_to(state)
        results = [
            jax.vmap(lambda g, s: inner.update(g, s, g))(g, s) if leafwise(tree_path(path)) else inner.update(g, s, g)
            for (path, g), s in zip(leaves, states, strict=True)
        ]
        new_updates, new_state = (tree.unflatten(list(column)) for column in zip(*results, strict=True))
        return back(new_updates, updates), new_state

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _clip_rms(threshold: float) -> optax.GradientTransformation:
    def clip(updates: PyTree, params: PyTree | None) -> PyTree:
        return jax.tree.map(lambda x: x / jnp.maximum(1.0, jnp.sqrt(jnp.mean(x**2)) / threshold), updates)

    return optax.stateless(clip)


def _clipped(gradients: PyTree, norm: jax.Array, largest: float) -> PyTree:
    scale = jnp.minimum(1.0, largest / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * scale, gradients)


class Optimizer:
    """Gradients of the live parameters to their updates, by the rules of the parts.

    Args:
        config: the optimiser.
        parts: the resolved rules.
        total_steps: length of the run, for the schedule.
    """

    def __init__(self, config: OptimizerConfig, parts: Parts, total_steps: int):
        self.config, self.parts, self.total_steps = config, parts, total_steps
        matrices = {path: Matrix.of(names, parts.shapes[path]) for path, names in parts.names.items()}
        self._direction = config.direction(matrices)

    def init(self, live: PyTree) -> PyTree:
        """The slots; frozen parameters, absent from `live`, have none."""
        return self._direction.init(live)

    def learning_rate(self, step: jax.Array) -> jax.Array:
        """The learning rate at a step, () fp32, before the parts' factors."""
        return self.config.learning_rate * self.config.schedule.factor(step, self.total_steps)

    def update(
        self, gradients: PyTree, norm: jax.Array, slots: PyTree, live: PyTree, step: jax.Array
    ) -> tuple[PyTree, PyTree]:
        """(updates to add to `live`, new slots); `norm` is the gradients' global norm."""
        config = self.config
        if config.clip_norm is not None and config.clip_by == "all":
            gradients = _clipped(gradients, norm, config.clip_norm)
        elif config.clip_norm is not None:
            norms = {name: optax.global_norm(module) for name, module in gradients.items()}
            gradients = {name: _clipped(module, norms[name], config.clip_norm) for name, module in gradients.items()}
        directions, slots = self._direction.update(gradients, slots, live)
        factor = config.schedule.factor(step, self.total_steps)
        decay = config.weight_decay * (config.learning_rate if config.decay_by == "learning_rate" else 1.0)
        decay = decay * config.decay_schedule.factor(step, self.total_steps)

        def tail(direction: jax.Array, param: jax.Array, lr: Any, part_decay: float, first_step: int) -> jax.Array:
            lr = jnp.where(step < first_step, 0.0, lr) if first_step else lr
            move = config.learning_rate * direction.astype(jnp.float32) + decay * part_decay * param
            return (-factor * lr * move).astype(param.dtype)

        parts = self.parts
        factors = parts.learning_rate_factors(live), parts.decay_factors(live), parts.first_steps(live)
        return jax.tree.map(tail, directions, live, *factors), slots
