"""Where a loss over all pairs of a batch is computed: on one device, after one all-gather, or around a ring.

A loss brings the mathematics of its three forms (`PairLoss`); what they share stands here: checks of the arguments,
padding, and the mesh. Not for losses per example.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from vlm_jax.losses.pairs import is_valid, pair_ids
from vlm_jax.mesh import BATCH_AXES

Form = Literal["gather", "ring", "global"]


class PairLoss(NamedTuple):
    """A loss in its three forms; each returns the sum over the valid rows, an fp32 scalar.

    Attributes:
        whole: (image_BxD, text_BxD, ids_B, *scalars), global arrays.
        gathered: (axes, image_bxD, text_bxD, ids_b, *scalars), the blocks of one device inside a `shard_map` over
            `axes`; returns the sum over all devices.
        ring: (mesh, axes, image_BxD, text_BxD, ids_B, *scalars), global arrays; brings its own `shard_map`s.
    """

    whole: Callable[..., jax.Array]
    gathered: Callable[..., jax.Array]
    ring: Callable[..., Any]


def sum_over_rows(
    loss: PairLoss,
    image_BxD: jax.Array,
    text_BxD: jax.Array,
    *scalars: jax.Array,
    impl: Form,
    positives: jax.Array | None,
    valid: jax.Array | None,
    mesh: Mesh | AbstractMesh | None,
) -> tuple[jax.Array, jax.Array]:
    """A loss on the mesh that the batch lies on.

    Args:
        loss: the forms.
        image_BxD: features of the global batch, fp32 or bf16.
        text_BxD: the same for the texts; row i belongs to image i.
        *scalars: what the loss takes beside features and ids (scale, bias); cast to fp32.
        impl: which form; without a mesh, or where its batch axes have one device, every form is the global one.
        positives: int32 [B] group of each row, or None.
        valid: bool [B], False for padding, or None.
        mesh: where the batch lies; None: the mesh of `jax.set_mesh`. Other axes than the batch's hold copies.

    Returns:
        (sum, count), fp32 scalars.

    Raises:
        ValueError: an unknown form, shapes that don't fit, or a batch that doesn't divide over the mesh.
    """
    if impl not in get_args(Form):
        raise ValueError(f"impl = {impl!r} is no form of a loss over pairs; use 'gather', 'ring' or 'global'")
    if image_BxD.ndim != 2 or image_BxD.shape != text_BxD.shape:
        raise ValueError(
            f"image features {image_BxD.shape} and text features {text_BxD.shape} must both be [batch, width]; "
            "give one text per image"
        )
    ids_B = pair_ids(image_BxD.shape[0], positives, valid)
    if valid is not None:
        # A padded row may hold NaN (the normalised feature of nothing), which no mask of the logits would stop.
        image_BxD, text_BxD = (jnp.where(valid[:, None], x, 0) for x in (image_BxD, text_BxD))
    count = jnp.sum(is_valid(ids_B), dtype=jnp.float32)
    arrays = (image_BxD, text_BxD, ids_B, *(jnp.asarray(scalar, jnp.float32) for scalar in scalars))
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if impl == "global" or shards == 1:
        return loss.whole(*arrays), count
    if image_BxD.shape[0] % shards:
        raise ValueError(
            f"a batch of {image_BxD.shape[0]} doesn't divide over the {shards} devices of mesh axes {axes}; "
            f"use a multiple of {shards}, padding it with rows that are not valid"
        )
    if impl == "ring":
        return loss.ring(mesh, axes, *arrays), count

    def local(*blocks: jax.Array) -> jax.Array:
        return loss.gathered(axes, *blocks)

    in_specs = (P(axes), P(axes), P(axes), *(P() for _ in scalars))
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=P())(*arrays), count


__all__ = ["Form", "PairLoss", "sum_over_rows"]
