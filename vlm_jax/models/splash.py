"""Pallas splash attention for TPU, run on each device's share of batch and heads. Not for masks that vary by query
other than the causal one, nor for additive biases: those go to XLA.

On other platforms the kernel runs interpreted, which is for tests only.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from vlm_jax.mesh import BATCH_AXES

LANES = 128  # the kernel's blocks are multiples of a vector register's lanes
BLOCK = 512


def splash_attention(
    q_BxTxHxD: jax.Array,
    k_BxSxHxD: jax.Array,
    v_BxSxHxD: jax.Array,
    *,
    key_mask_BxS: jax.Array | None,
    causal: bool,
    interpret: bool,
) -> jax.Array:
    """softmax(q k^T / sqrt D) v without the [T, S] matrix in memory (Dao et al. 2022, as a TPU kernel).

    Args:
        q_BxTxHxD: queries.
        k_BxSxHxD: keys.
        v_BxSxHxD: values.
        key_mask_BxS: bool, True where a key may be attended to; None for all.
        causal: whether query t sees keys 0..t only.
        interpret: run the kernel in the Pallas interpreter (any platform, slow).

    Returns:
        [B, T, H, D] in the dtype of the queries.
    """
    batch, keys = k_BxSxHxD.shape[:2]
    if key_mask_BxS is None:
        key_mask_BxS = jnp.ones((batch, keys), bool)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array) -> jax.Array:
        return _local(q, k, v, key_mask, causal, interpret)

    specs = _specs(batch, q_BxTxHxD.shape[2])
    if specs is None:
        return local(q_BxTxHxD, k_BxSxHxD, v_BxSxHxD, key_mask_BxS)
    # The partitioner can't split a Mosaic kernel: each device must be handed its own rows and heads.
    rows, heads = specs
    block = P(rows, None, heads, None)
    mapped = jax.shard_map(local, in_specs=(block, block, block, P(rows, None)), out_specs=block, check_vma=False)
    return mapped(q_BxTxHxD, k_BxSxHxD, v_BxSxHxD, key_mask_BxS)


def _specs(batch: int, heads: int) -> tuple[tuple[str, ...], str | None] | None:
    """Mesh axes that batch and heads divide over, or None where nothing is left to the partitioner."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    free = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
    if not free:
        return None
    rows = tuple(name for name in BATCH_AXES if name in free)
    count = int(np.prod([mesh.shape[name] for name in rows], dtype=int))
    tensor = "tensor" if "tensor" in free and heads % mesh.shape["tensor"] == 0 else None
    return (rows if batch % count == 0 else ()), tensor


def _local(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array, causal: bool, interpret: bool) -> jax.Array:
    queries, keys, heads, depth = q.shape[1], k.shape[1], q.shape[2], q.shape[3]
    padded_q, padded_k = (-(-n // LANES) * LANES for n in (queries, keys))
    q, k, v = _pad(q * depth**-0.5, padded_q), _pad(k, padded_k), _pad(v, padded_k)  # the kernel does not scale
    segments = splash.SegmentIds(
        q=jnp.zeros((q.shape[0], padded_q), jnp.int32),
        kv=jnp.where(_pad(key_mask, padded_k), 0, 1).astype(jnp.int32),
    )
    shape = (padded_q, padded_k)
    one_head = splash_mask.CausalMask(shape) if causal else splash_mask.FullMask(shape)
    kernel = splash.make_splash_mha(
        mask=splash_mask.MultiHeadMask([one_head] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=_block_sizes(padded_q, padded_k),
        interpret=interpret,
    )
    out_BxHxTxD: Any = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q, k, v)), segments)
    return out_BxHxTxD.swapaxes(1, 2)[:, :queries].astype(q.dtype)


def _pad(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _block_sizes(queries: int, keys: int) -> splash.BlockSizes:
    """All eight sizes: the backward kernels refuse to guess theirs."""
    q, kv = (max(b for b in range(LANES, BLOCK + 1, LANES) if n % b == 0) for n in (queries, keys))
    return splash.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        block_q_dq=q,
        block_kv_dq=kv,
    )
