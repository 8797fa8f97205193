"""The two terms of a discrete autoencoder's evidence bound (Ramesh et al. 2021, section 2.1 and appendix A.3)."""

import math

import jax
import jax.numpy as jnp


def logit_laplace(decoded_BxHxWx6: jax.Array, pixels_BxHxWx3: jax.Array) -> jax.Array:
    """-log p(pixels) in nats, summed over each image, [B] fp32.

    The logit of a pixel has a Laplace distribution, so that all of its mass lies where pixels can be.

    Args:
        decoded_BxHxWx6: three locations and three logarithms of scales for each pixel.
        pixels_BxHxWx3: in (0, 1).
    """
    location, log_scale = jnp.split(decoded_BxHxWx6.astype(jnp.float32), 2, axis=-1)
    pixels = pixels_BxHxWx3.astype(jnp.float32)
    distance = jnp.abs(jnp.log(pixels) - jnp.log1p(-pixels) - location)
    density = jnp.log(2 * pixels * (1 - pixels))
    return (distance * jnp.exp(-log_scale) + log_scale + density).sum(axis=(1, 2, 3))


def divergence_from_uniform(logits_BxRxCxV: jax.Array) -> jax.Array:
    """KL(q || uniform) of the distribution over codes at each place, in nats, summed over the places, [B] fp32."""
    log_q = jax.nn.log_softmax(logits_BxRxCxV.astype(jnp.float32))
    return (jnp.exp(log_q) * (log_q + math.log(logits_BxRxCxV.shape[-1]))).sum(axis=(1, 2, 3))


def gumbel_softmax(logits_BxRxCxV: jax.Array, temperature: jax.Array, keys: jax.Array) -> jax.Array:
    """A relaxed sample of codes (Jang et al. 2017): the same shape, fp32, non-negative, of sum 1 at each place.

    Args:
        logits_BxRxCxV: of the codes.
        temperature: the lower, the nearer to one code.
        keys: [B] typed keys, one a row.
    """
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits_BxRxCxV.shape[1:]))(keys)
    return jax.nn.softmax((logits_BxRxCxV.astype(jnp.float32) + noise) / temperature)


__all__ = ["divergence_from_uniform", "gumbel_softmax", "logit_laplace"]
