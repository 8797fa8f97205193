"""Probes that are trained by gradient descent on frozen features: one trainer for linear and attentive ones.

A grid of learning rates and weight decays is trained at once, `vmap`ped over its members: the features, by far the
largest part of the work, are computed once for all. Nothing here knows where the features come from (`probe_data`) or
what a probe is for (`sgd_probe`, `attentive_probe`); logistic regression by L-BFGS is `logistic`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlm_jax.evals.classification import label_ranks
from vlm_jax.schedule import Cosine

PyTree = Any
Features = Mapping[str, jax.Array]
BATCH_NORM_MOMENTUM = 0.1  # share of a batch's statistics in the running ones (PyTorch's convention)
_REFERENCE_BATCH = 256  # for which learning rates are given where they grow with the batch (Goyal et al. 2017)


@dataclasses.dataclass(frozen=True)
class ProbeTraining:
    """How a grid of probes is trained: half a cosine by the step, after a linear warm-up."""

    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"  # sgd and lars have momentum
    learning_rates: tuple[float, ...] = (1e-3,)  # each is tried with each weight decay
    scale_by_batch: bool = False  # whether those are for a batch of 256 and grow in proportion
    weight_decays: tuple[float, ...] = (0.0,)  # decoupled for adamw, added to the gradient for the others
    min_learning_rate: float = 0.0  # at the end of the cosine
    epochs: int = 100  # passes over the training images
    warmup_epochs: int = 0  # of them with a rising learning rate
    batch_size: int = 1024  # cut to the number of training images
    clip_norm: float | None = None  # largest norm of a probe's gradient
    momentum: float = 0.9  # of sgd and lars
    b2: float = 0.999  # of adamw, whose first moment has 0.9
    trust: float = 0.001  # LARS's trust coefficient (You et al. 2017); biases have a ratio of 1 and no decay

    def problems(self) -> Iterator[tuple[str, str]]:
        """Numbers out of range."""
        for key, least in (("epochs", 1), ("batch_size", 1), ("warmup_epochs", 0)):
            if getattr(self, key) < least:
                yield key, f"= {getattr(self, key)} must be {least} or more"
        if self.warmup_epochs >= self.epochs:
            yield "warmup_epochs", f"= {self.warmup_epochs} must be less than epochs = {self.epochs}"
        for key, least in (("learning_rates", "positive"), ("weight_decays", "0 or more")):
            values = getattr(self, key)
            if not values or min(values) < 0 or (least == "positive" and min(values) == 0):
                yield key, f"= {values} must be one or more numbers, {least}"
            elif len(set(values)) < len(values):
                yield key, f"= {values} names a number twice"
        if self.clip_norm is not None and self.clip_norm <= 0:
            yield "clip_norm", f"= {self.clip_norm} must be positive; None does not clip"

    def grid(self, batch_size: int) -> "Grid":
        """Every learning rate with every weight decay, for a batch of that size."""
        pairs = list(itertools.product(self.learning_rates, self.weight_decays))
        scale = batch_size / _REFERENCE_BATCH if self.scale_by_batch else 1.0
        rates = np.asarray([rate * scale for rate, _ in pairs], np.float32)
        return Grid(rates, np.asarray([decay for _, decay in pairs], np.float32))


class Grid(NamedTuple):
    """Peak learning rate and weight decay of G members, float32 [G] each."""

    learning_rate: Any
    weight_decay: Any


class Head(NamedTuple):
    """What is trained.

    Attributes:
        init: (key, features of one batch, number of classes) -> parameters.
        logits: (parameters, features [B, ..., D]) -> [B, C].
        eps: added to the variance of a batch norm without affine part on the features' last axis; None: no such norm.
            Its statistics depend on the features alone, so all members of a grid share them.
    """

    init: Callable[[jax.Array, jax.Array, int], PyTree]
    logits: Callable[[PyTree, jax.Array], jax.Array]
    eps: float | None = None


class Probe(NamedTuple):
    """A head and the part of the features that it sees."""

    select: Callable[[Features], jax.Array]
    head: Head


class ProbeState(NamedTuple):
    """A grid of one probe: parameters and optimiser slots [G, ...], and running statistics [D] of its batch norm."""

    params: PyTree
    slots: PyTree
    mean: jax.Array
    variance: jax.Array


States = dict[str, ProbeState]


def linear_head(spread: float = 0.01, eps: float | None = None) -> Head:
    """logits = x @ kernel + bias; the kernel starts with the spread of MAE's and DINOv2's probes, the bias at 0."""

    def init(key: jax.Array, x_BxD: jax.Array, classes: int) -> PyTree:
        kernel = spread * jax.random.truncated_normal(key, -2.0, 2.0, (x_BxD.shape[-1], classes))
        return {"kernel": kernel, "bias": jnp.zeros(classes)}

    def logits(params: PyTree, x_BxD: jax.Array) -> jax.Array:
        product = x_BxD @ params["kernel"]
        return product + jnp.broadcast_to(params["bias"], product.shape)

    return Head(init, logits, eps)


def train_probes(
    probes: Mapping[str, Probe],
    training: ProbeTraining,
    batches: Iterable[tuple[Features, jax.Array]],
    steps_per_epoch: int,
    batch_size: int,
    class_count: int,
    seed: int = 0,
) -> States:
    """Trains a grid of every probe on the same batches.

    All members of a grid start from the same weights, a function of the seed.

    Args:
        probes: by name.
        training: the recipe.
        batches: (features, int labels [B]) of as many steps as `training.epochs` takes; global arrays.
        steps_per_epoch: steps of an epoch.
        batch_size: B.
        class_count: C.
        seed: of the first weights.
    """
    total = training.epochs * steps_per_epoch
    schedule = Cosine(warmup_steps=training.warmup_epochs * steps_per_epoch)
    grid = training.grid(batch_size)
    states: States | None = None
    for step, (features, labels) in zip(range(total), batches, strict=False):
        if states is None:
            states = {
                name: start(probe, training, grid, probe.select(features), class_count, jax.random.key(seed))
                for name, probe in probes.items()
            }
        factor = schedule.factor(jnp.int32(step), total)
        rising = step < schedule.warmup_steps
        rates = grid.learning_rate * factor
        if not rising:  # the cosine ends at the floor, the warm-up begins at zero
            rates = rates + np.float32(training.min_learning_rate) * (1 - factor)
        hyper = Grid(rates, grid.weight_decay)
        for name, probe in probes.items():
            states[name] = _step(states[name], probe.select(features), labels, hyper, probe.head, training)
    assert states is not None, "there is at least one step"
    return states


def start(
    probe: Probe, training: ProbeTraining, grid: Grid, x: jax.Array, class_count: int, key: jax.Array
) -> ProbeState:
    """The state before the first step; `x` tells the shape of the features."""
    params = probe.head.init(key, x, class_count)
    members = len(grid.learning_rate)
    stacked = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (members, *leaf.shape)), params)
    slots = jax.vmap(lambda p, decay: _direction(training, decay).init(p))(stacked, jnp.asarray(grid.weight_decay))
    width = x.shape[-1]
    return ProbeState(stacked, slots, jnp.zeros(width), jnp.ones(width))


def logits(state: ProbeState, x: jax.Array, head: Head) -> jax.Array:
    """[G, B, C] with the running statistics: the probes at evaluation."""
    x = x.astype(jnp.float32)
    if head.eps is not None:
        x = _normalised(x, state.mean, state.variance, head.eps)
    return jax.vmap(lambda params: head.logits(params, x))(state.params)


@functools.partial(jax.jit, static_argnames=("head",))
def grid_ranks(state: ProbeState, x: jax.Array, labels_B: jax.Array, head: Head) -> jax.Array:
    """int32 [B, G]: how many classes each member puts before the right one."""
    return jax.vmap(lambda scores: label_ranks(scores, labels_B), out_axes=1)(logits(state, x, head))


@functools.partial(jax.jit, static_argnames=("head", "training"), donate_argnums=0)
def _step(
    state: ProbeState, x: jax.Array, labels_B: jax.Array, hyper: Grid, head: Head, training: ProbeTraining
) -> ProbeState:
    """One step of every member."""
    x, mean, variance = x.astype(jnp.float32), state.mean, state.variance
    if head.eps is not None:
        x, mean, variance = batch_normalised(x, mean, variance, head.eps)

    def loss(params: PyTree) -> jax.Array:
        scores = jax.nn.log_softmax(head.logits(params, x))
        return -jnp.take_along_axis(scores, labels_B[:, None], axis=1).mean()

    def member(params: PyTree, slots: PyTree, rate: jax.Array, decay: jax.Array) -> tuple[PyTree, PyTree]:
        directions, slots = _direction(training, decay).update(jax.grad(loss)(params), slots, params)
        return jax.tree.map(lambda p, d: p - rate * d, params, directions), slots

    params, slots = jax.vmap(member)(state.params, state.slots, hyper.learning_rate, hyper.weight_decay)
    return ProbeState(params, slots, mean, variance)


def batch_normalised(
    x: jax.Array, mean: jax.Array, variance: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B, ..., D] by the statistics of all but its last axis, and the running ones [D] moved towards them.

    As PyTorch: normalised by the biased variance, moved towards the unbiased one.
    """
    axes = tuple(range(x.ndim - 1))
    batch_mean = x.mean(axis=axes)
    batch_variance = jnp.square(x - _last(batch_mean, x)).mean(axis=axes)
    count = x.size // x.shape[-1]
    unbiased = batch_variance * (count / max(count - 1, 1))
    mean = mean + BATCH_NORM_MOMENTUM * (batch_mean - mean)
    variance = variance + BATCH_NORM_MOMENTUM * (unbiased - variance)
    return _normalised(x, batch_mean, batch_variance, eps), mean, variance


def _direction(training: ProbeTraining, decay: Any) -> optax.GradientTransformation:
    """Gradients -> what the learning rate multiplies."""
    steps = [] if training.clip_norm is None else [optax.clip_by_global_norm(training.clip_norm)]
    match training.optimizer:
        case "adamw":
            steps += [optax.scale_by_adam(b2=training.b2), optax.add_decayed_weights(decay)]
        case "sgd":
            steps += [optax.add_decayed_weights(decay), optax.trace(training.momentum)]
        case "lars":
            # optax.lars multiplies by the learning rate before the momentum, which differs while the rate changes;
            # this is the order of MAE's evaluation.
            steps += [
                optax.masked(optax.add_decayed_weights(decay), _matrices),
                optax.masked(optax.scale_by_trust_ratio(trust_coefficient=training.trust), _matrices),
                optax.trace(training.momentum),
            ]
    return optax.chain(*steps)


def _matrices(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _normalised(x: jax.Array, mean: jax.Array, variance: jax.Array, eps: float) -> jax.Array:
    return (x - _last(mean, x)) * _last(jax.lax.rsqrt(variance + eps), x)


def _last(x_D: jax.Array, like: jax.Array) -> jax.Array:
    return x_D.reshape(*[1] * (like.ndim - 1), -1)


__all__ = [
    "Features", "Grid", "Head", "Probe", "ProbeState", "ProbeTraining", "States",
    "batch_normalised", "grid_ranks", "linear_head", "logits", "start", "train_probes",
]  # fmt: skip
