"""Attention by plain products, for XLA to fuse, with a gradient of its own that keeps little.

Differentiated as written, softmax keeps its fp32 result for the backward pass, and that pass holds three more matrices
of [T, S] in fp32. Here the weights are kept in the compute dtype, in which they were multiplied with the values anyway,
and the mean under the softmax's gradient comes from the output (Dao et al. 2022, algorithm 4), so that the gradient of
the logits is the epilogue of one product. On a ViT-L/14 of 128 images a chip this is 2 GiB.
"""

import functools

import jax
import jax.numpy as jnp

from vlm_jax.models.stochastic import dropout

# Finite, unlike -inf: a row with nothing to attend to gives the mean of the values rather than NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)

Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def softmax_attention(
    q_BxTxHxD: jax.Array,
    k_BxSxHxD: jax.Array,
    v_BxSxHxD: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    causal: bool,
) -> jax.Array:
    """softmax(q k^T / sqrt D + bias) v per head, logits and softmax in fp32; arguments as in `attention.attend`."""
    return _forward(q_BxTxHxD, k_BxSxHxD, v_BxSxHxD, bias, mask, causal)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, mask: jax.Array | None, causal: bool
) -> tuple[jax.Array, Saved]:
    scores_BxHxTxS = jnp.einsum("BTHD,BSHD->BHTS", q, k, preferred_element_type=jnp.float32)
    # Fused into the maximum and again into the sum, the product would be made twice, as it is for v6e.
    logits_BxHxTxS = jax.lax.optimization_barrier(scores_BxHxTxS) * q.shape[-1] ** -0.5
    if bias is not None:
        logits_BxHxTxS = logits_BxHxTxS + jnp.broadcast_to(bias.astype(jnp.float32), logits_BxHxTxS.shape)
    allowed = _allowed(mask, causal, logits_BxHxTxS.shape[-2:])
    if allowed is not None:
        logits_BxHxTxS = jnp.where(allowed, logits_BxHxTxS, MASKED)
    weights_BxHxTxS = jax.nn.softmax(logits_BxHxTxS, axis=-1).astype(v.dtype)
    out_BxTxHxD = jnp.einsum("BHTS,BSHD->BTHD", weights_BxHxTxS, v)
    return out_BxTxHxD, (q, k, v, weights_BxHxTxS, out_BxTxHxD, bias, mask)


def _backward(
    causal: bool, saved: Saved, d_out_BxTxHxD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, None]:
    q, k, v, weights_BxHxTxS, out_BxTxHxD, bias, mask = saved
    products = d_out_BxTxHxD.astype(jnp.float32) * out_BxTxHxD.astype(jnp.float32)
    mean_BxHxTx1 = products.sum(axis=-1).swapaxes(1, 2)[..., None]
    d_weights = jnp.einsum("BTHD,BSHD->BHTS", d_out_BxTxHxD, v, preferred_element_type=jnp.float32)
    d_logits = weights_BxHxTxS.astype(jnp.float32) * (d_weights - mean_BxHxTx1)
    allowed = _allowed(mask, causal, d_logits.shape[-2:])
    if allowed is not None:
        # The weights are zero there already, but not in a row in which nothing is allowed.
        d_logits = jnp.where(allowed, d_logits, 0.0)
    d_bias = None if bias is None else _summed_to(d_logits, bias)
    d_scaled = d_logits.astype(q.dtype)
    scale = q.shape[-1] ** -0.5
    d_q = jnp.einsum("BHTS,BSHD->BTHD", d_scaled, k) * scale
    d_k = jnp.einsum("BHTS,BTHD->BSHD", d_scaled, q) * scale
    d_v = jnp.einsum("BHTS,BTHD->BSHD", weights_BxHxTxS, d_out_BxTxHxD)
    return d_q, d_k, d_v, d_bias, None


def _allowed(mask: jax.Array | None, causal: bool, shape: tuple[int, ...]) -> jax.Array | None:
    """Where attention is allowed, broadcastable to [B, H, T, S]; None for everywhere."""
    if not causal:
        return mask
    triangle = jnp.tril(jnp.ones(shape, bool))[None, None]
    return triangle if mask is None else mask & triangle


def _summed_to(gradient: jax.Array, like: jax.Array) -> jax.Array:
    """The gradient of what was broadcast to this shape."""
    axes = tuple(axis for axis, size in enumerate(like.shape) if size == 1 and gradient.shape[axis] > 1)
    return gradient.sum(axis=axes, keepdims=True).astype(like.dtype)


softmax_attention.defvjp(_forward, _backward)


def dropped_attention(
    q_BxTxHxD: jax.Array,
    k_BxSxHxD: jax.Array,
    v_BxSxHxD: jax.Array,
    mask: jax.Array | None,
    causal: bool,
    rate: float,
    keys: jax.Array,
) -> jax.Array:
    """As `softmax_attention` without a bias, with dropout on its weights (BERT); for short sequences.

    Differentiated as it is written: the dropped weights have to be kept anyway.

    Args:
        q_BxTxHxD: queries.
        k_BxSxHxD: keys of the attention.
        v_BxSxHxD: values.
        mask: as in `attention.attend`.
        causal: the same.
        rate: probability of a weight to be dropped.
        keys: [B] typed PRNG keys, one a row.
    """
    weights = attention_weights(q_BxTxHxD, k_BxSxHxD, mask, causal).astype(v_BxSxHxD.dtype)
    return jnp.einsum("BHTS,BSHD->BTHD", dropout(weights, rate, keys), v_BxSxHxD)


def attention_weights(
    q_BxTxHxD: jax.Array, k_BxSxHxD: jax.Array, mask: jax.Array | None = None, causal: bool = False
) -> jax.Array:
    """softmax(q k^T / sqrt D), fp32 [B, H, T, S]; arguments as in `attention.attend`. Differentiated as written."""
    logits = jnp.einsum("BTHD,BSHD->BHTS", q_BxTxHxD, k_BxSxHxD, preferred_element_type=jnp.float32)
    logits = logits * q_BxTxHxD.shape[-1] ** -0.5
    allowed = _allowed(mask, causal, logits.shape[-2:])
    return jax.nn.softmax(logits if allowed is None else jnp.where(allowed, logits, MASKED), axis=-1)


__all__ = ["MASKED", "attention_weights", "dropped_attention", "softmax_attention"]
