"""The pairwise sigmoid loss of SigLIP over a batch that lies on a mesh, in three forms with equal values and gradients.

Each form owns its collectives; a caller only sees global arrays. No form builds a matrix of signs or of ones: a row's
own pair is computed apart from its negatives.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from vlm_jax.losses.forms import Form, PairLoss, sum_over_rows
from vlm_jax.losses.pairs import block_logits, is_negative, is_valid, matmul, own_logits
from vlm_jax.losses.ring import circulate, ring_map


def sigmoid_loss(
    image_BxD: jax.Array,
    text_BxD: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    impl: Form = "gather",
    positives: jax.Array | None = None,
    valid: jax.Array | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Every pair by itself: matching or not (Zhai et al. 2023, eq. 1 and algorithm 1).

    A row's loss is -sum_j log sigmoid(z_ij (scale x_i . y_j + bias)), with z = 1 for its own text and -1 for the
    others; the mean over rows is the paper's.

    Args:
        image_BxD: L2-normalised features of the global batch, fp32 or bf16; products are accumulated in fp32.
        text_BxD: the same for the texts; row i belongs to image i.
        scale: fp32 scalar that multiplies the cosines (the exponential of the learned parameter).
        bias: fp32 scalar, added to the scaled cosines.
        impl: `gather`: one all-gather of the text tower, one [b, B] block of logits per device. `ring`: the paper's
            chunked form, blocks of [b, b], one at a time, with the gradients made on the same trip around the ring:
            memory does not depend on the number of devices. `global`: plain [B, B] logits that the compiler
            partitions; the reference.
        positives: int32 [B], group of each row (any number but the least int32). Pairs within a group other than a
            row's own, such as another caption of the same image, are left out. None: no groups.
        valid: bool [B]; rows that are False (padding) neither count nor serve as negatives, and their features may
            hold anything. None: all rows are valid.
        mesh: where the batch lies; None: the mesh of `jax.set_mesh`. Without a mesh, or where its batch axes have one
            device, every form is the global one. Other mesh axes hold copies.

    Returns:
        (sum, count), fp32 scalars: the sum of the rows' losses and the number of valid rows.

    Raises:
        ValueError: an unknown form, shapes that don't fit, or a batch that doesn't divide over the mesh.
    """
    forms = PairLoss(_whole, _gathered, _ring)
    return sum_over_rows(
        forms, image_BxD, text_BxD, scale, bias, impl=impl, positives=positives, valid=valid, mesh=mesh
    )


def _whole(image_BxD: jax.Array, text_BxD: jax.Array, ids_B: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.sum(
        _own(own_logits(image_BxD, text_BxD, scale) + bias, ids_B)
        + _negatives(block_logits(image_BxD, text_BxD, scale) + bias, ids_B, ids_B)
    )


def _gathered(
    axes: tuple[str, ...],
    image_bxD: jax.Array,
    text_bxD: jax.Array,
    ids_b: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
) -> jax.Array:
    text_BxD = jax.lax.all_gather(text_bxD, axes, tiled=True)
    ids_B = jax.lax.all_gather(ids_b, axes, tiled=True)
    losses_b = _own(own_logits(image_bxD, text_bxD, scale) + bias, ids_b)
    losses_b += _negatives(block_logits(image_bxD, text_BxD, scale) + bias, ids_b, ids_B)
    return jax.lax.psum(jnp.sum(losses_b), axes)


def _own(own_b: jax.Array, ids_b: jax.Array) -> jax.Array:
    """[b]: -log sigmoid(own), as a softplus, which neither overflows nor loses small losses."""
    return jnp.where(is_valid(ids_b), jax.nn.softplus(-own_b), 0.0)


def _negatives(logits_bxc: jax.Array, ids_b: jax.Array, ids_c: jax.Array) -> jax.Array:
    """[b]: -log sigmoid(-logit), summed over the negatives of each row."""
    return jnp.sum(jnp.where(is_negative(ids_b, ids_c), jax.nn.softplus(logits_bxc), 0.0), axis=1)


# A pair's gradient depends on no other pair, so the trip that sums the loss can sum the gradients as well: half the
# hops of a backward pass of its own, nothing is recomputed, and two [b, D] are all that waits for the cotangent.
# The custom_vjp stands outside the shard_map for the reason given in `vlm_jax.losses.ring`.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(
    mesh: Mesh | AbstractMesh,
    axes: tuple[str, ...],
    image_BxD: jax.Array,
    text_BxD: jax.Array,
    ids_B: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
) -> jax.Array:
    return _forward(mesh, axes, image_BxD, text_BxD, ids_B, scale, bias)[0]


def _forward(mesh: Mesh | AbstractMesh, axes: tuple[str, ...], *inputs: jax.Array) -> tuple[jax.Array, Any]:
    batch = P(axes)

    def local(
        image_bxD: jax.Array, text_bxD: jax.Array, ids_b: jax.Array, scale: jax.Array, bias: jax.Array
    ) -> tuple[jax.Array, ...]:
        def visit(home: Any, passing: Any) -> tuple[Any, Any]:
            losses_b, d_logits_b, d_image_bxD = home
            text, ids, d_text = passing
            logits_bxb = block_logits(image_bxD, text, scale) + bias
            d_logits_bxb = jnp.where(is_negative(ids_b, ids), jax.nn.sigmoid(logits_bxb), 0.0)
            home = (
                losses_b + _negatives(logits_bxb, ids_b, ids),
                d_logits_b + jnp.sum(d_logits_bxb, axis=1),
                d_image_bxD + matmul(d_logits_bxb, text),
            )
            return home, (text, ids, d_text + matmul(d_logits_bxb.T, image_bxD))

        own_b = own_logits(image_bxD, text_bxD, scale) + bias
        d_own_b = -jnp.where(is_valid(ids_b), jax.nn.sigmoid(-own_b), 0.0)
        d_image_bxD, d_text_bxD = (d_own_b[:, None] * x.astype(jnp.float32) for x in (text_bxD, image_bxD))
        home, passing = (_own(own_b, ids_b), d_own_b, d_image_bxD), (text_bxD, ids_b, d_text_bxD)
        (losses_b, d_logits_b, d_image_bxD), (_, _, d_text_bxD) = circulate(visit, home, passing, axes)
        sums = (jnp.sum(losses_b), jnp.sum(d_image_bxD * image_bxD), jnp.sum(d_logits_b))
        loss, d_scale, d_bias = jax.lax.psum(sums, axes)
        return loss, scale * d_image_bxD, scale * d_text_bxD, d_scale, d_bias

    in_specs, out_specs = (batch, batch, batch, P(), P()), (P(), batch, batch, P(), P())
    loss, *gradients = ring_map(local, mesh, in_specs, out_specs)(*inputs)
    # Empty arrays tell the backward pass the features' dtypes.
    return loss, (gradients, [jnp.zeros((0,), x.dtype) for x in inputs[:2]])


def _backward(
    mesh: Mesh | AbstractMesh, axes: tuple[str, ...], residuals: Any, cotangent: jax.Array
) -> tuple[Any, ...]:
    (d_image_BxD, d_text_BxD, d_scale, d_bias), (image, text) = residuals
    d_image_BxD, d_text_BxD = (
        (cotangent * gradient).astype(like.dtype) for gradient, like in ((d_image_BxD, image), (d_text_BxD, text))
    )
    return d_image_BxD, d_text_BxD, None, cotangent * d_scale, cotangent * d_bias


_ring.defvjp(_forward, _backward)

__all__ = ["Form", "sigmoid_loss"]
