"""The pairs of a contrastive batch: their logits, and which of them are negatives.

Not a loss: `vlm_jax.losses.contrastive` and `vlm_jax.losses.sigmoid` are. What all of their forms share stands here, so
that they can't drift apart.
"""

import jax
import jax.numpy as jnp
import numpy as np

# A finite stand-in for -inf: a row without any negative then has the LSE -1e30, the loss 0 and the gradient 0, where
# -inf would give NaN.
MASKED = np.float32(-1e30)  # numpy: a jnp constant would start the backend on import
_PADDING = jnp.iinfo(jnp.int32).min


def pair_ids(batch: int, positives: jax.Array | None, valid: jax.Array | None) -> jax.Array:
    """One int32 id per row [B]: two valid rows are each other's negatives if and only if their ids differ.

    Args:
        batch: B.
        positives: int32 [B] group of each row, any number but the least int32; None: every row is its own group.
        valid: bool [B], False for padded rows; None: all valid.
    """
    ids_B = jnp.arange(batch, dtype=jnp.int32) if positives is None else positives.astype(jnp.int32)
    return ids_B if valid is None else jnp.where(valid, ids_B, _PADDING)


def is_valid(ids_B: jax.Array) -> jax.Array:
    """bool [B]: the rows that aren't padding."""
    return ids_B != _PADDING


def is_negative(image_ids_b: jax.Array, text_ids_c: jax.Array) -> jax.Array:
    """bool [b, c]: the pairs that belong into a denominator; a row's own pair never does."""
    image_ids_bx1, text_ids_1xc = image_ids_b[:, None], text_ids_c[None, :]
    return (image_ids_bx1 != text_ids_1xc) & is_valid(image_ids_bx1) & is_valid(text_ids_1xc)


def block_logits(image_bxD: jax.Array, text_cxD: jax.Array, scale: jax.Array) -> jax.Array:
    """fp32 [b, c]: scaled cosines of a block of images and a block of texts.

    fp32 features are multiplied in full fp32: one bf16 pass (the default on TPU) would be off by 0.4 at scale 100.
    """
    cosines = jnp.einsum(
        "bd,cd->bc", image_bxD, text_cxD, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return scale * cosines


def own_logits(image_bxD: jax.Array, text_bxD: jax.Array, scale: jax.Array) -> jax.Array:
    """fp32 [b]: scaled cosine of each row's own pair."""
    return scale * jnp.sum(image_bxD.astype(jnp.float32) * text_bxD.astype(jnp.float32), axis=-1)


def matmul(a_mxk: jax.Array, b_kxn: jax.Array) -> jax.Array:
    """fp32 [m, n]: a product in the precision of `block_logits`, for gradients written by hand."""
    return jnp.dot(a_mxk, b_kxn, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
