"""Logistic regression with an L2 penalty by L-BFGS, on the devices, in float32. It selects no penalty.

The objective is that of scikit-learn's `LogisticRegression` divided by the number of examples, with lambda = 1 / C:
mean loss + lambda / (2 n) * |weights|^2, the bias without a penalty. Softmax cross-entropy for one label an example,
a sigmoid for each class for any number of labels.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlm_jax.evals.features import padded, to_host

Loss = Literal["softmax", "sigmoid"]
# Rows whose logits exist at a time, of all devices together: a million rows of a thousand classes would be 4 GB.
ROWS_AT_A_TIME = 16384
_MEMORY = 10  # pairs of steps and gradients that L-BFGS keeps; scipy's default
_LINE_SEARCH_STEPS = 30
# Steps in a row that don't lower the loss by a float32's resolution, after which nothing is left to gain.
_PATIENCE = 5


class Classifier(NamedTuple):
    """logits = vectors @ weights + bias: float32 [D, C] and [C]."""

    weights: Any
    bias: Any


class Fit(NamedTuple):
    """A fitted classifier.

    Attributes:
        classifier: on the host.
        iterations: steps of L-BFGS.
        converged: whether the gradient fell below the tolerance, or as far as float32 can tell; False: it was stopped.
    """

    classifier: Classifier
    iterations: int
    converged: bool


class TrainingSet:
    """Vectors and labels on the devices, laid out so that chunks of rows are spread over all of them.

    Args:
        vectors_NxD: float32 [N, D].
        labels: int32 [N], or bool [N, C] for the sigmoid loss.
        class_count: C.
        shard: spreads rows over the mesh.
        shards: devices that share the rows.
        rows_at_a_time: rows of a chunk, rounded up to a multiple of that.
    """

    def __init__(
        self,
        vectors_NxD: np.ndarray,
        labels: np.ndarray,
        class_count: int,
        shard: Callable[[np.ndarray], jax.Array],
        shards: int,
        rows_at_a_time: int = ROWS_AT_A_TIME,
    ):
        self.loss: Loss = "sigmoid" if labels.ndim == 2 else "softmax"
        self.class_count, self.examples = class_count, len(vectors_NxD)
        rows = -(-min(rows_at_a_time, self.examples) // shards) * shards
        self._chunks = -(-self.examples // rows)
        self._rows, self._shard = rows, shard
        self._vectors, self._labels = self._spread(vectors_NxD), self._spread(labels)

    def _spread(self, array: np.ndarray) -> jax.Array:
        """[N, ...] -> [rows, chunks, ...]: the sharded axis first, so that each device holds a part of every chunk."""
        filled = padded(array, self._rows * self._chunks)
        return self._shard(np.ascontiguousarray(filled.reshape(self._rows, self._chunks, *array.shape[1:])))

    def fit(self, l2: float, used_N: np.ndarray, tolerance: float, max_iterations: int) -> Fit:
        """The classifier that minimises the objective on some of the examples, from zero.

        Args:
            l2: lambda.
            used_N: bool [N], the examples; one compiled program serves every choice.
            tolerance: stops when no gradient is larger than this times the largest one at the start.
            max_iterations: stops there in any case.
        """
        used = self._spread(used_N.astype(np.float32))
        scale = np.float32(1.0 / used_N.sum())
        problem = (self._vectors, self._labels, used, scale, np.float32(l2 * scale))
        zero = Classifier(
            np.zeros((self._vectors.shape[-1], self.class_count), np.float32), np.zeros(self.class_count, np.float32)
        )
        found, iterations, converged = _minimise(zero, problem, np.float32(tolerance), max_iterations, self.loss)
        return Fit(to_host(found), int(to_host(iterations)), bool(to_host(converged)))


@functools.partial(jax.jit, static_argnames=("loss",))
def _minimise(start: Classifier, problem: Any, tolerance: Any, max_iterations: Any, loss: Loss) -> Any:
    """(classifier, iterations, whether it converged)."""

    def objective(classifier: Classifier) -> jax.Array:
        return _objective(classifier, problem, loss)

    optimizer = optax.lbfgs(
        memory_size=_MEMORY, linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=_LINE_SEARCH_STEPS)
    )
    value, gradient = jax.value_and_grad(objective)(start)
    enough = tolerance * _largest(gradient)

    def going_on(carry: Any) -> jax.Array:
        _, _, _, gradient, count, idle = carry
        return (count < max_iterations) & (_largest(gradient) > enough) & (idle < _PATIENCE)

    def step(carry: Any) -> Any:
        params, state, value, gradient, count, idle = carry
        updates, state = optimizer.update(gradient, state, params, value=value, grad=gradient, value_fn=objective)
        params = optax.apply_updates(params, updates)
        # The line search has evaluated the point that it chose.
        new_value, new_gradient = optax.tree.get(state, "value"), optax.tree.get(state, "grad")
        lowered = new_value < value - jnp.finfo(jnp.float32).eps * jnp.abs(value)
        return params, state, new_value, new_gradient, count + 1, jnp.where(lowered, 0, idle + 1)

    carry = (start, optimizer.init(start), value, gradient, jnp.int32(0), jnp.int32(0))
    found, _, _, gradient, count, idle = jax.lax.while_loop(going_on, step, carry)
    return found, count, (_largest(gradient) <= enough) | (idle >= _PATIENCE)


def _largest(tree: Any) -> jax.Array:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _objective(classifier: Classifier, problem: Any, loss: Loss) -> jax.Array:
    """Mean loss and penalty; differentiated with respect to the classifier."""
    return _value_and_gradient(classifier, problem, loss)[0]


def _forward(classifier: Classifier, problem: Any, loss: Loss) -> tuple[jax.Array, Classifier]:
    return _value_and_gradient(classifier, problem, loss)


def _backward(loss: Loss, gradient: Classifier, cotangent: jax.Array) -> tuple[Classifier, None]:
    del loss
    return jax.tree.map(lambda x: cotangent * x, gradient), None


# By hand, so that value and gradient are one pass in which a chunk's logits live no longer than the chunk's turn.
_objective.defvjp(_forward, _backward)


def _value_and_gradient(classifier: Classifier, problem: Any, loss: Loss) -> tuple[jax.Array, Classifier]:
    vectors_RxKxD, labels, used_RxK, scale, l2 = problem
    matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def chunk(carry: tuple[jax.Array, Classifier], place: jax.Array) -> tuple[tuple[jax.Array, Classifier], None]:
        x_RxD, y, used_R = (jax.lax.dynamic_index_in_dim(a, place, 1, False) for a in (vectors_RxKxD, labels, used_RxK))
        logits_RxC = matmul(x_RxD, classifier.weights) + classifier.bias[None, :]
        losses_R, residuals_RxC = _LOSSES[loss](logits_RxC, y)
        residuals_RxC = residuals_RxC * (used_R * scale)[:, None]
        gradient = Classifier(matmul(x_RxD.T, residuals_RxC), residuals_RxC.sum(axis=0))
        return jax.tree.map(jnp.add, carry, (jnp.sum(losses_R * used_R) * scale, gradient)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, classifier))
    (value, gradient), _ = jax.lax.scan(chunk, zero, jnp.arange(vectors_RxKxD.shape[1]))
    penalty = 0.5 * l2 * jnp.sum(jnp.square(classifier.weights))
    return value + penalty, gradient._replace(weights=gradient.weights + l2 * classifier.weights)


def _softmax(logits_RxC: jax.Array, labels_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(losses [R], their gradient with respect to the logits)."""
    log_probabilities = jax.nn.log_softmax(logits_RxC)
    targets = jax.nn.one_hot(labels_R, logits_RxC.shape[-1])
    return -jnp.sum(targets * log_probabilities, axis=-1), jnp.exp(log_probabilities) - targets


def _sigmoid(logits_RxC: jax.Array, positive_RxC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `_softmax`; the loss is the sum over the classes, which are independent of each other."""
    targets = positive_RxC.astype(jnp.float32)
    losses = jax.nn.softplus(logits_RxC) - targets * logits_RxC
    return losses.sum(axis=-1), jax.nn.sigmoid(logits_RxC) - targets


_LOSSES = {"softmax": _softmax, "sigmoid": _sigmoid}
