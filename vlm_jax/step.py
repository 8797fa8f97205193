"""The train step that every method runs through: gradients, accumulation, update, and what a bad step must not touch.

`make_train_step` is the only place that takes gradients of a training loss. An objective says what the loss of a
*global* batch is; how the batch is split into microbatches and laid over the mesh is decided here and changes nothing
but rounding. This file knows no method and no model.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vlm_jax.mesh import BATCH_AXES, logical_names, replicated, shardings, tree_path, unbox
from vlm_jax.optim import Optimizer, OptimizerConfig
from vlm_jax.parts import Part, Parts, merge

PyTree = Any
Batch = dict[str, jax.Array]
# (sum, count) in fp32: means over any split of the batch are then exact, never means of means
Ratio = tuple[jax.Array, jax.Array]
StepFunction = Callable[["TrainState", Batch], tuple["TrainState", dict[str, Ratio]]]


@flax.struct.dataclass
class TrainState:
    """Everything that training changes; every leaf is a global array.

    Attributes:
        step: () int32, strongly typed (a weak type would compile the step twice): batches consumed.
        params: the model.
        opt_state: slots of the live parameters.
        extra: what the objective owns (teacher, queues, centres); {} for most.
        ema: moving average of the live parameters; {} when off.
        nonfinite: "total" and "in_a_row" () int32: steps whose loss or gradients were not finite and changed nothing.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    extra: PyTree
    ema: PyTree
    nonfinite: dict[str, jax.Array]


@flax.struct.dataclass
class Aux:
    """What a loss returns beside its value.

    Attributes:
        metrics: name -> (sum, count).
        updates: arrays with a leading batch axis that `Objective.after` wants (features for a queue, say).
    """

    metrics: dict[str, Ratio]
    updates: PyTree = flax.struct.field(default_factory=dict)


class Objective:
    """A training method. Subclass it; override `loss`, or for a batch-coupled loss `embed` and `pair_loss`.

    Every function is pure, sees global arrays and the global batch, and never the mesh. `keys` is a [B] array of typed
    PRNG keys, one a row, derived from (seed, step, global row): randomness that depends on anything else would change
    with the mesh or the number of microbatches.
    """

    # whether the loss couples the rows of a batch, so that microbatches must share one `pair_loss`
    coupled: bool = False
    # whether `pair_loss` sees no more of the embeddings than their sums over the rows (several means with counts of
    # their own): the loss of a data set is then that of the sums over it
    additive: bool = False
    # regular expressions of the parameters that the loss gives no gradient to; `config.parts` must freeze them
    without_gradient: tuple[str, ...] = ()

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """(params, extra): params as nested dicts, weights in the boxes that carry their logical names."""
        raise TypeError(f"{type(self).__name__} defines no init")

    def loss(self, params: PyTree, extra: PyTree, batch: Batch, keys: jax.Array, step: jax.Array) -> tuple[Ratio, Aux]:
        """The loss of a batch as (sum, count)."""
        return self.pair_loss(params, extra, self.embed(params, extra, batch, keys, step), step)

    def embed(self, params: PyTree, extra: PyTree, batch: Batch, keys: jax.Array, step: jax.Array) -> PyTree:
        """The part of a coupled loss that is a function of each row alone: arrays with a leading batch axis.

        Whole numbers and keys may be among them; they have no gradient.
        """
        raise TypeError(f"{type(self).__name__} defines no embed; a coupled objective needs embed and pair_loss")

    def pair_loss(self, params: PyTree, extra: PyTree, embeddings: PyTree, step: jax.Array) -> tuple[Ratio, Aux]:
        """The loss of the whole batch from its embeddings."""
        raise TypeError(f"{type(self).__name__} defines no pair_loss; a coupled objective needs embed and pair_loss")

    def constrain(self, params: PyTree, updates: PyTree) -> PyTree:
        """The parameters after an update, brought back to where they are allowed to be (CLIP's scale).

        Parameters without a gradient that follow the data (the running statistics of a batch norm) are moved here
        too; `updates` come from `Aux`.
        """
        return params

    def begin(self, extra: PyTree, params: PyTree) -> PyTree:
        """What the objective owns at the start of a run whose parameters come from elsewhere (`init_from`)."""
        return extra

    def after(self, extra: PyTree, params: PyTree, updates: PyTree, step: jax.Array) -> PyTree:
        """What the objective owns after a step: teacher, queue; `updates` come from `Aux`."""
        return extra


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a state is made of, resolved for one mesh: made once, used by training, planning and restoring.

    Attributes:
        abstract: the `TrainState` as `jax.ShapeDtypeStruct`s with shardings.
        parts: the rules resolved.
        optimizer: the optimiser over the live parameters.
        init: () -> TrainState on the mesh.
    """

    abstract: TrainState
    parts: Parts
    optimizer: Optimizer
    init: Callable[[], TrainState]


def make_setup(
    objective: Objective,
    optimizer: OptimizerConfig,
    parts: tuple[Part, ...],
    mesh: Mesh,
    *,
    total_steps: int,
    seed: int,
    ema: bool,
) -> Setup:
    """Resolves parts, optimiser and shardings from shapes alone; nothing is allocated until `init` is called."""
    key = jax.random.key(seed)
    boxed = jax.eval_shape(lambda: objective.init(key))[0]
    shapes = {tree_path(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(unbox(boxed))[0]}
    resolved = Parts(parts, logical_names(boxed), shapes, objective.without_gradient)
    optim = Optimizer(optimizer, resolved, total_steps)

    def create(unboxed: bool) -> TrainState:
        params, extra = objective.init(key)
        plain = unbox(params)
        live, _ = resolved.split(plain)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=plain if unboxed else params,
            opt_state=optim.init(live),
            extra=unbox(extra) if unboxed else extra,
            # a copy: an alias of the parameters could not be donated beside them
            ema=jax.tree.map(jnp.copy, live) if ema else {},
            nonfinite={"total": jnp.zeros((), jnp.int32), "in_a_row": jnp.zeros((), jnp.int32)},
        )

    placement = shardings(jax.eval_shape(lambda: create(False)), mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(lambda: create(True)),
        placement,
    )

    def init() -> TrainState:
        with jax.set_mesh(mesh):
            return jax.jit(lambda: create(True), out_shardings=placement)()

    return Setup(abstract, resolved, optim, init)


def make_train_step(
    objective: Objective,
    optimizer: Optimizer,
    parts: Parts,
    mesh: Mesh,
    accum_steps: int = 1,
    *,
    seed: int = 0,
    ema_decay: float | None = None,
    state_shardings: PyTree | None = None,
) -> StepFunction:
    """The jitted step: (state, batch) -> (state, metrics); the state's buffers are donated.

    Args:
        objective: the method.
        optimizer: over the live parameters.
        parts: which parameters are live.
        mesh: where state and batch lie.
        accum_steps: microbatches per step; the gradients are those of the undivided batch to rounding.
        seed: of dropout and the like; a row's key depends on (seed, step, global row).
        ema_decay: of the moving average of the live parameters; None keeps none.
        state_shardings: of the new state; None leaves them to the compiler.

    Returns:
        A function under jit whose metrics are (sum, count): the objective's, and `loss`, `gradient_norm` (of each part
        too where several learn), `learning_rate`, `nonfinite_steps`, `nonfinite_in_a_row`.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Ratio]]:
        live, frozen = parts.split(state.params)
        keys = _row_keys(seed, state.step, jax.tree.leaves(batch)[0].shape[0])
        gradient = _coupled_gradient if objective.coupled and accum_steps > 1 else _gradient
        (loss_sum, count), aux, gradients = gradient(objective, live, frozen, state, batch, keys, accum_steps)
        loss = loss_sum / _at_least_one(count)
        norm = _global_norm(gradients)

        updates, opt_state = optimizer.update(gradients, norm, state.opt_state, live, state.step)
        new_live = jax.tree.map(lambda p, u: p + u, live, updates)
        new_params = objective.constrain(merge(new_live, frozen), aux.updates)
        # Whatever the method does to its parameters, those of frozen parts are what they were.
        new_live, _ = parts.split(new_params)
        new_params = merge(new_live, frozen)
        new_extra = objective.after(state.extra, new_params, aux.updates, state.step)
        new_ema = _moving_average(state.ema, new_live, ema_decay)

        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(_global_norm(updates))
        new_state = TrainState(state.step + 1, new_params, opt_state, new_extra, new_ema, state.nonfinite)
        new_state = _unless_bad(finite, new_state, state)
        one = jnp.ones((), jnp.float32)
        metrics = dict(aux.metrics) | {
            # a batch in which nothing counts has loss 0 in the log too, as it has for the update
            "loss": (loss_sum, _at_least_one(count)),
            "gradient_norm": (norm, one),
            **_part_norms(gradients, parts),
            "learning_rate": (optimizer.learning_rate(state.step), one),
            "nonfinite_steps": (new_state.nonfinite["total"].astype(jnp.float32), one),
            "nonfinite_in_a_row": (new_state.nonfinite["in_a_row"].astype(jnp.float32), one),
        }
        return new_state, metrics

    out = None if state_shardings is None else (state_shardings, replicated(mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def _unless_bad(finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """The new state, or for a step that was not finite the old one with the step and the count of such steps raised."""

    def keep(new_tree: PyTree, old_tree: PyTree) -> PyTree:
        # `where` on everything, never a product with zero: 0 * nan is nan.
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new_tree, old_tree)

    bad = jnp.where(finite, 0, 1).astype(jnp.int32)
    return TrainState(
        step=new.step,
        params=keep(new.params, old.params),
        opt_state=keep(new.opt_state, old.opt_state),
        extra=keep(new.extra, old.extra),
        ema=keep(new.ema, old.ema),
        nonfinite={"total": old.nonfinite["total"] + bad, "in_a_row": bad * (old.nonfinite["in_a_row"] + 1)},
    )


def _row_keys(seed: int, step: jax.Array, rows: int) -> jax.Array:
    """[rows] typed keys."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows, dtype=jnp.uint32))


def _gradient(
    objective: Objective, live: PyTree, frozen: PyTree, state: TrainState, batch: Batch, keys: jax.Array, accum: int
) -> tuple[Ratio, Aux, PyTree]:
    """Gradient of sum / count, where both are sums over the microbatches' rows."""

    def sum_loss(live: PyTree, batch: Batch, keys: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Aux]]:
        (total, count), aux = objective.loss(merge(live, frozen), state.extra, batch, keys, state.step)
        return total, (count, aux)

    grad = jax.value_and_grad(sum_loss, has_aux=True)
    if accum == 1:
        (total, (count, aux)), gradients = grad(live, batch, keys)
    else:

        def body(carry: PyTree, micro: PyTree) -> tuple[PyTree, PyTree]:
            (total, (count, aux)), gradients = grad(live, *micro)
            return jax.tree.map(jnp.add, carry, (gradients, total, count, aux.metrics)), aux.updates

        micros = _split((batch, keys), accum)
        first = jax.tree.map(lambda x: x[0], micros)
        (total_, (count_, aux_)), gradients_ = jax.eval_shape(grad, live, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (gradients_, total_, count_, aux_.metrics))
        (gradients, total, count, metrics), updates = jax.lax.scan(body, zeros, micros)
        aux = Aux(metrics, _join(updates))
    return (total, count), aux, jax.tree.map(lambda g: g / _at_least_one(count), gradients)


def _coupled_gradient(
    objective: Objective, live: PyTree, frozen: PyTree, state: TrainState, batch: Batch, keys: jax.Array, accum: int
) -> tuple[Ratio, Aux, PyTree]:
    """Gradient caching (Gao et al. 2021): embed every microbatch, one loss on all of them, then one VJP per microbatch.

    The same gradients as of the undivided batch, at the activation memory of one microbatch.
    """
    micros = _split((batch, keys), accum)

    def embed(live: PyTree, micro: tuple[Batch, jax.Array]) -> PyTree:
        rows, row_keys = micro
        return objective.embed(merge(live, frozen), state.extra, rows, row_keys, state.step)

    cached = _join(jax.lax.map(lambda micro: embed(live, micro), micros))
    floats, others = _by_dtype(cached)

    def mean_loss(live: PyTree, floats: PyTree) -> tuple[jax.Array, tuple[Ratio, Aux]]:
        embeddings = merge(floats, others)
        (total, count), aux = objective.pair_loss(merge(live, frozen), state.extra, embeddings, state.step)
        return total / _at_least_one(count), ((total, count), aux)

    grad = jax.value_and_grad(mean_loss, argnums=(0, 1), has_aux=True)
    (_, (ratio, aux)), (gradients, cotangents) = grad(live, floats)

    def body(gradients: PyTree, inputs: PyTree) -> tuple[PyTree, None]:
        micro, cotangent = inputs
        _, vjp = jax.vjp(lambda live: _by_dtype(embed(live, micro))[0], live)
        return jax.tree.map(jnp.add, gradients, vjp(cotangent)[0]), None

    gradients, _ = jax.lax.scan(body, gradients, (micros, _split(cotangents, accum)))
    return ratio, aux, gradients


def _by_dtype(tree: PyTree) -> tuple[PyTree, PyTree]:
    """(floats, others): two trees of the same structure with None in place of the other's leaves."""
    is_float = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.floating), tree)
    floats = jax.tree.map(lambda x, own: x if own else None, tree, is_float)
    return floats, jax.tree.map(lambda x, own: None if own else x, tree, is_float)


def _split(tree: PyTree, parts: int) -> PyTree:
    """[B, ...] -> [parts, B / parts, ...], rows j, j + parts, ... in microbatch j: every row stays on its device."""

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % parts:
            raise ValueError(f"a batch of {x.shape[0]} rows doesn't split into {parts} microbatches of equal size")
        return _pin(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), axis=1)

    return jax.tree.map(split, tree)


def _join(tree: PyTree) -> PyTree:
    """The inverse of `_split`."""
    return jax.tree.map(lambda x: _pin(x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), axis=0), tree)


def _pin(x: jax.Array, axis: int) -> jax.Array:
    """Keeps the batch axis on the mesh's batch axes, where they divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    axes = tuple(name for name in BATCH_AXES if name in mesh.axis_names)
    shards = 1
    for name in axes:
        shards *= mesh.shape[name]
    if x.shape[axis] % shards:
        return x
    spec = jax.sharding.PartitionSpec(*[None] * axis, axes)
    return jax.lax.with_sharding_constraint(x, spec)


def _moving_average(ema: PyTree, live: PyTree, decay: float | None) -> PyTree:
    if decay is None:
        return ema
    return jax.tree.map(lambda average, p: average + (1 - decay) * (p - average), ema, live)


def _at_least_one(count: jax.Array) -> jax.Array:
    """A count to divide by: a batch in which nothing counts has loss and gradient 0, not 0 / 0."""
    return jnp.where(count == 0, 1.0, count)


def _part_norms(gradients: PyTree, parts: Parts) -> dict[str, Ratio]:
    """`gradient_norm/PART` of each part that learns; nothing where only one does."""
    leaves: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        leaves.setdefault(parts.part_of[tree_path(path)].name, []).append(leaf)
    if len(leaves) == 1:
        return {}
    return {f"gradient_norm/{name}": (_global_norm(group), jnp.ones(())) for name, group in leaves.items()}


def _global_norm(tree: PyTree) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


__all__ = ["Aux", "Objective", "Setup", "TrainState", "make_setup", "make_train_step"]
