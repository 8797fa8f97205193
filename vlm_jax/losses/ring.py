"""A ring over the shards of a batch: every block of one tower visits every block of the other.

For losses over all pairs of a batch whose B x B matrix of logits doesn't fit: a device holds one b x b block at a time.
`circulate` knows nothing of the loss; `info_nce_ring` is the softmax one, the sigmoid one is in
`vlm_jax.losses.sigmoid`. Not for many chips with a small block each, where n dependent hops cost more than one
all-gather: that is the gather form of both losses.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from vlm_jax.losses.pairs import MASKED, block_logits, is_negative, is_valid, matmul, own_logits

Home = TypeVar("Home")
Travelling = TypeVar("Travelling")


def circulate(
    visit: Callable[[Home, Travelling], tuple[Home, Travelling]],
    home: Home,
    travelling: Travelling,
    axes: tuple[str, ...],
) -> tuple[Home, Travelling]:
    """Sends a block once around all devices; to be called inside a `shard_map` over `axes`.

    Args:
        visit: called once per hop with what stays and what is passing; returns both, updated.
        home: a tree that stays on its device, e.g. running sums of the rows.
        travelling: a tree that moves to the next device after each visit, e.g. a text block and its column sums.
        axes: the mesh axes that form the ring, in the order in which they shard the batch.

    Returns:
        `home` after n visits, and `travelling` back where it started, having been everywhere.
    """
    size = jax.lax.axis_size(axes)
    successors = [(device, (device + 1) % size) for device in range(size)]

    def hop(carry: tuple[Home, Travelling], _: None) -> tuple[tuple[Home, Travelling], None]:
        home, travelling = visit(*carry)
        return (home, jax.tree.map(lambda x: jax.lax.ppermute(x, axes, successors), travelling)), None

    (home, travelling), _ = jax.lax.scan(hop, (home, travelling), length=size)
    return home, travelling


def ring_map(function: Callable[..., Any], mesh: Mesh | AbstractMesh, in_specs: Any, out_specs: Any) -> Any:
    """A `shard_map` for a function that circulates and that nothing is differentiated through.

    So the replication check has nothing to protect, and it would demand casts of every scan carry.
    """
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


# The custom_vjp stands outside the shard_maps: inside one, a replicated scalar output hands the backward pass a
# cotangent that is already divided by the number of devices, and the features' gradients come out that much too small.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def info_nce_ring(
    mesh: Mesh | AbstractMesh,
    axes: tuple[str, ...],
    image_BxD: jax.Array,
    text_BxD: jax.Array,
    ids_B: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    """The sum over the batch of the symmetric InfoNCE loss, with O(b^2) memory per device.

    Args:
        mesh: the mesh that the batch lies on.
        axes: its axes that shard the batch.
        image_BxD: L2-normalised features, fp32 or bf16, B divisible by the number of devices on `axes`.
        text_BxD: the same for the texts.
        ids_B: int32 ids as `vlm_jax.losses.pairs.pair_ids` makes them.
        scale: fp32 scalar.

    Returns:
        An fp32 scalar.
    """
    return _forward(mesh, axes, image_BxD, text_BxD, ids_B, scale)[0]


def _forward(mesh: Mesh | AbstractMesh, axes: tuple[str, ...], *inputs: jax.Array) -> tuple[jax.Array, Any]:
    batch = P(axes)

    def local(image_bxD: jax.Array, text_bxD: jax.Array, ids_b: jax.Array, scale: jax.Array) -> tuple[Any, ...]:
        def visit(rows: Any, passing: Any) -> tuple[Any, Any]:
            text, ids, columns = passing
            negative_bxb = is_negative(ids_b, ids)
            logits_bxb = jnp.where(negative_bxb, block_logits(image_bxD, text, scale), MASKED)
            return _extend(rows, logits_bxb, axis=1), (text, ids, _extend(columns, logits_bxb, axis=0))

        empty = (jnp.full(ids_b.shape, MASKED), jnp.zeros(ids_b.shape, jnp.float32))
        rows, (_, _, columns) = circulate(visit, empty, (text_bxD, ids_b, empty), axes)
        row_lse_b, column_lse_b = (maximum + jnp.log(total) for maximum, total in (rows, columns))
        own_b = own_logits(image_bxD, text_bxD, scale)
        losses_b = jax.nn.softplus(row_lse_b - own_b) + jax.nn.softplus(column_lse_b - own_b)
        loss = 0.5 * jax.lax.psum(jnp.sum(jnp.where(is_valid(ids_b), losses_b, 0.0)), axes)
        return loss, row_lse_b, column_lse_b, own_b

    loss, *statistics = ring_map(local, mesh, (batch, batch, batch, P()), (P(), batch, batch, batch))(*inputs)
    return loss, (*inputs, *statistics)


def _extend(running: tuple[jax.Array, jax.Array], logits_bxb: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """A running (maximum, sum of exp(logit - maximum)) after one more block."""
    old_maximum, old_total = running
    maximum = jnp.maximum(old_maximum, jnp.max(logits_bxb, axis=axis))
    total = jnp.sum(jnp.exp(logits_bxb - jnp.expand_dims(maximum, axis)), axis=axis)
    return maximum, old_total * jnp.exp(old_maximum - maximum) + total


def _backward(
    mesh: Mesh | AbstractMesh, axes: tuple[str, ...], residuals: Any, cotangent: jax.Array
) -> tuple[Any, ...]:
    batch = P(axes)

    def local(image_bxD, text_bxD, ids_b, scale, row_lse_b, column_lse_b, own_b, cotangent):
        weight_b = 0.5 * cotangent * is_valid(ids_b)
        row_weight_b = weight_b * jax.nn.sigmoid(row_lse_b - own_b)
        column_weight_b = weight_b * jax.nn.sigmoid(column_lse_b - own_b)

        def visit(d_image_bxD: jax.Array, passing: Any) -> tuple[jax.Array, Any]:
            text, ids, column_lse, column_weight, d_text = passing
            logits_bxb = block_logits(image_bxD, text, scale)
            row_bxb = row_weight_b[:, None] * jnp.exp(logits_bxb - row_lse_b[:, None])
            column_bxb = column_weight[None, :] * jnp.exp(logits_bxb - column_lse[None, :])
            d_logits_bxb = jnp.where(is_negative(ids_b, ids), row_bxb + column_bxb, 0.0)
            d_image_bxD = d_image_bxD + matmul(d_logits_bxb, text)
            d_text = d_text + matmul(d_logits_bxb.T, image_bxD)
            return d_image_bxD, (text, ids, column_lse, column_weight, d_text)

        # The own pair's gradient is of opposite sign to the negatives' and starts the sums.
        d_own_bx1 = -(row_weight_b + column_weight_b)[:, None]
        passing = (text_bxD, ids_b, column_lse_b, column_weight_b, d_own_bx1 * image_bxD.astype(jnp.float32))
        d_image_bxD, passing = circulate(visit, d_own_bx1 * text_bxD.astype(jnp.float32), passing, axes)
        d_scale = jax.lax.psum(jnp.sum(d_image_bxD * image_bxD), axes)
        return (scale * d_image_bxD).astype(image_bxD.dtype), (scale * passing[-1]).astype(text_bxD.dtype), d_scale

    in_specs = (batch, batch, batch, P(), batch, batch, batch, P())
    d_image_BxD, d_text_BxD, d_scale = ring_map(local, mesh, in_specs, (batch, batch, P()))(*residuals, cotangent)
    return d_image_BxD, d_text_BxD, None, d_scale


info_nce_ring.defvjp(_forward, _backward)
