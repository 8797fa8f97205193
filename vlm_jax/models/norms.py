"""Normalisation layers. Statistics and affine part are fp32 whatever the compute dtype; the result is cast back."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import ones, zeros

from vlm_jax.models.weights import weight

NormName = Literal["layer", "rms", "rms_offset"]


class LayerNorm(nn.Module):
    """Ba et al. 2016, over the last axis.

    The two-pass variance is deliberate: the one-pass form E[x^2] - E[x]^2 cancels when the mean is large against the
    spread, as it is in the residual stream of deep towers.

    Attributes:
        eps: added to the variance (CLIP 1e-5; SigLIP, MAE, DINOv2 1e-6).
    """

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D], in x's dtype."""
        width = x.shape[-1]
        scale = weight(self, "scale", ones, (None,), (width,))
        bias = weight(self, "bias", zeros, (None,), (width,))
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.eps)
        scale, bias = jnp.broadcast_to(scale, x.shape), jnp.broadcast_to(bias, x.shape)
        return (normed * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """Zhang & Sennrich 2019, over the last axis: no mean is subtracted, and there is no bias.

    Attributes:
        eps: added to the mean square.
    """

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D], in x's dtype."""
        return _rms_normed(x, weight(self, "scale", ones, (None,), (x.shape[-1],)), self.eps)


class OffsetRMSNorm(nn.Module):
    """RMS norm whose stored scale is what is added to 1 (Gemma), so that it starts at 0 and decay pulls it to 1.

    Attributes:
        eps: added to the mean square.
    """

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D], in x's dtype."""
        return _rms_normed(x, 1.0 + weight(self, "scale", zeros, (None,), (x.shape[-1],)), self.eps)


def _rms_normed(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(axis=-1, keepdims=True) + eps)
    return (normed * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


NORMS: dict[str, type[LayerNorm] | type[RMSNorm] | type[OffsetRMSNorm]] = {
    "layer": LayerNorm,
    "rms": RMSNorm,
    "rms_offset": OffsetRMSNorm,
}
