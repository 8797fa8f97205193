"""Self-distillation: what a teacher's scores of prototypes become, and how a student is held to it.

DINO (Caron et al. 2021), iBOT (Zhou et al. 2022) and KoLeo (Sablayrolles et al. 2019) as DINOv2 combines them (Oquab et
al. 2024, section 4). Everything sees the rows of the global batch. Sums over rows and prototypes are plain reductions,
so any layout over the mesh gives the same numbers.
"""

import jax
import jax.numpy as jnp

from vlm_jax.mesh import constrain


def sinkhorn_knopp(
    logits_RxK: jax.Array, temperature: jax.Array, weights_R: jax.Array | None = None, iterations: int = 3
) -> jax.Array:
    """Soft assignments of rows to prototypes in which every prototype gets the same share (SwAV, Caron et al. 2020).

    Args:
        logits_RxK: the teacher's scores, of all rows of the global batch.
        temperature: () that divides them.
        weights_R: 1 for a row that counts, 0 for padding; None: all count.
        iterations: of bringing first the prototypes to equal shares, then the rows to 1.

    Returns:
        [R, K] fp32; the rows that count sum to 1, the others are 0.
    """
    scaled = logits_RxK.astype(jnp.float32) / temperature
    weights_R = jnp.ones(scaled.shape[:1]) if weights_R is None else weights_R.astype(jnp.float32)
    count = jnp.maximum(weights_R.sum(), 1.0)
    scaled = jnp.where(weights_R[:, None] > 0, scaled, -jnp.inf)
    # One number for the whole matrix: the iterations cancel it, and exp can't overflow.
    top = scaled.max()
    mass_RxK = jnp.exp(scaled - jnp.where(jnp.isfinite(top), top, 0.0))
    # diag(rows) mass diag(columns) is the matrix of the published loop. Scaling two vectors keeps one such matrix in
    # memory, where scaling the matrix would write it twice in each iteration.
    rows_R = jnp.ones_like(weights_R)
    columns_K = jnp.ones(scaled.shape[1:])
    for _ in range(iterations):
        columns_K = _inverse(scaled.shape[1] * (mass_RxK * rows_R[:, None]).sum(axis=0))
        rows_R = _inverse(count * (mass_RxK * columns_K[None]).sum(axis=1))
    return mass_RxK * columns_K[None] * (count * rows_R)[:, None]


def _inverse(x: jax.Array) -> jax.Array:
    """1 / x, and 0 where there is nothing to divide by: a row of padding, a prototype below the smallest number."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1.0), 0.0)


def centred_softmax(logits_RxK: jax.Array, centre_K: jax.Array, temperature: jax.Array) -> jax.Array:
    """softmax((logits - centre) / temperature), fp32 [R, K] (DINO, section 3.1)."""
    return jax.nn.softmax((logits_RxK.astype(jnp.float32) - centre_K[None]) / temperature, axis=-1)


def mean_logits(logits_RxK: jax.Array, weights_R: jax.Array | None = None) -> jax.Array:
    """The mean of the rows that count, fp32 [K]: what a centre moves towards."""
    logits = logits_RxK.astype(jnp.float32)
    if weights_R is None:
        return logits.mean(axis=0)
    return (logits * weights_R[:, None]).sum(axis=0) / jnp.maximum(weights_R.sum(), 1.0)


def cross_entropy(student_RxK: jax.Array, targets_RxK: jax.Array, temperature: float) -> jax.Array:
    """-sum_k targets log softmax(student / temperature), fp32 [R]; the targets of a row may have any sum.

    In this form no second matrix [R, K] of log-probabilities is kept.
    """
    scaled = student_RxK.astype(jnp.float32) / temperature
    total = jax.nn.logsumexp(scaled, axis=-1)
    return total * targets_RxK.sum(axis=-1) - (targets_RxK * scaled).sum(axis=-1)


def koleo(features_BxD: jax.Array, eps: float = 1e-8) -> jax.Array:
    """-log of each row's distance to its nearest other row on the unit sphere, fp32 [B] (DINOv2, section 4).

    Differentiated through both rows of a pair; which one is nearest is not.
    """
    features = features_BxD.astype(jnp.float32)
    square = jnp.square(features).sum(axis=-1, keepdims=True)
    unit_BxD = constrain(features * jax.lax.rsqrt(jnp.maximum(square, eps**2)), "batch", None)
    others_BxD = constrain(unit_BxD, None, None)
    cosines_BxB = jnp.einsum(
        "BD,CD->BC", jax.lax.stop_gradient(unit_BxD), jax.lax.stop_gradient(others_BxD), precision="highest"
    )
    itself_BxB = jnp.eye(features.shape[0], dtype=bool)
    nearest_B = jnp.where(itself_BxB, -1.0, constrain(cosines_BxB, "batch", None)).argmax(axis=-1)
    # torch's pairwise_distance adds eps to every difference
    difference_BxD = unit_BxD - others_BxD[nearest_B] + eps
    # The root's slope at 0 is infinite; eps in every difference keeps it off but for rounding.
    distance_B = jnp.sqrt(jnp.maximum(jnp.square(difference_BxD).sum(axis=-1), eps**2))
    return -jnp.log(distance_B + eps)


__all__ = ["centred_softmax", "cross_entropy", "koleo", "mean_logits", "sinkhorn_knopp"]
