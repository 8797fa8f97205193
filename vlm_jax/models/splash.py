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
_NOT_SEEN = -1  # number of keys that no token of a text has


def splash_attention(
    q_BxTxHxD: jax.Array,
    k_BxSxKxD: jax.Array,
    v_BxSxKxD: jax.Array,
    *,
    key_mask_BxS: jax.Array | None,
    segments_BxT: jax.Array | None = None,
    causal: bool,
    interpret: bool,
) -> jax.Array:
    """softmax(q k^T / sqrt D) v without the [T, S] matrix in memory (Dao et al. 2022, as a TPU kernel).

    Args:
        q_BxTxHxD: queries.
        k_BxSxKxD: keys; K divides H.
        v_BxSxKxD: values.
        key_mask_BxS: bool, True where a key may be attended to; None for all.
        segments_BxT: int32 >= 0, tokens of other numbers are not seen, with S = T; None: all are of one.
        causal: whether query t sees keys 0..t only.
        interpret: run the kernel in the Pallas interpreter (any platform, slow).

    Returns:
        [B, T, H, D] in the dtype of the queries.
    """
    batch, queries = q_BxTxHxD.shape[:2]
    q_ids_BxT = jnp.zeros((batch, queries), jnp.int32) if segments_BxT is None else segments_BxT.astype(jnp.int32)
    k_ids_BxS = jnp.zeros(k_BxSxKxD.shape[:2], jnp.int32) if segments_BxT is None else q_ids_BxT
    if key_mask_BxS is not None:
        k_ids_BxS = jnp.where(key_mask_BxS, k_ids_BxS, _NOT_SEEN)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, q_ids: jax.Array, k_ids: jax.Array) -> jax.Array:
        return _local(q, k, v, q_ids, k_ids, causal, interpret)

    arrays = (q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, q_ids_BxT, k_ids_BxS)
    specs = _specs(batch, k_BxSxKxD.shape[2])
    if specs is None:
        return local(*arrays)
    # The partitioner can't split a Mosaic kernel: each device must be handed its own rows and heads.
    rows, heads = specs
    block, ids = P(rows, None, heads, None), P(rows, None)
    mapped = jax.shard_map(local, in_specs=(block, block, block, ids, ids), out_specs=block, check_vma=False)
    return mapped(*arrays)


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


def _local(
    q: jax.Array, k: jax.Array, v: jax.Array, q_ids: jax.Array, k_ids: jax.Array, causal: bool, interpret: bool
) -> jax.Array:
    queries, keys, heads, depth = q.shape[1], k.shape[1], q.shape[2], q.shape[3]
    padded_q, padded_k = (-(-n // LANES) * LANES for n in (queries, keys))
    q, k, v = _pad(q * depth**-0.5, padded_q), _pad(k, padded_k), _pad(v, padded_k)  # the kernel does not scale
    # What fills queries up must see something: what fills keys up, or where that may be nothing the tokens of number 0.
    filler = _NOT_SEEN if queries == keys else 0
    segments = splash.SegmentIds(q=_pad(q_ids, padded_q, filler), kv=_pad(k_ids, padded_k, _NOT_SEEN))
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


def _pad(x: jax.Array, length: int, value: int = 0) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=value)


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
