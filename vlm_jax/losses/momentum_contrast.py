"""Contrast with a queue of an averaged model's features, soft targets, and negatives as hard as they come (ALBEF).

Which pairs of a batch may be compared (`same_group`), which are no negatives of each other (`same_identity`), the loss
on their features, and the choice of one negative for each row. Encoders are elsewhere.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vlm_jax.losses.pairs import MASKED, block_logits
from vlm_jax.mesh import BATCH_AXES, constrain

Scope = Literal["global", "group", "device"]


def group_count(scope: Scope, group: int, rows: int) -> int:
    """How many groups a global batch falls into whose rows alone are each other's negatives.

    Args:
        scope: the whole batch; groups of `group` neighbouring rows; or the rows of each device, which is the one choice
            that makes the loss depend on the mesh.
        group: rows of a group.
        rows: of the global batch.

    Raises:
        ValueError: the batch doesn't divide into such groups.
    """
    if scope == "global":
        return 1
    if scope == "group":
        count, what = rows // group, f"groups of {group}"
    else:
        mesh = jax.sharding.get_abstract_mesh()
        count = math.prod(mesh.shape[axis] for axis in BATCH_AXES if axis in mesh.axis_names)
        what = f"the {count} devices that share it"
    if count < 1 or rows % count or (scope == "group" and rows % group):
        raise ValueError(f"a batch of {rows} rows doesn't divide into {what}; change negatives_scope or the batch size")
    return count


def same_group(rows: int, groups: int) -> jax.Array:
    """bool [B, B]: the pairs of rows of one group."""
    group_B = jnp.arange(rows) // (rows // groups)
    return group_B[:, None] == group_B[None, :]


def same_identity(ids_BxI: jax.Array, other_NxI: jax.Array) -> jax.Array:
    """bool [B, N]: the pairs that agree in any of their I ids (image, caption); negative ids agree with none."""
    ids_Bx1xI, other_1xNxI = ids_BxI[:, None], other_NxI[None]
    agree = (ids_Bx1xI == other_1xNxI) & (ids_Bx1xI >= 0)
    return agree.any(axis=-1)


def soft_cross_entropy(logits_BxN: jax.Array, targets_BxN: jax.Array, allowed_BxN: jax.Array) -> jax.Array:
    """-sum target log p over the allowed columns, fp32 [B]."""
    log_p_BxN = jax.nn.log_softmax(jnp.where(allowed_BxN, logits_BxN, MASKED), axis=1)
    return -jnp.where(allowed_BxN, log_p_BxN * targets_BxN, 0.0).sum(axis=1)


def queue_contrast(
    image: tuple[jax.Array, jax.Array],
    text: tuple[jax.Array, jax.Array],
    queue: tuple[jax.Array, jax.Array, jax.Array] | None,
    scale: jax.Array,
    allowed_BxB: jax.Array,
    positive_BxB: jax.Array,
    share: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """ITC (Li et al. 2021, eq. 1, 2 and 6): features against the averaged model's, those of the batch and of a queue.

    Args:
        image: features of the images [B, E], fp32 of unit length, by the model and by the averaged one.
        text: the same of the texts.
        queue: the averaged model's features of earlier images and texts, [Q, E] each, and which of them are no
            negatives of which rows, bool [B, Q].
        scale: the inverse of the temperature, ().
        allowed_BxB: the pairs that are compared at all.
        positive_BxB: those that are no negatives, the diagonal among them.
        share: of the averaged model's softmax in the targets, (); None: none, and it costs nothing.

    Returns:
        (the sum over rows, half of it each way, fp32; logits within the batch [B, B], of images to texts and back).
    """
    slow: dict[str, jax.Array] = jax.lax.stop_gradient({"image": image[1], "text": text[1]})
    earlier: dict[str, jax.Array] = {}
    rows = allowed_BxB.shape[0]
    allowed_BxN, positive_BxN = allowed_BxB, positive_BxB
    if queue is not None:
        same_BxQ = queue[2]
        earlier |= {"image": queue[0], "text": queue[1]}
        allowed_BxN = jnp.concatenate([allowed_BxB, jnp.ones_like(same_BxQ)], axis=1)
        positive_BxN = jnp.concatenate([positive_BxB, same_BxQ], axis=1)

    def logits(features_BxE: jax.Array, other: str) -> jax.Array:
        blocks = [block_logits(features_BxE, columns[other], scale) for columns in (slow, earlier) if other in columns]
        return constrain(jnp.concatenate(blocks, axis=1), "batch", None)

    loss, within = jnp.zeros(()), []
    for (fast_BxE, _), name, other in ((image, "image", "text"), (text, "text", "image")):
        logits_BxN = logits(fast_BxE, other)
        targets_BxN = positive_BxN / positive_BxN.sum(axis=1, keepdims=True)
        if share is not None:
            taught_BxN = jnp.where(allowed_BxN, jax.lax.stop_gradient(logits(slow[name], other)), MASKED)
            targets_BxN = share * jax.nn.softmax(taught_BxN, axis=1) + (1 - share) * targets_BxN
        loss += 0.5 * soft_cross_entropy(logits_BxN, targets_BxN, allowed_BxN).sum()
        within.append(logits_BxN[:, :rows])
    return loss, (within[0], within[1])


def hard_negatives(logits_BxB: jax.Array, candidates_BxB: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One column for each row, drawn with probability proportional to exp(logit) among its candidates.

    By the largest of logit + Gumbel noise, which needs no normalised weights: where all candidates are so far from the
    positive that their softmax underflows, they are still drawn as their logits say.

    Args:
        logits_BxB: fp32; no gradient goes through the choice.
        candidates_BxB: bool.
        keys: [B] typed keys, one a row.

    Returns:
        (index int32 [B], found bool [B]): a row without a candidate has found = False and the index 0.
    """
    columns = logits_BxB.shape[1]
    noise_BxB = jax.vmap(lambda key: jax.random.gumbel(key, (columns,)))(keys)
    scores_BxB = jnp.where(candidates_BxB, jax.lax.stop_gradient(logits_BxB) + noise_BxB, -jnp.inf)
    found_B = candidates_BxB.any(axis=1)
    return jnp.where(found_B, jnp.argmax(scores_BxB, axis=1), 0).astype(jnp.int32), found_B


def take_rows(x_BxTxD: jax.Array, index_B: jax.Array, groups: int) -> jax.Array:
    """[B, T, D] -> [B, T, D], the rows `index`; with groups each row's index lies in its own group.

    A global choice gathers the whole batch on every device for a moment; groups of a device's own rows stay there.
    """
    if groups == 1:
        taken = jnp.take(constrain(x_BxTxD, None, "length", "embed"), index_B, axis=0)
    else:
        size = x_BxTxD.shape[0] // groups
        grouped = constrain(x_BxTxD.reshape(groups, size, *x_BxTxD.shape[1:]), "batch", None, None, "embed")
        place_GxS = index_B.reshape(groups, size) % size
        taken = jax.vmap(lambda rows, place: jnp.take(rows, place, axis=0))(grouped, place_GxS)
        taken = constrain(taken, "batch", None, None, "embed").reshape(x_BxTxD.shape)
    return constrain(taken, "batch", "length", "embed")


def in_chunks(function: Callable[[Any], jax.Array], rows: Any, chunks: int) -> jax.Array:
    """A function of rows, one part of them after the other; the backward pass computes each part anew.

    Args:
        function: tree of arrays [n, ...] -> array [n, ...], each row by itself.
        rows: tree of arrays [B, ...].
        chunks: number of parts; divides B. 1 calls the function as it is.
    """
    if chunks == 1:
        return function(rows)
    # Every chunks-th row in a part: then each row stays on its device.
    parts = jax.tree.map(lambda x: x.reshape(x.shape[0] // chunks, chunks, *x.shape[1:]).swapaxes(0, 1), rows)
    out = jax.lax.map(jax.checkpoint(function), parts).swapaxes(0, 1)
    return out.reshape(-1, *out.shape[2:])


def enqueue(queue_QxE: jax.Array, rows_BxE: jax.Array, pointer: jax.Array) -> jax.Array:
    """The queue with the rows written from `pointer` on, around its end; of more rows than it has places the last."""
    length, rows = queue_QxE.shape[0], rows_BxE.shape[0]
    skipped = max(rows - length, 0)
    places = (pointer + skipped + jnp.arange(rows - skipped)) % length
    return queue_QxE.at[places].set(rows_BxE[skipped:].astype(queue_QxE.dtype))


__all__ = [
    "Scope",
    "enqueue",
    "group_count",
    "hard_negatives",
    "in_chunks",
    "queue_contrast",
    "same_group",
    "same_identity",
    "soft_cross_entropy",
    "take_rows",
]
