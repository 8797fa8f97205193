"""Symmetric InfoNCE over a batch that lies on a mesh, in three forms with equal values and gradients.

Each form owns its collectives; a caller only sees global arrays. Not for per-example losses, and it draws no
gradients: the train step does.

All forms compute log(1 + sum_negatives exp(S_ij - S_ii)) as softplus(LSE_negatives - S_ii) instead of LSE - S_ii: at
scale 100 with aligned towers both terms of the latter are near 100, and their fp32 difference would lose the loss.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from vlm_jax.losses.forms import Form, PairLoss, sum_over_rows
from vlm_jax.losses.pairs import MASKED, block_logits, is_negative, is_valid, own_logits
from vlm_jax.losses.ring import info_nce_ring


def info_nce(
    image_BxD: jax.Array,
    text_BxD: jax.Array,
    scale: jax.Array,
    *,
    impl: Form = "gather",
    positives: jax.Array | None = None,
    valid: jax.Array | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The loss of CLIP (Radford et al. 2021, Fig. 3): the mean of image-to-text and text-to-image cross-entropy.

    Args:
        image_BxD: L2-normalised features of the global batch, fp32 or bf16; products are accumulated in fp32.
        text_BxD: the same for the texts; row i belongs to image i.
        scale: fp32 scalar that multiplies the cosines (the exponential of CLIP's learned parameter).
        impl: `gather`: one all-gather of the text tower, one [b, B] block of logits per device, half of the work and
            memory of gathering both towers. `ring`: blocks of [b, b], recomputed in the backward pass, for batches
            whose [b, B] block doesn't fit. `global`: plain [B, B] logits that the compiler partitions; the reference.
        positives: int32 [B], group of each row (any number but the least int32). Rows of one group, such as several
            captions of one image, aren't each other's negatives; the target stays the own pair. None: no groups.
        valid: bool [B]; rows that are False (padding) neither count nor serve as negatives, and their features may
            hold anything. None: all rows are valid.
        mesh: where the batch lies; None: the mesh of `jax.set_mesh`. Without a mesh, or where its batch axes have one
            device, every form is the global one. Other mesh axes hold copies.

    Returns:
        (sum, count), fp32 scalars: the sum of the rows' losses and the number of valid rows.

    Raises:
        ValueError: an unknown form, shapes that don't fit, or a batch that doesn't divide over the mesh.
    """
    forms = PairLoss(_whole, _gathered, info_nce_ring)
    return sum_over_rows(forms, image_BxD, text_BxD, scale, impl=impl, positives=positives, valid=valid, mesh=mesh)


def _whole(image_BxD: jax.Array, text_BxD: jax.Array, ids_B: jax.Array, scale: jax.Array) -> jax.Array:
    logits_BxB = jnp.where(is_negative(ids_B, ids_B), block_logits(image_BxD, text_BxD, scale), MASKED)
    own_B = own_logits(image_BxD, text_BxD, scale)
    losses_B = sum(jax.nn.softplus(jax.nn.logsumexp(logits_BxB, axis=axis) - own_B) for axis in (0, 1))
    return 0.5 * jnp.sum(jnp.where(is_valid(ids_B), losses_B, 0.0))


def _gathered(
    axes: tuple[str, ...], image_bxD: jax.Array, text_bxD: jax.Array, ids_b: jax.Array, scale: jax.Array
) -> jax.Array:
    """Rows are complete on a device; columns are completed by one pmax and one psum of B numbers."""
    text_BxD = jax.lax.all_gather(text_bxD, axes, tiled=True)
    ids_B = jax.lax.all_gather(ids_b, axes, tiled=True)
    logits_bxB = jnp.where(is_negative(ids_b, ids_B), block_logits(image_bxD, text_BxD, scale), MASKED)
    own_b = own_logits(image_bxD, text_bxD, scale)
    row_lse_b = jax.nn.logsumexp(logits_bxB, axis=1)
    maximum_B = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(logits_bxB, axis=0)), axes)
    column_lse_B = maximum_B + jnp.log(jax.lax.psum(jnp.sum(jnp.exp(logits_bxB - maximum_B[None, :]), axis=0), axes))
    start = jax.lax.axis_index(axes) * own_b.shape[0]
    column_lse_b = jax.lax.dynamic_slice_in_dim(column_lse_B, start, own_b.shape[0])
    losses_b = jax.nn.softplus(row_lse_b - own_b) + jax.nn.softplus(column_lse_b - own_b)
    return 0.5 * jax.lax.psum(jnp.sum(jnp.where(is_valid(ids_b), losses_b, 0.0)), axes)


__all__ = ["Form", "info_nce"]
